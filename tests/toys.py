"""Networks and data of a few hundred numbers, with the seams of the real ones: the loop's tests run in milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from PIL import Image as Pillow
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from sslsr_diffusion.images import resize_bicubic
from sslsr_diffusion.losses import build_losses
from sslsr_diffusion.losses.diffusion import DiffusionSettings
from sslsr_diffusion.losses.pixel import PixelL1Settings
from sslsr_diffusion.losses.self_similarity import SelfSimilaritySettings
from sslsr_diffusion.models.codec import Codec
from sslsr_diffusion.models.condition import Condition, Text
from sslsr_diffusion.models.networks import LatentNetworks
from sslsr_diffusion.models.process import DDPM
from sslsr_diffusion.models.size import SizeRequirements
from sslsr_diffusion.seeding import sample_generator
from sslsr_diffusion.tasks.diffusion import DiffusionTask
from sslsr_diffusion.training.checkpoints import read_checkpoint
from sslsr_diffusion.training.job import Job
from sslsr_diffusion.training.settings import CheckpointSettings, OutputSettings, TrainingSettings, ValidationSettings
from sslsr_diffusion.training.validation import Validation
from sslsr_diffusion.types import Batch

SIZE = 32


def smooth(seed: int, channels: int = 3, size: int = SIZE) -> Tensor:
    """[channels, size, size] in [0, 1], smooth: white noise would make the graph one-hot."""
    coarse = torch.rand(1, channels, 5, 5, generator=torch.Generator().manual_seed(seed))
    return resize_bicubic(coarse, size=(size, size))[0].clamp(0, 1)


def toy_sample(index: int, seed: int = 0, density: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    hr = smooth(seed * 100_003 + index)
    generator = sample_generator(seed, index, "mask")
    share = float(torch.rand((), generator=generator)) ** 3 if density is None else density  # masks of very different sizes
    mask = torch.rand(1, SIZE, SIZE, generator=generator) < share * 0.5
    return hr, F.avg_pool2d(hr[None], 4)[0], mask


def toy_batch(indices: list[int], seed: int = 0, density: float | None = None) -> Batch:
    hr, lr, mask = (torch.stack(parts) for parts in zip(*(toy_sample(i, seed, density) for i in indices)))
    return Batch(hr, lr, mask, torch.tensor(indices), tuple(f"{i}.png" for i in indices))


class ToyLoader:
    """The TrainingLoader seam: global micro-batch m of rank r holds samples [(m * world + r) * B, + B)."""

    def __init__(self, rank: int, world_size: int, state: dict[str, Any] | None, *, batch_size: int, poison: range = range(0)) -> None:
        self.rank, self.world_size, self.batch_size, self.poison = rank, world_size, batch_size, poison
        self.position = 0 if state is None else state["batch"] * batch_size * world_size

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        first = self.position + self.rank * self.batch_size
        self.position += self.batch_size * self.world_size
        batch = toy_batch(list(range(first, first + self.batch_size)))
        return replace(batch, hr=batch.hr * float("nan")) if first in self.poison else batch

    def state_dict(self) -> dict[str, Any]:
        return {"batch": self.position // (self.batch_size * self.world_size)}

    def problems(self) -> list[str]:
        return []

    def close(self) -> None:
        pass


class ToyCodec(nn.Module):
    """Scale 4, three latent channels; linear, so gradients are exact enough to compare."""

    scale, latent_channels, has_fidelity = 4, 3, False

    def __init__(self) -> None:
        super().__init__()
        self.vae = nn.ModuleDict({"enter": nn.Conv2d(3, 3, 4, 4), "leave": nn.ConvTranspose2d(3, 3, 4, 4)})
        self.vae.requires_grad_(False)

    def noise_shape(self, pixels: Tensor) -> tuple[int, ...]:
        return (pixels.shape[0], 3, pixels.shape[-2] // 4, pixels.shape[-1] // 4)

    def encode(self, pixels: Tensor, noise: Tensor) -> Tensor:
        latents: Tensor = self.vae["enter"](pixels * 2 - 1) + 0.1 * noise
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        pixels: Tensor = self.vae["leave"](latents) / 2 + 0.5
        return pixels


class ToyDenoiser(nn.Module):
    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.frozen = nn.Conv2d(6, 8, 3, padding=1)
        self.trained = nn.Conv2d(8, 3, 3, padding=1)
        self.time = nn.Linear(1, 8)
        self.dropout = nn.Dropout(dropout)  # draws from the global stream: a resume must restore it
        self.frozen.requires_grad_(False)

    def forward(self, zt: Tensor, t: Tensor, condition: Condition) -> Tensor:
        assert condition.z_lr is not None
        h = self.frozen(torch.cat([zt, condition.z_lr], dim=1)) + self.time(t[:, None].float() / 1000)[:, :, None, None]
        pred: Tensor = self.trained(self.dropout(torch.tanh(h)))
        return pred


class ToyNetworks(LatentNetworks):
    def __init__(self, dropout: float = 0.1) -> None:
        process = DDPM(torch.linspace(0.999, 0.05, 1000), {"prediction_type": "epsilon"})
        super().__init__(cast(Codec, ToyCodec()), ToyDenoiser(dropout), process, Text(torch.zeros(1, 1, 4)), base="toys")

    def size(self) -> SizeRequirements:
        return SizeRequirements(multiple_of=4)

    def components(self) -> dict[str, Any]:
        return {"denoiser": self.denoiser, "codec": self.codec}

    def set_trainable(self, which: str) -> list[str]:
        return [name for name, parameter in self.named_parameters() if parameter.requires_grad]

    def save(self, folder: Path, **call: Any) -> None:
        save_file({name: value.detach().clone() for name, value in self.denoiser.named_parameters()}, folder / "weights.safetensors")


def toy_networks(dropout: float = 0.1) -> ToyNetworks:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return ToyNetworks(dropout)


class ToyTask(DiffusionTask):
    """The real step over toy networks; what it restores is the truth with noise of `strength`."""

    def __init__(self, networks: ToyNetworks, *, strength: Callable[[], float] = lambda: 0.1, **values: Any) -> None:
        super().__init__(networks, **values)
        self.strength = strength

    def restore(self, lr: Tensor, hr: Tensor, seed: int) -> Tensor:
        return hr + self.strength() * torch.randn(hr.shape, generator=torch.Generator().manual_seed(seed))

    def save(self, folder: Path) -> None:
        self.networks.save(folder)


def toy_task(dropout: float = 0.1, **values: Any) -> ToyTask:
    return ToyTask(toy_networks(dropout), seed=3, **values)


def toy_losses(max_timestep: int | None = None, weight: Any = 1.0, auto_steps: int = 4) -> list[Any]:
    return build_losses(
        [
            DiffusionSettings(),
            PixelL1Settings(max_timestep=max_timestep),
            SelfSimilaritySettings(
                max_timestep=max_timestep,
                weight=weight,
                auto_steps=auto_steps,
                search_size=7,
                window_size=3,
                mask_stride=2,
                backend="torch",
            ),
        ]
    )


def toy_job(
    run: Path,
    *,
    dropout: float = 0.1,
    losses: list[Any] | None = None,
    decode_crop: int | None = None,
    strength: Callable[[], float] | None = None,
    gain: float = 0.0,
    poison: range = range(0),
    **training: Any,
) -> Job:
    """`strength` of what is restored; None: 0.1, and less as the weights leave where they began, until they are `gain` away."""
    settings = TrainingSettings.model_validate(
        {"steps": 20, "batch_size": 2, "crop_size": SIZE, "log_every": 5, "optimizer": {"lr": 1e-2}, **training}
    )
    task = toy_task(dropout, decode_crop=decode_crop)
    weight = dict(task.module.named_parameters())["trained.weight"]
    start = weight.detach().clone()
    task.strength = strength or (lambda: 0.1 / (1 + min(gain, float((weight.detach() - start).norm()))))
    return Job(
        task=task,
        losses=losses if losses is not None else toy_losses(),
        training=settings,
        checkpoints=CheckpointSettings(every=10),
        output=OutputSettings(dir=str(run), trackers=()),
        open_data=lambda rank, world, state, device: ToyLoader(rank, world, state, batch_size=settings.batch_size, poison=poison),
        export=lambda checkpoint, folder: None,
        recipe={"training": settings.model_dump(mode="json")},
        seed=3,
    )


class PicturePair(NamedTuple):
    name: str
    lr: Tensor
    hr: Tensor


def toy_validation(every: int = 10, count: int = 3, **values: Any) -> Validation:
    """`count` pictures, measured by their mean square error."""
    return Validation(
        pairs=[PicturePair(f"p{i}.png", F.avg_pool2d(smooth(i)[None], 4)[0], smooth(i)) for i in range(count)],
        metrics={"mse": lambda a, b, lr: (a - b).square().mean(dim=(1, 2, 3))},
        settings=ValidationSettings(every=every, metrics=("mse",), best="mse", pictures=2, **values),
        higher_is_better={"mse": False},
    )


def assert_same_checkpoint(first: Path, second: Path, *, apart: Sequence[str] = ("seconds",)) -> None:
    """Every tensor of two checkpoints bit for bit, and their states but for the recipe and what stands `apart` in the progress."""
    a, b = read_checkpoint(first), read_checkpoint(second)
    assert a.tensors.keys() == b.tensors.keys()
    for stem, group in a.tensors.items():
        assert group.keys() == b.tensors[stem].keys()
        for name, value in group.items():
            torch.testing.assert_close(value, b.tensors[stem][name], rtol=0, atol=0, msg=f"{first.name}: {stem} {name}", equal_nan=True)
    for state in (a.state, b.state):
        for key in apart:
            state["progress"].pop(key, None)
        state.pop("recipe", None)
    assert a.state == b.state


def namespace(**values: Any) -> SimpleNamespace:
    return SimpleNamespace(**values)


def wave_photos(folder: Path) -> Path:
    """Three smooth pictures of 96 x 80 pixels as PNG files in `folder`."""
    y, x = np.mgrid[:80, :96]
    for k in range(3):
        picture = np.stack([128 + 100 * np.sin((x * (k + 1) + y * c) / 9) for c in range(3)], axis=-1)
        Pillow.fromarray(picture.astype(np.uint8)).save(folder / f"{k}.png")
    return folder
