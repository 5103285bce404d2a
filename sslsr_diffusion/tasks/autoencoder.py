"""Task `autoencoder`: a VAE from scratch; no diffusion in it."""

from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field
from torch import Tensor, nn

from sslsr_diffusion.inference.tiled import Reconstruct
from sslsr_diffusion.models.codec import Codec
from sslsr_diffusion.models.stablesr.networks import AutoencoderNetworks
from sslsr_diffusion.tasks.frame import Frame, TaskSettings
from sslsr_diffusion.tasks.graph import Graph, decoder_graph
from sslsr_diffusion.tasks.task import Draws, TaskBase
from sslsr_diffusion.types import Batch, Outputs

CALIBRATION_PICTURES = 32  # crops from which a fresh autoencoder's scaling factor is measured


class AutoencoderTaskSettings(TaskSettings):
    """An autoencoder from scratch."""

    kind: Literal["autoencoder"] = "autoencoder"
    latents: Literal["sample", "mean"] = Field(
        "sample",
        description="What the saved encoder says. sample: as trained, a posterior to draw from; mean: its mean, so that a decoder trained "
        "to bear noise (losses: latent_kl) gets clean latents.",
    )


class AutoencoderTask(TaskBase):
    """sr = decode(sampled latents of hr)"""

    networks: AutoencoderNetworks
    settings: ClassVar[type[TaskSettings]] = AutoencoderTaskSettings
    makes_upscaler: ClassVar[bool] = False
    gives: ClassVar[frozenset[str]] = frozenset({"sr", "sr_ema", "moments"})
    label: ClassVar[str] = "reconstruction"
    posteriors: ClassVar[tuple[str, ...]] = ("posterior_hr",)

    def __init__(self, networks: AutoencoderNetworks, *, seed: int, mean: bool = False, frame: Frame | None = None) -> None:
        """`mean`: save an encoder that gives the posterior's mean; `frame` gives the crops for the calibration."""
        self.networks, self.seed, self._mean, self._frame = networks, seed, mean, frame
        self.module: nn.Module = Autoencoder(networks.codec)
        self._reconstruct = Reconstruct(networks.codec)

    @classmethod
    def build(cls, settings: AutoencoderTaskSettings, frame: Frame) -> Self:
        networks = frame.build("autoencoder")
        assert isinstance(networks, AutoencoderNetworks)
        return cls(networks, seed=frame.seed, mean=settings.latents == "mean", frame=frame)

    def run(self, module: Any, batch: Batch, draws: Draws) -> Outputs:
        sr, moments = module(batch.hr, draws.noise["posterior_hr"])
        return Outputs(**vars(draws.given), sr=sr.float(), moments=moments.float())

    def restore(self, lr: Tensor, hr: Tensor, seed: int) -> Tensor:
        return self._reconstruct(hr, seed)

    def save(self, folder: Path) -> None:
        codec = self.networks.codec.without_variance() if self._mean else self.networks.codec
        if self._frame is not None and self._frame.crops is not None:
            codec.calibrate(self._frame.crops(CALIBRATION_PICTURES).to(codec.device))
        self.networks.codec.vae.register_to_config(scaling_factor=codec.vae.config.scaling_factor)
        AutoencoderNetworks(codec).save(folder)

    def graph(self) -> Graph:
        """The decoder, of latents as the saved encoder gives them."""
        return decoder_graph(self.networks.codec)


class Autoencoder(nn.Module):
    """Encoder, sampling and decoder in one forward, as DDP wants it."""

    def __init__(self, codec: Codec) -> None:
        super().__init__()
        self.codec = codec

    def forward(self, pixels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, H, W] in [0, 1] -> the reconstruction, and the moments [B, 2*c, h, w] of the latents."""
        return self.codec.autoencode(pixels, noise)
