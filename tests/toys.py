"""Networks and data of a few hundred numbers, with the seams of the real ones: the loop's tests run in milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image as Pillow
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from sslsr_diffusion.images import resize_bicubic
from sslsr_diffusion.losses import Loss, build_losses
from sslsr_diffusion.losses.diffusion import DiffusionSettings
from sslsr_diffusion.losses.pixel import PixelL1Settings
from sslsr_diffusion.losses.self_similarity import SelfSimilaritySettings
from sslsr_diffusion.seeding import sample_generator
from sslsr_diffusion.tasks.decode_window import draw_windows
from sslsr_diffusion.tasks.task import Draws, per_sample_noise
from sslsr_diffusion.training.checkpoints import read_checkpoint
from sslsr_diffusion.training.job import Job
from sslsr_diffusion.training.settings import CheckpointSettings, OutputSettings, TrainingSettings, ValidationSettings
from sslsr_diffusion.training.validation import Validation
from sslsr_diffusion.types import Batch, Given, Outputs

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


class ToyCodec:
    """Scale 4, three latent channels; linear, so gradients are exact enough to compare."""

    scale, latent_channels = 4, 3

    def __init__(self) -> None:
        self.vae = nn.ModuleDict({"enter": nn.Conv2d(3, 3, 4, 4), "leave": nn.ConvTranspose2d(3, 3, 4, 4)})
        self.vae.requires_grad_(False)

    def noise_shape(self, pixels: Tensor) -> tuple[int, ...]:
        return (pixels.shape[0], 3, pixels.shape[-2] // 4, pixels.shape[-1] // 4)

    def encode(self, pixels: Tensor, noise: Tensor) -> Tensor:
        return self.vae["enter"](pixels * 2 - 1) + 0.1 * noise

    def decode(self, latents: Tensor) -> Tensor:
        return self.vae["leave"](latents) / 2 + 0.5


class ToySchedule:
    num_train_timesteps, prediction_type = 1000, "epsilon"
    alphas_cumprod = torch.linspace(0.999, 0.05, 1000)

    def _levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha = self.alphas_cumprod[t][:, None, None, None]
        return alpha.sqrt(), (1 - alpha).sqrt()

    def add_noise(self, z0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        signal, sigma = self._levels(t)
        return signal * z0 + sigma * noise

    def target(self, z0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return noise

    def x0(self, pred: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        signal, sigma = self._levels(t)
        return (zt - sigma * pred) / signal

    def snr(self, t: Tensor) -> Tensor:
        return self.alphas_cumprod[t] / (1 - self.alphas_cumprod[t])


class ToyDenoiser(nn.Module):
    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.frozen = nn.Conv2d(6, 8, 3, padding=1)
        self.trained = nn.Conv2d(8, 3, 3, padding=1)
        self.time = nn.Linear(1, 8)
        self.dropout = nn.Dropout(dropout)  # draws from the global stream: a resume must restore it
        self.frozen.requires_grad_(False)

    def forward(self, zt: Tensor, t: Tensor, z_lr: Tensor, text: Tensor) -> Tensor:
        h = self.frozen(torch.cat([zt, z_lr], dim=1)) + self.time(t[:, None].float() / 1000)[:, :, None, None]
        return self.trained(self.dropout(torch.tanh(h)))


@dataclass
class ToyNetworks:
    codec: ToyCodec
    denoiser: ToyDenoiser
    schedule: ToySchedule
    text: Tensor

    def to(self, device: Any) -> ToyNetworks:
        self.codec.vae.to(device)
        self.denoiser.to(device)
        return self


def toy_networks(dropout: float = 0.1) -> ToyNetworks:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return ToyNetworks(ToyCodec(), ToyDenoiser(dropout), ToySchedule(), torch.zeros(1, 1, 4))


class ToyTask:
    """A latent-diffusion step over toy networks; `strength` is that of the noise in what it restores."""

    gives, label = frozenset({"pred", "sr"}), "prediction"

    def __init__(
        self, networks: ToyNetworks, *, seed: int, decode_crop: int | None = None, strength: Callable[[], float] = lambda: 0.1
    ) -> None:
        self.networks, self.seed, self.decode_crop, self.strength = networks, seed, decode_crop, strength
        self.module: nn.Module = networks.denoiser

    def to(self, device: torch.device) -> None:
        self.networks.to(device)

    def draw(self, batch: Batch, losses: Sequence[Loss]) -> Draws:
        indices, schedule = batch.index.tolist(), self.networks.schedule
        t = torch.tensor([int(torch.randint(1000, (), generator=sample_generator(self.seed, i, "timestep"))) for i in indices])
        given = Given(t=t, snr=schedule.snr(t))
        shape = self.networks.codec.noise_shape(batch.hr)[1:]
        noise = {name: per_sample_noise(self.seed, indices, name, shape) for name in ("posterior_hr", "posterior_lr", "noise")}
        pixel_losses = [loss.active(given) for loss in losses if loss.name != "diffusion"]
        if not pixel_losses:
            return Draws(given, noise)
        decoded = torch.stack(pixel_losses).any(dim=0).nonzero()[:, 0]
        hr, mask, origin, windows = batch.hr[decoded], batch.mask[decoded], torch.zeros(len(decoded), 2, dtype=torch.int64), None
        if self.decode_crop is not None and len(decoded):
            windows = draw_windows(batch.index[decoded].tolist(), (shape[1], shape[2]), self.decode_crop, self.seed)
            hr, mask, origin = windows.cut_pixels(hr, 4), windows.cut_pixels(mask, 4), windows.start * 4
        return Draws(replace(given, decoded=decoded, hr=hr, mask=mask, origin=origin), noise, windows)

    def run(self, module: Any, batch: Batch, draws: Draws) -> Outputs:
        nets, given, noise = self.networks, draws.given, draws.noise
        with torch.no_grad():
            z0 = nets.codec.encode(batch.hr, noise["posterior_hr"]).float()
            enlarged = resize_bicubic(batch.lr, size=(batch.hr.shape[-2], batch.hr.shape[-1])).clamp(0, 1)
            z_lr = nets.codec.encode(enlarged, noise["posterior_lr"]).float()
        zt = nets.schedule.add_noise(z0, noise["noise"], given.t)
        pred = module(zt, given.t, z_lr, nets.text).float()
        sr = None if given.decoded is None else self._decode(nets.schedule.x0(pred, zt, given.t)[given.decoded], draws)
        return Outputs(**vars(given), pred=pred, target=noise["noise"], sr=sr)

    def _decode(self, z0: Tensor, draws: Draws) -> Tensor:
        """[K, 3, H, W], or the windows of it; K may be 0."""
        if not len(z0):
            assert draws.given.hr is not None
            return draws.given.hr + 0 * z0.sum()
        codec, windows = self.networks.codec, draws.windows
        return (codec.decode(z0) if windows is None else windows.cut_interior(codec.decode(windows.cut_latents(z0)), 4)).float()

    def restore(self, lr: Tensor, hr: Tensor, seed: int) -> Tensor:
        return hr + self.strength() * torch.randn(hr.shape, generator=torch.Generator().manual_seed(seed))

    def save(self, folder: Path) -> None:
        save_file({name: value.detach().clone() for name, value in self.module.named_parameters()}, folder / "weights.safetensors")


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
    strength: Callable[[], float] = lambda: 0.1,
    poison: range = range(0),
    **training: Any,
) -> Job:
    settings = TrainingSettings.model_validate(
        {"steps": 20, "batch_size": 2, "crop_size": SIZE, "log_every": 5, "optimizer": {"lr": 1e-2}, **training}
    )
    return Job(
        task=toy_task(dropout, decode_crop=decode_crop, strength=strength),
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


def toy_validation(every: int = 10, **values: Any) -> Validation:
    """Three pictures, measured by their mean square error."""
    return Validation(
        pairs=[PicturePair(f"p{i}.png", F.avg_pool2d(smooth(i)[None], 4)[0], smooth(i)) for i in range(3)],
        metrics={"mse": lambda a, b: (a - b).square().mean(dim=(1, 2, 3))},
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
