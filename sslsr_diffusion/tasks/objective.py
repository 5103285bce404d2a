"""One step's data flow for each stage: pixels in, `Outputs` out. No optimizer, no accelerator, no I/O, no hidden randomness."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.images import resize_bicubic
from sslsr_diffusion.losses import Loss
from sslsr_diffusion.seeding import sample_generator
from sslsr_diffusion.tasks.decode_window import Windows, draw_windows
from sslsr_diffusion.types import Batch, Given, Outputs


@dataclass(frozen=True)
class Draws:
    """Everything random about one micro-batch, and what follows from it before the networks run."""

    given: Given
    noise: dict[str, Tensor] = field(default_factory=dict)
    windows: Windows | None = None


class Objective(Protocol):
    """What the loop needs to know about a stage."""

    module: nn.Module  # all trained parameters, one forward: what DDP, FSDP2 and DeepSpeed wrap

    def to(self, device: torch.device) -> None:
        """Move the networks, frozen ones included."""

    def draw(self, batch: Batch, losses: Sequence[Loss]) -> Draws:
        """Timesteps, noises and windows of each sample, from (seed, global sample index) alone."""

    def run(self, module: Any, batch: Batch, draws: Draws) -> Outputs:
        """The networks' part; `module` is `self.module` or its wrapped form."""


@dataclass(frozen=True)
class StepResult:
    """What one micro-batch adds to the optimizer step."""

    loss: Tensor  # the scalar to go backward from
    weighted: dict[str, Tensor]  # per loss, detached, before any automatic weight
    raw: dict[str, Tensor]  # per term, detached and unweighted: what is plotted


def apply_losses(
    outputs: Outputs, losses: Sequence[Loss], counts: dict[str, Tensor] | None = None, scales: dict[str, float] | None = None
) -> StepResult:
    """The sum of all losses; `counts` are the units of the whole batch, `scales` the automatic weights."""
    total = outputs.t.new_zeros((), dtype=torch.float32)
    weighted: dict[str, Tensor] = {}
    raw: dict[str, Tensor] = {}
    for loss in losses:
        value, terms = loss(outputs, None if counts is None else counts[loss.name])
        total = total + value * (scales or {}).get(loss.name, 1.0)
        weighted[loss.name] = value.detach()
        raw.update(terms)
    return StepResult(total, weighted, raw)


def per_sample_noise(seed: int, indices: list[int], purpose: str, shape: Sequence[int]) -> Tensor:
    """[B, *shape] standard normal, one generator per sample, drawn on the CPU."""
    return torch.stack([torch.randn(tuple(shape), generator=sample_generator(seed, i, purpose)) for i in indices])


