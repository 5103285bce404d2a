"""Who wraps the trained module, adds up gradients and moves the weights: accelerate, or DeepSpeed ZeRO-2 through it.

ZeRO-2: every process holds the whole parameters and a part of the gradients and of the optimizer's states. DeepSpeed divides, clips and
updates; means, schedule, counters and checkpoints stay the loop's own. Parameters stay float32 and bf16 is torch's autocast, as without
DeepSpeed, so a checkpoint is the same files as without and either kind of run goes on from it.
"""

import contextlib
import importlib
import os
from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from sslsr_diffusion.errors import MissingDependency, UserError
from sslsr_diffusion.training.settings import TrainingSettings
from sslsr_diffusion.training.state import continued_group, full_tensor, load_optimizer_state_dict, optimizer_state_dict, trained_parameters

if TYPE_CHECKING:
    from accelerate import Accelerator

OLDEST = "0.19.8"  # earlier ones may apply a gradient that is not a number when parameters are float32
BUCKET = 50_000_000  # numbers per exchange; DeepSpeed's own 500 million would take 2 GB per GPU
UNCOMPILED = ("FSDP", "DEEPSPEED")  # with which compiled networks have not been tried
HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}  # of training.mixed_precision
DIVIDED = ("exp_avg", "exp_avg_sq")  # of AdamW; its step count is one number


def make_accelerator(settings: TrainingSettings, trackers: Sequence[str], run: Path) -> "Accelerator":
    """The accelerator of a run. Accumulation is ours (its means would be means of means), so it is told 1.

    UserError when the machine cannot do what the recipe asks for.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()  # or this run would keep the precision of the one before it in this interpreter
    if settings.cpu_threads is not None:
        torch.set_num_threads(settings.cpu_threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = settings.tf32
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() != "no":  # accelerate wraps the module, and all names in checkpoints would begin with _orig_mod
        raise UserError(f"training.compile: expected true in the recipe, got dynamo_backend {backend} for accelerate; leave that out.")
    plugin = deepspeed_plugin(settings)
    importlib.import_module("torch.distributed.nn.functional")  # imported later (by DDP), its default arguments hold the group for ever
    precision = "no" if plugin else settings.mixed_precision
    try:
        accelerator = Accelerator(mixed_precision=precision, deepspeed_plugin=plugin, log_with=list(trackers) or None, project_dir=str(run))
    except (ValueError, ImportError, RuntimeError) as error:
        raise UserError(f"training: this machine cannot run the recipe as it is: {error}") from error
    accelerator.gradient_accumulation_steps = 1
    kind = distribution(accelerator)
    if settings.compile and kind in UNCOMPILED:
        raise UserError(f"training.compile: expected one process or DDP, got {kind}, with which it has not been tried; set it to false.")
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" and not accelerator.is_fsdp2:
        reason = "asks for FSDP 1" if kind == "FSDP" else f"is not followed on this machine (accelerate chose {kind})"
        raise UserError(f"training: expected FSDP2 (fsdp_version: 2) on GPUs, the accelerate configuration {reason}.")
    if kind == "FSDP":
        set_sharding(accelerator.state.fsdp_plugin, settings.mixed_precision)
    if kind in ("MEGATRON_LM", "TP"):
        raise UserError(f"training: {kind} is not supported; configs/accelerate/fsdp2.yaml divides the same states among GPUs.")
    return accelerator


def set_sharding(plugin: Any, precision: str) -> None:
    """Let accelerate's FSDP2 `plugin` compute what one process computes under autocast: parameters in half precision, as autocast has
    them, but pictures as they are and gradients summed in float32. accelerate's own policy rounds all of these, results too.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy

    if precision in HALF:
        plugin.mixed_precision_policy = MixedPrecisionPolicy(HALF[precision], reduce_dtype=torch.float32, cast_forward_inputs=False)
    # every process has read the weights; to pass them on as accelerate does fails where a network has buffers among them (SD 3)
    plugin.cpu_ram_efficient_loading = False


