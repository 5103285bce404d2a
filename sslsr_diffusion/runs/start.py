"""From a recipe to a `Job`: parts are built here and meet as objects and callables. One function per stage."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sslsr_diffusion.config import parse
from sslsr_diffusion.data import open_training_data, open_validation_pairs
from sslsr_diffusion.errors import MissingDependency, UserError
from sslsr_diffusion.evaluation.metrics import METRICS
from sslsr_diffusion.evaluation.perceptual import load_perceptual_distance
from sslsr_diffusion.files import atomic_folder
from sslsr_diffusion.inference.live import Upscaler, halve, sample_latents, save_pipeline
from sslsr_diffusion.inference.reconstruction import Reconstruct
from sslsr_diffusion.inference.sampling import spaced_timesteps
from sslsr_diffusion.losses import build_losses
from sslsr_diffusion.models import Networks, build_autoencoder, build_networks
from sslsr_diffusion.runs.recipe import Recipe, resolved
from sslsr_diffusion.seeding import derive_seed
from sslsr_diffusion.tasks.objective import AutoencoderObjective, DecoderObjective, DiffusionObjective, Objective
from sslsr_diffusion.training.checkpoints import read_checkpoint
from sslsr_diffusion.training.job import Job, Publisher
from sslsr_diffusion.training.state import load_trained, trained_parameters
from sslsr_diffusion.training.validation import Pair, Validation

logger = logging.getLogger(__name__)

CALIBRATION_PICTURES = 32  # crops from which a fresh autoencoder's scaling factor is measured


def build(recipe: Recipe, *, publisher: Publisher | None = None) -> Job:
    """Networks, data, losses and callables of a recipe, ready for `fit`.

    Raises:
        UserError: a part cannot be built (the message says which key and why).
    """
    return STAGES[recipe.stage](recipe, publisher)


def export_checkpoint(folder: Path, output: Path, *, averaged: bool = True, half: bool = False) -> int:
    """Write the pipeline of a checkpoint: networks from its recipe and base, trained tensors from it; returns its step.

    Args:
        averaged: the moving average of the trained tensors, where the run kept one.
        half: float16 files, half the size; loading converts to whatever precision is asked for.

    Raises:
        UserError: the checkpoint is damaged, or belongs to a model that can no longer be built.
    """
    tensors, state = read_checkpoint(folder)
    recipe = parse(Recipe, state["recipe"])
    base = state.get("base") or {}
    if base.get("revision"):  # the very commit that was fine-tuned
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"revision": base["revision"]})})
    job = build(recipe.model_copy(update={"losses": [], "validation": recipe.validation.model_copy(update={"limit": 0})}))
    weights = tensors.get("ema", tensors["trained"]) if averaged else tensors["trained"]
    load_trained(trained_parameters(job.objective.module), weights, what=str(folder))
    job.objective.module.eval()

    def save(folder: Path) -> None:
        job.save_pipeline(folder)
        if half:
            halve(folder)

    with atomic_folder(output) as new:
        save(new)
    return int(state["progress"]["step"])


def _diffusion(recipe: Recipe, publisher: Publisher | None) -> Job:
    networks = build_networks(recipe.model, seed=recipe.seed)
    check_crop(recipe, networks)
    _economize(recipe, networks.denoiser, networks.codec.vae)
    start = recipe.training.start_timestep
    if start is not None:
        networks = networks.until(start)
    elif networks.schedule.starts_from_lr:
        last = networks.schedule.num_train_timesteps - 1
        raise UserError(
            f"model.base: {networks.base} starts its one step at timestep {last}, from the low-resolution picture; to train it on, set "
            f"training.sampler_steps: 1, training.start_timestep: {last} and validation.steps: 1."
        )
    objective = DiffusionObjective(
        networks,
        seed=recipe.seed,
        decode_crop=recipe.training.decode_crop,
        timesteps=_timesteps(recipe, networks),
        from_lr=start is not None,
    )
    return _upscaler(recipe, objective, publisher)


def _timesteps(recipe: Recipe, networks: Any) -> list[int] | None:
    """The noise levels that a few-step sampler starts its steps from; not 0, where next to no noise is left to be learned from."""
    if recipe.training.sampler_steps is None:
        return None
    return [t for t in spaced_timesteps(recipe.training.sampler_steps, networks.schedule.num_train_timesteps) if t > 0]


def _base(recipe: Recipe, publisher: Publisher | None) -> Job:
    networks = build_networks(recipe.model, plain=True, seed=recipe.seed)
    check_crop(recipe, networks)
    _economize(recipe, networks.denoiser, networks.codec.vae)
    objective = DiffusionObjective(networks, seed=recipe.seed, conditional=False)

    def denoise(lr: Tensor, hr: Tensor, seed: int) -> Tensor:
        """The held-out picture, noised to the middle of the schedule and sampled back: a base knows no low-resolution picture."""
        nets, unit = objective.networks, crop_unit(objective.networks)
        hr = hr.to(nets.text.device)
        height, width = hr.shape[-2:]
        padded = F.pad(hr, (0, -width % unit, 0, -height % unit), mode="replicate")
        noise = torch.randn(nets.codec.noise_shape(padded), generator=torch.Generator().manual_seed(seed)).to(hr)
        latents = nets.codec.encode(padded, noise)
        sampled = sample_latents(nets, latents, [seed], recipe.validation.steps, seed=seed, strength=0.5, conditional=False)
        return nets.codec.decode(sampled)[..., :height, :width]

    return _job(
        recipe,
        objective,
        prediction_type=networks.schedule.prediction_type,
        restore=denoise,
        save_pipeline=lambda folder: objective.networks.save_parts(folder),
        base={"id": networks.base, "revision": networks.revision},
        label="denoised",
        publisher=None,
    )


def _autoencoder(recipe: Recipe, publisher: Publisher | None) -> Job:
    codec = build_autoencoder(recipe.model, seed=recipe.seed)
    if recipe.model.latents == "mean" and codec.vae.quant_conv is None:
        raise UserError("model.latents: mean needs an autoencoder with quant_conv (use_quant_conv: true); take sample.")
    check_crop_unit(recipe, codec.scale)
    _economize(recipe, codec.vae)
    objective = AutoencoderObjective(codec, seed=recipe.seed)
    reconstruct = Reconstruct(codec)

    def save_vae(folder: Path) -> None:
        saved = codec.without_variance() if recipe.model.latents == "mean" else codec
        saved.calibrate(_calibration_pixels(recipe).to(next(saved.vae.parameters()).device))
        saved.vae.save_pretrained(folder / "vae", safe_serialization=True)

    return _job(
        recipe,
        objective,
        restore=lambda lr, hr, seed: reconstruct(hr, seed),
        save_pipeline=save_vae,
        label="reconstruction",
        publisher=None,
    )


def _cfw(recipe: Recipe, publisher: Publisher | None) -> Job:
    from sslsr_diffusion.models import AutoencoderKLCFW, Codec

    networks = build_networks(recipe.model, seed=recipe.seed)
    vae = networks.codec.vae
    if not isinstance(vae, AutoencoderKLCFW):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(recipe.seed, "cfw"))
            vae = AutoencoderKLCFW.from_autoencoder(vae)
    return _decoder(recipe, publisher, replace(networks, codec=Codec(vae)))


def _decoder(recipe: Recipe, publisher: Publisher | None, fused: Networks | None = None) -> Job:
    """The decoder on the frozen upscaler's latents: a plain one whole, of `fused` networks the fusion layers."""
    networks = fused or build_networks(recipe.model, seed=recipe.seed)
    if fused is None and networks.codec.has_fidelity:
        raise UserError(f"model.base: the decoder of {networks.base} is fused with the encoder (CFW); use stage cfw to train it on.")
    if networks.source is not None and not networks.source.has("structural_encoder"):
        raise UserError(f"model.base: stage {recipe.stage} needs a finished upscaler, and {networks.base} has no structural_encoder/.")
    for key, steps in (("training.synthesis_steps", recipe.training.synthesis_steps), ("validation.steps", recipe.validation.steps)):
        if networks.schedule.starts_from_lr and steps != 1:
            raise UserError(f"{key}: {networks.base} is a one-step model; expected 1, got {steps}.")
    check_crop(recipe, networks)
    _economize(recipe, networks.codec.vae)
    objective = DecoderObjective(
        networks,
        seed=recipe.seed,
        synthesize=lambda z_lr, indices: sample_latents(
            objective.networks, z_lr, indices, recipe.training.synthesis_steps, seed=recipe.seed
        ),
        fused=fused is not None,
    )
    return _upscaler(recipe, objective, publisher)


