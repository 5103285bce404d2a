"""The schema of a recipe, assembled from the tables of families, tasks and losses, and what must hold between its sections."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from sslsr_diffusion.config import Settings, apply_overrides, find_recipe, one_of, parse, read_raw
from sslsr_diffusion.data import DataSettings
from sslsr_diffusion.evaluation.statistics import LEAST
from sslsr_diffusion.hub import has_id_shape
from sslsr_diffusion.losses import LOSSES, LossEntry
from sslsr_diffusion.losses.learning import LearningLoss
from sslsr_diffusion.models.families import FAMILIES
from sslsr_diffusion.models.family import Family, FamilySettings
from sslsr_diffusion.tasks.diffusion import DiffusionTaskSettings
from sslsr_diffusion.tasks.frame import TaskSettings
from sslsr_diffusion.tasks.kinds import TASKS, TaskKind
from sslsr_diffusion.training.settings import CheckpointSettings, OutputSettings, TrainingSettings, ValidationSettings

__all__ = ["Recipe", "load_recipe", "resolved", "run_folder"]

RESERVED = ("total", "weighted")  # names of curves that are no loss

if TYPE_CHECKING:
    ModelEntry = FamilySettings
    TaskEntry = TaskSettings
else:
    ModelEntry = one_of([family.settings for family in FAMILIES.values()])
    TaskEntry = one_of([task.settings for task in TASKS.values()])


class Recipe(Settings):
    """One training run, completely."""

    seed: int = Field(42, ge=0, lt=2**63, description="Everything random follows from it and the global sample index.")
    scale: int = Field(4, ge=1, le=8, description="Enlargement: HR side / LR side.")
    model: ModelEntry = Field(
        default_factory=FAMILIES["stablesr"].settings, description="The family of networks, and where they come from."
    )
    task: TaskEntry = Field(default_factory=DiffusionTaskSettings, description="What trains, and from what.")
    data: DataSettings = Field(description="Training pictures, degradation, edge mask, held-out pictures.")
    losses: list[LossEntry] = Field(min_length=1, description="Terms of the objective; each name once.")
    training: TrainingSettings = Field(TrainingSettings(), description="Length, batch, numerics, optimizer.")
    validation: ValidationSettings = Field(ValidationSettings(), description="Looking at held-out pictures.")
    checkpoints: CheckpointSettings = Field(CheckpointSettings(), description="Saving what a stopped run goes on from.")
    output: OutputSettings = Field(OutputSettings(), description="Run folder, trackers, publication.")

    @property
    def family(self) -> Family:
        return FAMILIES[self.model.kind]

    @property
    def task_kind(self) -> type[TaskKind]:
        return TASKS[self.task.kind]

    @property
    def picture_side(self) -> int:
        """The side, in pixels, of the pictures that pixel losses see."""
        return self.task.picture_side(self.training.crop_size, self.model.codec_scale())

    @model_validator(mode="after")
    def _possible(self) -> "Recipe":
        mistakes = [*self._task_fits(), *self._losses_fit(), *self._turns_fit(), *self._sizes_fit(), *self._output_fits()]
        mistakes += [*self._patience_fits(), *(self._best_is_measured() if self.validation.limit else ())]
        if mistakes:
            raise ValueError("\n".join(mistakes))
        return self

    def without_effect(self) -> Iterator[str]:
        """A sentence about each part that does nothing, or not what it says, in this run."""
        schedule, steps = self.training.schedule, self.training.steps
        looks = bool(self.validation.limit and self.data.validation)
        if self.validation.limit and not looks:
            yield "no validation: data.validation names no pictures, so nothing is measured and no weights are the best."
        if self.output.pipeline == "best" and not looks:
            yield "output.pipeline: best has no effect without validation; the last weights become the result."
        if schedule.warmup_steps > steps:
            warm, share = schedule.warmup_steps, f"{steps / schedule.warmup_steps:.0%}"
            yield f"training.schedule.warmup_steps: {warm} are more than the {steps} steps of the run, which ends at {share} of lr."
        late = [milestone for milestone in schedule.milestones if milestone >= steps]
        if late:
            yield f"training.schedule.milestones: {', '.join(map(str, late))} lie at or behind the end of the run of {steps} steps."
        patience, every = self.validation.patience, self.validation.every
        if patience is not None and patience * every >= steps:
            yield f"validation.patience: {patience} looks of {every} steps each are as long as the run of {steps} steps, which ends first."
        if getattr(self.task, "decode_crop", None) and not any("sr" in LOSSES[loss.kind].reads_of(loss) for loss in self.losses):
            yield "task.decode_crop has no effect: no loss looks at pixels."

    def _best_is_measured(self) -> Iterator[str]:
        settings = self.validation
        for key, names in (("best", [settings.best]), ("refuse", settings.refuse)):
            for name in names:
                if name not in settings.metrics:
                    known = ", ".join(settings.metrics)
                    yield f"validation.{key}: {name!r} is not measured; expected one of validation.metrics: {known}."

    def _patience_fits(self) -> Iterator[str]:
        settings, instead = self.validation, "or leave patience out"
        if settings.patience is None:
            return
        if settings.limit < LEAST:
            few = f"expected validation.limit {LEAST} or more, to tell progress from noise, got {settings.limit}"
            yield f"validation.patience: {few}; raise it, {instead}."
        if settings.every == 0:
            yield f"validation.patience: expected validation.every above 0, got 0, a look at the end alone; give its steps, {instead}."
        if not self.data.validation:
            yield f"validation.patience: expected held-out pictures in data.validation, got none; name some, {instead}."

    def _task_fits(self) -> Iterator[str]:
        kind, family = self.task.kind, self.family
        if kind not in family.tasks:
            yield f"task.kind: {kind} is impossible with model.kind {family.kind}; possible are {', '.join(sorted(family.tasks))}."
        train = getattr(self.task, "train", None)
        if train is not None and train not in family.trains:
            yield f"task.train: {train!r} is not a part of {family.kind}; expected one of {', '.join(family.trains)}."
        if self.data.teacher_anchor and self.data.teacher is None:
            yield "data.teacher_anchor: has no effect without data.teacher; leave it out, or give it to `sslsr prepare teacher --anchor`."
        stored = [i for i, source in enumerate(self.data.sources) if source.kind == "cfw"]
        if stored and not self.task_kind.reads_latents:
            yield f"data.sources.{stored[0]}.kind: cfw has stored latents, which task {kind} does not read; use pairs."
        elif stored and self.data.teacher is not None:
            yield "data.teacher: stored samples of kind cfw have their targets already; leave it out."
        elif stored and len(stored) < len(self.data.sources):
            yield "data.sources: kind cfw cannot be mixed with other kinds; make all samples with `sslsr prepare cfw`, or none."

    def _losses_fit(self) -> Iterator[str]:
        names = [loss.called for loss in self.losses]
        for name, count in Counter(names).items():
            if count > 1:
                yield f"losses: {name} stands there {count} times; each name once. Give one of them another `name`."
        yield from (f"losses: {name} is what the logs call something else; give it another `name`." for name in names if name in RESERVED)
        gives = self.task_kind.gives
        possible = [kind for kind, loss in LOSSES.items() if loss.reads <= gives]
        for i, loss in enumerate(self.losses):
            reads = LOSSES[loss.kind].reads_of(loss)
            side = self.picture_side if "z0" not in reads else self.training.crop_size // self.model.codec_scale()
            if loss.kind not in possible:
                yield f"losses.{i}.kind: {loss.kind} is impossible in task {self.task.kind}; possible are {', '.join(possible)}."
            elif not reads <= gives:
                lacking = min(reads - gives)
                yield f"losses.{i}: as it is set, {loss.kind} reads {lacking}, which task {self.task.kind} does not give; set it otherwise."
            elif "sr_ema" in reads and self.training.ema is None:
                yield f"losses.{i}.kind: {loss.kind} compares with the averaged weights' picture; set training.ema: {{decay: 0.999}}."
            for key, why in loss.misfits(side=side, alone=len(names) == 1):
                yield f"losses.{i}.{key}: {why}"

    def _turns_fit(self) -> Iterator[str]:
        if self.training.turns == "alternate" and not any(issubclass(LOSSES[loss.kind], LearningLoss) for loss in self.losses):
            yield "training.turns: alternate needs a loss that learns, gan or vsd; add one, or leave it at together."

    def _sizes_fit(self) -> Iterator[str]:
        sizes = [("training.crop_size", self.training.crop_size)]
        sizes += [("validation.size", self.validation.size)] if self.validation.limit else []
        yield from (f"{key}: {size} is not a multiple of scale {self.scale}." for key, size in sizes if size % self.scale)

    def _output_fits(self) -> Iterator[str]:
        output = self.output
        if output.push_to_hub and not output.hub_id:
            yield "output.hub_id: push_to_hub needs to know where; give it as user/name."
        if output.hub_id and not has_id_shape(output.hub_id):
            yield f"output.hub_id: expected user/name of letters, digits, dots, dashes and _; got {output.hub_id!r}."
        if output.push_state and not output.push_to_hub:
            yield "output.push_state: has no effect without output.push_to_hub: true; set both or none."
        if output.push_to_hub and not self.task_kind.makes_upscaler:
            yield f"output.push_to_hub: task {self.task.kind} makes no upscaler; publish the run that builds on it."


def load_recipe(name: str, overrides: Sequence[str] = (), *, preset: str | None = None) -> Recipe:
    """Read a recipe by path or shipped name, lay its preset and then `--set` overrides over it, validate.

    Args:
        preset: the memory of a card, for example 12gb: what the recipe's `presets` say for it.
    Raises RecipeError: with one line per mistake.
    """
    return parse(Recipe, apply_overrides(read_raw(find_recipe(name), preset), overrides))


def resolved(recipe: Recipe) -> dict[str, Any]:
    """Plain YAML-able data with every default filled in; `load_recipe` of it gives the same recipe."""
    return recipe.model_dump(mode="json")


def run_folder(recipe: Recipe) -> Path:
    return Path(recipe.output.dir).expanduser()
