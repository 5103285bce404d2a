"""What a task knows of its run beside its own settings and the model's."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from sslsr_diffusion.config import Settings
from sslsr_diffusion.errors import UserError
from sslsr_diffusion.models.family import Family
from sslsr_diffusion.models.networks import Networks


@dataclass(frozen=True)
class Frame:
    """The run around a task."""

    family: Family
    model: Any  # the family's settings
    scale: int
    seed: int
    crop_size: int
    gradient_checkpointing: bool = False
    channels_last: bool = False
    meta: bool = False  # shapes alone, for the dry run
    crops: Callable[[int], Tensor] | None = None  # n -> [n, 3, H, W] training crops, for what is calibrated at the end

    def build(self, part: Literal["upscaler", "base", "autoencoder"] = "upscaler", train: str | None = None) -> Networks:
        """The family's networks; UserError where they cannot be built, or cannot take the crop."""
        networks = self.family.build(self.model, part=part, train=train, meta=self.meta, seed=self.seed)
        self.check_crop(networks)
        networks.economize(gradient_checkpointing=self.gradient_checkpointing, channels_last=self.channels_last)
        return networks

    def check_crop(self, networks: Networks) -> None:
        """Raises UserError unless these networks can take a crop of the run's size."""
        size = networks.size()
        if not size.fits(self.crop_size):
            end = f" of at least {size.minimum}" if size.minimum > self.crop_size else ""
            end = f" of at most {size.maximum}" if 0 < size.maximum < self.crop_size else end
            raise UserError(
                f"training.crop_size: this model needs a multiple of {size.multiple_of} pixels{end}, got {self.crop_size}; "
                f"{size.nearest(self.crop_size)} would do."
            )


class TaskSettings(Settings):
    """What the task section of every kind has."""

    kind: str

    def picture_side(self, crop_size: int, codec_scale: int) -> int:
        """The side, in pixels, of the pictures that pixel losses see; `codec_scale`: pixels per latent pixel."""
        return crop_size


class WindowSettings(TaskSettings):
    """What tasks have that decode latents."""

    decode_crop: int | None = Field(
        None, ge=4, description="Side in latent pixels of the random window that pixel losses decode; null: the whole crop."
    )

    def picture_side(self, crop_size: int, codec_scale: int) -> int:
        """That of the window."""
        return crop_size if self.decode_crop is None else min(crop_size, self.decode_crop * codec_scale)


class CallSettings(Settings):
    """How the upscaler is called in validation; the result keeps these values as its defaults."""

    detail: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Share of the model's picture in the result, the rest is bicubic. null: the base's default, or 1; on --resume what "
        "the run had.",
    )
    back_projection: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Share of what the model's picture, reduced again, lacks of the low-resolution one that is put back. null: the base's "
        "default, or 0; on --resume what the run had.",
    )
    antiring: float | None = Field(
        None,
        ge=0,
        le=1,
        description="How much is taken back of what leaves the range of the low-resolution pixels nearby. null: the base's default, or 0; "
        "on --resume what the run had.",
    )

    @property
    def named(self) -> dict[str, Any]:
        """What the restorer takes where a call names nothing; a None is left to the base."""
        return {name: value for name in CallSettings.model_fields if (value := getattr(self, name)) is not None}


class SampledCallSettings(CallSettings):
    """That of upscalers that sample in steps."""

    steps: int = Field(20, ge=1, description="Sampling steps.")

    @property
    def named(self) -> dict[str, Any]:
        return {"num_inference_steps": self.steps, **super().named}