def _upscaler(recipe: Recipe, objective: DiffusionObjective | DecoderObjective, publisher: Publisher | None) -> Job:
    """What is validated, saved and published is the whole upscaler, whichever part of it trains."""
    networks = objective.networks
    named = recipe.validation.model_dump(include=set(networks.call_defaults), exclude_none=True)
    own = {**networks.call_defaults, **named}
    # what the base says today is written down, so that neither a resume nor an export depends on what it says then
    recipe = recipe.model_copy(update={"validation": recipe.validation.model_copy(update=own)})
    call = {"num_inference_steps": recipe.validation.steps, **own}
    upscaler = Upscaler(lambda: objective.networks, recipe.scale, **call)
    return _job(
        recipe,
        objective,
        prediction_type=networks.schedule.prediction_type,
        restore=lambda lr, hr, seed: upscaler(lr, seed),
        save_pipeline=lambda folder: save_pipeline(objective.networks, folder, **{f"default_{key}": value for key, value in call.items()}),
        base={"id": networks.base, "revision": networks.revision},
        publisher=publisher,
    )


def _economize(recipe: Recipe, *networks: Any) -> None:
    """What saves memory or time and leaves the mathematics alone."""
    for network in networks:
        if recipe.training.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        if recipe.training.channels_last:
            network.to(memory_format=torch.channels_last)


