"""Restorers without trained networks: one that enlarges by nearest neighbour, and small networks of both kinds with a family each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from sslsr_diffusion.inference.options import LatentOptions
from sslsr_diffusion.inference.restorer import Output, settled
from sslsr_diffusion.inference.runner import RunnerOptions, RunnerReport, find_work, run_work
from sslsr_diffusion.models.codec import Codec
from sslsr_diffusion.models.condition import Condition, Text
from sslsr_diffusion.models.family import Card, FamilySettings
from sslsr_diffusion.models.networks import LatentNetworks, Networks, PixelNetworks
from sslsr_diffusion.models.process import Process
from sslsr_diffusion.models.size import SizeRequirements


class Nearest:
    """Called as every restorer is; keeps the keywords of its calls."""

    scale = 4
    options = LatentOptions.names()

    def __init__(self, **defaults: Any) -> None:
        self.calls: list[dict[str, Any]] = []
        self.defaults = defaults

    def check(self, **call: Any) -> list[str]:
        return settled(LatentOptions, call, self.options, self.defaults)[1]

    def __call__(self, image, *, scale=None, generator=None, output_type="pil", **call):
        self.calls.append({"generator": generator, "output_type": output_type, **call})
        return Output(self.enlarge(image if image.ndim == 4 else image[None], scale or self.scale, generator))

    def enlarge(self, pictures: Tensor, scale: float, generator: torch.Generator) -> Tensor:
        size = tuple(max(1, round(scale * side)) for side in pictures.shape[-2:])
        return F.interpolate(pictures, size=size, mode="nearest")

    def save(self, folder: Path) -> None:
        raise NotImplementedError


class ToyPixels(PixelNetworks):
    """Space to depth by 2, two convolutions, depth to space by 4: enlarges twice, sees 4 pixels to each side, knows odd from even."""

    scale = 2

    def __init__(self, base: str = "toy", multiple_of: int = 8, minimum: int = 0) -> None:
        super().__init__(base)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Conv2d(12, 16, 3, padding=1), nn.Tanh(), nn.Conv2d(16, 48, 1))
        self._size = SizeRequirements(multiple_of, minimum)
        self.own: dict[str, Any] = {}
        self.saved: dict[str, Any] = {}

    def forward(self, lr: Tensor) -> Tensor:
        if any(side % 4 for side in lr.shape[-2:]):
            raise ValueError(f"expected sides that are multiples of 4, got {tuple(lr.shape)}")
        return F.interpolate(lr, scale_factor=2) + F.pixel_shuffle(self.body(F.pixel_unshuffle(lr, 2)), 4)

    def size(self) -> SizeRequirements:
        return self._size

    @property
    def call_defaults(self) -> dict[str, float]:
        return self.own

    def components(self) -> dict[str, Any]:
        return {"body": self.body}

    def save(self, folder: Path, **call: Any) -> None:
        self.saved = {"folder": folder, **call}

    def set_trainable(self, which: str) -> list[str]:
        return [name for name, _ in self.named_parameters()]


class ToyLatents(LatentNetworks):
    """A codec that shrinks four times, a denoiser of two convolutions, and any process."""

    def __init__(self, scheduler: dict[str, Any], base: str = "toy", own: dict[str, Any] | None = None) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            codec, denoiser = cast(Codec, _Codec()), _Denoiser()
        super().__init__(codec, denoiser, Process.of(scheduler), Text(torch.zeros(1, 1, 4)), base=base)
        self.scheduler, self.own = scheduler, dict(own or {})

    def size(self) -> SizeRequirements:
        return SizeRequirements(multiple_of=8, trained=32)

    @property
    def call_defaults(self) -> dict[str, float]:
        return self.own

    def components(self) -> dict[str, Any]:
        return {"denoiser": self.denoiser, "codec": self.codec}

    def save(self, folder: Path, **call: Any) -> None:
        (folder / "toy.json").write_text(json.dumps({"scheduler": self.scheduler, "call": call}))
        save_file(dict(self.state_dict()), folder / "toy.safetensors")

    def set_trainable(self, which: str) -> list[str]:
        return [name for name, _ in self.denoiser.named_parameters()]


class _Codec(nn.Module):
    scale, latent_channels, has_fidelity = 4, 3, False

    def __init__(self) -> None:
        super().__init__()
        self.vae = nn.ModuleDict({"enter": nn.Conv2d(3, 3, 4, 4), "leave": nn.ConvTranspose2d(3, 3, 4, 4)})

    def noise_shape(self, pixels: Tensor) -> tuple[int, ...]:
        return (pixels.shape[0], 3, pixels.shape[-2] // 4, pixels.shape[-1] // 4)

    def encode(self, pixels: Tensor, noise: Tensor) -> Tensor:
        return self.vae["enter"]((pixels * 2 - 1).to(self.vae["enter"].weight.dtype)).float() + 0.1 * noise

    def decode(self, latents: Tensor, features: Any = None, fidelity: float = 1.0) -> Tensor:
        return self.vae["leave"](latents.to(self.vae["leave"].weight.dtype)).float() / 2 + 0.5


class _Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(7, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, 3, 3, padding=1))

    def forward(self, zt: Tensor, t: Tensor, condition: Condition) -> Tensor:
        assert condition.z_lr is not None
        told = (t.to(zt.dtype) / 1000)[:, None, None, None].expand(-1, 1, *zt.shape[-2:])
        return self.body(torch.cat([zt, condition.z_lr, told], dim=1))


class ToyFamily:
    """Folders with a toy.json; a family as an entry of FAMILIES is."""

    kind, settings, restorer = "toy", FamilySettings, "latent"
    tasks = frozenset({"diffusion"})
    trains: tuple[str, ...] = ("all",)
    files: tuple[str, ...] = ("toy.json", "toy.safetensors")
    card = Card()

    def reads(self, path: Path) -> bool:
        return (path / "toy.json").is_file()

    def read(self, path: Path, *, meta: bool = False) -> Networks:
        known = json.loads((path / "toy.json").read_text())
        networks = ToyLatents(known["scheduler"], str(path), known["call"])
        networks.load_state_dict(load_file(path / "toy.safetensors"))
        return networks.shapes() if meta else networks

    def call_defaults(self, path: Path) -> dict[str, Any]:
        return json.loads((path / "toy.json").read_text())["call"]


class ToyPixelFamily(ToyFamily):
    """Single files that end in .toy."""

    kind, restorer = "toy_pixels", "direct"
    tasks = frozenset({"network"})

    def reads(self, path: Path) -> bool:
        return path.suffix == ".toy" and path.is_file()

    def read(self, path: Path, *, meta: bool = False) -> Networks:
        networks = ToyPixels(str(path))
        return networks.shapes() if meta else networks

    def call_defaults(self, path: Path) -> dict[str, Any]:
        return {}


def upscale_files(restorer: Any, inputs: Any, output: Path, options: RunnerOptions, **more: Any) -> RunnerReport:
    """What `sslsr infer` does with a model and its pictures."""
    return run_work(restorer, find_work(inputs, output, options), **more)
