"""How much memory the networks take, found by running them on shapes alone."""

import copy
import weakref
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

from sslsr_diffusion.models.networks import LatentNetworks, working_dtype

# Convolution workspaces, reordered copies and the allocator's fragmentation are invisible to a shape run. On the CPU single
# calls took 1.0 to 1.25 times the shape run's peak with freed blocks handed back at once, up to 2.7 times without.
SAFETY_CPU = 3.0
SAFETY_ELSEWHERE = 1.6
SAFETY_STEADY = 1.5  # after `hand_freed_blocks_back`
CALL_BYTES = 64 << 20  # compiled kernels, thread buffers, libraries' pages at first use: whatever the size of the call
_PICTURES = 6  # float32 copies of the whole padded picture at once, at most: enlarged, padded, decoded, colours
_LATENTS = 8  # the same of its latent: start, noise, prediction, blended
Offload = Literal["none", "model", "sequential"]
_NORMS = {getattr(torch.ops.aten, f"native_{kind}_norm{way}").default for kind in ("group", "layer") for way in ("", "_backward")}
_normed: dict[str, Any] = {}  # the meta device takes norms apart in Python, slowly; the same shapes get the same answer


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
        out = _norm(func, args) if func in _NORMS else func(*args, **(kwargs or {}))
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


def _norm(func: Any, args: Any) -> Any:
    key = str((func, [(a.shape, a.stride(), a.dtype) if isinstance(a, Tensor) else a for a in args]))
    if key not in _normed:
        _normed[key] = func(*args)
    return tree_map_only(Tensor, torch.empty_like, _normed[key])


class _FusedAttention(TorchFunctionMode):
    """Fused attention kernels never hold the score matrix; the meta device's decomposition would."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            return torch.empty_like(args[0] if args else kwargs["query"])
        return func(*args, **(kwargs or {}))


def peak_activation_bytes(shapes: nn.Module, run: Callable[[], object], device: torch.device | str = "meta") -> int:
    """The largest sum of live activations while `run` calls a network that lies on `device`; its weights are not counted."""
    peak = LivePeak(shapes.parameters())
    with torch.no_grad(), torch.device(device), _FusedAttention(), peak:
        run()
    return peak.peak


def call_bytes(activations: float, largest_weight: int, device: str, steady: bool) -> int:
    """What a network call takes beside its weights, from the bytes of its activations, on a type of device.

    Convolutions on the CPU copy their weights into another order, so the largest one's bytes count there; there, too, it matters
    whether memory is `steady`: after `hand_freed_blocks_back`.
    """
    if device == "cpu":
        return int((SAFETY_STEADY if steady else SAFETY_CPU) * (activations + largest_weight)) + CALL_BYTES
    return int(SAFETY_ELSEWHERE * activations) + CALL_BYTES


class MemoryModel:
    """What latent networks take: activation floats per latent pixel, which grow with the area, so one shape run is enough."""

    def __init__(self, networks: LatentNetworks, device: torch.device, *, text_parameters: int = 0) -> None:
        """Networks that lie anywhere, the meta device included, as they will work on `device`; size of the text encoder, 0 without one."""
        shapes = networks.shapes().float().eval()
        codec, denoiser = shapes.codec, shapes.denoiser
        side = 4 * networks.size().multiple_of // codec.scale
        area, channels = side * side, codec.latent_channels
        pixels = torch.empty(1, 3, side * codec.scale, side * codec.scale, device="meta")
        latents = torch.empty(1, channels, side, side, device="meta")
        noise = torch.empty(1, *networks.seen_noise_shape(*pixels.shape[-2:]), device="meta")
        level = torch.zeros(1, dtype=torch.long, device="meta") if networks.max_noise_level else None
        condition = shapes.see(pixels[..., :: networks.zoom, :: networks.zoom], noise, level=level, encode=lambda *_: latents)

        def fused() -> None:
            _, maps = codec.encode_with_features(pixels, latents)
            codec.decode(latents, maps)

        floats = 4 * area
        self._denoise = peak_activation_bytes(denoiser, lambda: denoiser(latents, torch.zeros(1, dtype=torch.long), condition)) / floats
        runs: list[Callable[[], object]] = [lambda: codec.decode(latents), lambda: codec.encode(pixels, latents)]
        runs += [fused] if codec.has_fidelity else []
        self._codec = max(peak_activation_bytes(codec, run) for run in runs) / floats
        self._widths = {name: working_dtype(part).itemsize for name, part in (("denoiser", networks.denoiser), ("codec", networks.codec))}
        self._device, self.zoom, self._channels = device.type, codec.scale, channels
        self._counts = {name: sum(p.numel() for p in part.parameters()) for name, part in (("denoiser", denoiser), ("codec", codec))}
        self._counts["text"] = text_parameters
        self._largest = max(p.numel() for p in (*denoiser.parameters(), *codec.parameters()))

    def at(self, dtype: torch.dtype) -> "MemoryModel":
        """The same networks in another precision."""
        other = copy.copy(self)
        other._widths = {"denoiser": dtype.itemsize, "codec": dtype.itemsize}
        return other

    def denoise_bytes(self, height: int, width: int, batch: int = 1, *, steady: bool = False) -> int:
        """Estimated peak of one network call on `batch` latent tiles of height x width (weights not counted)."""
        return self._call(self._denoise * self._widths["denoiser"] * height * width * batch, steady)

    def codec_bytes(self, height: int, width: int, batch: int = 1, *, steady: bool = False) -> int:
        """The same for encoding or decoding, whichever takes more."""
        return self._call(self._codec * self._widths["codec"] * height * width * batch, steady)

    def _call(self, activations: float, steady: bool) -> int:
        return call_bytes(activations, self._largest * max(self._widths.values()), self._device, steady)

    def picture_bytes(self, height: int, width: int, batch: int = 1, rows: int | None = None) -> int:
        """What `batch` pictures of height x width padded output pixels take beside any network call; `rows` of them at once, or all."""
        pixels, latents = (height if rows is None else min(rows, height)) * width, height * width / self.zoom**2
        return int(4 * batch * (_PICTURES * 3 * pixels + _LATENTS * self._channels * latents))

    def weight_bytes(self, offload: Offload = "none") -> tuple[int, int]:
        """Weights on the device while the denoiser works, and while the autoencoder does."""
        count, width = self._counts, self._widths["denoiser"]
        if offload == "sequential":
            return 2 * self._largest * width, 2 * self._largest * width
        if offload == "model":
            return max(count["denoiser"], count["text"]) * width, count["codec"] * width
        total = sum(count.values()) * width
        return total, total
