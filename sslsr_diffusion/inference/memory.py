"""How much memory the networks take, found by running them on shapes alone; how much there is; when it ran out."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import re
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.models.condition import Condition
from sslsr_diffusion.models.networks import LatentNetworks

# Convolution workspaces, reordered copies and the allocator's fragmentation are invisible to a shape run. On the CPU single
# calls took 1.0 to 1.25 times the shape run's peak with freed blocks handed back at once, up to 2.7 times without.
SAFETY = {"cpu": 3.0}
SAFETY_ELSEWHERE = 1.6
SAFETY_STEADY = 1.5  # after `hand_freed_blocks_back`
CALL_BYTES = 64 << 20  # compiled kernels, thread buffers, libraries' pages at first use: whatever the size of the call
_SHARE = 0.8  # of the free memory that a run may take
_PICTURES = 6  # float32 copies of the whole padded picture at once, at most: enlarged, padded, decoded, colours
_LATENTS = 8  # the same of its latent: start, noise, prediction, blended
_M_MMAP_THRESHOLD = -3  # of glibc's mallopt
_CGROUP = Path("/sys/fs/cgroup")
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


def peak_activation_bytes(shapes: nn.Module, run: Callable[[], object]) -> int:
    """The largest sum of live activations while `run` calls a network that lies on the meta device; its weights are not counted."""
    peak = LivePeak(shapes.parameters())
    with torch.no_grad(), torch.device("meta"), _FusedAttention(), peak:
        run()
    return peak.peak


def call_bytes(activations: float, largest_weight: int, device: str, steady: bool) -> int:
    """What a network call takes beside its weights, from the bytes of its activations.

    Args:
        largest_weight: bytes of the largest one: convolutions on the CPU copy their weights into another order.
        device: its type.
        steady: after `hand_freed_blocks_back`.
    """
    if device == "cpu":
        return int((SAFETY_STEADY if steady else SAFETY["cpu"]) * (activations + largest_weight)) + CALL_BYTES
    return int(SAFETY.get(device, SAFETY_ELSEWHERE) * activations) + CALL_BYTES


class MemoryModel:
    """What latent networks take: activation floats per latent pixel, which grow with the area, so one shape run is enough."""

    def __init__(self, networks: LatentNetworks, device: torch.device, *, text_parameters: int = 0) -> None:
        """
        Args:
            networks: anywhere, the meta device included.
            device: where they will work.
            text_parameters: size of the text encoder, 0 without one.
        """
        shapes = networks.shapes().float().eval()
        codec, denoiser = shapes.codec, shapes.denoiser
        side = 4 * networks.size().multiple_of // codec.scale
        area, channels = side * side, codec.latent_channels
        pixels = torch.empty(1, 3, side * codec.scale, side * codec.scale, device="meta")
        latents = torch.empty(1, channels, side, side, device="meta")
        condition = Condition(latents, shapes.text)

        def fused() -> None:
            _, maps = codec.encode_with_features(pixels, latents)
            codec.decode(latents, maps)

        floats = 4 * area
        self._denoise = peak_activation_bytes(denoiser, lambda: denoiser(latents, torch.zeros(1, dtype=torch.long), condition)) / floats
        runs: list[Callable[[], object]] = [lambda: codec.decode(latents), lambda: codec.encode(pixels, latents)]
        runs += [fused] if codec.has_fidelity else []
        self._codec = max(peak_activation_bytes(codec, run) for run in runs) / floats
        self._widths = {"denoiser": _width(networks.denoiser), "codec": _width(networks.codec)}
        self._device, self.zoom, self._channels = device.type, codec.scale, channels
        self._counts = {name: sum(p.numel() for p in part.parameters()) for name, part in (("denoiser", denoiser), ("codec", codec))}
        self._counts["text"] = text_parameters
        self._largest = max(p.numel() for p in (*denoiser.parameters(), *codec.parameters()))

    def at(self, dtype: torch.dtype) -> MemoryModel:
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

    def picture_bytes(self, height: int, width: int, batch: int = 1) -> int:
        """What `batch` whole pictures of height x width padded output pixels take beside any network call."""
        return int(4 * height * width * batch * (_PICTURES * 3 + _LATENTS * self._channels / self.zoom**2))

    def weight_bytes(self, offload: Offload = "none") -> tuple[int, int]:
        """Weights on the device while the denoiser works, and while the autoencoder does."""
        count, width = self._counts, self._widths["denoiser"]
        if offload == "sequential":
            return 2 * self._largest * width, 2 * self._largest * width
        if offload == "model":
            return max(count["denoiser"], count["text"]) * width, count["codec"] * width
        total = sum(count.values()) * width
        return total, total


def _width(network: nn.Module) -> int:
    return next(network.parameters()).dtype.itemsize


def free_bytes(device: torch.device) -> int:
    """Memory that a run on this device may take."""
    if device.type == "cuda":
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(_SHARE * (torch.cuda.mem_get_info(device)[0] + idle))
    if device.type == "mps":
        return int(_SHARE * (torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()))
    import psutil

    return int(_SHARE * min(psutil.virtual_memory().available, _container_bytes()))


def device_bytes(device: torch.device) -> int:
    """Memory that the device has in all; a container's limit counts as the CPU's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    import psutil

    limits = [psutil.virtual_memory().total]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            limits.append(int((_CGROUP / name).read_text()))
    return min(limits)


def _container_bytes() -> int:
    """What a container's limit leaves; a container sees its host's memory as its own."""
    for folder, limit, used, cached in (
        ("", "memory.max", "memory.current", "inactive_file"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        place = _CGROUP / folder
        try:
            room = int((place / limit).read_text()) - int((place / used).read_text())
        except (OSError, ValueError):
            continue  # no such limit, or "max"
        with contextlib.suppress(OSError, ValueError, KeyError):  # files that were read count as used, and go when room is needed
            room += int(dict(line.split() for line in (place / "memory.stat").read_text().splitlines())[cached])
        return max(0, room)
    return 1 << 62


def hand_freed_blocks_back() -> None:
    """Let glibc return every freed block of a megabyte to the system at once: its habit of keeping them is what peaks are made of."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def parse_bytes(text: str) -> int:
    """Bytes of "8GB", "8GiB", "500MB", "1.5 g" (decimal without the i); a bare number is bytes.

    Raises:
        UserError: something else was given.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?)b?|b)?\s*", text, re.IGNORECASE)
    if found is None or not float(found[1]):
        raise UserError(f"--memory-budget {text}: expected a size such as 8GB, 7.5GiB or 500MB.")
    power = " kmgt".index((found[2] or " ").lower())
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


def shown_bytes(count: float) -> str:
    """500 MB, 8.1 GB: rounded up, so that what is shown is enough."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            tenths = -(-count // (unit / 10))
            return f"{tenths / 10:.1f} {name}" if tenths < 1000 else f"{-(-count // unit):.0f} {name}"
    return "1 MB"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: torch has a class for GPUs, the CPU's and Metal's allocators raise plain RuntimeErrors."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


_SIGNS = ("DefaultCPUAllocator", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


def release_cached(device: torch.device) -> None:
    """Give back what the device's allocator keeps after a failed allocation."""
    if device.type in ("cuda", "mps", "xpu"):
        getattr(torch, device.type).empty_cache()
