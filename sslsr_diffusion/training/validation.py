"""A pass over held-out pictures: metrics, and a grid LR bicubic · prediction · ground truth."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite, isnan, nan
from pathlib import PurePath
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sslsr_diffusion.errors import NotEnoughMemory, UserError
from sslsr_diffusion.images import resize_bicubic
from sslsr_diffusion.seeding import derive_seed
from sslsr_diffusion.tasks.task import Task
from sslsr_diffusion.training.settings import ValidationSettings

logger = logging.getLogger(__name__)


class Pair(Protocol):
    """A held-out picture with its fixed low-resolution version."""

    @property
    def name(self) -> str: ...
    @property
    def lr(self) -> Tensor: ...  # [3, h, w]
    @property
    def hr(self) -> Tensor: ...  # [3, H, W]


@dataclass(frozen=True)
class Validation:
    """The pictures of a pass and what is measured on them."""

    pairs: Sequence[Pair]
    metrics: Mapping[str, Callable[[Tensor, Tensor, Tensor], Tensor]]  # of restored, hr, lr [1, 3, H, W] in [0, 1]
    settings: ValidationSettings
    higher_is_better: Mapping[str, bool] = field(default_factory=dict)
    without: set[tuple[str, str]] = field(default_factory=set)  # metric and picture: has no number, and that was said

    def better(self, value: float, than: float | None) -> bool:
        if than is None:
            return value == value
        return value > than if self.best_is_higher else value < than

    @property
    def best_is_higher(self) -> bool:
        return self.higher_is_better.get(self.settings.best, True)

    def refusals(self, values: Mapping[str, float]) -> list[str]:
        """Why weights with these means cannot become the best, by `validation.refuse`; a mean that is not there is a reason, too."""
        found = []
        for name, limit in self.settings.refuse.items():
            value, higher = values.get(name, nan), self.higher_is_better.get(name, True)
            if not (value >= limit if higher else value <= limit):
                found.append(f"{name} is {value:.4g}, validation.refuse allows {'at least' if higher else 'at most'} {limit:g}")
        return found


@dataclass
class ValidationResult:
    """Means over the pictures, of the prediction and of bicubic enlargement, and the grid."""

    values: dict[str, float]
    bicubic: dict[str, float]
    deciding: list[float | None]  # `validation.best` of each picture, None where it has no finite number
    rows: list[list[Tensor]]
    captions: list[list[str]]


class _Measured(NamedTuple):
    """One picture of a pass; `pictures` and `captions` are empty where the grid does not show it."""

    position: int
    values: dict[str, float]
    bicubic: dict[str, float]
    pictures: list[Tensor]
    captions: list[str]


@torch.no_grad()
def validate(
    validation: Validation,
    task: Task,
    *,
    rank: int = 0,
    world_size: int = 1,
    gather: Callable[[list[_Measured]], list[_Measured]] = lambda found: found,
    should_stop: Callable[[], bool] = lambda: False,
    label: str | None = None,
) -> ValidationResult | None:
    """Let the task restore this process's share of the pictures and measure them; every process returns the same means, None when stopped.

    A picture for which a metric has no number (too small, without edges) is named once and left out of that metric's means. A picture
    that does not fit into memory is left out with a warning; None when that holds for all of them.
    All processes restore the same number of pictures (sharded networks need everyone in every forward), so the last share
    may repeat a picture; repeats are not counted.
    """
    pairs = validation.pairs
    found: list[_Measured] = []
    for turn in range(-(-len(pairs) // world_size)):
        position = turn * world_size + rank
        if should_stop() and world_size == 1:
            return None
        pair = pairs[min(position, len(pairs) - 1)]
        try:
            measured = _measure(validation, task, pair, position, label or task.label)
        except NotEnoughMemory as error:  # measuring is not worth the run
            logger.warning("validation: %s is left out: %s", pair.name, error)
            continue
        if position < len(pairs):
            found.append(measured)
    everything = sorted(gather(found), key=lambda measured: measured.position)
    if not everything:
        return None
    values, bicubic = {}, {}
    for name in validation.metrics:
        both = [(m.values[name], m.bicubic[name]) for m in everything if not (isnan(m.values[name]) or isnan(m.bicubic[name]))]
        values[name], bicubic[name] = (sum(side) / len(both) for side in zip(*both)) if both else (nan, nan)
    best = {m.position: m.values.get(validation.settings.best, nan) for m in everything}
    deciding = [value if isfinite(value := best.get(position, nan)) else None for position in range(len(pairs))]
    shown = [measured for measured in everything if measured.pictures]
    return ValidationResult(values, bicubic, deciding, [m.pictures for m in shown], [m.captions for m in shown])


def _measure(validation: Validation, task: Task, pair: Pair, position: int, label: str) -> _Measured:
    settings = validation.settings
    lr, hr = pair.lr[None], pair.hr[None]
    with torch.random.fork_rng(devices=[]):  # measuring must not change what training draws next
        restored = task.restore(lr, hr, derive_seed(settings.seed, position)).float().cpu().clamp(0, 1)
    if not restored.isfinite().all():
        logger.warning("validation: the %s of %s has values that are not numbers (pink in the grid)", label, pair.name)
    bicubic = resize_bicubic(lr, size=(hr.shape[-2], hr.shape[-1])).clamp(0, 1)
    values, baseline = (_values(validation, pair.name, picture, hr, lr) for picture in (restored, bicubic))
    if position >= settings.pictures:
        return _Measured(position, values, baseline, [], [])
    first = next(iter(values), None)
    notes = ["", ""] if first is None else [f" {first} {side[first]:.2f}" for side in (baseline, values)]
    captions = [f"LR bicubic{notes[0]}", f"{label}{notes[1]}", f"ground truth {PurePath(pair.name).name}"]
    return _Measured(position, values, baseline, [bicubic[0], restored[0], hr[0]], captions)


def _values(validation: Validation, name: str, picture: Tensor, hr: Tensor, lr: Tensor) -> dict[str, float]:
    found = {}
    for metric, measure in validation.metrics.items():
        value, why = nan, "nothing in it to measure"
        try:  # what a library of metrics does with a picture is not worth the run either
            value = float(measure(picture, hr, lr).mean()) if picture.isfinite().all() else nan
        except Exception as error:
            why = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        if isnan(value) and (metric, name) not in validation.without:
            validation.without.add((metric, name))
            logger.warning("validation: %s has no number for %s, which is left out of its means: %s", metric, name, why)
        found[metric] = value
    return found
