"""The forward process z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) n, and what a network that predicts n or v says about z_0."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from diffusers import DDPMScheduler
from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction"]


def make_scheduler(config: Mapping[str, Any]) -> DDPMScheduler:
    """The sampler's scheduler for a base model's scheduler config: same betas and prediction type, spaced DDPM settings.

    StableSR neither clips x_0 nor learns the variance, whatever the base model's own scheduler did.
    """
    keep = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type", "rescale_betas_zero_snr")
    kept = {key: config[key] for key in keep if key in config}
    return DDPMScheduler(**kept, clip_sample=False, variance_type="fixed_small")


def truncated(config: Mapping[str, Any], num_timesteps: int) -> dict[str, Any]:
    """The config of a scheduler with the first `num_timesteps` noise levels only; the timesteps keep their meaning.

    Raises:
        ValueError: it has fewer.
    """
    scheduler = make_scheduler(config)
    betas = scheduler.betas
    if num_timesteps > len(betas):
        raise ValueError(f"expected at most the {len(betas)} timesteps of the scheduler, got {num_timesteps}.")
    return {
        "num_train_timesteps": num_timesteps,
        "trained_betas": betas[:num_timesteps].tolist(),
        "prediction_type": scheduler.config.prediction_type,
    }


@dataclass(frozen=True)
class Schedule:
    """Noise levels of the training process. All functions take t as [B] int64 and broadcast over [B, C, h, w]."""

    alphas_cumprod: Tensor  # [T] float32, decreasing
    prediction_type: PredictionType = "epsilon"

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> Schedule:
        """From a diffusers scheduler, or from its config (a mapping).

        Raises:
            ValueError: the scheduler predicts something other than "epsilon" or "v_prediction".
        """
        if isinstance(scheduler, Mapping):
            scheduler = make_scheduler(scheduler)
        kind = scheduler.config.prediction_type
        if kind not in ("epsilon", "v_prediction"):
            raise ValueError(f"expected a scheduler with prediction_type 'epsilon' or 'v_prediction', got {kind!r}.")
        return cls(scheduler.alphas_cumprod.float().cpu(), kind)

    def to(self, device: torch.device | str) -> Schedule:
        """The same schedule with its table on `device`, so that a step does not copy it there."""
        return replace(self, alphas_cumprod=self.alphas_cumprod.to(device))

    @property
    def num_train_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    @property
    def starts_from_lr(self) -> bool:
        """Whether the last timestep still shows the picture: sampling then starts from the low-resolution one, not from next to nothing."""
        return float(self.alphas_cumprod[-1]) > 0.5

    def add_noise(self, z0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) n."""
        signal, sigma = self._levels(t, z0)
        return signal * z0 + sigma * noise

    def noise_to(self, z0: Tensor, other: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The noise that leads from z0 to where `noise` leads from `other`: n + sqrt(SNR_t) (other - z_0)."""
        signal, sigma = self._levels(t, z0)
        return noise + signal / sigma * (other - z0)

    def target(self, z0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should say: n for epsilon, v = sqrt(abar_t) n - sqrt(1 - abar_t) z_0 for v_prediction."""
        if self.prediction_type == "epsilon":
            return noise
        signal, sigma = self._levels(t, z0)
        return signal * noise - sigma * z0

    def x0(self, pred: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        """z_0 = (z_t - sqrt(1 - abar_t) n) / sqrt(abar_t), or sqrt(abar_t) z_t - sqrt(1 - abar_t) v. No clipping."""
        signal, sigma = self._levels(t, zt)
        if self.prediction_type == "epsilon":
            return (zt - sigma * pred) / signal
        return signal * zt - sigma * pred

    def snr(self, t: Tensor) -> Tensor:
        """abar_t / (1 - abar_t), [B] float32."""
        abar = self.alphas_cumprod.to(t.device)[t]
        return abar / (1 - abar)

    def _levels(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(abar_t), sqrt(1 - abar_t) as [B, 1, 1, 1] float32 (at least), so that half precision latents lose nothing here."""
        abar = self.alphas_cumprod.to(like.device)[t.to(like.device)].reshape(-1, *(1,) * (like.ndim - 1))
        dtype = torch.promote_types(like.dtype, torch.float32)
        return abar.sqrt().to(dtype), (1 - abar).sqrt().to(dtype)
