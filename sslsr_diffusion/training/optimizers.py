"""Optimizers, learning-rate schedules and the moving average, by name."""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from sslsr_diffusion.errors import MissingDependency
from sslsr_diffusion.training.settings import EMASettings, OptimizerSettings, ScheduleSettings

if TYPE_CHECKING:
    from diffusers.training_utils import EMAModel


def build_optimizer(settings: OptimizerSettings, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """torch's AdamW, or that of bitsandbytes (MissingDependency without it), which keeps its states in 8 bit."""
    kind: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW
    if settings.kind == "adamw8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise MissingDependency(
                "training.optimizer.kind: adamw8bit needs bitsandbytes: pip install 'sslsr-diffusion[adam8bit]', or use adamw."
            ) from error
        kind = AdamW8bit
    return kind(list(parameters), **settings.model_dump(exclude={"kind"}))


def build_schedule(settings: ScheduleSettings, optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
    """diffusers' schedule of that name over the whole run; multistep is torch's MultiStepLR, with a warm-up if one is asked for."""
    if settings.kind == "multistep":
        return LambdaLR(optimizer, lambda done: _multistep(settings, done))
    from diffusers.optimization import get_scheduler

    kind = "constant_with_warmup" if settings.kind == "constant" else settings.kind  # diffusers' constant leaves warm-up steps out
    return get_scheduler(kind, optimizer, num_warmup_steps=settings.warmup_steps, num_training_steps=steps)


def _multistep(settings: ScheduleSettings, done: int) -> float:
    """The share of the first learning rate after so many optimizer steps."""
    warm = min(1.0, done / settings.warmup_steps) if settings.warmup_steps else 1.0
    return warm * float(settings.gamma ** bisect_right(settings.milestones, done))


def build_ema(settings: EMASettings | None, parameters: Iterable[nn.Parameter]) -> "EMAModel | None":
    """diffusers' EMAModel over the trained parameters, or None."""
    if settings is None:
        return None
    from diffusers.training_utils import EMAModel

    if settings.warmup:
        return EMAModel(list(parameters), decay=settings.decay, use_ema_warmup=True, power=settings.power)
    # diffusers warms up all the same, by another formula, which the least decay overrules; after step -1, or the first step would copy
    return EMAModel(list(parameters), decay=settings.decay, min_decay=settings.decay, update_after_step=-1)


@contextmanager
def averaged(ema: "EMAModel | None", parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside, the parameters hold their moving average; afterwards what they held before, bit for bit."""
    if ema is None:
        yield
        return
    parameters = list(parameters)
    kept = [parameter.detach().clone() for parameter in parameters]
    ema.copy_to(parameters)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, before in zip(parameters, kept):
                parameter.copy_(before)
