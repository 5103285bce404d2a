"""Picture in, picture out: what every model is to whoever asks (command line, validation, evaluation, page, Python)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.images import resize_bicubic
from sslsr_diffusion.inference.noise import Generators
from sslsr_diffusion.inference.options import CallOptions
from sslsr_diffusion.inference.pictures import OUTPUT_TYPES
from sslsr_diffusion.inference.tiling import Strip
from sslsr_diffusion.models.networks import Networks

O = TypeVar("O", bound=CallOptions)


@dataclass
class Output:
    """The restored pictures as `output_type` asked; sentences about what was done otherwise than asked, smaller tiles for example."""

    images: Any
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Described:
    """What is known of a model's calls before its weights are read; the two are those of its `Restorer`."""

    options: frozenset[str]
    defaults: Mapping[str, Any]


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

    def check(self, **call: Any) -> list[str]:
        """What there is to say about a call with these options, for example that one of them has no effect; no picture is made.

        Raises UserError where the call would be refused whatever the picture.
        """

    def strips(self, size: tuple[int, int], *, scale: float, held: int, **call: Any) -> tuple[list[Strip], dict[str, Any]] | None:
        """The strips in which a picture of (h, w) pixels is made so that memory is enough, and the call that makes each of them.

        Put together, the rows that strips answer for are the result of one piece. None: a result depends on the whole picture, and
        `bands` makes it. Asked only where a picture may be too large; `held` bytes are taken by the picture itself.
        Raises NotEnoughMemory.
        """

    def bands(self, picture: Tensor, *, scale: float, generator: Generators, **call: Any) -> Output:
        """A picture [3, h, w] in [0, 1] whose result is never whole in memory: `images` are bands of it, [3, n, W] from the top down.

        Asked only where `strips` has none; with the same tiles, the pixels are those of one piece. Errors as a call's.
        """

    def __call__(
        self, image: Any, *, scale: float | None = None, generator: Generators = None, output_type: str = "pil", **call: Any
    ) -> Output:
        """Upscale one picture or several; each is exactly round(scale * height) x round(scale * width) pixels large.

        Args:
            image: PIL image, array [h, w, 3] or [B, h, w, 3], tensor [3, h, w] or [B, 3, h, w] with values in [0, 1], or a list.
            scale: enlargement, any positive number; None: the model's own.
            generator: one, or one per picture; a picture's result depends on its own generator alone.
            output_type: "pil", "np" ([B, H, W, 3]) or "pt" ([B, 3, H, W] float32); a list where sizes differ.
            call: some of `options`; None stands for the model's own value, for `tile` and `vae_tile` for the whole picture.
        Raises:
            UserError: an argument has an impossible value, or is not among `options`.
            NotEnoughMemory: the budget is too small, or memory ran out even with the smallest tiles.
        """

    def save(self, folder: Path) -> None:
        """Write what the family's own world loads."""


# What some models lack: the values that ask for nothing, which are taken all the same, and why the others are refused.
OPTIONAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "color_fix": (("none",), "no colour fix"),
    "back_projection": ((0,), "no back projection"),
    "antiring": ((0,), "no filter"),
    "detail": ((1,), "no mixing"),
    "strength": ((1,), "no sampling from the picture"),
    "sampler": ((), "no sampling"),
    "start": (("lr",), "no sampling from the picture"),
    "eta": ((0,), "no sampling"),
    "prompt": (("",), "no text encoder"),
    "negative_prompt": (("",), "no text encoder"),
    "guidance_scale": ((1,), "no text encoder"),
    "fidelity": ((0,), "no CFW decoder"),
    "lora_scale": ((1,), "no LoRA"),
    "noise_level": ((), "no noise on the picture"),
}
STEPS = "num_inference_steps"  # a one-step model has its one, whatever is asked
_WHOLE = frozenset({"tile", "vae_tile"})  # of these, None is a value


