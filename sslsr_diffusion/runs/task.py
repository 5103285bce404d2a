"""The task that a recipe describes, built; with `meta` from shapes alone."""

import torch
from torch import Tensor

from sslsr_diffusion.data import open_training_data
from sslsr_diffusion.runs.recipe import Recipe
from sslsr_diffusion.seeding import derive_seed
from sslsr_diffusion.tasks.frame import Frame
from sslsr_diffusion.tasks.task import Task


def build_task(recipe: Recipe, *, meta: bool = False) -> Task:
    """The task of a recipe.

    Args:
        meta: no weights are read and no hub is asked.
    Raises:
        UserError: a part cannot be built.
    """
    return recipe.task_kind.build(recipe.task, frame_of(recipe, meta=meta))


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
        recipe.data,
        crop_size=recipe.training.crop_size,
        scale=recipe.scale,
        seed=derive_seed(recipe.seed, "calibration"),
        batch_size=8,
    )
    try:
        batches = iter(loader)
        return torch.cat([next(batches).hr for _ in range(count // 8)])
    finally:
        loader.close()