def _job(
    recipe: Recipe,
    objective: Objective,
    *,
    restore: Callable[[Tensor, Tensor, int], Tensor],
    save_pipeline: Callable[[Path], None],
    prediction_type: str = "epsilon",
    base: dict[str, Any] | None = None,
    label: str = "prediction",
    publisher: Publisher | None = None,
) -> Job:
    training = recipe.training

    def open_data(rank: int, world_size: int, state: dict[str, Any] | None, device: torch.device) -> Any:
        return open_training_data(
            recipe.data,
            crop_size=training.crop_size,
            scale=recipe.scale,
            seed=recipe.seed,
            batch_size=training.batch_size,
            rank=rank,
            world_size=world_size,
            state=state,
            device=device,
        )

    losses = build_losses(recipe.losses, prediction_type=prediction_type, distance=_perceptual_distance(recipe), seed=recipe.seed)
    pairs = _validation_pairs(recipe)
    validation = None
    if pairs:
        metrics = {name: validation_metric(name) for name in recipe.validation.metrics}
        higher = {name: METRICS[name].higher_is_better for name in recipe.validation.metrics}
        validation = Validation(pairs, restore, metrics, recipe.validation, label, higher)
    return Job(
        objective=objective,
        losses=losses,
        training=training,
        checkpoints=recipe.checkpoints,
        output=recipe.output,
        open_data=open_data,
        save_pipeline=save_pipeline,
        export=export_checkpoint,
        recipe=resolved(recipe),
        seed=recipe.seed,
        base=base or {},
        validation=validation,
        publisher=publisher,
        card=_card(recipe, base or {}, {loss.name for loss in losses}) if publisher is not None else None,
    )


