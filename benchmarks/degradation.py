"""Images per second of the degradation presets on 512-pixel crops, against the same operations written the plain way.

The plain way is BasicSR's: kernels padded to 21 x 21 and a grouped convolution, F.interpolate, torch.poisson, and a JPEG model that
multiplies every 8x8 block with an 8x8x8x8 tensor. Both sides carry out the same drawn operations, image by image.
tests/test_degradation_plain.py checks that they agree.

    python benchmarks/degradation.py [--presets mild ...] [--processes 2] [--device cpu|cuda] [--output benchmarks/results/degradation.csv]
"""

from __future__ import annotations

import argparse
import csv
import functools
import itertools
import platform
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sslsr_diffusion.data import operations
from sslsr_diffusion.data.blur_kernels import kernel_from
from sslsr_diffusion.data.degradation import DEGRADATIONS, Degradation, DegradationSettings
from sslsr_diffusion.data.jpeg import _matrices, quality_factor
from sslsr_diffusion.imresize import cubic_matrix

SIZE, SCALE = 512, 4


def plain_run(image: Tensor, ops: list, generator: torch.Generator) -> Tensor:
    """The drawn operations by plain functions where there is one; BSRGAN's own steps exist once."""
    for op in ops:
        image = PLAIN.get(op.name, operations.OPERATIONS[op.name])(image, generator, **op.values)
    return image


