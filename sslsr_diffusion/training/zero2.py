"""DeepSpeed ZeRO-2: every process holds the whole parameters and a part of the gradients and of the optimizer's states.

The engine divides, clips and updates; means, schedule, counters and checkpoints stay the loop's own. Parameters stay float32 and
bf16 is torch's autocast, as without DeepSpeed, so a checkpoint is the same files as without and either kind of run goes on from it.
"""

from __future__ import annotations

import contextlib
import os
from math import isfinite
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sslsr_diffusion.errors import MissingDependency, UserError
from sslsr_diffusion.training.engines import Update
from sslsr_diffusion.training.settings import TrainingSettings
from sslsr_diffusion.training.state import continued_group, trained_parameters

if TYPE_CHECKING:
    from accelerate import Accelerator

OLDEST = "0.19.8"  # earlier ones may apply a gradient that is not a number when parameters are float32
BUCKET = 50_000_000  # numbers per exchange; DeepSpeed's own 500 million would take 2 GB per GPU
DIVIDED = ("exp_avg", "exp_avg_sq")  # of AdamW; its step count is one number


def deepspeed_plugin(settings: TrainingSettings) -> Any:
    """accelerate's plugin with the recipe's values, or None when the launch configuration does not ask for DeepSpeed.

    Raises:
        UserError: the recipe or the launch configuration asks for something that this loop has not been tried with.
        MissingDependency: deepspeed is missing or too old.
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


class Zero2Engine:
    """DeepSpeed's own engine behind the methods of `Engine`."""

    def __init__(self, accelerator: Accelerator, module: nn.Module, optimizer: torch.optim.Optimizer, settings: TrainingSettings) -> None:
        self.model, _ = accelerator.prepare(module, optimizer)
        self.parameters = trained_parameters(accelerator.unwrap_model(self.model))
        self.optimizer: torch.optim.Optimizer = self.model.optimizer.optimizer  # over this process's part of all parameters, made flat
        self._device, self._bf16 = accelerator.device.type, settings.mixed_precision == "bf16"

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self._device, torch.bfloat16, enabled=self._bf16)  # accelerate leaves precision to DeepSpeed

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
        """What `PlainEngine` returns for the same optimizer undivided."""
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
