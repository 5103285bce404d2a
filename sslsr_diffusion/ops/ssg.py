"""The public operator: check, choose a backend, call it. Each backend module has `graph`, `loss` and `unavailable`."""

import math
from numbers import Real
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sslsr_diffusion.ops import ssg_cpu, ssg_cuda, ssg_reference, ssg_torch
from sslsr_diffusion.ops.settings import BackendUnavailable, GraphSettings


def self_similarity_graph(
    image: Tensor,
    mask: Tensor,
    *,
    search_size: int = 25,
    window_size: int = 9,
    sigma: float = 0.004,
    normalize: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Row n weighs every patch of the search area around the n-th masked pixel against that pixel's own patch.

    S[n, d] = exp(-|P_n - P_{n+d}|^2 / (C window^2 sigma)), divided by its row sum   (Chen et al., ACM MM 2024)
    Window samples that fall outside the search area count as 0, as in the published code.
    Second derivatives, forward-mode derivatives and torch.func transforms need backend="reference".

    Args:
        image: [B, C, H, W] float32 or float64 in [0, 1]; differentiable; borders are reflect-padded. Half types are computed in float32.
        mask: [B, 1, H, W] bool, or numbers of which exactly 1 counts; rows come out by image, then row-major.
        search_size: odd side k of the search area, at least window_size; the image must be larger than k // 2.
        window_size: odd side of a patch.
        sigma: how fast the weight falls with the mean squared difference.
        normalize: divide each row by its sum.
        backend: "auto", "reference", "torch", "cpu" or "cuda"; asked for by name it never falls back.

    Returns:
        [N, search_size^2] with N masked pixels; column (dy + k // 2) * k + dx + k // 2.

    Raises:
        ValueError: a shape, dtype, device or size above is broken (the message shows both sides).
        BackendUnavailable: a backend named explicitly cannot run here (the message says why).
    """
    image, mask = checked(image, mask, search_size, window_size, sigma)
    settings = GraphSettings(search_size, window_size, float(sigma), bool(normalize))
    return choose_backend(backend, image, settings).graph(image, mask, settings)


def check_sizes(search_size: int, window_size: int, sigma: float) -> None:
    """ValueError unless both sizes are odd, the window fits into the search area and sigma is a positive number."""
    for name, size in (("search_size", search_size), ("window_size", window_size)):
        if not isinstance(size, int) or size < 1 or size % 2 == 0:
            raise ValueError(f"{name}: expected a positive odd integer, got {size!r}.")
    if window_size > search_size:
        raise ValueError(f"window_size: expected at most search_size = {search_size}, got {window_size}.")
    if not is_number(sigma) or not 0 < sigma < math.inf:
        raise ValueError(f"sigma: expected a positive finite number, got {sigma!r}.")


def is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def check_tensors(**named: object) -> None:
    """ValueError for anything that is no tensor, a numpy array for example."""
    for name, value in named.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name}: expected a torch tensor, got {type(value).__name__}.")


def checked(image: Tensor, mask: Tensor, search_size: int, window_size: int, sigma: float) -> tuple[Tensor, Tensor]:
    """The two as the backends take them, the mask as bool; ValueError for any shape, dtype, device or size that the operator does not take.

    Half types, from autocast for example, are computed in float32: sigma = 0.004 magnifies rounding 250 times.
    """
    check_sizes(search_size, window_size, sigma)
    check_tensors(image=image, mask=mask)
    if image.ndim != 4 or image.shape[1] < 1:
        raise ValueError(f"image: expected [B, C, H, W], got {list(image.shape)}.")
    low_precision = image.dtype in (torch.float16, torch.bfloat16)
    if not low_precision and image.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"image: expected floating point in [0, 1], got {image.dtype}; divide 8-bit images by 255.")
    batch, _, height, width = image.shape
    if list(mask.shape) != [batch, 1, height, width]:
        raise ValueError(f"mask: expected [{batch}, 1, {height}, {width}] for an image {list(image.shape)}, got {list(mask.shape)}.")
    if mask.is_complex():
        raise ValueError(f"mask: expected bool or numbers, got {mask.dtype}.")
    if mask.device != image.device:
        raise ValueError(f"mask: expected on the image's device {image.device}, got on {mask.device}.")
    smallest = search_size // 2 + 1
    if min(height, width) < smallest:
        raise ValueError(f"image: expected sides of at least {smallest} pixels for search_size = {search_size}, got {height} x {width}.")
    return image.float() if low_precision else image, mask if mask.dtype == torch.bool else mask == 1


def backend_module(name: str) -> ModuleType:
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of auto, {', '.join(BACKENDS)}, got {name!r}.")
    return BACKENDS[name]


def choose_backend(name: str, image: Tensor, settings: GraphSettings) -> ModuleType:
    """The module that runs `image`; "auto" takes the fastest that can, a name is taken literally or refused with the reason.

    An image with a forward-mode tangent, which the fast backends would drop without a word, is a RuntimeError.
    """
    module = BACKENDS.get(image.device.type, ssg_torch) if name == "auto" else backend_module(name)  # cpu and cuda are devices' names, too
    wide = module in (ssg_cpu, ssg_cuda) and image.dtype != torch.float32
    reason = None if wide else module.unavailable(image.device)
    if name == "auto" and module is ssg_cuda and not (wide or reason):
        reason = ssg_cuda.too_large(image.device, settings.search, settings.window, image.shape[1])
    if name == "auto" and (wide or reason):
        module = ssg_torch
    elif wide:
        raise ValueError(f'image: backend="{name}" computes in float32, got {image.dtype}; use backend="torch" for it.')
    elif reason:
        raise BackendUnavailable(f'backend="{name}" cannot run here: {reason}')
    if module is not ssg_reference and forward_ad.unpack_dual(image).tangent is not None:
        raise RuntimeError('The self-similarity operator has no forward-mode derivative in its fast backends; backend="reference" has one.')
    return module


BACKENDS = {"reference": ssg_reference, "torch": ssg_torch, "cpu": ssg_cpu, "cuda": ssg_cuda}
