"""The model that comes with the package: found by its name wherever a folder or a hub id is expected."""

import re
from pathlib import Path

from sslsr_diffusion.errors import UserError

SMALL = "small-v4"  # from the first release on other weights get another name, so that a name in a run's record stays true
FOLDER = Path(__file__).resolve().parent / "shipped_models"


def shipped_folder(name: str) -> Path | None:
    """The pipeline folder of a shipped model; None for any other name, and where the user has a folder of that name."""
    folder = FOLDER / name
    return folder if name == SMALL and not Path(name).is_dir() else None


def local_folder(name: str) -> Path:
    """Where a model of that name lies, or would lie, on this machine: the shipped one's folder, else the name as a path."""
    return shipped_folder(name) or Path(name).expanduser()


def refuse_earlier(name: str, field: str) -> None:
    """UserError for the name of a model that came with another version of the package."""
    if re.fullmatch(r"small-v\d+", name):
        raise UserError(
            f"{field}: {name!r} does not come with this version of the package, which has {SMALL}; use that one, "
            f"or the folder of the old one's files (shipped_models/{name} in a version that had it)."
        )
