"""The loss in a trainer of latent diffusion models that has no picture at hand. Copy this file beside its training script.

For diffusers' train_controlnet.py and its text-to-image LoRA scripts, and for SeeSR; docs/integrations.md has the lines that call it.
"""

from typing import Any

import torch
from torch import Tensor

from sslsr_diffusion import SelfSimilarityLoss
from sslsr_diffusion.models.codec import Codec
from sslsr_diffusion.models.process import Process


class LatentSSL:
    """The loss between the picture that a prediction means, decoded, and the ground truth.

    z_0 is what the scheduler's rule makes of z_t and the prediction (epsilon, v or sample). Samples whose noise is stronger than
    `max_noise_level` times their signal are left out: such a z_0 is a blur.

    Args:
        vae: the trainer's AutoencoderKL, frozen, in any precision.
        scheduler: the trainer's noise scheduler.
        window: side of the random part that is decoded, in latent pixels: decoding with gradient is the peak of memory.
        options: arguments of SelfSimilarityLoss.
    """

    def __init__(self, vae: Any, scheduler: Any, *, window: int = 32, max_noise_level: float = 1.0, **options: Any) -> None:
        self.codec, self.process = Codec(vae), Process.of(scheduler.config, type(scheduler).__name__)
        self.window, self.max_noise_level = window, max_noise_level
        self.loss = SelfSimilarityLoss(**{"l1_weight": 100, "kl_weight": 100, "mask_stride": 3, "prefilter_sigma": 1.8, **options})

    def __call__(self, model_pred: Tensor, noisy_latents: Tensor, timesteps: Tensor, pixel_values: Tensor) -> Tensor:
        """A scalar.

        Args:
            model_pred, noisy_latents: [B, C, h, w], the latents multiplied by the autoencoder's scaling factor.
            timesteps: [B] int64.
            pixel_values: [B, 3, H, W] in [-1, 1], what the latents were encoded from.
        """
        z0, _ = self.process.clean_and_noise(model_pred.float(), noisy_latents.float(), timesteps)
        clean = (self.process.noise_level(timesteps) <= self.max_noise_level).to(z0.device)
        if not clean.any():
            return 0 * model_pred.float().sum()  # with a graph, as DDP wants
        y, x = (int(torch.randint(max(0, side - self.window) + 1, ())) for side in z0.shape[-2:])
        scale, side = self.codec.scale, self.window
        sr = self.codec.decode(z0[clean, :, y : y + side, x : x + side])  # in [0, 1]
        gt = pixel_values[clean, :, scale * y : scale * (y + side), scale * x : scale * (x + side)]
        return self.loss(sr, gt.float() / 2 + 0.5)
