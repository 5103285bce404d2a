"""DeepSpeed ZeRO-2: every process holds the whole parameters and a part of the gradients and of the optimizer's states.

The engine divides, clips and updates; means, schedule, counters and checkpoints stay the loop's own. Parameters stay float32 and
bf16 is torch's autocast, as without DeepSpeed, so a checkpoint is the same files as without and either kind of run goes on from it.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from sslsr_diffusion.errors import MissingDependency, UserError
from sslsr_diffusion.training.settings import TrainingSettings
from sslsr_diffusion.training.state import continued

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


class Zero2:
    """The engine's part of an optimizer step, and its states as whole tensors. All processes call every method."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.optimizer: torch.optim.Optimizer = engine.optimizer.optimizer  # over this process's part of all parameters, made flat

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of one micro-batch; a loss that is not a number makes them so, and `step` then changes nothing anywhere."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * (1 + 0 * loss.detach()))

    def step(self) -> float:
        """Clip and update, unless a gradient is not a number; the norm before clipping (infinite when nothing was changed)."""
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def take_optimizer(self, parameters: dict[str, nn.Parameter]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What `state.take_optimizer` returns for the same optimizer undivided."""
        from deepspeed.utils import safe_get_full_optimizer_state

        tensors: dict[str, Tensor] = {}
        own = self.optimizer.state[self._part()]
        for name, parameter in parameters.items() if own else ():
            for key in DIVIDED:
                tensors[f"{name}|{key}"] = safe_get_full_optimizer_state(parameter, key).cpu()
            tensors[f"{name}|step"] = own["step"].clone().cpu()
        return tensors, {
            "state": {},
            "groups": [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups],
        }

    def give_optimizer(self, parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
        """The inverse of `take_optimizer`, after the parameters were put back."""
        from deepspeed.utils import safe_set_full_optimizer_state

        self.engine.optimizer.refresh_fp32_params()  # the part that is updated is a copy
        for group, saved in zip(self.optimizer.param_groups, plain["groups"]):
            group.update(continued(saved, dict(group)))
        if not tensors:
            return
        part = self._part()
        own = self.optimizer.state[part]
        if not own:  # AdamW makes its states in the first step
            own.update({key: torch.zeros_like(part) for key in DIVIDED})
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()
        own["step"] = tensors[f"{next(iter(parameters))}|step"].clone()
        for name, parameter in parameters.items():
            for key in DIVIDED:
                safe_set_full_optimizer_state(parameter, tensors[f"{name}|{key}"], key)

    def _part(self) -> Tensor:
        (group,) = self.optimizer.param_groups
        (part,) = group["params"]
        return part
