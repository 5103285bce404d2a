"""What a family's networks are to everyone above: sizes, parts, files; and the two ways in which networks make a picture."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.models.codec import Codec
from sslsr_diffusion.models.condition import Condition, Text
from sslsr_diffusion.models.process import Process
from sslsr_diffusion.models.size import SizeRequirements


class Networks(nn.Module):
    """All networks of one model, moved in place by `.to(device)`. A family builds one of the two kinds below."""

    def __init__(self, base: str, revision: str | None = None) -> None:
        """`base`: what they were built from, as the user wrote it; `revision`: commit of one that was fetched from the hub."""
        super().__init__()
        self.base, self.revision = base, revision

    @abstractmethod
    def size(self) -> SizeRequirements:
        """The sides that these networks take; nobody else derives them."""

    @abstractmethod
    def components(self) -> dict[str, Any]:
        """Name -> part (a network, scheduler or tokenizer), as the files of a saved model are named."""

    @abstractmethod
    def save(self, folder: Path, **call: Any) -> None:
        """Write what the family's own world loads; `call` are the defaults of a call that names none."""

    @abstractmethod
    def set_trainable(self, which: str) -> list[str]:
        """Choose what trains, by one of the family's names; the names of the trained parameters."""

    def shapes(self) -> Self:
        """The same networks on the meta device, for estimates: no weight is copied."""
        tensors = [*self.parameters(), *self.buffers()]
        memo: dict[int, Any] = {id(t): torch.empty_like(t, device="meta") for t in tensors if not isinstance(t, nn.Parameter)}
        memo |= {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in tensors if isinstance(p, nn.Parameter)}
        return deepcopy(self, memo)

    @property
    def call_defaults(self) -> Mapping[str, Any]:
        """Defaults of a call that the base brought along, for example `detail`."""
        return {}

    def parameters_per_part(self) -> dict[str, tuple[int, int]]:
        """Part -> (all parameters, trained parameters), for the dry run."""
        parts = {name.replace("_", " "): part for name, part in self.components().items() if isinstance(part, nn.Module)}
        return {name: (count_parameters(part), count_parameters(part, trained=True)) for name, part in parts.items()}

    def saved_bytes(self) -> int:
        """What weights take less than their shapes say, where they are held as integers."""
        return 0

    def merge(self) -> None:
        """Add LoRAs to the weights of the base, so that a result is the whole model; UserError where there are none."""
        raise UserError(f"merge: expected a model with a LoRA, {self.base} has none; leave it out.")

    def for_comfyui(self, folder: Path, scale: float) -> list[str]:
        """Write a LoRA as ComfyUI loads it, and sentences on what it lacks; UserError where there is none."""
        raise UserError(f"comfyui: expected a model with a LoRA of its own, {self.base} has none; leave it out.")

    def left_out(self) -> list[str]:
        """Sentences on what others, who load a result without this package, do not do with it."""
        return []

    def economize(self, *, gradient_checkpointing: bool, channels_last: bool) -> None:
        """What saves memory or time and leaves the mathematics alone."""
        for part in self.modules() if gradient_checkpointing else ():
            enable = getattr(part, "enable_gradient_checkpointing", None)
            if callable(enable) and getattr(part, "_supports_gradient_checkpointing", True):  # diffusers raises where a class lacks it
                enable()
        if channels_last:
            cast(Any, self).to(memory_format=torch.channels_last)  # torch 2.13's types do not know it


