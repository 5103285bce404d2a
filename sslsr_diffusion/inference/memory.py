"""How much memory the networks take, found by running them on shapes alone."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

# Convolution workspaces, reordered copies and the allocator's fragmentation are invisible to a shape run. On the CPU single
# calls took 1.0 to 1.25 times the shape run's peak with freed blocks handed back at once, up to 2.7 times without.
SAFETY = {"cpu": 3.0}
SAFETY_ELSEWHERE = 1.6
SAFETY_STEADY = 1.5  # after `hand_freed_blocks_back`
CALL_BYTES = 64 << 20  # compiled kernels, thread buffers, libraries' pages at first use: whatever the size of the call
_PICTURES = 6  # float32 copies of the whole padded picture at once, at most: enlarged, padded, decoded, colours
_LATENTS = 8  # the same of its latent: start, noise, prediction, blended
Offload = Literal["none", "model", "sequential"]


class LivePeak(TorchDispatchMode):
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
    peak = LivePeak(shadow.parameters())
    with torch.no_grad(), torch.device("meta"), _FusedAttention(), peak:
        run(shadow.eval())
    return peak.peak


class MemoryModel:
    """What the pipeline's networks take: activation floats per latent pixel, which grow with the area, so one shape run is enough."""

    def __init__(self, unet: Any, structural_encoder: Any, vae: Any, device: torch.device, *, text_parameters: int = 0) -> None:
        """
        Args:
            unet, structural_encoder, vae: the networks, or their shapes on the meta device.
            text_parameters: size of the text encoder, 0 without one.
        """
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

        def run_fused(shadow: Any) -> None:
            _, maps = shadow.encode_with_features(torch.empty(pixels))
            shadow.decode(torch.empty(latents), features=maps)

        floats = 4 * area
        encoder = peak_activation_bytes(structural_encoder, run_encoder) / floats
        self._denoise = max(encoder, peak_activation_bytes(unet, run_unet) / floats)
        runs = [lambda shadow: shadow.decode(torch.empty(latents)), lambda shadow: shadow.encode(torch.empty(pixels))]
        if hasattr(vae, "encode_with_features"):
            runs.append(run_fused)
        self._codec = max(peak_activation_bytes(vae, run) for run in runs) / floats
        self._widths = {"unet": unet.dtype.itemsize, "vae": vae.dtype.itemsize}
        self._device, self.zoom, self._channels = device.type, zoom, unet.config.in_channels
        networks = {"unet": unet, "structural_encoder": structural_encoder, "vae": vae}
        self._counts = {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}
        self._counts["text_encoder"] = text_parameters
        self._largest = max(p.numel() for network in networks.values() for p in network.parameters())

    def at(self, dtype: torch.dtype) -> MemoryModel:
        """The same networks in another precision."""
        other = copy.copy(self)
        other._widths = {"unet": dtype.itemsize, "vae": dtype.itemsize}
        return other

    def denoise_bytes(self, height: int, width: int, batch: int = 1, *, steady: bool = False) -> int:
        """Estimated peak of one network call on `batch` latent tiles of height x width (weights not counted)."""
        return self._call(self._denoise * self._widths["unet"] * height * width * batch, steady)

    def codec_bytes(self, height: int, width: int, batch: int = 1, *, steady: bool = False) -> int:
        """The same for encoding or decoding, whichever takes more."""
        return self._call(self._codec * self._widths["vae"] * height * width * batch, steady)

    def _call(self, activations: float, steady: bool) -> int:
        safety = SAFETY.get(self._device, SAFETY_ELSEWHERE)
        if self._device == "cpu":
            safety = SAFETY_STEADY if steady else safety
            reordered = self._largest * max(self._widths.values())  # convolutions copy their weights into another order
            return int(safety * (activations + reordered)) + CALL_BYTES
        return int(safety * activations) + CALL_BYTES

    def picture_bytes(self, height: int, width: int, batch: int = 1) -> int:
        """What `batch` whole pictures of height x width padded output pixels take beside any network call."""
        return int(4 * height * width * batch * (_PICTURES * 3 + _LATENTS * self._channels / self.zoom**2))

    def weight_bytes(self, offload: Offload = "none") -> tuple[int, int]:
        """Weights on the device while the denoiser works, and while the autoencoder does."""
        count, width = self._counts, self._widths["unet"]
        if offload == "sequential":
            return 2 * self._largest * width, 2 * self._largest * width
        if offload == "model":
            return max(count["unet"] + count["structural_encoder"], count["text_encoder"]) * width, count["vae"] * width
        total = sum(count.values()) * width
        return total, total
