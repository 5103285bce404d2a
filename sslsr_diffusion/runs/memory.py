"""Parameters and memory of a recipe, counted on shapes alone: the task's own step is played on the meta device."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from sslsr_diffusion.devices import training_device
from sslsr_diffusion.inference.memory import LivePeak
from sslsr_diffusion.losses import LOSSES, Loss, build_losses
from sslsr_diffusion.losses.base import Learner, PixelLoss
from sslsr_diffusion.losses.learning import LearningLoss
from sslsr_diffusion.models.networks import count_parameters
from sslsr_diffusion.runs.pin import with_precision
from sslsr_diffusion.runs.recipe import Recipe
from sslsr_diffusion.runs.task import build_task, means_of
from sslsr_diffusion.tasks.task import Task
from sslsr_diffusion.types import Batch, Given

GIB = 2**30
# Of a device that an estimated step may fill: at full size peaks were up to 1.33 times the estimate, which knows no workspaces, no
# fragmentation and no libraries (benchmarks/results/full_size_step.jsonl).
SHARE = 0.75
_CHECKPOINT = "torch.utils.checkpoint.checkpoint"  # which diffusers calls
_SDPA = "torch.nn.functional.scaled_dot_product_attention"  # a function mode would not reach checkpointed recomputation


def describe_parameters(task: Task) -> list[str]:
    """One line per part: how many parameters, how many of them train."""
    parts = task.networks.parameters_per_part()
    rows = [*parts.items(), ("all", (sum(p[0] for p in parts.values()), sum(p[1] for p in parts.values())))]
    return ["parameters"] + [
        f"  {name:<20} {_millions(total)}   trained {_millions(trained)}   frozen {_millions(total - trained)}"
        for name, (total, trained) in rows
    ]


def describe_memory(recipe: Recipe, available: int | None = None, *, savings: bool = True) -> list[str]:
    """One line per way to run the recipe: its own settings first, then what would save memory, then all of that together.

    Args:
        available: bytes that the device has; each line then says whether it fits.
        savings: False: its own settings alone.
    """
    lines = [
        "memory per process, estimated (on top: kernels' workspaces, a quarter of it on a CPU, and the framework, about half a GiB)"
        + "".join(f"; {note}" for note in _uncounted(recipe))
        + ("" if available is None else f"; this device has {available / GIB:.1f} GiB")
    ]
    variants = _variants(recipe) if savings else {"as it is": recipe}
    return lines + [f"  {name:<34} {told(variant, available)[0]}" for name, variant in variants.items()]


def told(recipe: Recipe, available: int | None) -> tuple[str, bool]:
    """The estimate in words, and whether it fits into `available` bytes."""
    try:
        parts = step_bytes(recipe)
    except RuntimeError as error:  # of a network that looks at numbers, of which shapes have none
        return f"cannot be estimated: {str(error).splitlines()[0][:100]}", False
    total = sum(parts.values())
    fits = available is not None and total <= SHARE * available
    verdict = "" if available is None else "   fits    " if fits else "   too much"
    return f"{total / GIB:6.2f} GiB{verdict}   " + "  ".join(f"{k} {v / GIB:.2f}" for k, v in parts.items()), fits


def _uncounted(recipe: Recipe) -> list[str]:
    """What the numbers are of, where they are not of the recipe itself."""
    kinds = {loss.called: LOSSES[loss.kind] for loss in recipe.losses}
    learn = [name for name, kind in kinds.items() if issubclass(kind, LearningLoss) and not issubclass(kind, PixelLoss)]
    notes = [f"what the network of {' and '.join(learn)} keeps while it learns is not counted"] if learn else []
    if recipe.data.teacher is not None:
        notes.append("data.teacher is not counted; pairs of `sslsr prepare teacher` need none")
    return notes


def _variants(recipe: Recipe) -> dict[str, Recipe]:
    """Names of savings, and the recipe with them; more accumulation keeps the samples of an optimizer step."""
    recipe = with_precision(recipe, training_device())
    training, task = recipe.training, recipe.task
    savings: dict[str, dict[str, dict[str, Any]]] = {}
    if not training.gradient_checkpointing:
        savings["gradient_checkpointing: true"] = {"training": {"gradient_checkpointing": True}}
    if hasattr(task, "decode_crop") and any("sr" in LOSSES[loss.kind].reads_of(loss) for loss in recipe.losses):
        smaller = 32 if task.decode_crop is None else task.decode_crop // 2
        if smaller >= 16:
            savings[f"decode_crop: {smaller}"] = {"task": {"decode_crop": smaller}}
    if training.batch_size > 1:
        more = training.batch_size * training.accumulate
        savings[f"batch_size: 1, accumulate: {more}"] = {"training": {"batch_size": 1, "accumulate": more}}
    if training.mixed_precision == "no":
        savings["mixed_precision: bf16"] = {"training": {"mixed_precision": "bf16"}}
    if training.optimizer.kind == "adamw":
        eight = training.optimizer.model_copy(update={"kind": "adamw8bit"})
        savings["optimizer.kind: adamw8bit (CUDA)"] = {"training": {"optimizer": eight}}
    variants = {"as it is": recipe, **{name: with_values(recipe, saving) for name, saving in savings.items()}}
    if len(savings) > 1:
        together = recipe
        for saving in savings.values():
            together = with_values(together, saving)
        variants["all of these"] = together
    return variants


def with_values(recipe: Recipe, changes: dict[str, dict[str, Any]]) -> Recipe:
    """A recipe with other values in its sections."""
    return recipe.model_copy(update={key: getattr(recipe, key).model_copy(update=values) for key, values in changes.items()})


def step_bytes(recipe: Recipe) -> dict[str, int]:
    """Bytes of one process in a training step, by what holds them."""
    recipe = with_precision(recipe, training_device())
    training = recipe.training
    half = training.mixed_precision != "no"
    task = build_task(one_sampling_step(recipe), meta=True)
    modules = nn.ModuleList([task.module, task.networks])
    trained = count_parameters(modules, trained=True)
    stored = sum(p.numel() * p.element_size() for p in modules.parameters()) - task.networks.saved_bytes()
    whole = sum(p.numel() for p in modules.parameters() if p.element_size() == 4)
    losses = build_losses(recipe.losses, means_of(recipe, task, shapes=True))
    learning = nn.ModuleList([loss.network for loss in losses if isinstance(loss, Learner)])
    beside = nn.ModuleList([network for loss in losses if (network := loss.network) is not None])
    known = {id(parameter) for parameter in modules.parameters()}  # a prior stands on the same weights
    extra = sum(p.numel() for p in beside.parameters() if id(p) not in known)  # float32, always
    batch = _batch(recipe, task)
    draws = task.draw(batch, [_Everything(loss) for loss in losses])
    _to_meta(task, torch.bfloat16 if half else torch.float32)
    task.module.train()
    peak = LivePeak(tensor for part in (modules, beside) for tensor in (*part.parameters(), *part.buffers()))
    # on one thread, or the backward pass would run outside of these modes
    one_thread, unchecked = torch.autograd.set_multithreading_enabled(False), partial(checkpoint, determinism_check="none")
    # with torch 2.9 some of what is computed again leaves the meta device: of shapes alone that is no fault
    with one_thread, torch.device("meta"), patch(_SDPA, _fused_attention), patch(_CHECKPOINT, unchecked), peak:
        batch, draws = batch.to("meta"), draws.to("meta")
        outputs = task.run(task.module, batch, draws)
        if "sr_ema" in draws.reads:
            with torch.no_grad():
                outputs = replace(outputs, sr_ema=task.run(task.module, batch, draws).sr)
        total = torch.zeros((), device="meta")
        if outputs.pred is not None and outputs.target is not None:
            total = total + (outputs.pred - outputs.target).square().mean()
        if outputs.z0 is not None:
            total = total + outputs.z0.square().mean()
        if outputs.moments is not None:
            total = total + outputs.moments.square().mean()
        played = [loss for loss in losses if isinstance(loss, PixelLoss) and all(getattr(outputs, name) is not None for name in loss.reads)]
        total = sum((loss.play(outputs) for loss in played), total)
        total.backward()
        del outputs, total
    per_state = 2 if training.optimizer.kind == "adamw8bit" else 8
    # autocast's half-precision copies: of trained weights for the whole step, of frozen ones as long as the graph holds them
    copies = 2 * (trained if training.gradient_checkpointing else whole) if half else 0
    return {
        "weights": stored + extra * 4 + copies,
        "optimizer": trained * per_state + count_parameters(learning, trained=True) * 8,
        "average": trained * 4 if training.ema else 0,
        "activations and gradients": peak.peak + (trained * 2 if half else 0),
    }


def one_sampling_step(recipe: Recipe) -> Recipe:
    """A sampler's steps come one after the other: one of them has the peak of all."""
    if not hasattr(recipe.task, "synthesis_steps"):
        return recipe
    return with_values(recipe, {"task": {"synthesis_steps": 1}})


