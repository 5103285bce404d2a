"""Networks that wait on the CPU until a phase needs them, or whose layers do until they compute."""

import torch
from torch import Tensor, nn

from sslsr_diffusion.inference.latent_work import Host
from sslsr_diffusion.inference.memory import Offload
from sslsr_diffusion.models.networks import LatentNetworks

CPU = torch.device("cpu")


class WaitingHost(Host):
    """Codec, denoiser and text encoder wait; what is small (the encoded prompt, the process's tables) lies on the device."""

    def __init__(self, networks: LatentNetworks, device: torch.device, offload: Offload) -> None:
        """`offload`: "model", each network comes for its phase and leaves after it; "sequential", each layer for its own call."""
        super().__init__(networks)
        self._device, self._offload, self._here = device, offload, list[nn.Module]()
        parts = [part for part in (networks.codec, networks.denoiser, networks.text_network) if part is not None]
        waiting = {module for part in parts for module in part.modules()}
        for module in networks.modules():
            if module not in waiting or offload == "sequential":
                for name, buffer in module.named_buffers(recurse=False):
                    setattr(module, name, buffer.to(device))
        if offload == "sequential":
            for layer in waiting:
                _wait(layer, device)

    @property
    def device(self) -> torch.device:
        return self._device

    def offload(self) -> Offload:
        return self._offload

    def bring(self, part: nn.Module) -> None:
        if self._offload == "model" and part not in self._here:
            self._here.append(part)  # first: of a move that fails halfway, release takes back what has moved
            part.to(self._device)

    def release(self) -> None:
        while self._here:
            self._here.pop().to(CPU)


def _wait(layer: nn.Module, device: torch.device) -> None:
    """Let a layer's own weights be on the device while its forward runs; those on the CPU stay where they are, so none is copied back."""
    if not any(True for _ in layer.parameters(recurse=False)):
        return
    kept: dict[nn.Parameter, Tensor] = {}

    def fetch(layer: nn.Module, args: object) -> None:
        for parameter in layer.parameters(recurse=False):
            if not parameter.is_meta:  # a copy of the networks for an estimate has these hooks, too
                kept[parameter] = parameter.data
                parameter.data = _copied(parameter.data, device)

    def leave(layer: nn.Module, args: object, output: object) -> None:
        for parameter in layer.parameters(recurse=False):
            parameter.data = kept.pop(parameter, parameter.data)

    layer.register_forward_pre_hook(fetch, prepend=True)
    layer.register_forward_hook(leave, prepend=True, always_call=True)


def _copied(weight: Tensor, device: torch.device) -> Tensor:
    return weight.to(device)