class DiffusionObjective:
    """StableSR stage 1 (Wang et al., IJCV 2024) with pixel losses on the decoded x0 (Chen et al., ACM MM 2024).

    z0, z_lr = encode(hr), encode(bicubic(lr));  zt = add_noise(z0, n, t)
    pred = denoiser(zt, t, z_lr, text);  sr = decode(x0(pred, zt, t))

    A base (a denoiser without structural encoder) goes the same way, not `conditional`: without z_lr. `timesteps` are
    the noise levels to train, each drawn equally often; None: all. With `from_lr` the sampler's own start is trained:
    zt = add_noise(z_lr, n, t), and the noise that would lead there from z0 takes n's place in the target.
    """

    def __init__(
        self,
        networks: Any,
        *,
        seed: int,
        decode_crop: int | None = None,
        timesteps: Sequence[int] | None = None,
        conditional: bool = True,
        from_lr: bool = False,
    ) -> None:
        self.networks = networks
        self.module: nn.Module = networks.denoiser
        self.seed = seed
        self.decode_crop = decode_crop
        self.timesteps = timesteps or range(networks.schedule.num_train_timesteps)
        self.conditional = conditional
        self.from_lr = from_lr

    def to(self, device: torch.device) -> None:
        self.networks = self.networks.to(device)

    def draw(self, batch: Batch, losses: Sequence[Loss]) -> Draws:
        indices, device = batch.index.tolist(), batch.hr.device
        schedule, codec = self.networks.schedule, self.networks.codec
        places = [int(torch.randint(len(self.timesteps), (), generator=sample_generator(self.seed, i, "timestep"))) for i in indices]
        t = torch.tensor([self.timesteps[place] for place in places]).to(device)
        given = Given(t=t, snr=schedule.snr(t).to(device))
        shape = codec.noise_shape(batch.hr)[1:]
        noise = {p: per_sample_noise(self.seed, indices, p, shape).to(device) for p in ("posterior_hr", "posterior_lr", "noise")}
        given, windows = choose_pixels(given, batch, losses, scale=codec.scale, decode_crop=self.decode_crop, seed=self.seed)
        return Draws(given, noise, windows)

    def run(self, module: Any, batch: Batch, draws: Draws) -> Outputs:
        nets, t = self.networks, draws.given.t
        with torch.no_grad():
            z0 = nets.codec.encode(batch.hr, draws.noise["posterior_hr"]).float()  # [B, 3, H, W] -> [B, 4, H/8, W/8], scaled
            z_lr = nets.codec.encode(upsampled(batch), draws.noise["posterior_lr"]).float() if self.conditional else None
        noise = draws.noise["noise"]
        if self.from_lr:
            noise = nets.schedule.noise_to(z0, z_lr, noise, t)
        zt = nets.schedule.add_noise(z0, noise, t)
        target = nets.schedule.target(z0, noise, t)
        pred = module(zt, t, z_lr, nets.text).float()  # epsilon or v: only the schedule knows which
        sr = self._decode(nets.schedule.x0(pred, zt, t), draws)
        return Outputs(**vars(draws.given), pred=pred, target=target, sr=sr)

    def _decode(self, z0: Tensor, draws: Draws) -> Tensor | None:
        """Pixels of the samples and windows that some loss looks at. Decoding with gradient is a step's memory peak."""
        if draws.given.decoded is None:
            return None
        if draws.given.decoded.numel() == 0:
            assert draws.given.hr is not None
            return draws.given.hr + 0 * z0.sum()
        z0 = z0[draws.given.decoded]
        if draws.windows is None:
            return self.networks.codec.decode(z0).float()
        return draws.windows.cut_interior(self.networks.codec.decode(draws.windows.cut_latents(z0)).float(), self.networks.codec.scale)


class AutoencoderObjective:
    """A VAE from scratch: sr = decode(sampled latents of hr); no diffusion in it."""

    def __init__(self, codec: Any, *, seed: int) -> None:
        self.codec = codec
        self.module: nn.Module = Autoencoder(codec)
        self.seed = seed

    def to(self, device: torch.device) -> None:
        self.module.to(device)

    def draw(self, batch: Batch, losses: Sequence[Loss]) -> Draws:
        noise = per_sample_noise(self.seed, batch.index.tolist(), "posterior_hr", self.codec.noise_shape(batch.hr)[1:])
        return Draws(_everything(batch), {"posterior_hr": noise.to(batch.hr.device)})

    def run(self, module: Any, batch: Batch, draws: Draws) -> Outputs:
        sr, moments = module(batch.hr, draws.noise["posterior_hr"])
        return Outputs(**vars(draws.given), sr=sr.float(), moments=moments.float())


