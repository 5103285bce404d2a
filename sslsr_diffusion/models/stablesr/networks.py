"""StableSR's networks: an AutoencoderKL, a Stable Diffusion UNet with SFT layers, the structural encoder; and parts of them alone."""

from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.models.base import Base
from sslsr_diffusion.models.clip_text import PromptedNetworks, count_text_encoder, load_text_encoder, load_tokenizer
from sslsr_diffusion.models.codec import Codec
from sslsr_diffusion.models.condition import Text
from sslsr_diffusion.models.networks import Networks, count_parameters
from sslsr_diffusion.models.process import Process
from sslsr_diffusion.models.size import SizeRequirements
from sslsr_diffusion.models.stablesr.denoiser import Denoiser
from sslsr_diffusion.models.stablesr.settings import CALL_DEFAULTS


class StableSRNetworks(PromptedNetworks):
    """Everything that a step needs, and enough to write a complete pipeline at the end.

    With `text_encoder` (and tokenizer) any prompt can be encoded; without, the one context that the recipe's prompt gave.
    """

    denoiser: Denoiser

    def __init__(
        self,
        codec: Codec,
        denoiser: Denoiser,
        process: Process,
        text: Tensor,
        *,
        prompt: str = "",
        base: str = "",
        source: Base | None = None,
        text_config: dict[str, Any] | None = None,
        call_defaults: dict[str, float] | None = None,
    ) -> None:
        """
        Args:
            text: [1, L, D] context of the recipe's prompt.
            prompt: that text itself, which the result takes where a call names none.
            source, text_config: see PromptedNetworks.
        """
        super().__init__(codec, denoiser, process, Text(text), base=base, source=source, text_config=text_config)
        self.prompt = prompt
        self._call_defaults = dict(call_defaults or CALL_DEFAULTS)

    @property
    def conditional(self) -> bool:
        return self.denoiser.structural_encoder is not None

    @property
    def call_defaults(self) -> dict[str, float]:
        return dict(self._call_defaults)

    def size(self) -> SizeRequirements:
        """The UNet halves the latent once per level but the last; its config says at which latent side it was trained."""
        config, scale = self.denoiser.unet.config, self.codec.scale
        unit = SizeRequirements(scale * 2 ** (len(config.block_out_channels) - 1))
        trained = unit.rounded_up(int(config.sample_size or 0) * scale)
        return SizeRequirements(unit.multiple_of, trained=trained)

    def shapes(self) -> Self:
        """From the configs, because hooks of offload would be copied with the modules."""
        unet, encoder, vae = map(_on_meta, (self.denoiser.unet, self.denoiser.structural_encoder, self.codec.vae))
        _, length, width = self.text_sequence.shape
        text = torch.empty(1, max(77, length), width, device="meta")
        found = type(self)(Codec(vae), Denoiser(unet, encoder), self.process, text, base=self.base, text_config=self.text_config)
        for parameter, real in zip(found.parameters(), self.parameters()):
            parameter.requires_grad_(real.requires_grad)
        return found

    def components(self) -> dict[str, Any]:
        """The diffusers components of the pipeline; the text encoder, freed after the prompt was encoded, is read again."""
        source = self.source if self.source is not None and self.source.has("text_encoder") and not self.text_sequence.is_meta else None
        encoder = self.denoiser.structural_encoder
        return {
            "vae": self.codec.vae,
            "unet": self.denoiser.unet,
            **({} if encoder is None else {"structural_encoder": encoder}),
            "scheduler": self.process.scheduler(),
            "text_encoder": load_text_encoder(source) if source else None,
            "tokenizer": load_tokenizer(source) if source else None,
        }

    def save(self, folder: Path, **call: Any) -> None:
        """A base: one folder per component, which `model.base` takes. An upscaler is saved by its pipeline, with the call's defaults."""
        for name, part in self.components().items():
            if part is not None:
                part.save_pretrained(folder / name)

    def parameters_per_part(self) -> dict[str, tuple[int, int]]:
        """The text encoder is in memory for one prompt only."""
        parts = {"unet": self.denoiser.unet, "structural encoder": self.denoiser.structural_encoder, "vae": self.codec.vae}
        counts = {name: (count_parameters(part), count_parameters(part, trained=True)) for name, part in parts.items() if part is not None}
        if self.text_config is not None:
            counts["text encoder"] = (count_text_encoder(self.text_config), 0)
        return counts

    def set_trainable(self, which: str) -> list[str]:
        self.codec.requires_grad_(False)
        return self.denoiser.set_trainable(which)

    def check_fit(self) -> None:
        """Raises UserError unless denoiser, structural encoder and autoencoder belong together."""
        unet, encoder = self.denoiser.unet, self.denoiser.structural_encoder
        if self.codec.latent_channels != unet.config.in_channels:
            raise UserError(
                f"model.vae: the denoiser works on {unet.config.in_channels} latent channels, the autoencoder gives "
                f"{self.codec.latent_channels}."
            )
        if encoder is None:
            return
        maps, width = len(unet.down_blocks), unet.config.feature_channels
        if encoder.config.out_channels != width or len(encoder.taps) != maps:
            raise UserError(
                f"model.base: the UNet of {self.base} wants {maps} maps of {width} channels, its structural encoder gives "
                f"{len(encoder.taps)} of {encoder.config.out_channels}."
            )


class AutoencoderNetworks(Networks):
    """An autoencoder alone: what a latent upscaler begins with."""

    def __init__(self, codec: Codec, base: str = "") -> None:
        super().__init__(base)
        self.codec = codec

    def size(self) -> SizeRequirements:
        return SizeRequirements(self.codec.scale)

    def components(self) -> dict[str, Any]:
        return {"vae": self.codec.vae}

    def save(self, folder: Path, **call: Any) -> None:
        self.codec.vae.save_pretrained(folder / "vae", safe_serialization=True)

    def set_trainable(self, which: str) -> list[str]:
        self.requires_grad_(True)
        return [name for name, _ in self.named_parameters()]


def _on_meta(network: Any) -> Any:
    if network is None:
        return None
    network = getattr(network, "_orig_mod", network)  # torch.compile's wrapper
    with torch.device("meta"):
        return nn.Module.to(type(network).from_config(network.config), network.dtype)  # not diffusers' own to(), which warns
