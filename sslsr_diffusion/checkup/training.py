"""Steps that train or restore as the recipes do, with random weights on drawn pictures: no file beside the package, no network."""

import tempfile
import time
from collections.abc import Sequence
from math import isfinite, nan
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from sslsr_diffusion.checkup.steps import NotHere
from sslsr_diffusion.devices import device_bytes, find_device
from sslsr_diffusion.losses import build_losses
from sslsr_diffusion.runs.memory import step_bytes
from sslsr_diffusion.runs.recipe import Recipe, load_recipe
from sslsr_diffusion.runs.task import build_task, means_of
from sslsr_diffusion.tasks.task import apply_losses
from sslsr_diffusion.training.session import Session, StepReport
from sslsr_diffusion.training.state import full_tensor
from sslsr_diffusion.types import Batch

RANDOM = ("model.init=random", "training.accumulate=1", "data.validation=[]", "validation.limit=0")
GIB = 2**30


def random_recipe(name: str, overrides: Sequence[str], without: Sequence[str] = ()) -> Recipe:
    """A shipped recipe with weights drawn at random, where its family is not told otherwise, and `without` losses of these names.
    ValueError where it has no such loss.
    """
    own = any(override.startswith("model=") for override in overrides)
    recipe = load_recipe(name, [*overrides, *RANDOM[own:]])
    names = [loss.called for loss in recipe.losses]
    if absent := set(without).difference(names):
        raise ValueError(f"without: expected losses of {name} ({', '.join(names)}), got {', '.join(sorted(absent))}.")
    return recipe.model_copy(update={"losses": [loss for loss in recipe.losses if loss.called not in without]})


def make_batch(recipe: Recipe, begin: int = 0) -> Batch:
    """Smooth pictures with edges of the recipe's sizes, their averages as low-resolution pictures, a tenth of the pixels masked."""
    count, side = recipe.training.batch_size, recipe.training.crop_size
    generator = torch.Generator().manual_seed(recipe.seed + begin)
    coarse = torch.rand(count, 3, side // 8 + 2, side // 8 + 2, generator=generator)
    hr = F.interpolate(coarse, size=(side, side), mode="bicubic").clamp(0, 1)
    lr = F.avg_pool2d(hr, recipe.scale)
    mask = torch.rand(count, 1, side, side, generator=generator) < 0.1
    return Batch(hr, lr, mask, begin + torch.arange(count))


def _steps(recipe: Recipe, count: int) -> tuple[list[StepReport], list[float], bool]:
    """Optimizer steps as a run makes them: reports, seconds of each, and whether the weights have moved."""
    task = build_task(recipe)
    losses = build_losses(recipe.losses, means_of(recipe, task))
    with tempfile.TemporaryDirectory() as folder:
        session = Session(task, losses, recipe.training, seed=recipe.seed, trackers=(), run=Path(folder))
        before = _sums(session)
        reports, seconds = list[StepReport](), list[float]()
        for number in range(count):
            began = time.perf_counter()
            reports.append(session.step([make_batch(recipe, number * recipe.training.batch_size)]))
            if session.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        moved = _sums(session) != before
        session.close()
    return reports, seconds, moved


def _sums(session: Session) -> list[float]:
    """Of each trained tensor: what a step changes."""
    return [float(full_tensor(p).detach().double().sum()) for p in session.parameters.values()]


def _loss_on_cpu(recipe: Recipe) -> float:
    """The first step's loss in float32 on the CPU: everything drawn follows from seed and sample, so it is the same there."""
    task = build_task(recipe)
    losses = build_losses(recipe.losses, means_of(recipe, task))
    batch = make_batch(recipe)
    draws = task.draw(batch, losses)
    with torch.no_grad():
        outputs = task.run(task.module, batch, draws)
        return float(apply_losses(outputs, losses, {loss.name: loss.count(draws.given) for loss in losses}).loss)


def small_steps(recipe: str, overrides: Sequence[str] = (), count: int = 5) -> dict[str, Any]:
    """Steps of a small recipe; AssertionError where the first loss is not the CPU's within 5 %, or nothing has moved."""
    asked = random_recipe(recipe, overrides)
    want = _loss_on_cpu(asked)
    reports, seconds, moved = _steps(asked, count)
    first, updated = reports[0].loss, sum(report.updated for report in reports)
    if not abs(first - want) <= 0.05 * abs(want):
        raise AssertionError(f"first loss: expected {want:.6g} as on the CPU in float32, got {first:.6g}.")
    if not moved or not updated:
        raise AssertionError(f"expected steps that move the weights, got {updated} of {count}.")
    return {
        "loss": first,
        "on the CPU": want,
        "last loss": reports[-1].loss,
        "updated": f"{updated} of {count}",
        "s per step": min(seconds),
    }


def full_step(recipe: str, overrides: Sequence[str] = (), without: Sequence[str] = ()) -> dict[str, Any]:
    """Two steps of a recipe, `without` some of its losses: seconds of the second, peak memory beside the dry run's estimate.
    NotHere where that is more than the device has, AssertionError for a loss that is not a number.
    """
    asked, there = random_recipe(recipe, overrides, without), device_bytes(find_device("auto")) / GIB
    estimated = _estimate(asked)
    if estimated > there:
        raise NotHere(f"estimated {estimated:.1f} GiB, this device has {there:.1f} GiB.")
    reports, seconds, _ = _steps(asked, 2)
    peaks = {"peak GiB": torch.cuda.max_memory_allocated() / GIB, "reserved GiB": torch.cuda.max_memory_reserved() / GIB}
    if not all(isfinite(report.loss) for report in reports):
        raise AssertionError(f"expected losses that are numbers, got {[report.loss for report in reports]}.")
    return {
        "s per step": seconds[-1],
        **(peaks if torch.cuda.is_available() else {}),
        "estimated GiB": estimated,
        "batch": asked.training.batch_size,
        "crop": asked.training.crop_size,
        "precision": asked.training.mixed_precision,
        "loss": reports[0].loss,
    }


def _estimate(recipe: Recipe) -> float:
    """The dry run's, in GiB; not a number where it has none: what is measured counts."""
    try:
        return sum(step_bytes(recipe).values()) / GIB
    except RuntimeError:
        return nan


@torch.no_grad()
def restore(recipe: str, overrides: Sequence[str] = (), side: int = 128) -> dict[str, Any]:
    """One picture of side x side pixels, enlarged as validation does it; seconds and peak memory."""
    asked = random_recipe(recipe, overrides)
    task = build_task(asked)
    device = find_device("auto")
    task.to(device)
    task.module.eval()
    batch = make_batch(asked).to(device)
    lr = F.interpolate(batch.lr[:1], size=(side, side), mode="bicubic").clamp(0, 1)
    hr = F.interpolate(batch.hr[:1], size=(side * asked.scale,) * 2, mode="bicubic").clamp(0, 1)
    began = time.perf_counter()
    picture = task.restore(lr, hr, asked.seed)
    found = {"size": "x".join(str(n) for n in picture.shape[-2:]), "s": time.perf_counter() - began}
    if picture.shape != hr.shape or not picture.isfinite().all():
        raise AssertionError(f"expected numbers of shape {list(hr.shape)}, got {list(picture.shape)}.")
    return {**found, "peak GiB": torch.cuda.max_memory_allocated() / GIB} if torch.cuda.is_available() else found
