"""accelerate's view of this machine and of how it was launched."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.training.settings import TrainingSettings
from sslsr_diffusion.training.zero2 import deepspeed_plugin

if TYPE_CHECKING:
    from accelerate import Accelerator


def make_accelerator(settings: TrainingSettings, trackers: Sequence[str], run: Path) -> Accelerator:
    """The accelerator of a run. Accumulation is ours (its means would be means of means), so it is told 1.

    Raises:
        UserError: the machine cannot do what the recipe asks for.
    """
    from accelerate import Accelerator

    if settings.cpu_threads is not None:
        torch.set_num_threads(settings.cpu_threads)
    torch.backends.cuda.matmul.allow_tf32 = settings.tf32
    torch.backends.cudnn.allow_tf32 = settings.tf32
    plugin = deepspeed_plugin(settings)
    importlib.import_module("torch.distributed.nn.functional")  # imported later (by DDP), its default arguments hold the group for ever
    try:
        accelerator = Accelerator(
            mixed_precision="no" if plugin else settings.mixed_precision,
            deepspeed_plugin=plugin,
            log_with=list(trackers) or None,
            project_dir=str(run),
        )
    except (ValueError, ImportError, RuntimeError) as error:
        raise UserError(f"training: this machine cannot run the recipe as it is: {error}") from error
    accelerator.gradient_accumulation_steps = 1
    kind = distribution(accelerator)
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" and not accelerator.is_fsdp2:
        reason = "asks for FSDP 1" if kind == "FSDP" else f"is not followed on this machine (accelerate chose {kind})"
        raise UserError(f"training: expected FSDP2 (fsdp_version: 2) on GPUs, the accelerate configuration {reason}.")
    if kind in ("MEGATRON_LM", "TP"):
        raise UserError(f"training: {kind} is not supported; configs/accelerate/fsdp2.yaml divides the same states among GPUs.")
    return accelerator


def distribution(accelerator: Accelerator) -> str:
    """NO, MULTI_GPU, FSDP, DEEPSPEED ... by accelerate's names."""
    return str(accelerator.distributed_type).rpartition(".")[2]
