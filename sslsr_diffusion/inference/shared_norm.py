"""GroupNorm statistics of a whole picture for a network that only ever sees tiles of it.

A GroupNorm over a tile takes the tile's own mean and variance, so that neighbouring tiles disagree about the same pixel.
A first pass over all tiles records the statistics of every GroupNorm, a second one applies their pool: then every tile
computes the same function, and two tiles agree wherever the overlap exceeds the convolutions' reach.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sslsr_diffusion.models.compiled import eagerly


class SharedGroupNorm:
    """Records, then applies, one mean and variance per group for every GroupNorm inside a network."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._norms = [module for module in network.modules() if isinstance(module, nn.GroupNorm)]
        self._seen: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}

    @property
    def any(self) -> bool:
        """Whether there is anything to share."""
        return bool(self._norms)

    def recording(self) -> AbstractContextManager[None]:
        return self._hooks(self._record)

    def applying(self) -> AbstractContextManager[None]:
        return self._hooks(self._apply)

    @contextmanager
    def _hooks(self, hook: Any) -> Iterator[None]:
        with eagerly(self._network), ExitStack() as handles:
            for norm in self._norms:
                handles.enter_context(norm.register_forward_hook(hook, prepend=True))  # before weights that wait go back to the CPU
            yield

    def _record(self, norm: nn.GroupNorm, args: tuple[Tensor], output: Tensor) -> None:
        found = [torch.var_mean(group.float().flatten(1), dim=-1, correction=0) for group in args[0].chunk(norm.num_groups, dim=1)]
        variance, mean = (torch.stack(side, dim=1) for side in zip(*found))  # [n, groups]
        self._seen.setdefault(norm, []).append((mean, variance))

    def _apply(self, norm: nn.GroupNorm, args: tuple[Tensor], output: Tensor) -> Tensor:
        x = args[0]
        mean, variance = self._pooled(norm)
        per_channel = norm.num_channels // norm.num_groups
        gain = torch.rsqrt(variance + norm.eps).repeat_interleave(per_channel)
        shift = -mean.repeat_interleave(per_channel) * gain
        if norm.affine:
            weight, bias = (tensor.to(x.device).float() for tensor in _affine(norm))
            gain, shift = gain * weight, shift * weight + bias
        # group by group into what the norm itself has made: no copy of the whole in float32
        per_group = (one.split(per_channel) for one in (gain, shift))
        for into, part, scale, offset in zip(output.split(per_channel, 1), x.split(per_channel, 1), *per_group):
            shape = (1, -1, *(1,) * (x.ndim - 2))
            into.copy_(torch.addcmul(offset.reshape(shape), part.float(), scale.reshape(shape)))
        return output

    def _pooled(self, norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
        """Over equally large tiles: the mean of the means; the mean variance plus the variance of the means."""
        means, variances = (torch.cat(side) for side in zip(*self._seen[norm]))
        return means.mean(0), variances.mean(0) + means.var(0, correction=0)


def _affine(norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
    """Weight and bias; with layers that wait on the CPU (accelerate), a hook sees them when they have gone back there already."""
    if not norm.weight.is_meta:
        return norm.weight, norm.bias
    hook: Any = norm._hf_hook
    waiting = hook.weights_map
    return waiting["weight"], waiting["bias"]
