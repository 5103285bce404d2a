"""What a family is: its section of the recipe, and how its networks are built and read."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import Field, field_validator

from sslsr_diffusion.config import Settings

if TYPE_CHECKING:
    from sslsr_diffusion.models.networks import Networks

Part = Literal["upscaler", "base", "autoencoder"]  # what of the family a task wants


class FamilySettings(Settings):
    """What the model section of every family has."""

    kind: str
    base: str | None = Field(None, description="File, folder or hub id that the networks are read from.")
    revision: str | None = Field(None, description="Branch, tag or commit of the hub id; the commit is recorded either way.")

    def codec_scale(self) -> int:
        """Pixels per latent pixel along a side, as far as it is known without building networks; 1 where there are no latents."""
        return 1


class PresetSettings(FamilySettings):
    """What families have beside it whose networks may be drawn from an architecture that ships with the package."""

    init: Literal["pretrained", "random"] = Field(
        "pretrained", description="pretrained: weights from `base`; random: architecture from `preset`, weights drawn, no download."
    )
    preset: str

    @staticmethod
    def presets() -> list[str]:
        """The names that `preset` may have."""
        raise NotImplementedError

    @field_validator("preset", check_fields=False)
    @classmethod
    def _known_preset(cls, value: str) -> str:
        if value not in cls.presets():
            raise ValueError(f"{value!r} is not a preset; expected one of {', '.join(cls.presets())}.")
        return value

    def source(self) -> str | None:
        """The folder or hub id that weights are read from; None: they are drawn."""
        return None if self.init == "random" else self.base

    def checked(self, check: Callable[[], str]) -> Callable[[], str]:
        """A check of the base's files; where weights are drawn, a sentence that says so in its place."""
        return check if self.init == "pretrained" else lambda: f"architecture {self.preset}, weights drawn"


def is_pipeline(path: Path, name: str) -> bool:
    """Whether this is a folder in diffusers format whose pipeline's class has this name."""
    try:
        index = json.loads((path / "model_index.json").read_text(encoding="utf-8"))
        return index.get("_class_name") == name
    except (OSError, ValueError, AttributeError):
        return False


@dataclass(frozen=True)
class Card:
    """What the model card of a published result says about its family."""

    what: str = "an upscaler"  # after "An upscaler for real photographs: "
    library: str | None = None  # the hub's library_name; None: it has none for these
    tags: tuple[str, ...] = ()
    needs: str = "The networks live in the `sslsr-diffusion` package, so it must be installed."
    python: str = (
        "from PIL import Image\n"
        "from sslsr_diffusion import open_upscaler\n\n"
        'upscale = open_upscaler("{repo_id}")\n'
        'image = upscale(Image.open("small.jpg"), scale={scale}).images[0]\n'
        'image.save("large.png")'
    )  # how it is called; {repo_id} and {scale} are filled in
    citation: str = ""  # BibTeX beside the self-similarity loss's


class Family(Protocol):
    """One entry of the table of families. Light to import: networks and their libraries are imported inside the methods."""

    kind: str  # the recipe's model.kind
    settings: type[Any]  # of the recipe's model section; it has `kind` and what FamilySettings has
    restorer: str  # which of inference's restorers makes pictures with its upscalers
    tasks: frozenset[str]  # the kinds of task that can train it
    trains: tuple[str, ...]  # what of an upscaler may train (task.train), the first is the default
    files: tuple[str, ...]  # patterns of the files of a result, as a repository of the hub holds them
    card: Card

    def build(self, settings: Any, *, part: Part = "upscaler", train: str | None = None, meta: bool = False, seed: int = 0) -> "Networks":
        """The networks of a recipe's model section.

        Args:
            part: the whole upscaler, a base that sees no low-resolution picture, or an autoencoder alone.
            train: one of `trains`.
            meta: shapes only: no weights are read, no network is asked.
            seed: of freshly drawn layers.
        Raises UserError: the base cannot be found or does not fit.
        """

    def reads(self, path: Path) -> bool:
        """Whether this file or folder holds a model of this family."""

    def read(self, path: Path, *, meta: bool = False) -> "Networks":
        """The networks in a file or folder for which `reads` is true, on the CPU; with `meta` their shapes alone.
        Raises UserError: its files are incomplete or damaged.
        """

    def call_defaults(self, path: Path) -> Mapping[str, Any]:
        """What a call of the model in a file or folder for which `reads` is true takes where it names nothing; no weights are read.
        Raises UserError: its files are damaged.
        """

    def source(self, settings: Any) -> str | None:
        """The folder, file or hub id that the networks are read from; None: nothing is read, they are drawn at random."""

    def check_files(self, settings: Any) -> dict[str, Callable[[], str]]:
        """For the dry run: recipe key -> a check of what stands there on this machine, which gives a sentence.

        It reads no weights but their names and shapes. A check raises UserError where something is missing or does not fit.
        """
