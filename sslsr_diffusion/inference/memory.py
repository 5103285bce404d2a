"""How much memory the networks take, found by running them on shapes alone."""

import copy
import weakref
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

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
_Form = tuple[torch.Size, tuple[int, ...], torch.dtype]
_made: dict[Any, tuple[_Form | None, ...] | None] = {}  # by operation and forms of its arguments: forms of its new tensors; None: others


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
        out = _shaped(func, args, kwargs or {})
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


def _shaped(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What an operation gives. The meta device takes most of them apart in Python, slowly: the same forms get the same answer."""
    if not isinstance(func, torch._ops.OpOverload):  # of others nobody knows what they are called with
        return func(*args, **kwargs)
    key = (func, _form(args), _form(tuple(kwargs.items())))
    if (made := _made.get(key)) is not None:
        new = [None if form is None else torch.empty_strided(form[0], form[1], dtype=form[2], device="meta") for form in made]
        return new[0] if len(new) == 1 else tuple(new)
    out = func(*args, **kwargs)
    if key not in _made:
        _made[key] = _forms_of_new(out, (args, kwargs))
    return out


def _form(value: Any) -> Any:
    """All of an argument that its shape run depends on; a number is its type, too, and one that became a tensor lies on the CPU."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device.type
    if isinstance(value, list | tuple):
        return tuple(_form(one) for one in value)
    return type(value), value


def _forms_of_new(out: Any, arguments: Any) -> tuple[_Form | None, ...] | None:
    """Of tensors on the meta device that share no memory with the arguments or each other; None: not all of these are such."""
    parts = (out,) if isinstance(out, Tensor) else out
    if not isinstance(parts, tuple) or not parts or not all(part is None or isinstance(part, Tensor) for part in parts):
        return None
    tensors = [part for part in parts if part is not None]
    known = [value.untyped_storage()._cdata for value in tree_iter(arguments) if isinstance(value, Tensor)]
    storages = [tensor.untyped_storage() for tensor in tensors]
    apart = len({*known, *(storage._cdata for storage in storages)}) == len({*known}) + len(tensors)
    whole = all(
        storage.nbytes() == torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta").untyped_storage().nbytes()
        for tensor, storage in zip(tensors, storages)
    )
    if not apart or not whole or any(not tensor.is_meta for tensor in tensors):
        return None
    return tuple(None if part is None else (part.shape, part.stride(), part.dtype) for part in parts)


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
        self._widths = _widths(networks)
        self._device, self.zoom, self._channels = device.type, codec.scale, channels
        self._counts = {name: sum(p.numel() for p in part.parameters()) for name, part in (("denoiser", denoiser), ("codec", codec))}
        self._counts["text"] = text_parameters
        self._largest = max(p.numel() for p in (*denoiser.parameters(), *codec.parameters()))

    def at(self, networks: LatentNetworks) -> "MemoryModel":
        """The same networks in the precision that they have now."""
        other = copy.copy(self)
        other._widths = _widths(networks)
        return other

    def denoise_bytes(self, height: int, width: int, batch: int = 1, *, steady: bool = False) -> int:
        """Estimated peak of one network call on `batch` latent tiles of height x width (weights not counted)."""
        return self._call(self._denoise * self._widths["denoiser"] * height * width * batch, steady)

    def codec_bytes(self, height: int, width: int, batch: int = 1, *, steady: bool = False) -> int:
        """The same for encoding or decoding, whichever takes more."""
        return self._call(self._codec * self._widths["codec"] * height * width * batch, steady)

    def _call(self, activations: float, steady: bool) -> int:
        return call_bytes(activations, self._largest * max(self._widths.values()), self._device, steady)

    def picture_bytes(self, height: int, width: int, batch: int = 1, rows: int | None = None, of_latents: int | None = None) -> int:
        """What `batch` pictures of height x width padded output pixels take beside any network call.

        `rows` of pixels, and of what `of_latents` rows of pixels are decoded from, are there at once; None: all.
        """
        tall, tall_latents = (height if some is None else min(some, height) for some in (rows, of_latents))
        pixels, latents = tall * width, tall_latents * width / self.zoom**2
        return int(4 * batch * (_PICTURES * 3 * pixels + _LATENTS * self._channels * latents))

    def weight_bytes(self, offload: Offload = "none") -> tuple[int, int]:
        """Weights on the device while the denoiser works, and while the autoencoder does."""
        widths = {**self._widths, "text": self._widths["denoiser"]}
        size = {name: count * widths[name] for name, count in self._counts.items()}
        if offload == "sequential":
            layers = 2 * self._largest * max(self._widths.values())
            return layers, layers
        if offload == "model":
            return max(size["denoiser"], size["text"]), size["codec"]
        total = sum(size.values())
        return total, total


def _widths(networks: LatentNetworks) -> dict[str, int]:
    """Bytes per number; an autoencoder may need a wider one than the denoiser."""
    return {name: working_dtype(part).itemsize for name, part in (("denoiser", networks.denoiser), ("codec", networks.codec))}