class Autoencoder(nn.Module):
    """Encoder, sampling and decoder in one forward, as DDP wants it."""

    def __init__(self, codec: Any) -> None:
        super().__init__()
        self.vae = codec.vae
        self._codec = codec

    def forward(self, pixels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, H, W] in [0, 1] -> the reconstruction, and the moments [B, 2*c, h, w] of the latents."""
        return self._codec.autoencode(pixels, noise)


class DecoderObjective:
    """A decoder learns on what the frozen upscaler makes of lr, stored or sampled on the fly.

    sr = decode(latents);  `fused` (StableSR stage 2): sr = decode(latents, features(bicubic(lr))), and only the fusion layers learn
    """

    def __init__(self, networks: Any, *, seed: int, synthesize: Callable[[Tensor, list[int]], Tensor], fused: bool) -> None:
        """`synthesize(z_lr, global sample indices) -> latents` runs the frozen upscaler."""
        self.networks = networks
        self.module: nn.Module = TrainedDecoder(networks.codec, fused=fused)
        self.seed = seed
        self.synthesize = synthesize
        self.fused = fused

    def to(self, device: torch.device) -> None:
        self.networks = self.networks.to(device)

    def draw(self, batch: Batch, losses: Sequence[Loss]) -> Draws:
        noise = per_sample_noise(self.seed, batch.index.tolist(), "posterior_lr", self.networks.codec.noise_shape(batch.hr)[1:])
        return Draws(_everything(batch), {"posterior_lr": noise.to(batch.hr.device)})

    def run(self, module: Any, batch: Batch, draws: Draws) -> Outputs:
        codec, noise, features = self.networks.codec, draws.noise["posterior_lr"], None
        with torch.no_grad():
            if self.fused:
                z_lr, features = codec.encode_with_features(upsampled(batch), noise)
            else:
                z_lr = codec.encode(upsampled(batch), noise)
            latents = self.synthesize(z_lr.float(), batch.index.tolist()) if batch.latents is None else batch.latents
        if latents.shape != z_lr.shape:
            raise UserError(
                f"data: this autoencoder makes latents {list(z_lr.shape[1:])} of such crops, stored are {list(latents.shape[1:])}; "
                "make them again with `sslsr prepare cfw` and the model that is trained."
            )
        return Outputs(**vars(draws.given), sr=module(latents, features).float())


class TrainedDecoder(nn.Module):
    """The decoder as one trained module: of a CFW decoder the fusion layers learn, of a plain one all of it."""

    def __init__(self, codec: Any, *, fused: bool) -> None:
        super().__init__()
        self.vae = codec.vae
        self._codec = codec
        self.vae.requires_grad_(False)
        for part in (self.vae.fusion_layers,) if fused else (self.vae.decoder, self.vae.post_quant_conv):
            if part is not None:
                part.requires_grad_(True)

    def forward(self, latents: Tensor, features: Sequence[Tensor] | None = None) -> Tensor:
        return self._codec.decode(latents, features, fidelity=1.0)


def upsampled(batch: Batch) -> Tensor:
    """[B, 3, h, w] -> [B, 3, H, W] in [0, 1]: the low-resolution pictures at the size of the ground truth."""
    return resize_bicubic(batch.lr, size=(batch.hr.shape[-2], batch.hr.shape[-1])).clamp(0, 1)


def _everything(batch: Batch) -> Given:
    """Stages without noise levels: every sample is seen, whole."""
    samples, device = batch.hr.shape[0], batch.hr.device
    return Given(
        t=torch.zeros(samples, dtype=torch.int64, device=device),
        snr=torch.full((samples,), float("inf"), device=device),
        decoded=torch.arange(samples, device=device),
        hr=batch.hr,
        mask=batch.mask,
    )


def choose_pixels(
    given: Given, batch: Batch, losses: Sequence[Loss], *, scale: int, decode_crop: int | None, seed: int
) -> tuple[Given, Windows | None]:
    """Add to `given` the pixels that some loss looks at: gated-out samples and everything outside the windows are never decoded."""
    wanted = [loss.active(given) for loss in losses if loss.needs_pixels]
    if not wanted:
        return given, None
    decoded = torch.stack(wanted).any(dim=0).nonzero()[:, 0]
    hr, mask = batch.hr[decoded], batch.mask[decoded]
    windows, origin = None, torch.zeros(len(decoded), 2, dtype=torch.int64)
    latent = (batch.hr.shape[-2] // scale, batch.hr.shape[-1] // scale)
    if decode_crop is not None and decode_crop < max(latent) and len(decoded):
        windows = draw_windows(batch.index[decoded.cpu()].tolist(), latent, decode_crop, seed)
        hr, mask, origin = windows.cut_pixels(hr, scale), windows.cut_pixels(mask, scale), windows.start * scale
    return Given(t=given.t, snr=given.snr, decoded=decoded, hr=hr, mask=mask, origin=origin), windows