class PixelNetworks(Networks):
    """Low-resolution pixels in, high-resolution pixels out, in one call."""

    scale: int  # enlargement
    has_branch: bool = False  # whether they make something beside the picture, for a loss
    overlap: int = 16  # low-resolution pixels that tiles share at least: four times as far as a pixel sees leaves no seam at all
    far_sighted: bool = False  # whether a pixel sees further than that

    @abstractmethod
    def forward(self, lr: Tensor) -> Any:
        """[B, 3, h, w] in [0, 1] -> [B, 3, scale h, scale w], about [0, 1], not clamped.

        Networks with `has_branch` take `branch=True`, too: the picture and their second output, of the same shape.
        """

    def shared(self, side: int) -> int:
        """Low-resolution pixels that neighbouring tiles of this side share.

        Of far-sighted networks a sixteenth of the side where that is more: what tiles compute twice stays below 14 %
        ((16/15)^2), and the larger a tile, the more of what a pixel sees lies in it.
        """
        return max(self.overlap, side // 16) if self.far_sighted else self.overlap

    def taken(self, dtype: torch.dtype) -> torch.dtype:
        """The precision that they work in where this one is asked for: itself, or one whose range holds their values."""
        return dtype

    def blend(self, other: "PixelNetworks", alpha: float) -> None:
        """Every weight becomes alpha of its own and 1 - alpha of the other's   (network interpolation; Wang et al., ECCVW 2018)

        UserError where the other's are not the same tensors.
        """
        own, theirs = ({**dict(nets.named_parameters()), **dict(nets.named_buffers())} for nets in (self, other))
        if {name: tensor.shape for name, tensor in own.items()} != {name: tensor.shape for name, tensor in theirs.items()}:
            raise UserError(f"blend: expected the same network as {self.base}, got {other.base}, whose tensors are others.")
        with torch.no_grad():
            for name, tensor in own.items():
                if tensor.is_floating_point():
                    tensor.mul_(alpha).add_(theirs[name].to(tensor), alpha=1 - alpha)


Encode = Callable[[Tensor, Tensor], Tensor]  # pixels, posterior noise -> latents


class LatentNetworks(Networks):
    """A codec, a denoiser on its latents, and the noise process between them."""

    zoom: int = 1  # output pixels per pixel of the picture that they see; 1: it is enlarged before, by any scale
    max_noise_level: int = 0  # of the noise that this picture gets, in timesteps; 0: it gets none
    sampling_scheduler: Any = None  # a diffusers scheduler that samples, as it is, where a call names no sampler

    def __init__(self, codec: Codec, denoiser: nn.Module, process: Process, text: Text, *, base: str, revision: str | None = None) -> None:
        """`denoiser`: (z_t [B, C, h, w], t [B], Condition) -> [B, C, h, w], where t is what `process.timestep` says.

        `text`: [1, ...] context of the recipe's prompt.
        """
        super().__init__(base, revision)
        self.codec, self.denoiser, self.process = codec, denoiser, process
        for name, part in text._asdict().items():
            self.register_buffer(f"text_{name}", part, persistent=False)

    text_sequence: Tensor
    text_pooled: Tensor | None

    @property
    def text(self) -> Text:
        return Text(self.text_sequence, self.text_pooled)

    @property
    def blank(self) -> Text | None:
        """[1, ...] context of the empty text, for networks that can train with it in the place of the recipe's prompt."""
        return None

    @property
    def conditional(self) -> bool:
        """Whether the denoiser sees the low-resolution picture; a base does not."""
        return True

    @property
    def device(self) -> torch.device:
        return self.text_sequence.device

    def seen_noise_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """The shape of the noise that `see` takes for one picture, by its output pixels."""
        return (self.codec.latent_channels, height // self.codec.scale, width // self.codec.scale)

    def see(
        self, picture: Tensor, noise: Tensor, *, level: Tensor | None = None, text: Text | None = None, encode: Encode | None = None
    ) -> Condition:
        """What the denoiser is told beside the noisy latent: here the latent of the enlarged low-resolution picture, and the text.

        Args:
            picture: [B, 3, H / zoom, W / zoom] in [0, 1], the low-resolution picture, for an output of H x W pixels.
            noise: [B, *seen_noise_shape(H, W)] standard normal.
            level: [B] int64 up to `max_noise_level`, for networks that have one.
            text: None: the recipe's prompt.
            encode: takes the place of `codec.encode`, for example in tiles.
        """
        z_lr = (encode or self.codec.encode)(picture, noise).float() if self.conditional else None
        return Condition(z_lr, text or self.text)

    @property
    def takes_prompts(self) -> bool:
        """Whether any text can be encoded; otherwise there is the recipe's alone."""
        return False

    @property
    def text_network(self) -> nn.Module | None:
        """The text encoder, where there is one in memory."""
        return None

    def text_parameters(self) -> int:
        """Its size; 0 without one."""
        return 0 if self.text_network is None else count_parameters(self.text_network)

    @property
    def can_wait(self) -> bool:
        """Whether weights may move between the CPU and a device."""
        return True

    def encode_prompts(self, prompts: list[str], device: torch.device) -> Text:
        """Context of len(prompts) texts; an empty one stands for the recipe's where no other can be encoded.

        UserError where a text is given and these networks know the recipe's prompt alone.
        """
        if any(prompts):
            raise UserError(f"prompt: this model takes no text, got {max(prompts)!r}; leave prompt out.")
        return self.text.each(lambda part: part.to(device)).repeated(len(prompts))

    def cast(self, dtype: torch.dtype) -> None:
        """The networks that a call needs in this precision, or where its range is too small for one, that one in its own."""
        for part in (self.codec, self.denoiser):
            part.to(dtype)

    def prior(self, *, rank: int, negative_prompt: str, seed: int) -> Any:
        """The frozen diffusion model that these networks were made from, with a fresh LoRA of its own (losses.base.Prior).

        Of tasks that give "prior" alone.
        """
        raise NotImplementedError

    def start_at(self, timestep: int) -> None:
        """Shorten the process, so that sampling starts at this timestep; UserError where it ends before."""
        self.process = self.process.until(timestep)


def count_parameters(module: nn.Module, trained: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


def working_dtype(module: nn.Module) -> torch.dtype:
    """What a network computes in: the dtype of its first floating-point parameter that is no LoRA's.

    bitsandbytes holds weights in whole numbers, and a LoRA is float32 whatever the rest is in.
    """
    return next(p.dtype for name, p in module.named_parameters() if p.is_floating_point() and ".lora_" not in name)
