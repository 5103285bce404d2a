"""A run folder that explains itself: resolved recipe, versions, log, history, checkpoints, pictures, pipeline."""

import contextlib
import json
import logging
import os
import platform
import sys
from collections.abc import Mapping
from importlib import metadata
from math import isfinite
from pathlib import Path
from typing import Any

import yaml

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.files import atomic_write, remove_leftovers, restore_folder
from sslsr_diffusion.training.checkpoints import latest_checkpoint

logger = logging.getLogger(__name__)

PICTURES = "validation_pictures"  # key of a validation pass: what decides about the best weights, picture by picture
_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "datasets", "safetensors", "numpy", "numba", "huggingface_hub")


class RunFolder:
    """The files of one run. Only the main process writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.yaml"
        self.history_file = path / "history.jsonl"
        self.pictures = path / "pictures"
        self.pipeline = path / "pipeline"
        self.best = path / "best"

    def check_free(self) -> None:
        """Refuse, with a UserError, to mix a new run into an old one."""
        if self.recipe.exists() or latest_checkpoint(self.path):
            raise UserError(
                f"output.dir: {self.path} already holds a run; --resume latest continues it, --restart moves it aside, "
                f"--set output.dir=OTHER starts elsewhere."
            )

    def move_aside(self) -> None:
        """Rename an old run folder to the first free `NAME.old-1`, `NAME.old-2`, ..."""
        if not self.path.exists():
            return
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.old-{number}")).exists():
            number += 1
        self.path.rename(aside)
        logger.info("the earlier run was moved to %s", aside)

    def start(self, recipe: Mapping[str, Any], step: int) -> None:
        """Make the folder and write down what is going to run, and forget what was logged after `step`."""
        try:
            self.pictures.mkdir(parents=True, exist_ok=True)
            for folder in (self.best, self.pipeline):
                restore_folder(folder)
            remove_leftovers(self.path)
            atomic_write(self.recipe, yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True).encode())
            atomic_write(self.path / "versions.json", json.dumps(versions(), indent=1).encode())
            kept = [row for row in self.history() if row["step"] <= step]
            atomic_write(self.history_file, "".join(map(_line, kept)).encode())
        except OSError as error:
            raise UserError(f"output.dir: {self.path} cannot be written ({error.strerror}); choose another folder.") from None

    def log_to_file(self) -> logging.Handler:
        handler = _LogFile(self.path / "log.txt", encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        package = logging.getLogger("sslsr_diffusion")
        package.addHandler(handler)
        if package.getEffectiveLevel() > logging.INFO:
            package.setLevel(logging.INFO)
        return handler

    def append_history(self, row: Mapping[str, Any]) -> None:
        """Add a row; numbers that are not finite become null, which JSON can say. An OSError leaves the rows before it untouched."""
        before = self.history_file.stat().st_size if self.history_file.exists() else 0
        try:
            with self.history_file.open("a", encoding="utf-8") as stream:
                stream.write(_line(row))
        except OSError:
            os.truncate(self.history_file, before)  # half a row would spoil the next one
            raise

    def history(self) -> list[dict[str, Any]]:
        """All whole rows; a line cut off by a crash is passed over."""
        if not self.history_file.is_file():
            return []
        rows = []
        for line in self.history_file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
        return rows

    def validations(self) -> list[dict[str, Any]]:
        """The rows of validation passes."""
        return [row for row in self.history() if any(key.startswith("validation/") for key in row)]


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps({key: None if isinstance(value, float) and not isfinite(value) else value for key, value in row.items()}) + "\n"


class _LogFile(logging.FileHandler):
    """A full disk costs lines of the log; the console has them."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


def versions() -> dict[str, Any]:
    """What the run was made with, for the person who wants to repeat it."""
    import torch

    from sslsr_diffusion import __version__

    found: dict[str, Any] = {"sslsr_diffusion": __version__, "python": sys.version.split()[0], "platform": platform.platform()}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return found
