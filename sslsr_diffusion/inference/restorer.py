"""Picture in, picture out: what every model is to whoever asks (command line, validation, evaluation, page, Python)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.images import resize_bicubic
from sslsr_diffusion.inference.antiring import antiring
from sslsr_diffusion.inference.color_fix import COLOR_FIXES, color_fix
from sslsr_diffusion.inference.noise import Generators
from sslsr_diffusion.inference.pictures import OUTPUT_TYPES
from sslsr_diffusion.models.base import is_share

FINISHING = frozenset({"color_fix", "antiring", "detail"})  # what every restorer does to a picture after its networks


@dataclass
class Output:
    """
    Args:
        images: the restored pictures, as `output_type` asked.
        notes: sentences about what was done otherwise than asked, for example smaller tiles where memory ran out.
    """

    images: Any
    notes: list[str] = field(default_factory=list)


class Restorer(Protocol):
    """Networks that are ready to be called."""

    @property
    def options(self) -> frozenset[str]:
        """The keywords of a call that this model has, beside image, scale, generator and output_type."""

    @property
    def defaults(self) -> Mapping[str, Any]:
        """What a call takes where it names no value, for options that the model brings defaults for."""

    @property
    def scale(self) -> float:
        """The enlargement that it was trained for, which a call takes that names none."""

    def __call__(
        self, image: Any, *, scale: float | None = None, generator: Generators = None, output_type: str = "pil", **call: Any
    ) -> Output:
        """Upscale one picture or several; each is exactly round(scale * height) x round(scale * width) pixels large.

        Args:
            image: PIL image, array [h, w, 3] or [B, h, w, 3], tensor [3, h, w] or [B, 3, h, w] with values in [0, 1], or a list.
            scale: enlargement, any positive number; None: the model's own.
            generator: one, or one per picture; a picture's result depends on its own generator alone.
            output_type: "pil", "np" ([B, H, W, 3]) or "pt" ([B, 3, H, W] float32); a list where sizes differ.
            call: some of `options`.
        Raises:
            UserError: an argument has an impossible value, or is not among `options`.
            NotEnoughMemory: the budget is too small, or memory ran out even with the smallest tiles.
        """

    def save(self, folder: Path) -> None:
        """Write what the family's own world loads."""


# What an option is when it asks for nothing: taken by models that do not have it.
OFF: dict[str, tuple[Any, ...]] = {
    "color_fix": ("none", None),
    "antiring": (0, None),
    "detail": (1, None),
    "strength": (1,),
    "guidance_scale": (1,),
    "eta": (0,),
    "fidelity": (0, None),
    "prompt": ("", None),
    "negative_prompt": ("", None),
    "sampler": (None,),
    "num_inference_steps": (None,),
    "start": ("lr",),
}
ONE_STEP = "num_inference_steps"


def accepted(call: Mapping[str, Any], options: Iterable[str], notes: list[str]) -> dict[str, Any]:
    """The part of a call that a model with these options takes.

    A value that means "off" and a number of steps are left out for a model that does not have them, with one note; steps, because a
    one-step model has its one whatever is asked.

    Raises:
        UserError: anything else that the model does not have; the message names it and what there is.
    """
    known, kept = frozenset(options), {}
    for name, value in call.items():
        if name in known:
            kept[name] = value
        elif name not in OFF and name != ONE_STEP:
            raise UserError(f"{name}: this model has no such option; it has {', '.join(sorted(known))}.")
        elif name == ONE_STEP and value is not None:
            notes.append(f"{name} {value} has no effect: this model makes a picture in one step")
        elif value not in OFF[name]:
            raise UserError(f"{name}: this model does not have it, got {value!r}; leave it out. It has {', '.join(sorted(known))}.")
        elif value is not None:
            notes.append(f"{name} {value} is off, and this model has none")
    return kept


@dataclass(frozen=True)
class Finishing:
    """What is done to a picture after the networks, whatever they are."""

    color_fix: str | None = "wavelet"
    antiring: float = 0.0
    detail: float = 1.0

    def check(self) -> None:
        """Raises UserError for an impossible value."""
        if (self.color_fix or "none") not in COLOR_FIXES:
            raise UserError(f"color_fix: expected one of {', '.join(COLOR_FIXES)}, got {self.color_fix!r}.")
        if not is_share(self.antiring):
            raise UserError(f"antiring: expected 0 (off) to 1 (nothing beyond the low-resolution pixels nearby), got {self.antiring!r}.")
        if not is_share(self.detail):
            raise UserError(f"detail: expected 0 (bicubic) to 1 (all that the model adds), got {self.detail!r}.")

    def __call__(self, restored: Tensor, enlarged: Tensor, low: Tensor) -> Tensor:
        """[B, 3, H, W]: colours of the enlarged picture, seams taken back, mixed with the enlarged one (changed in place)."""
        result = color_fix(self.color_fix, restored, enlarged).clamp_(0, 1)
        result = antiring(result, low, self.antiring)
        return enlarged.lerp_(result, self.detail)  # exactly the result where detail is 1


def enlarged(pictures: Tensor, scale: float) -> Tensor:
    """[B, 3, h, w] -> [B, 3, round(scale h), round(scale w)] in [0, 1], bicubic: what every restorer begins and is compared with."""
    height, width = (max(1, round(scale * side)) for side in pictures.shape[-2:])
    return resize_bicubic(pictures, (height, width)).clamp(0, 1)


def check_call(scale: float, output_type: str) -> None:
    """Raises UserError for an impossible scale or output type."""
    if not 0 < scale < float("inf"):
        raise UserError(f"scale: expected a positive number, got {scale}.")
    if output_type not in OUTPUT_TYPES:
        raise UserError(f"output_type: expected one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}.")


def by_size(pictures: Sequence[Tensor]) -> list[list[int]]:
    """Positions of pictures that run as a batch: all together where their sizes are equal, else one after the other."""
    one_size = len({picture.shape for picture in pictures}) == 1
    return [list(range(len(pictures)))] if one_size else [[k] for k in range(len(pictures))]
