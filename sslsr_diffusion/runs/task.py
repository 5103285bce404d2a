"""The task that a recipe describes, built (with `meta` from shapes alone), and the result that its checkpoint gives."""

from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sslsr_diffusion.config import parse
from sslsr_diffusion.data import open_training_data
from sslsr_diffusion.errors import UserError
from sslsr_diffusion.files import atomic_folder
from sslsr_diffusion.inference.open import find_model
from sslsr_diffusion.losses import LOSSES, Means
from sslsr_diffusion.models.networks import LatentNetworks, PixelNetworks
from sslsr_diffusion.runs.onnx import write_onnx
from sslsr_diffusion.runs.recipe import Recipe
from sslsr_diffusion.seeding import derive_seed
from sslsr_diffusion.tasks.frame import Frame
from sslsr_diffusion.tasks.task import Task
from sslsr_diffusion.training.checkpoints import read_checkpoint
from sslsr_diffusion.training.engines import HALF
from sslsr_diffusion.training.state import load_trained, trained_parameters


def build_task(recipe: Recipe, *, meta: bool = False) -> Task:
    """The task of a recipe; with `meta` no weights are read and no hub is asked. UserError: a part cannot be built."""
    task = recipe.task_kind.build(recipe.task, frame_of(recipe, meta=meta))
    for i, loss in enumerate(recipe.losses):
        lacking = sorted(LOSSES[loss.kind].reads_of(loss) - task.gives)
        if lacking:
            raise UserError(f"losses.{i}.kind: {loss.kind} reads {lacking[0]}, which this model does not make; leave it out.")
    return task


def means_of(recipe: Recipe, task: Task, *, shapes: bool = False) -> Means:
    """What the losses of a recipe are built with; with `shapes` on the meta device, and nothing is read."""
    means = Means(seed=recipe.seed, side=recipe.picture_side, shapes=shapes)
    if not isinstance(task.networks, LatentNetworks):
        return means
    side = recipe.training.crop_size
    channels, height, _ = task.networks.codec.noise_shape(torch.empty(1, 3, side, side, device="meta"))[1:]
    half = HALF.get(recipe.training.mixed_precision)
    return replace(means, latent=(channels, height), prior=task.networks.prior, half=half)


def frame_of(recipe: Recipe, *, meta: bool = False) -> Frame:
    """What a task knows of its run."""
    return Frame(
        family=recipe.family,
        model=recipe.model,
        scale=recipe.scale,
        seed=recipe.seed,
        crop_size=recipe.training.crop_size,
        gradient_checkpointing=recipe.training.gradient_checkpointing,
        channels_last=recipe.training.channels_last and not meta,
        meta=meta,
        crops=lambda count: training_crops(recipe, count),
    )


def training_crops(recipe: Recipe, count: int) -> Tensor:
    """[count, 3, H, W] crops as training sees them; `count` is a multiple of 8."""
    loader = open_training_data(
        recipe.data, crop_size=recipe.training.crop_size, scale=recipe.scale, seed=derive_seed(recipe.seed, "calibration"), batch_size=8
    )
    try:
        batches = iter(loader)
        return torch.cat([next(batches).hr for _ in range(count // 8)])
    finally:
        loader.close()


def export_checkpoint(
    folder: Path,
    output: Path,
    *,
    averaged: bool = True,
    half: bool = False,
    blend: tuple[str, float] | None = None,
    merge: bool = False,
    comfyui: bool = False,
    onnx: bool = False,
) -> tuple[int, list[str]]:
    """Write the result of a checkpoint: networks from its recipe and base, trained tensors from it.

    Its step, and what there is to say about the result.

    Args:
        averaged: the moving average of the trained tensors, where the run kept one.
        half: float16 files, half the size; loading converts to whatever precision is asked for.
        comfyui: of a LoRA: ComfyUI's files beside the result, too.
        onnx: of what makes a picture in one call: an ONNX graph beside the result, too (`runs/onnx.py`).
        merge: of a LoRA: the whole model with the LoRA in its weights, in the place of the LoRA.
        blend: another model, and the share of this one in every weight of the result; the rest is the other's.
    Raises UserError: the checkpoint is damaged, or belongs to a model that can no longer be built; the other model is another network.
    """
    tensors, state = read_checkpoint(folder)
    recipe = parse(Recipe, state["recipe"])
    revision = (state.get("base") or {}).get("revision")
    if revision:  # the very commit that was fine-tuned
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"revision": revision})})
    task = build_task(recipe)
    weights = tensors.get("ema", tensors["trained"]) if averaged else tensors["trained"]
    load_trained(trained_parameters(task.module), weights, what=str(folder))
    if blend is not None:
        _blend(task, recipe, *blend)
    if merge:
        task.networks.merge()
    task.module.eval()

    with atomic_folder(output) as new:
        task.save(new)
        notes: list[str] = task.networks.for_comfyui(new, recipe.scale) if comfyui else []
        if half:
            halve(new)
        left_out = task.networks.left_out()  # before the graph merges what lies in the files
        notes += write_onnx(task.graph(), new) if onnx else []
    return int(state["progress"]["step"]), [*notes, *left_out]


def _blend(task: Task, recipe: Recipe, other: str, alpha: float) -> None:
    if not 0 <= alpha <= 1:
        raise UserError(f"alpha: expected 0 (all of the other network) to 1 (all of this one), got {alpha}.")
    if not isinstance(task.networks, PixelNetworks):
        raise UserError(f"blend: expected a run of plain networks, this one is of model.kind {recipe.model.kind}; leave it out.")
    found = find_model(other)
    networks = found.family.read(found.path)
    if not isinstance(networks, PixelNetworks):
        raise UserError(f"blend: expected a plain network, {other} is of the family {found.family.kind}; choose another.")
    task.networks.blend(networks, alpha)


def halve(folder: Path) -> None:
    """Rewrite the weights below `folder` in float16; UserError for one that float16 cannot hold."""
    for file in folder.rglob("*.safetensors"):
        with safe_open(file, framework="pt") as stream:
            metadata = stream.metadata()
        tensors = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in load_file(file).items()}
        broken = next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None)
        if broken is not None:
            raise UserError(f"half: {broken} has values that float16 cannot hold (above 65504); export without it.")
        save_file(tensors, file, metadata=metadata or {"format": "pt"})