def distribution(accelerator: "Accelerator") -> str:
    """NO, MULTI_GPU, FSDP, DEEPSPEED ... by accelerate's names."""
    return str(accelerator.distributed_type).rpartition(".")[2]


def name_blocks(module: nn.Module) -> None:
    """Tell accelerate which blocks of a module FSDP2 divides and gathers one by one: those that diffusers names for its networks in it.

    Otherwise a launch configuration would have to name the classes of the very network that a recipe trains; one that does is followed.
    """
    parts = list(module.modules())
    named = {name for part in parts for name in getattr(part, "_no_split_modules", None) or ()}
    there = sorted(named & {type(part).__name__ for part in parts})
    object.__setattr__(module, "_no_split_modules", there)


def deepspeed_plugin(settings: TrainingSettings) -> Any:
    """accelerate's plugin with the recipe's values, or None when the launch configuration does not ask for DeepSpeed.

    UserError for what this loop has not been tried with, MissingDependency where deepspeed is missing or too old.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return None
    from accelerate.utils import DeepSpeedPlugin, compare_versions, is_deepspeed_available

    if settings.mixed_precision == "fp16":
        raise UserError("training.mixed_precision: expected no or bf16 with DeepSpeed, got fp16.")
    if settings.optimizer.kind != "adamw":
        raise UserError(f"training.optimizer.kind: expected adamw with DeepSpeed, which divides its states, got {settings.optimizer.kind}.")
    if os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none") != "none":
        raise UserError("DeepSpeed: expected its settings as in configs/accelerate/deepspeed_zero2.yaml, got a deepspeed_config_file.")
    if not is_deepspeed_available() or compare_versions("deepspeed", "<", OLDEST):
        raise MissingDependency(f"the accelerate configuration asks for DeepSpeed: pip install 'deepspeed>={OLDEST}'.")
    plugin = DeepSpeedPlugin(gradient_accumulation_steps=1)
    zero = plugin.deepspeed_config["zero_optimization"]
    offload = [zero[key]["device"] for key in ("offload_optimizer", "offload_param") if zero[key]["device"] != "none"]
    if zero["stage"] != 2 or offload:
        raise UserError(f"DeepSpeed: expected zero_stage 2 without offload, got zero_stage {zero['stage']}, offload {offload or 'none'}.")
    zero.update(reduce_bucket_size=BUCKET, allgather_bucket_size=BUCKET)
    plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = settings.batch_size
    plugin.deepspeed_config["gradient_clipping"] = settings.max_grad_norm or 0.0  # 0: never; left out, it would be 1
    if settings.mixed_precision == "bf16":  # no module is named, so gradients are summed in float32
        plugin.deepspeed_config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return plugin


class Update(NamedTuple):
    """The end of an optimizer step."""

    norm: float  # of the whole gradient, before clipping
    sound: bool  # loss and gradient are numbers, so the weights were moved
    overflow: bool = False  # not sound, but that is how fp16 finds its scale


class Engine:
    """accelerate's own: one process, DDP or FSDP2, with a gradient scaler in fp16.

    One optimizer step: for each micro-batch a forward and a `backward` within `accumulating`, then `update`.
    All processes call every method. State goes out whole, whoever holds which part of it.

    Attributes:
        model: the wrapped module.
        parameters: what is trained, by its name in the module.
        optimizer: whose groups the schedule reads and sets.
    """

    def __init__(self, accelerator: "Accelerator", module: nn.Module, optimizer: torch.optim.Optimizer, settings: TrainingSettings) -> None:
        self.accelerator, self.settings = accelerator, settings
        name_blocks(module)
        self.model, self._wrapped = accelerator.prepare(module, optimizer)
        self.parameters = trained_parameters(accelerator.unwrap_model(self.model))
        self.optimizer: torch.optim.Optimizer = self._wrapped.optimizer

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Around the forward: the recipe's mixed precision."""
        return self.accelerator.autocast()

    def accumulating(self, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Around a micro-batch: only the last one's backward needs to exchange gradients between the processes."""
        return contextlib.nullcontext() if last else self.accelerator.no_sync(self.model)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of one micro-batch."""
        self.accelerator.backward(loss)

    def update(self, loss: float) -> Update:
        """Clip and move the weights, unless `loss` (the same on all processes) or a gradient is not a number; forget the gradients."""
        norm = self.accelerator.clip_grad_norm_(self.parameters.values(), self.settings.max_grad_norm or float("inf"))
        norm = float(full_tensor(torch.as_tensor(norm)))
        sound, scaler = isfinite(loss) and isfinite(norm), self.accelerator.scaler
        overflow = not sound and scaler is not None and scaler.get_scale() > 1
        if sound or scaler is not None:  # the scaler leaves the step out by itself, and learns from it
            self._wrapped.step()
        self._wrapped.zero_grad()
        return Update(norm, sound, overflow)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors of the optimizer, and `optimizer` and `scaler` as plain values."""
        tensors, plain = optimizer_state_dict(self.optimizer, list(self.parameters))
        scaler = self.accelerator.scaler
        return tensors, {"optimizer": plain, "scaler": None if scaler is None else scaler.state_dict()}

    def load_state_dict(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """The inverse of `state_dict`, after the parameters were loaded; settings stay those of the recipe."""
        load_optimizer_state_dict(self.optimizer, self.parameters, tensors, state["optimizer"])
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])


