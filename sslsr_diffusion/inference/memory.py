"""How much memory a tile takes, found by running the networks on shapes alone, and the largest tile that fits."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

log = logging.getLogger(__name__)

# Convolution workspaces, reordered copies and the allocator's fragmentation are invisible to a shape run. On the CPU the
# tiny networks took 2.6 to 2.7 times the shape run's peak.
SAFETY = {"cpu": 3.0}
SAFETY_ELSEWHERE = 1.6
_SHARE = 0.8  # of the free memory that a run may take


class _LivePeak(TorchDispatchMode):
    """Sums the bytes of all tensors that are alive, and remembers the largest sum."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known = {weight.untyped_storage()._cdata for weight in weights}  # a transposed weight is no new memory

    def _free(self, key: int, size: int) -> None:
        self.live -= size
        self._known.discard(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                key = storage._cdata
                if key not in self._known:
                    self._known.add(key)
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self._free, key, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return out


class _FusedAttention(TorchFunctionMode):
    """Fused attention kernels never hold the score matrix; the meta device's decomposition would."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            return torch.empty_like(args[0] if args else kwargs["query"])
        return func(*args, **(kwargs or {}))


def peak_activation_bytes(network: Any, run: Callable[[Any], object]) -> int:
    """The largest sum of live activations while `run` calls a copy of `network` on the meta device; weights are not counted."""
    network = getattr(network, "_orig_mod", network)  # torch.compile's wrapper
    with torch.device("meta"):
        shadow = type(network).from_config(network.config)
    peak = _LivePeak(shadow.parameters())
    with torch.no_grad(), torch.device("meta"), _FusedAttention(), peak:
        run(shadow.eval())
    return peak.peak


class MemoryModel:
    """Activation bytes per latent pixel of the pipeline's networks; activations grow with the area, so one shape run is enough."""

    def __init__(self, unet: Any, structural_encoder: Any, vae: Any, device: torch.device) -> None:
        side = 2 ** (len(unet.config.block_out_channels) + 1)
        area = side * side
        latents = (1, unet.config.in_channels, side, side)
        zoom = 2 ** (len(vae.config.block_out_channels) - 1)
        pixels = (1, 3, side * zoom, side * zoom)
        features: list[tuple[int, ...]] = []

        def run_encoder(shadow: Any) -> None:
            features.extend(tuple(f.shape) for f in shadow(torch.empty(latents), torch.zeros(1, dtype=torch.long)))

        def run_unet(shadow: Any) -> None:
            context = torch.empty(1, 77, unet.config.cross_attention_dim)
            shadow(torch.empty(latents), torch.zeros(1, dtype=torch.long), context, features=[torch.empty(f) for f in features])

        floats = 4 * area
        encoder = peak_activation_bytes(structural_encoder, run_encoder) / floats
        self._denoise = max(encoder, peak_activation_bytes(unet, run_unet) / floats)
        self._decode = peak_activation_bytes(vae, lambda shadow: shadow.decode(torch.empty(latents))) / floats
        self._encode = peak_activation_bytes(vae, lambda shadow: shadow.encode(torch.empty(pixels))) / floats
        self._widths = {"unet": unet.dtype.itemsize, "vae": vae.dtype.itemsize}
        self._safety = SAFETY.get(device.type, SAFETY_ELSEWHERE)

    def denoise_bytes(self, height: int, width: int, batch: int = 1) -> int:
        """Estimated peak of one network call on `batch` latent tiles of height x width (weights not counted)."""
        return int(self._safety * self._denoise * self._widths["unet"] * height * width * batch)

    def codec_bytes(self, height: int, width: int, batch: int = 1) -> int:
        """The same for encoding or decoding, whichever takes more."""
        return int(self._safety * max(self._decode, self._encode) * self._widths["vae"] * height * width * batch)


def largest_fitting(sides: Sequence[int], cost: Callable[[int], int], budget: int, what: str) -> int:
    """The first of the descending `sides` whose cost is within the budget; the last, with a warning, if none is."""
    for side in sides:
        if cost(side) <= budget:
            return side
    log.warning("%s: even the smallest tile needs about %d MB, free are %d MB", what, cost(sides[-1]) >> 20, budget >> 20)
    return sides[-1]


def free_bytes(device: torch.device) -> int:
    """Memory that a run on this device may take."""
    if device.type == "cuda":
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(_SHARE * (torch.cuda.mem_get_info(device)[0] + idle))
    if device.type == "mps":
        return int(_SHARE * (torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()))
    import psutil

    return int(_SHARE * min(psutil.virtual_memory().available, _container_bytes()))


def _container_bytes() -> int:
    """What a container's limit leaves; a container sees its host's memory as its own."""
    for limit, used in (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        root = Path("/sys/fs/cgroup")
        try:
            return max(0, int((root / limit).read_text()) - int((root / used).read_text()))
        except (OSError, ValueError):
            continue  # no such limit, or "max"
    return 1 << 62
