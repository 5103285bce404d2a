"""Where a base model's files are: a local folder, or a hub id resolved to one commit and fetched once."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sslsr_diffusion import hub
from sslsr_diffusion.errors import UserError
from sslsr_diffusion.models.stablesr.settings import CALL_DEFAULTS, DEFAULT_BASE, is_share
from sslsr_diffusion.shipped_model import SMALL, local_folder, refuse_earlier

# Half-precision and non-EMA copies of the same weights would double the download.
IGNORED = ["*.fp16.*", "*non_ema*", "*.bin", "*.ckpt", "*.msgpack", "*.onnx*", "safety_checker/*", "feature_extractor/*"]
WANTED = [f"{part}/*" for part in ("unet", "transformer", "vae", "structural_encoder", "scheduler", "low_res_scheduler")]
WANTED += [f"{part}{number}/*" for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")]
GONE = f"Stability AI took its 2.1 models down in November 2025: use {DEFAULT_BASE}, or any local folder in diffusers format."
ADVICE: dict[hub.Reason, str] = {
    "invalid": f"The shipped model is {SMALL}.",
    "missing": GONE,
    "unreachable": "Or train from scratch with model.init=random.",
}


@dataclass(frozen=True)
class Base:
    """A pipeline folder in diffusers format, and what to write down so that it can be found again."""

    name: str  # as the user wrote it
    folder: Path
    revision: str | None = None  # commit of the hub id; None for a local folder
    key: str = "model.base"  # of the recipe, for messages

    def part(self, name: str) -> str:
        """How messages call a component."""
        return f"{self.key}: {name} of {self.name}"

    def has(self, part: str) -> bool:
        return (self.folder / part).is_dir()

    def config(self, part: str) -> dict[str, Any]:
        """The component's config.json (a scheduler: scheduler_config.json); UserError where the folder has no such component."""
        name = "scheduler_config.json" if part.endswith("scheduler") else "config.json"
        path = self.folder / part / name
        if not path.is_file():
            raise UserError(f"{self.key}: {self.name} has no {part}/{name}; expected a pipeline folder in diffusers format.")
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{self.part(f'{part}/{name}')} cannot be read as JSON ({error}); fetch the model again.") from None
        if not isinstance(found, dict):
            raise UserError(f"{self.part(f'{part}/{name}')} holds no `name: value` pairs; fetch the model again.")
        return found

    def call_defaults(self) -> dict[str, float]:
        """`detail`, `back_projection` and `antiring` that the pipeline in this folder has where a call names none.

        UserError where its model_index.json is no JSON object, or names something else than numbers from 0 to 1.
        """
        path = self.folder / "model_index.json"
        try:
            index = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            found = {key: index.get(f"default_{key}", value) for key, value in CALL_DEFAULTS.items()}
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f"model.base: model_index.json of {self.name} cannot be read ({error}); fetch the model again.") from None
        for key, value in found.items():
            if not is_share(value):
                raise UserError(
                    f"model.base: default_{key} in model_index.json of {self.name}: expected a number from 0 to 1, got {value!r}."
                )
        return {key: float(value) for key, value in found.items()}


def find_base(name: str, revision: str | None = None, parts: list[str] | None = None, advice: Mapping[hub.Reason, str] = ADVICE) -> Base:
    """The folder of a base model; a hub id is fetched (or taken from the cache) at one resolved commit.

    Args:
        name: local folder, shipped model or hub id.
        revision: branch, tag or commit of a hub id.
        parts: file patterns to fetch; default: everything that a pipeline needs.
        advice: a further sentence by the hub's reason.

    UserError where nothing of that name exists (HubError: on the hub), or the hub cannot be reached and nothing is cached.
    """
    folder = local_folder(name)
    if folder.is_dir():
        if not any((folder / part).is_dir() for part in ("unet", "vae")):
            raise UserError(f"model.base: the folder {name} holds no unet/ or vae/; expected a pipeline folder in diffusers format.")
        return Base(name, folder)
    refuse_earlier(name, "model.base")
    advice = {**advice, **({"unreachable": GONE} if name.startswith("stabilityai/stable-diffusion-2") else {})}
    patterns = ["*.json", *(parts or WANTED)]
    fetched = hub.fetch(name, revision, patterns=patterns, ignore=IGNORED, field="model.base", advice=advice)
    return Base(name, fetched, fetched.name)