class Zero2Engine(Engine):
    """DeepSpeed's own engine behind the same methods."""

    def __init__(self, accelerator: "Accelerator", module: nn.Module, optimizer: torch.optim.Optimizer, settings: TrainingSettings) -> None:
        super().__init__(accelerator, module, optimizer, settings)
        self.optimizer = self.model.optimizer.optimizer  # over this process's part of all parameters, made flat

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """accelerate leaves precision to DeepSpeed."""
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.settings.mixed_precision == "bf16")

    def accumulating(self, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """A loss that is not a number makes the gradients so: DeepSpeed looks at them alone, and then changes nothing anywhere."""
        self.model.set_gradient_accumulation_boundary(last)
        self.model.backward(loss * (1 + 0 * loss.detach()))

    def update(self, loss: float) -> Update:
        self.model.step()
        norm = float(self.model.get_global_grad_norm())  # infinite when nothing was changed
        return Update(norm, isfinite(loss) and isfinite(norm))

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What `Engine` returns for the same optimizer undivided."""
        from deepspeed.utils import safe_get_full_optimizer_state

        tensors: dict[str, Tensor] = {}
        own = self.optimizer.state[self._part()]
        for name, parameter in self.parameters.items() if own else ():
            for key in DIVIDED:
                tensors[f"{name}|{key}"] = safe_get_full_optimizer_state(parameter, key).cpu()
            tensors[f"{name}|step"] = own["step"].clone().cpu()
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        return tensors, {"optimizer": {"state": {}, "groups": groups}, "scaler": None}

    def load_state_dict(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        self.model.optimizer.refresh_fp32_params()  # the part that is updated is a copy
        for group, saved in zip(self.optimizer.param_groups, state["optimizer"]["groups"]):
            group.update(continued_group(saved, dict(group)))
        if not tensors:
            return
        part = self._part()
        own = self.optimizer.state[part]
        if not own:  # AdamW makes its states in the first step
            own.update({key: torch.zeros_like(part) for key in DIVIDED})
            self.model.optimizer._lazy_init_hp_params_optimizer_state()
        own["step"] = tensors[f"{next(iter(self.parameters))}|step"].clone()
        for name, parameter in self.parameters.items():
            for key in DIVIDED:
                safe_set_full_optimizer_state(parameter, tensors[f"{name}|{key}"], key)

    def _part(self) -> Tensor:
        (group,) = self.optimizer.param_groups
        (part,) = group["params"]
        return part
