"""What a base's network is to a one-step upscaler: a denoiser with the noise process's signs and times, whatever the network's own are."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sslsr_diffusion.models.base import Base
from sslsr_diffusion.models.condition import Condition, Text
from sslsr_diffusion.tables import named


class Backbone(nn.Module):
    """One network of a base model, called as the base's own diffusers pipeline calls it.

    Its prediction is what the process expects: epsilon or v for DDPM, the velocity n - z_0 for a flow, whose timestep is 1000 sigma.
    """

    part: ClassVar[str] = "transformer"  # the folder of the network in a pipeline folder
    network_class: ClassVar[str]  # of diffusers
    autoencoder_classes: ClassVar[tuple[str, ...]] = ("AutoencoderKL",)  # that go with it, of AUTOENCODERS
    pipeline_class: ClassVar[str]  # of diffusers: what loads the LoRA, and what encodes the prompt
    flow: ClassVar[bool] = True  # whether the process is a flow, else DDPM
    tokens: ClassVar[int]  # of an encoded prompt, where none was encoded
    last: ClassVar[str] = "proj_out"  # the layer that says the prediction
    # node and inputs that load the text encoders in ComfyUI; None: they are in the network's own file
    comfyui_text: ClassVar[tuple[str, Mapping[str, str]] | None] = None

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    @classmethod
    def check(cls, config: Mapping[str, Any], name: str) -> None:
        """Raises Refused where a network of this class and config needs more than a call gives it; `name`: of the base."""

    @property
    def channels(self) -> int:
        """Latent channels."""
        return int(self.network.config.in_channels)

    @property
    def unit(self) -> int:
        """Both sides of the latent are multiples of it."""
        return 1

    @property
    def trained_side(self) -> int:
        """Side of the latents that the network was made for; 0: any."""
        return 0

    @property
    def longest_side(self) -> int:
        """Side of the latents at which the network's positions end; 0: nowhere."""
        return 0

    def start_at_zero(self) -> None:
        """Let a drawn network predict zeros."""
        for parameter in self.network.get_submodule(self.last).parameters():
            nn.init.zeros_(parameter)

    @abstractmethod
    def no_text(self, tokens: int = 1) -> Text:
        """The context of a base without text encoder: zeros."""

    def encode(self, base: Base, prompt: str) -> Text:
        """The prompt as the base's own pipeline encodes it, float32; the text encoders are loaded in bfloat16, as published, and freed.
        Raises UserError, OSError, ValueError: the text encoders are not whole.
        """
        pipeline = named(f"diffusers:{self.pipeline_class}")
        without = {self.part: None, "vae": None}
        pipe = pipeline.from_pretrained(base.folder, torch_dtype=torch.bfloat16, local_files_only=True, use_safetensors=True, **without)
        with torch.no_grad():
            return self.encoded(pipe, prompt).each(lambda part: part.float())

    @abstractmethod
    def encoded(self, pipe: Any, prompt: str) -> Text:
        """The prompt by a pipeline that has text encoders."""

    def prepared(self, zt: Tensor, condition: Condition) -> tuple[Tensor, Text]:
        """The latents, and one text for each, in the network's precision."""
        assert condition.text is not None
        dtype = self.network.dtype
        return zt.to(dtype), condition.text.repeated(len(zt)).each(lambda part: part.to(dtype))

    @abstractmethod
    def forward(self, zt: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The prediction, [B, C, h, w].

        Args:
            zt: [B, C, h, w], normalised by the codec.
            t: [B] what the process says of the timestep: its index for DDPM, 1000 sigma for a flow.
            condition: `text` of [1 or B, L, D]; the low-resolution latent is what the call begins with, so the network does not see it.
        """


# the class of the autoencoder in a base's folder -> where it is
AUTOENCODERS = {
    "AutoencoderKL": "diffusers:AutoencoderKL",
    "AutoencoderKLFlux2": "diffusers:AutoencoderKLFlux2",
    "ShuffleAutoencoder": "sslsr_diffusion.models.shuffle_autoencoder:ShuffleAutoencoder",
}
# the class of the network in a base's folder -> how it is called
BACKBONES: dict[str, str] = {
    "UNet2DConditionModel": "sd:StableDiffusion",
    "SD3Transformer2DModel": "sd3:StableDiffusion3",
    "Flux2Transformer2DModel": "flux2:Flux2",
    "ZImageTransformer2DModel": "zimage:ZImage",
}


def backbone_class(network_class: str) -> type[Backbone]:
    """The entry of BACKBONES, imported now."""
    found: type[Backbone] = named(f"sslsr_diffusion.models.one_step.{BACKBONES[network_class]}")
    return found
