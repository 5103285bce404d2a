"""The base as a teacher of its own one-step child: frozen, with a second LoRA that learns, on the same weights in memory."""

from copy import deepcopy
from typing import Any

from torch import Tensor, nn

from sslsr_diffusion.models.condition import Condition, Text, guided
from sslsr_diffusion.models.lora import LoRASettings, add_lora, scale_lora
from sslsr_diffusion.models.one_step.backbone import Backbone
from sslsr_diffusion.models.process import Process


class BasePrior(nn.Module):
    """What losses ask about latents: the prediction of the base, guided or not, or of the base with the LoRA that learns beside."""

    def __init__(self, network: Backbone, process: Process, text: Text, negative: Text | None) -> None:
        """`negative`: what guidance leads away from; None: it would be the text itself, so guidance changes nothing."""
        super().__init__()
        self.network, self.process = network, process
        self._texts = text, negative

    def predict(self, zt: Tensor, t: Tensor, *, guidance: float, learned: bool) -> Tensor:
        """`guided` prediction, [B, C, h, w] float32, at timesteps t [B] of the process; `learned`: with the LoRA."""
        scale_lora(self.network.network, 1.0 if learned else 0.0)
        told, (text, negative) = self.process.timestep(t).to(zt.device), self._texts
        wanted = self._ask(zt, told, text)
        if guidance == 1 or negative is None:
            return wanted
        return guided(wanted, self._ask(zt, told, negative), guidance)

    def _ask(self, zt: Tensor, told: Tensor, text: Text) -> Tensor:
        said: Tensor = self.network(zt, told, Condition(text=text.each(lambda part: part.to(zt.device))))
        return said.float()


def plain_copy(backbone: Backbone) -> Backbone:
    """The base's network without its LoRA, on the same frozen tensors; what trains whole is copied as it is now, and frozen."""
    shared: dict[int, Any] = {id(p): p for p in backbone.parameters() if not p.requires_grad} | {id(b): b for b in backbone.buffers()}
    copy = deepcopy(backbone, shared)
    if hasattr(copy.network, "peft_config"):
        copy.network.unload_lora()
    return copy.requires_grad_(False)


def base_prior(backbone: Backbone, process: Process, texts: tuple[Text, Text | None], lora: LoRASettings, *, seed: int) -> BasePrior:
    """A prior whose LoRA, drawn from `seed`, says nothing yet."""
    network = plain_copy(backbone)
    add_lora(network.network, lora, seed=seed)
    return BasePrior(network, process, *texts)
