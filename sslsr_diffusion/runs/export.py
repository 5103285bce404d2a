"""From a checkpoint to the result that others load."""

from pathlib import Path

from safetensors.torch import load_file, save_file

from sslsr_diffusion.config import parse
from sslsr_diffusion.errors import UserError
from sslsr_diffusion.files import atomic_folder
from sslsr_diffusion.runs.recipe import Recipe
from sslsr_diffusion.runs.task import build_task
from sslsr_diffusion.training.checkpoints import read_checkpoint
from sslsr_diffusion.training.state import load_trained, trained_parameters


def export_checkpoint(folder: Path, output: Path, *, averaged: bool = True, half: bool = False) -> int:
    """Write the result of a checkpoint: networks from its recipe and base, trained tensors from it; returns its step.

    Args:
        averaged: the moving average of the trained tensors, where the run kept one.
        half: float16 files, half the size; loading converts to whatever precision is asked for.

    Raises:
        UserError: the checkpoint is damaged, or belongs to a model that can no longer be built.
    """
    tensors, state = read_checkpoint(folder)
    recipe = parse(Recipe, state["recipe"])
    revision = (state.get("base") or {}).get("revision")
    if revision:  # the very commit that was fine-tuned
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"revision": revision})})
    task = build_task(recipe)
    weights = tensors.get("ema", tensors["trained"]) if averaged else tensors["trained"]
    load_trained(trained_parameters(task.module), weights, what=str(folder))
    task.module.eval()

    with atomic_folder(output) as new:
        task.save(new)
        if half:
            halve(new)
    return int(state["progress"]["step"])


def halve(folder: Path) -> None:
    """Rewrite the weights below `folder` in float16; UserError for one that float16 cannot hold."""
    for file in folder.rglob("*.safetensors"):
        tensors = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in load_file(file).items()}
        broken = next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None)
        if broken is not None:
            raise UserError(f"half: {broken} has values that float16 cannot hold (above 65504); export without it.")
        save_file(tensors, file, metadata={"format": "pt"})