def accepted(call: Mapping[str, Any], options: frozenset[str]) -> tuple[dict[str, Any], list[str]]:
    """The part of a call that a model with these options takes, and a note on each value that it does not need; UserError for others."""
    notes, had = [], ", ".join(sorted(options))
    for name, value in call.items():
        if name in options:
            continue
        off, lacking = OPTIONAL.get(name, ((), ""))
        if name not in OPTIONAL and name != STEPS:
            raise UserError(f"{name}: this model has no such option; it has {had}.")
        if value is None:
            continue
        if name == STEPS:
            notes.append(f"{name} {value} has no effect: this model makes a picture in one step")
        elif value in off:
            notes.append(f"{name} {value!r} has no effect: it is off, and this model has none")
        else:
            raise UserError(f"{name}: this model does not have it, got {value!r} ({lacking}); leave it out. It has {had}.")
    return {name: value for name, value in call.items() if name in options}, notes


def settled(kind: type[O], call: Mapping[str, Any], options: frozenset[str], defaults: Mapping[str, Any]) -> tuple[O, list[str]]:
    """The checked options of a call, with the model's own values where it names none, and notes; UserError for impossible ones."""
    given, notes = accepted(call, options)
    made = kind(**{**defaults, **{name: value for name, value in given.items() if value is not None or name in _WHOLE}})
    made.check()
    return made, notes + made.without_effect()


class AroundNetworks(Generic[O]):
    """What restorers around networks have in common: whose values a call takes where it names none, and what of them is the model's."""

    kind: type[O]  # the options of a call

    def __init__(self, networks: Networks, scale: float | None, defaults: Mapping[str, Any] | None, fallback: Mapping[str, Any]) -> None:
        """`scale` and `defaults` are those of calls that name none; the networks' own ones come second, `fallback` last."""
        own = {**fallback, **networks.call_defaults, **(defaults or {})}
        self.scale: float = own["scale"] if scale is None else scale
        self.defaults: dict[str, Any] = {name: value for name, value in own.items() if name in self.options}

    @property
    def options(self) -> frozenset[str]:
        return self.kind.names()

    @property
    def kept_defaults(self) -> dict[str, Any]:
        """The defaults that are the model's; how much memory there is, is this machine's."""
        return {name: value for name, value in self.defaults.items() if name != "memory_budget"}

    def strips(self, size: tuple[int, int], *, scale: float, held: int, **call: Any) -> tuple[list[Strip], dict[str, Any]] | None:
        return None

    def bands(self, picture: Tensor, *, scale: float, generator: Generators, **call: Any) -> Output:
        raise NotImplementedError

    def _settled(self, call: Mapping[str, Any], scale: float | None, output_type: str) -> tuple[float, O, list[str]]:
        """Scale and options of a call, checked, and notes."""
        scale = self.scale if scale is None else scale
        check_call(scale, output_type)
        return scale, *settled(self.kind, call, self.options, self.defaults)


def check_call(scale: float, output_type: str) -> None:
    """Raises UserError for an impossible scale or output type."""
    if not 0 < scale < float("inf"):
        raise UserError(f"scale: expected a positive number, got {scale}.")
    if output_type not in OUTPUT_TYPES:
        raise UserError(f"output_type: expected one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}.")


def enlarged_size(pictures: Tensor, scale: float) -> tuple[int, int]:
    """round(scale h), round(scale w) of [B, 3, h, w], at least one pixel."""
    height, width = (max(1, round(scale * side)) for side in pictures.shape[-2:])
    return height, width


def enlarged(pictures: Tensor, scale: float) -> Tensor:
    """[B, 3, h, w] -> [B, 3, round(scale h), round(scale w)] in [0, 1], bicubic: what every picture is compared with."""
    return resize_bicubic(pictures, enlarged_size(pictures, scale)).clamp(0, 1)


def by_size(pictures: Sequence[Tensor]) -> list[list[int]]:
    """Positions of pictures that run as a batch: all together where their sizes are equal, else one after the other."""
    one_size = len({picture.shape for picture in pictures}) == 1
    return [list(range(len(pictures)))] if one_size else [[k] for k in range(len(pictures))]