class _Everything:
    """A loss for the draws of the estimate: it looks at every sample, whatever its noise level."""

    def __init__(self, loss: Loss) -> None:
        self.reads = loss.reads

    def active(self, given: Given) -> Tensor:
        return torch.ones_like(given.t, dtype=torch.bool)


def _batch(recipe: Recipe, task: Task) -> Batch:
    """Samples of the recipe's sizes; with stored latents where its sources have them."""
    count, side = recipe.training.batch_size, recipe.training.crop_size
    low = side // recipe.scale
    latents = None
    if any(source.kind == "cfw" for source in recipe.data.sources):
        codec: Any = task.networks.codec
        latents = torch.zeros(codec.noise_shape(torch.zeros(count, 3, side, side)))
    hr, lr, mask = torch.zeros(count, 3, side, side), torch.zeros(count, 3, low, low), torch.ones(count, 1, side, side, dtype=torch.bool)
    return Batch(hr, lr, mask, torch.arange(count), latents=latents)


def _to_meta(task: Task, dtype: torch.dtype) -> None:
    """All tensors on the meta device, and networks in the arithmetic of the step; what enters them is cast, as autocast would."""
    task.to(torch.device("meta"))
    for part in _callable_parts(task):
        nn.Module.to(part, dtype)  # not diffusers' own to(), which warns
        part.register_forward_pre_hook(lambda _, args, kwargs: tree_map(lambda x: _cast(x, dtype), (args, kwargs)), with_kwargs=True)


def _callable_parts(task: Task) -> Sequence[nn.Module]:
    """The networks whose forward is called from outside."""
    children = [part for part in task.networks.children() if any(True for _ in part.parameters())]
    return children or [task.networks]


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


class _FusedAttentionShape(torch.autograd.Function):
    """What a fused attention kernel keeps for its backward: q, k, v and the output, never the score matrix."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _fused_attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return _FusedAttentionShape.apply(query, key, value)


def _millions(count: int) -> str:
    return f"{count / 1e6:8.2f} M"