def _perceptual_distance(recipe: Recipe) -> nn.Module | None:
    """What the loss lpips measures with; None where it is not asked for, or is optional and cannot be had."""
    wanted = [loss for loss in recipe.losses if loss.kind == "lpips"]
    if not wanted:
        return None
    try:
        return load_perceptual_distance()
    except (MissingDependency, UserError) as error:
        if not wanted[0].optional:
            raise
        logger.warning("training goes without the optional loss: %s", error)
        return None


def _card(
    recipe: Recipe, base: dict[str, Any], trained_with: set[str]
) -> Callable[[dict[str, float], list[Path]], dict[str, Path | bytes]]:
    """The model card of this run, with the losses that it has: an optional one that could not be had is not among them."""
    from sslsr_diffusion.runs.model_card import card_files

    drawn = str(base.get("id", "")).startswith("random:")
    about = {"base": None if drawn else base.get("id"), "base_revision": base.get("revision")}
    recipe = recipe.model_copy(update={"losses": [loss for loss in recipe.losses if loss.kind in trained_with]})
    return lambda metrics, pictures: card_files(metrics, pictures, repo_id=recipe.output.hub_id, recipe=resolved(recipe), **about)


def _validation_pairs(recipe: Recipe) -> Sequence[Pair]:
    if not recipe.validation.limit:
        return []
    return open_validation_pairs(
        recipe.data, crop_size=recipe.validation.size, scale=recipe.scale, seed=recipe.validation.seed, limit=recipe.validation.limit
    )


def validation_metric(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """(restored, reference), both [B, 3, H, W] in [0, 1] -> [B]; UserError for a name that cannot be measured per picture."""
    metric = METRICS.get(name)
    if metric is None or metric.whole_set:
        usable = [key for key, entry in METRICS.items() if not entry.whole_set]
        raise UserError(f"validation.metrics: {name!r} cannot be measured per picture; expected some of {', '.join(usable)}.")
    return lambda restored, reference: metric.fn(restored, reference if metric.needs_reference else None, crop_border=0, y_channel=False)


def check_crop(recipe: Recipe, networks: Any) -> None:
    """Raises UserError unless these networks can halve the crop as often as they do."""
    check_crop_unit(recipe, crop_unit(networks))


def crop_unit_of(recipe: Recipe) -> int:
    """`crop_unit` of the networks that a recipe asks for, without reading weights; UserError where they cannot be had."""
    if recipe.stage == "autoencoder":
        return build_autoencoder(recipe.model, meta=True).scale
    return crop_unit(build_networks(recipe.model, plain=recipe.stage == "base", meta=True))


def crop_unit(networks: Any) -> int:
    """Pixels along a side that become one latent pixel of the UNet's deepest level."""
    return networks.codec.scale * 2 ** (len(networks.denoiser.unet.down_blocks) - 1)


def check_crop_unit(recipe: Recipe, unit: int) -> None:
    """The networks halve the crop a fixed number of times."""
    size = recipe.training.crop_size
    if size % unit:
        near = max(unit, round(size / unit) * unit)
        raise UserError(f"training.crop_size: this model needs a multiple of {unit} pixels, got {size}; {near} would do.")


def _calibration_pixels(recipe: Recipe) -> Tensor:
    """[N, 3, H, W] crops as training sees them."""
    loader = open_training_data(
        recipe.data,
        crop_size=recipe.training.crop_size,
        scale=recipe.scale,
        seed=derive_seed(recipe.seed, "calibration"),
        batch_size=min(CALIBRATION_PICTURES, 8),
    )
    try:
        batches = iter(loader)
        return torch.cat([next(batches).hr for _ in range(CALIBRATION_PICTURES // 8)])
    finally:
        loader.close()


STAGES: dict[str, Callable[[Recipe, Publisher | None], Job]] = {
    "diffusion": _diffusion,
    "base": _base,
    "autoencoder": _autoencoder,
    "cfw": _cfw,
    "decoder": _decoder,
}
