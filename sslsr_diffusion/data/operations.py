"""The drawn operations carried out: each is a pure function (image, generator, **values) -> image."""

from collections.abc import Callable, Mapping, Sequence

from torch import Generator, Tensor

from sslsr_diffusion.data.blur_kernels import kernel_from
from sslsr_diffusion.data.draws import Op, Value
from sslsr_diffusion.data.filters import filter2d, unsharp_mask
from sslsr_diffusion.data.jpeg import jpeg_codec, jpeg_model
from sslsr_diffusion.data.noise import correlated_noise, gaussian_noise, poisson_noise
from sslsr_diffusion.data.resizing import area_average, interpolate
from sslsr_diffusion.imresize import matlab_bicubic


def run(image: Tensor, ops: Sequence[Op], generator: Generator) -> Tensor:
    """All operations in order.

    Args:
        image: [B, 3, H, W] float32 in [0, 1]; not changed. Numbers that a draw fixes are the same for the whole batch.
        ops: what was drawn.
        generator: for the noise fields, on the image's device.
    """
    for op in ops:
        image = OPERATIONS[op.name](image, generator, **op.values)
    return image


def blur(image: Tensor, generator: Generator, **kernel: Value) -> Tensor:
    return filter2d(image, kernel_from(kernel))


def resize(image: Tensor, generator: Generator, mode: str, factor: float | None = None, size: tuple[int, int] | None = None) -> Tensor:
    if mode == "area_average":
        assert size is not None
        return area_average(image, size)
    if factor is not None and min(image.shape[2:]) * factor < 1:
        return interpolate(image, mode, size=(max(1, int(image.shape[2] * factor)), max(1, int(image.shape[3] * factor))))
    return interpolate(image, mode, factor=factor, size=size)


def reduce(image: Tensor, generator: Generator, scale: int) -> Tensor:
    return matlab_bicubic(image, 1 / scale).clamp(0, 1) if scale > 1 else image.clamp(0, 1)


def quantize(image: Tensor, generator: Generator) -> Tensor:
    return (image.clamp(0, 1) * 255).round() / 255


def describe(ops: Sequence[Op]) -> str:
    """The drawn numbers in a few words, in order: "blur iso 7 s1.2 · x0.45 area · noise 8.2 · jpeg 71"."""
    return " · ".join(_words(op.name, op.values) for op in ops) or "none"


def _words(name: str, values: Mapping[str, Value]) -> str:
    if name == "blur":
        width = values.get("sigma_x", values.get("sigma"))
        detail = f"cut {values['cutoff']:.1f}" if "cutoff" in values else f"s{width:.1f}" if width is not None else "aniso"
        return f"{values['family']} {values['size']} {detail}"
    if name == "resize":
        size = values.get("size")
        where = f"to {size[1]}x{size[0]}" if isinstance(size, tuple) else f"x{values['factor']:.2f}"
        return f"{where} {values['mode']}"
    if name == "gaussian":
        return f"noise {values['sigma'] * 255:.1f}{' gray' if values['gray'] else ''}"
    if name == "poisson":
        return f"poisson {values['scale']:.2f}{' gray' if values['gray'] else ''}"
    if name in ("jpeg", "jpeg_codec"):
        return f"jpeg {values['quality']:.0f}"
    return name + "".join(f" {v}" for v in values.values())


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "blur": blur,
    "resize": resize,
    "reduce": reduce,
    "gaussian": gaussian_noise,
    "correlated": correlated_noise,
    "poisson": poisson_noise,
    "jpeg": lambda image, generator, quality: jpeg_model(image.clamp(0, 1), quality),
    "jpeg_codec": lambda image, generator, quality: jpeg_codec(image, quality),
    "sharpen": lambda image, generator, **values: unsharp_mask(image, **values),
    "every": lambda image, generator, step: image[:, :, ::step, ::step],
    "clip": lambda image, generator: image.clamp(0, 1),
    "quantize": quantize,
}
