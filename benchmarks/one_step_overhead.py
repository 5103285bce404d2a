"""Our own part of a one-step call: all but encoding, the network, decoding.

    python benchmarks/one_step_overhead.py [--preset sd21] [--dtype bfloat16] [--device cpu] [--denoiser-alone] [--append FILE]

Weights are drawn. A first call, in which the networks only give back the right shapes, does what is done once; the second is
measured, in seconds of processor time on the CPU (a busy machine does not matter), of wall clock elsewhere. With --denoiser-alone
the autoencoder gives back shapes in the second call, too: the share is then of the network's time alone, so more than it really is.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sslsr_diffusion.inference.open import restorer_of
from sslsr_diffusion.models.families import FAMILIES
from sslsr_diffusion.models.one_step.build import build_networks
from sslsr_diffusion.models.one_step.networks import OneStepNetworks
from sslsr_diffusion.models.one_step.settings import OneStepSettings, load_preset

SCALE = 4


def drawn(preset: str, dtype: torch.dtype, device: str) -> OneStepNetworks:
    """The preset with its LoRA at once in this precision: float32 first would take twice the memory."""
    level = {"timestep": 200} if "unet" in load_preset(preset) else {"sigma": 0.8}
    networks = build_networks(OneStepSettings.model_validate({"preset": preset, **level}), meta=True)
    networks.cast(dtype)
    for part in (networks.codec, networks.denoiser):
        part.to_empty(device=device)
        for weight in (*part.parameters(), *part.buffers()):
            if weight.is_floating_point():
                weight.data.uniform_(-0.05, 0.05)
    return networks.to(device).requires_grad_(False).eval()


class Stopwatch:
    """Seconds inside each network's call; `shapes`: of these the stand-ins answer."""

    def __init__(self, networks: OneStepNetworks, device: str) -> None:
        self.seconds: dict[str, float] = {}
        self.shapes: set[str] = set()
        self._device, codec = device, networks.codec
        like = {
            "encode": lambda pixels, noise: torch.zeros_like(noise),
            "denoise": lambda zt, *_: torch.zeros_like(zt),
            "decode": lambda latents, *_: latents[:, :3].float().repeat_interleave(codec.scale, 2).repeat_interleave(codec.scale, 3),
        }
        for owner, name, key in ((codec, "encode", "encode"), (networks.denoiser, "forward", "denoise"), (codec, "decode", "decode")):
            setattr(owner, name, self._timed(key, getattr(owner, name), like[key]))

    def _timed(self, key: str, real: Callable[..., Tensor], shape: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*given: Any) -> Tensor:
            began = self.now()
            made = (shape if key in self.shapes else real)(*given)
            self.seconds[key] = self.seconds.get(key, 0.0) + self.now() - began
            return made

        return call

    def now(self) -> float:
        if self._device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="sd21")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--side", type=int, default=512, help="of the result, in pixels")
    parser.add_argument("--denoiser-alone", action="store_true")
    parser.add_argument("--append", type=Path, help="add the row to this file")
    arguments = parser.parse_args()
    networks = drawn(arguments.preset, getattr(torch, arguments.dtype), arguments.device)
    watch = Stopwatch(networks, arguments.device)
    restorer = restorer_of(networks, FAMILIES["one_step"], scale=SCALE)
    picture = torch.rand(3, arguments.side // SCALE, arguments.side // SCALE, generator=torch.Generator().manual_seed(0))
    watch.shapes = {"encode", "denoise", "decode"}
    restorer(picture, tile=None, vae_tile=None)
    watch.shapes = {"encode", "decode"} if arguments.denoiser_alone else set()
    watch.seconds.clear()
    began = watch.now()
    restorer(picture, tile=None, vae_tile=None)
    whole = watch.now() - began
    ours = whole - sum(watch.seconds.values())
    timed = {key: value for key, value in watch.seconds.items() if key not in watch.shapes}
    cuda = arguments.device == "cuda"
    row = {
        "preset": arguments.preset,
        "dtype": arguments.dtype,
        "side": arguments.side,
        "device": torch.cuda.get_device_name() if cuda else f"cpu {platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "clock": "wall" if cuda else "processor",
        "network_seconds": {key: round(value, 2) for key, value in timed.items()},
        "our_seconds": round(ours, 4),
        "our_share": round(ours / sum(timed.values()), 5),
    }
    print(json.dumps(row))
    if arguments.append:
        with arguments.append.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
