"""Task `decoder`: a decoder learns on what the frozen upscaler makes of lr, stored or sampled on the fly."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.inference.open import restorer_of
from sslsr_diffusion.inference.restorer import Restorer
from sslsr_diffusion.inference.sampling import sample_latents
from sslsr_diffusion.models.codec import Codec
from sslsr_diffusion.models.condition import Condition
from sslsr_diffusion.models.stablesr.networks import StableSRNetworks
from sslsr_diffusion.seeding import derive_seed, seeded
from sslsr_diffusion.tasks.frame import Frame, SampledCallSettings, TaskSettings
from sslsr_diffusion.tasks.graph import Graph, decoder_graph
from sslsr_diffusion.tasks.pixels import seen
from sslsr_diffusion.tasks.task import Draws, TaskBase
from sslsr_diffusion.types import Batch, Outputs


class DecoderTaskSettings(TaskSettings):
    """The decoder of a finished upscaler learns on the latents that it predicts."""

    kind: Literal["decoder"] = "decoder"
    part: Literal["all", "fusion"] = Field(
        "all",
        description="all: a plain decoder whole; fusion: the layers that fuse it with the low-resolution picture's encoder features "
        "(CFW, StableSR's second stage).",
    )
    synthesis_steps: int = Field(20, ge=1, description="Sampling steps of the frozen upscaler per training sample, where none is stored.")
    inference: SampledCallSettings = Field(SampledCallSettings(), description="How the upscaler is called in validation and by default.")


class DecoderTask(TaskBase):
    """sr = decode(latents);  `fused` (StableSR stage 2): sr = decode(latents, features(bicubic(lr))), and only the fusion layers learn"""

    networks: StableSRNetworks
    settings: ClassVar[type[TaskSettings]] = DecoderTaskSettings
    reads_latents: ClassVar[bool] = True
    gives: ClassVar[frozenset[str]] = frozenset({"sr", "lr", "sr_ema"})
    posteriors: ClassVar[tuple[str, ...]] = ("posterior_lr",)

    def __init__(
        self,
        networks: StableSRNetworks,
        *,
        seed: int,
        synthesize: Callable[[Condition, list[int]], Tensor],
        fused: bool,
        restorer: Restorer | None = None,
    ) -> None:
        """`synthesize(condition, global sample indices) -> latents` runs the frozen upscaler."""
        self.networks, self.restorer = networks, restorer
        networks.denoiser.requires_grad_(False)
        self.module: nn.Module = TrainedDecoder(networks.codec, fused=fused)
        self.seed, self.synthesize, self.fused = seed, synthesize, fused

    @classmethod
    def build(cls, settings: DecoderTaskSettings, frame: Frame) -> Self:
        networks = frame.build()
        assert isinstance(networks, StableSRNetworks)
        fused = settings.part == "fusion"
        _check_upscaler(networks, settings, fused)
        if fused and not networks.codec.has_fidelity:
            from sslsr_diffusion.models import AutoencoderKLCFW

            with seeded(derive_seed(frame.seed, "cfw"), meta=frame.meta):
                networks.codec = Codec(AutoencoderKLCFW.from_autoencoder(networks.codec.vae))
            networks.economize(gradient_checkpointing=frame.gradient_checkpointing, channels_last=frame.channels_last)

        def synthesize(condition: Condition, indices: list[int]) -> Tensor:
            assert condition.z_lr is not None
            return sample_latents(networks, condition.z_lr, condition, indices, settings.synthesis_steps, seed=frame.seed)

        restorer = restorer_of(networks, frame.family, scale=frame.scale, **settings.inference.named)
        return cls(networks, seed=frame.seed, synthesize=synthesize, fused=fused, restorer=restorer)

    def graph(self) -> Graph:
        """The decoder alone, of the upscaler's latents."""
        if self.fused:
            raise UserError("onnx: expected a plain decoder, got one that is fused with the encoder's features (CFW); leave it out.")
        return decoder_graph(self.networks.codec)

    def run(self, module: Any, batch: Batch, draws: Draws) -> Outputs:
        codec, features = self.networks.codec, None

        def encode(pixels: Tensor, noise: Tensor) -> Tensor:
            nonlocal features
            z_lr, features = codec.encode_with_features(pixels, noise)
            return z_lr

        with torch.no_grad():
            condition = self.networks.see(seen(batch), draws.noise["posterior_lr"], encode=encode if self.fused else None)
            latents = self.synthesize(condition, batch.index.tolist()) if batch.latents is None else batch.latents
        shape = codec.noise_shape(batch.hr)
        if latents.shape != shape:
            raise UserError(
                f"data: this autoencoder makes latents {list(shape[1:])} of such crops, stored are {list(latents.shape[1:])}; "
                "make them again with `sslsr prepare cfw` and the model that is trained."
            )
        return Outputs(**vars(draws.given), sr=module(latents, features).float())


def _check_upscaler(networks: StableSRNetworks, settings: DecoderTaskSettings, fused: bool) -> None:
    if not fused and networks.codec.has_fidelity:
        raise UserError(
            f"model.base: the decoder of {networks.base} is fused with the encoder (CFW); set task.part: fusion to train it on."
        )
    if networks.source is not None and not networks.source.has("structural_encoder"):
        raise UserError(f"model.base: task decoder needs a finished upscaler, and {networks.base} has no structural_encoder/.")
    if not networks.process.starts_from_lr:
        return
    for key, steps in (("task.synthesis_steps", settings.synthesis_steps), ("task.inference.steps", settings.inference.steps)):
        if steps != 1:
            raise UserError(f"{key}: {networks.base} is a one-step model; expected 1, got {steps}.")


class TrainedDecoder(nn.Module):
    """The decoder as one trained module: of a CFW decoder the fusion layers learn, of a plain one all of it."""

    def __init__(self, codec: Codec, *, fused: bool) -> None:
        super().__init__()
        self.codec = codec
        vae: Any = codec.vae
        vae.requires_grad_(False)
        for part in (vae.fusion_layers,) if fused else (vae.decoder, vae.post_quant_conv):
            if part is not None:
                part.requires_grad_(True)

    def forward(self, latents: Tensor, features: Sequence[Tensor] | None = None) -> Tensor:
        return self.codec.decode(latents, features, fidelity=1.0)