def plain_blur(image: Tensor, generator: torch.Generator, **kernel) -> Tensor:
    drawn = torch.from_numpy(kernel_from(kernel)).to(image)
    weights = F.pad(drawn, (max(0, (21 - len(drawn)) // 2),) * 4)  # as published: to the largest size, so that kernels stack
    padded = F.pad(image, (10,) * 4, mode="reflect")
    return F.conv2d(padded, weights.expand(3, 1, 21, 21), groups=3)


def plain_resize(image: Tensor, generator: torch.Generator, mode: str, factor: float | None = None, size=None) -> Tensor:
    if mode == "area_average":
        return operations.resize(image, generator, mode, factor, size)
    return F.interpolate(image, size=size, scale_factor=factor, mode=mode)


def plain_reduce(image: Tensor, generator: torch.Generator, scale: int) -> Tensor:
    """MATLAB's bicubic row by row and column by column, as BasicSR's imresize loops."""
    for axis in (2, 3):
        lines = image.transpose(2, axis)
        matrix = torch.from_numpy(cubic_matrix(lines.shape[2], lines.shape[2] // scale, 1 / scale, True)).to(image)
        done = []
        for weights in matrix:
            used = weights.nonzero()[:, 0]
            done.append(torch.einsum("bcyx,y->bcx", lines[:, :, used], weights[used]))
        image = torch.stack(done, 2).transpose(2, axis)
    return image.clamp(0, 1)


def plain_gaussian(image: Tensor, generator: torch.Generator, sigma: float, gray: bool) -> Tensor:
    batch, channels, height, width = image.shape
    field = torch.randn(batch, 1 if gray else channels, height, width, generator=generator, device=image.device)
    return torch.clamp(image + field * sigma, 0, 1)


def plain_poisson(image: Tensor, generator: torch.Generator, scale: float, gray: bool) -> Tensor:
    source = image
    if gray:
        source = (image * torch.tensor([0.2989, 0.587, 0.114], device=image.device)[None, :, None, None]).sum(1, keepdim=True)
    source = torch.clamp((source * 255.0).round(), 0, 255) / 255.0
    levels = 2.0 ** np.ceil(np.log2(len(torch.unique(source))))
    noise = torch.poisson(source * levels, generator=generator) / levels - source
    return torch.clamp(image + noise * scale, 0, 1)


def plain_jpeg(image: Tensor, generator: torch.Generator, quality: float) -> Tensor:
    image = image.clamp(0, 1)
    height, width = image.shape[2:]
    padded = F.pad(image, (0, -width % 16, 0, -height % 16)).permute(0, 2, 3, 1) * 255
    matrix = torch.tensor([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]], device=image.device)
    shift = torch.tensor([0.0, 128.0, 128.0], device=image.device)
    planes = list((torch.tensordot(padded, matrix.T, dims=1) + shift).unbind(-1))
    for i in (1, 2):
        planes[i] = F.avg_pool2d(planes[i][:, None], 2)[:, 0]
    factor = quality_factor(torch.tensor([quality], dtype=image.dtype, device=image.device))[:, None, None, None]
    luma, chroma, _ = (m.to(image) for m in _matrices())
    basis, scale = _basis(image.device)
    done = []
    for plane, table in zip(planes, (luma, chroma, chroma)):
        blocks = _blocks(plane) - 128
        coefficients = scale * torch.tensordot(blocks, basis, dims=2)
        coefficients = torch.round(coefficients / (table * factor)) * (table * factor)
        alpha = scale * 4
        restored = 0.25 * torch.tensordot(coefficients * alpha, basis.permute(2, 3, 0, 1), dims=2) + 128
        done.append(_merge(restored, *plane.shape[1:]))
    for i in (1, 2):
        done[i] = done[i].repeat_interleave(2, 1).repeat_interleave(2, 2)
    back = torch.tensor([[1.0, 0.0, 1.402], [1.0, -0.344136, -0.714136], [1.0, 1.772, 0.0]], device=image.device)
    rgb = torch.tensordot(torch.stack(done, -1) - shift, back.T, dims=1).clamp(0, 255)
    return rgb.permute(0, 3, 1, 2)[:, :, :height, :width] / 255


@functools.cache
def _basis(device: torch.device) -> tuple[Tensor, Tensor]:
    """The 8x8x8x8 cosine tensor, filled entry by entry as DiffJPEG does, and the scale 1/4 a(u) a(v)."""
    tensor = np.zeros((8, 8, 8, 8), dtype=np.float32)
    for x, y, u, v in itertools.product(range(8), repeat=4):
        tensor[x, y, u, v] = np.cos((2 * x + 1) * u * np.pi / 16) * np.cos((2 * y + 1) * v * np.pi / 16)
    alpha = np.array([1.0 / np.sqrt(2)] + [1] * 7)
    return torch.from_numpy(tensor).to(device), torch.from_numpy(np.outer(alpha, alpha) * 0.25).float().to(device)


def _blocks(plane: Tensor) -> Tensor:
    batch, height, width = plane.shape
    return plane.view(batch, height // 8, 8, width // 8, 8).permute(0, 1, 3, 2, 4).reshape(batch, -1, 8, 8)


def _merge(blocks: Tensor, height: int, width: int) -> Tensor:
    return blocks.view(len(blocks), height // 8, width // 8, 8, 8).permute(0, 1, 3, 2, 4).reshape(len(blocks), height, width)


PLAIN = {
    "blur": plain_blur,
    "reduce": plain_reduce,
    "resize": plain_resize,
    "gaussian": plain_gaussian,
    "poisson": plain_poisson,
    "jpeg": plain_jpeg,
}


def measure(task: tuple[str, str, int, int, str]) -> tuple[float, float]:
    """Wall and CPU seconds of one process for `count` images of a preset, one way."""
    preset, way, first, count, device = task
    torch.set_num_threads(1)
    degradation = Degradation(DegradationSettings(preset=preset, no_degradation_prob=0), SCALE)
    small = torch.rand(1, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    hr = F.interpolate(small, (SIZE, SIZE), mode="bicubic").clamp(0, 1).to(device)
    drawn = [degradation.draw(SIZE, SIZE, torch.Generator().manual_seed(first + i)) for i in range(count)]
    generator = torch.Generator(device).manual_seed(first)
    carry_out = plain_run if way == "plain" else degradation.apply
    for ops in drawn[:2]:
        carry_out(hr, ops, generator)
    if device != "cpu":
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    for ops in drawn:
        carry_out(hr, ops, generator)
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def repeated(preset: str, options: argparse.Namespace, pool: ProcessPoolExecutor) -> dict[str, str | int | float]:
    """One row: medians over repetitions that take turns, and in brackets the least and the greatest."""
    images = options.count * options.processes
    seen: dict[str, list[float]] = {f"{way}_{what}": [] for way in ("ours", "plain") for what in ("images_per_s", "cpu_ms")}
    for _ in range(options.repetitions):
        for way in ("ours", "plain"):
            seconds = list(pool.map(measure, [(preset, way, 1000 * p, options.count, options.device) for p in range(options.processes)]))
            seen[f"{way}_images_per_s"].append(sum(options.count / wall for wall, _ in seconds))
            seen[f"{way}_cpu_ms"].append(1000 * sum(cpu for _, cpu in seconds) / images)
    seen["speedup"] = [ours / plain for ours, plain in zip(seen["ours_images_per_s"], seen["plain_images_per_s"])]
    seen["cpu_speedup"] = [plain / ours for ours, plain in zip(seen["ours_cpu_ms"], seen["plain_cpu_ms"])]
    hardware = torch.cuda.get_device_name() if options.device != "cpu" else f"{options.processes} x {platform.machine()} core"
    row: dict[str, str | int | float] = {"preset": preset, "hardware": hardware, "torch": torch.__version__, "images": images}
    for name, values in seen.items():
        row[name] = f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"
    return row | {"repetitions": options.repetitions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10, help="images per process and repetition")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--presets", nargs="*", default=list(DEGRADATIONS))
    parser.add_argument("--output", type=Path, help="CSV; rows of the same preset and hardware are replaced, the others kept")
    options = parser.parse_args()
    rows = []
    with ProcessPoolExecutor(options.processes, mp_context=torch.multiprocessing.get_context("spawn")) as pool:
        list(pool.map(measure, [("bicubic", "ours", 0, 20, options.device)] * options.processes))  # started, imported, compiled
        for preset in options.presets:
            rows.append(repeated(preset, options, pool))
            print(rows[-1], flush=True)
    if options.output:
        replaced = {(row["preset"], row["hardware"]) for row in rows}
        if options.output.exists():
            with options.output.open(newline="") as file:
                rows = [row for row in csv.DictReader(file) if (row["preset"], row["hardware"]) not in replaced] + rows
        options.output.parent.mkdir(parents=True, exist_ok=True)
        with options.output.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[-1])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
