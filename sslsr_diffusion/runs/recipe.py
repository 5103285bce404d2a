"""The schema of a recipe, assembled from the parts' dicts, and the building of a run from it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from sslsr_diffusion.config import Settings, apply_overrides, find_recipe, parse, read_raw
from sslsr_diffusion.data import DataSettings
from sslsr_diffusion.hub import has_id_shape
from sslsr_diffusion.losses import LossSettings
from sslsr_diffusion.models.stablesr.settings import CALL_DEFAULTS, ModelSettings
from sslsr_diffusion.training.settings import CheckpointSettings, OutputSettings, TrainingSettings, ValidationSettings

__all__ = ["Recipe", "load_recipe", "resolved"]

LOSSES_OF_STAGE = {
    "diffusion": ("diffusion", "pixel_l1", "self_similarity", "lpips", "patch_gan"),
    "base": ("diffusion",),
    "autoencoder": ("pixel_l1", "self_similarity", "latent_kl", "lpips"),
    "cfw": ("pixel_l1", "self_similarity", "lpips", "patch_gan"),
    "decoder": ("pixel_l1", "self_similarity", "lpips", "patch_gan"),
}


class Recipe(Settings):
    """One training run, completely."""

    stage: Literal["diffusion", "base", "autoencoder", "cfw", "decoder"] = Field(
        "diffusion",
        description="diffusion: the upscaler; base: a latent-diffusion model that sees no low-resolution picture, the start of stage "
        "diffusion; autoencoder: a VAE from scratch; cfw: the decoder's fusion layers (StableSR stage 2); decoder: all of a plain decoder, "
        "on the latents that a finished upscaler predicts.",
    )
    seed: int = Field(42, ge=0, lt=2**63, description="Everything random follows from it and the global sample index.")
    scale: int = Field(4, ge=1, le=8, description="Enlargement: HR side / LR side.")
    model: ModelSettings = Field(ModelSettings(), description="Networks and which part of them trains.")
    data: DataSettings = Field(description="Training pictures, degradation, edge mask, held-out pictures.")
    losses: list[LossSettings] = Field(min_length=1, description="Terms of the objective; each kind at most once.")
    training: TrainingSettings = Field(TrainingSettings(), description="Length, batch, numerics, optimizer.")
    validation: ValidationSettings = Field(ValidationSettings(), description="Looking at held-out pictures.")
    checkpoints: CheckpointSettings = Field(CheckpointSettings(), description="Saving what a stopped run goes on from.")
    output: OutputSettings = Field(OutputSettings(), description="Run folder, trackers, publication.")

    @property
    def makes_upscaler(self) -> bool:
        """Whether the result restores low-resolution pictures; stages autoencoder and base make parts for later ones."""
        return self.stage not in ("autoencoder", "base")

    @model_validator(mode="after")
    def _possible(self) -> Recipe:
        mistakes = [*self._losses_fit(), *self._sizes_fit(), *self._stage_fits()]
        if self.validation.limit and self.validation.best not in self.validation.metrics:
            mistakes.append(
                f"validation.best: {self.validation.best!r} is not measured; expected one of validation.metrics: "
                f"{', '.join(self.validation.metrics)}."
            )
        if self.output.push_to_hub and not self.output.hub_id:
            mistakes.append("output.hub_id: push_to_hub needs to know where; give it as user/name.")
        if self.output.hub_id and not has_id_shape(self.output.hub_id):
            mistakes.append(f"output.hub_id: expected user/name of letters, digits, dots, dashes and _; got {self.output.hub_id!r}.")
        if self.output.push_state and not self.output.push_to_hub:
            mistakes.append("output.push_state: has no effect without output.push_to_hub: true; set both or none.")
        if mistakes:
            raise ValueError("\n".join(mistakes))
        return self

    def _losses_fit(self) -> list[str]:
        kinds = [loss.kind for loss in self.losses]
        allowed = LOSSES_OF_STAGE[self.stage]
        mistakes = [
            f"losses: {kind} stands there twice; each kind at most once." for kind in sorted({k for k in kinds if kinds.count(k) > 1})
        ]
        mistakes += [
            f"losses.{i}.kind: {kind} is impossible in stage {self.stage}; possible are {', '.join(allowed)}."
            for i, kind in enumerate(kinds)
            if kind not in allowed
        ]
        side = self.training.crop_size if self.training.decode_crop is None else min(self.training.crop_size, self.training.decode_crop * 4)
        for i, loss in enumerate(self.losses):
            if loss.kind == "self_similarity":
                if side <= loss.search_size // 2:
                    mistakes.append(f"losses.{i}.search_size: {loss.search_size} is too large for pictures of {side} pixels a side.")
                if loss.weight == "auto" and len(kinds) == 1:
                    mistakes.append(f"losses.{i}.weight: auto compares with the other losses, and there is none; give a number.")
            if loss.kind == "patch_gan" and side < 3 * 2**loss.layers:
                mistakes.append(f"losses.{i}.layers: {loss.layers} are too many for pictures of {side} pixels a side.")
        if kinds == ["lpips"] and self.losses[0].kind == "lpips" and self.losses[0].optional:
            mistakes.append(
                "losses.0.optional: lpips is the only loss, so the run cannot go without it; add another or set optional: false."
            )
        return mistakes

    def _sizes_fit(self) -> list[str]:
        sizes = [("training.crop_size", self.training.crop_size)]
        sizes += [("validation.size", self.validation.size)] if self.validation.limit else []
        return [f"{key}: {size} is not a multiple of scale {self.scale}." for key, size in sizes if size % self.scale]

    def _stage_fits(self) -> list[str]:
        mistakes = []
        stored = [i for i, source in enumerate(self.data.sources) if source.kind == "cfw"]
        if stored and self.stage not in ("cfw", "decoder"):
            mistakes.append(
                f"data.sources.{stored[0]}.kind: cfw is for stages cfw and decoder only, here the stage is {self.stage}; use pairs."
            )
        elif stored and len(stored) < len(self.data.sources):
            mistakes.append("data.sources: kind cfw cannot be mixed with other kinds; make all samples with `sslsr prepare cfw`, or none.")
        if self.training.start_timestep is not None and (self.stage != "diffusion" or self.training.sampler_steps != 1):
            mistakes.append(
                "training.start_timestep: is for one-step models, stage diffusion with training.sampler_steps: 1; "
                f"here the stage is {self.stage} and sampler_steps {self.training.sampler_steps}."
            )
        if self.training.start_timestep is not None and self.validation.steps != 1:
            mistakes.append(
                f"validation.steps: expected 1 for a one-step model (it is what its pipeline will take, too), got {self.validation.steps}."
            )
        if self.model.latents != "sample" and self.stage != "autoencoder":
            mistakes.append(f"model.latents: is for stage autoencoder only, here the stage is {self.stage}; remove it.")
        if self.stage == "diffusion":
            return mistakes
        if self.training.decode_crop is not None:
            mistakes.append(f"training.decode_crop: is for stage diffusion only, here the stage is {self.stage}; remove it.")
        if self.training.sampler_steps is not None:
            mistakes.append(f"training.sampler_steps: is for stage diffusion only, here the stage is {self.stage}; remove it.")
        for key in CALL_DEFAULTS:
            if not self.makes_upscaler and getattr(self.validation, key) not in (None, CALL_DEFAULTS[key]):
                mistakes.append(f"validation.{key}: is a default of upscalers, and stage {self.stage} makes none; remove it.")
        if not self.makes_upscaler and self.output.push_to_hub:
            mistakes.append(f"output.push_to_hub: stage {self.stage} makes no upscaler; publish the run that builds on it.")
        return mistakes


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe by path or shipped name, lay `--set` overrides over it, validate.

    Raises:
        RecipeError: with one line per mistake.
    """
    return parse(Recipe, apply_overrides(read_raw(find_recipe(name)), overrides))


def resolved(recipe: Recipe) -> dict[str, Any]:
    """Plain YAML-able data with every default filled in; `load_recipe` of it gives the same recipe."""
    return recipe.model_dump(mode="json")


def run_folder(recipe: Recipe) -> Path:
    return Path(recipe.output.dir).expanduser()
