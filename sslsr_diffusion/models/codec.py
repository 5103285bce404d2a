"""Pixels in [0, 1] to normalised latents and back: the one place that knows the VAE's [-1, 1], its scaling, shift, mean and deviation."""

from collections.abc import Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sslsr_diffusion.models.size import pixels_per_latent

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


class Codec(nn.Module):
    """An AutoencoderKL seen from the outside: `encode` draws from the posterior with noise that the caller brings.

    Latents are normalised as the autoencoder's config says: (z - shift) scaling, or with a mean and deviation per channel
    (z - mean) scaling / std, as diffusers' pipelines do. FLUX.2's autoencoder packs 2 x 2 of its latent pixels into the channels of
    one, and normalises those by the statistics of its batch norm.
    """

    def __init__(self, vae: "AutoencoderKL") -> None:
        super().__init__()
        self.vae = vae

    @property
    def scale(self) -> int:
        """Pixels per latent pixel along a side (8 for Stable Diffusion)."""
        return pixels_per_latent(self.vae.config)

    @property
    def latent_channels(self) -> int:
        return self.vae.config.latent_channels * self._packed**2

    @property
    def _packed(self) -> int:
        """The autoencoder's own latent pixels along a side of one of ours."""
        return int(self.vae.config.get("patch_size", (1,))[0])

    @property
    def has_fidelity(self) -> bool:
        """Whether the decoder can be fed with the low-resolution picture's encoder features (CFW)."""
        return hasattr(self.vae, "encode_with_features")

    @property
    def draws(self) -> bool:
        """Whether latents depend on the posterior noise."""
        return getattr(self.vae, "draws", True)

    @property
    def device(self) -> torch.device:
        return next(self.vae.parameters()).device

    def noise_shape(self, pixels: Tensor) -> tuple[int, int, int, int]:
        """The shape of the posterior noise, and of the latents, for pixels [B, 3, H, W]."""
        self._check(pixels)
        b, _, h, w = pixels.shape
        return (b, self.latent_channels, h // self.scale, w // self.scale)

    def encode(self, pixels: Tensor, noise: Tensor) -> Tensor:
        """mean + exp(logvar / 2) noise, normalised: the posterior's sample, never its mode, [B, C, H/scale, W/scale] float32.

        Args:
            pixels: [B, 3, H, W] in [0, 1]; both sides divisible by `scale`.
            noise: [B, C, H/scale, W/scale], standard normal (`noise_shape`).
        """
        return self._sample(self._posterior(pixels), noise)

    def encode_with_features(self, pixels: Tensor, noise: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """`encode`, and the encoder features that `decode` takes; only with a CFW autoencoder."""
        posterior, features = self.vae.encode_with_features(self._to_vae(pixels))
        return self._sample(posterior, noise), features

    def decode(self, latents: Tensor, features: Sequence[Tensor] | None = None, fidelity: float = 1.0) -> Tensor:
        """Pixels [B, 3, H, W] float32, about [0, 1], not clamped; differentiable in `latents`.

        Args:
            latents: [B, C, h, w], normalised.
            features: of `encode_with_features` for the low-resolution picture; None decodes plainly.
            fidelity: the fusion weight w of CFW, any real; 0 is the plain decoder.
        """
        z = latents.to(self.vae.dtype)
        offset, deviation = self._statistics(z)
        z = z / self.vae.config.get("scaling_factor", 1.0)
        z = F.pixel_shuffle(z if offset is None else z * deviation + offset, self._packed)
        fused = {} if features is None or fidelity == 0 else {"features": features, "fidelity": fidelity}
        return self.vae.decode(z, return_dict=False, **fused)[0].float() * 0.5 + 0.5

    def autoencode(self, pixels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Encode, draw, decode, all differentiable: the reconstruction of `pixels`, and mean and log-variance [B, 2*C, h, w]."""
        posterior = self._posterior(pixels)
        return self.decode(self._sample(posterior, noise)), torch.cat([posterior.mean, posterior.logvar], dim=1)

    @torch.no_grad()
    def calibrate(self, pixels: Tensor) -> float:
        """Set the scaling factor of a freshly trained autoencoder to 1 / std of the latents of `pixels`, and return it.

        The autoencoder's config has no shift, mean or deviation: this package's presets have none.
        """
        posterior = self._posterior(pixels)
        factor = float(1.0 / (posterior.mean.float().var() + posterior.var.float().mean()).sqrt())
        self.vae.register_to_config(scaling_factor=factor)
        return factor

    def without_variance(self) -> "Codec":
        """A copy that encodes to the posterior's mean, whoever calls it: the log-variances become diffusers' lower bound, -30.

        They are the second half of what quant_conv says, or, without one (SD3, Z-Image), the encoder's last layer.
        """
        vae = deepcopy(self.vae)
        last, own = vae.encoder.conv_out if vae.quant_conv is None else vae.quant_conv, vae.config.latent_channels
        with torch.no_grad():
            last.weight[own:] = 0
            last.bias[own:] = -30
        return Codec(vae)

    def _posterior(self, pixels: Tensor) -> Any:
        return self.vae.encode(self._to_vae(pixels)).latent_dist

    def _sample(self, posterior: Any, noise: Tensor) -> Tensor:
        mean, std = (F.pixel_unshuffle(side.float(), self._packed) for side in (posterior.mean, posterior.std))
        if noise.shape != mean.shape:
            raise ValueError(f"expected posterior noise of shape {tuple(mean.shape)} (Codec.noise_shape), got {tuple(noise.shape)}.")
        z, factor = mean + std * noise.to(mean), self.vae.config.get("scaling_factor", 1.0)
        offset, deviation = self._statistics(z)
        return z * factor if offset is None else (z - offset) * factor / deviation

    def _statistics(self, like: Tensor) -> tuple[Tensor | float | None, Tensor | float]:
        """What is taken off and divided by, beside the scaling factor; None: nothing."""
        config, norm = self.vae.config, getattr(self.vae, "bn", None)
        mean, deviation, shift = (config.get(key) for key in ("latents_mean", "latents_std", "shift_factor"))
        if norm is not None:
            mean, deviation = norm.running_mean, (norm.running_var + config.batch_norm_eps).sqrt()
        if mean is not None and deviation is not None:
            return tuple(torch.as_tensor(side).to(like).reshape(1, -1, 1, 1) for side in (mean, deviation))  # type: ignore[return-value]
        return (shift, 1.0) if shift else (None, 1.0)

    def _to_vae(self, pixels: Tensor) -> Tensor:
        self._check(pixels)
        return (pixels * 2 - 1).to(self.vae.dtype)

    def _check(self, pixels: Tensor) -> None:
        if pixels.ndim != 4 or pixels.shape[-2] % self.scale or pixels.shape[-1] % self.scale:
            raise ValueError(
                f"expected pixels [B, 3, H, W] with both sides divisible by {self.scale}, got {tuple(pixels.shape)}; pad the picture first."
            )
