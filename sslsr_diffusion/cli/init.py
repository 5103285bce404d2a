"""`sslsr init`: copy a shipped recipe to edit it."""

import itertools
import os
import re
import shlex
import shutil
from pathlib import Path
from typing import Annotated

import typer

from sslsr_diffusion.errors import UserError

EXAMPLES = ("photos", "lr", "SOURCES.md")  # what recipes and the README name of examples/; the last has authors and licences


def init(
    name: Annotated[str | None, typer.Argument(help="A shipped recipe; without it they are listed.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write; default: NAME.yaml here.")] = None,
) -> None:
    """Copy a shipped recipe (and what it extends) into the current folder."""
    from sslsr_diffusion.config import find_recipe, read_family, shipped_recipes

    shipped = shipped_recipes()
    if name is None:
        width = max(map(len, shipped), default=0)
        for known, path in shipped.items():
            comment = itertools.takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
            first = re.split(r"(?<=[.?])\s", " ".join(line.lstrip("# ") for line in comment))[0]
            typer.echo(f"{known:<{width}}  {first}")
        return
    source = find_recipe(name).resolve()
    target = place = output or Path(next((known for known, path in shipped.items() if path == source), source.stem) + ".yaml")
    if target.exists():
        raise UserError(f"{target} is already there; choose another name with --output.")
    wanted: dict[Path, Path] = {}
    for original, raw in read_family(source):  # a copy's `extends` has to find the copies of the others at the same relative place
        wanted[place] = original
        place = Path(os.path.normpath(place.parent / (raw.get("extends") or "")))
    outside = [path for path in wanted if path.parts[0] == ".."]
    if outside and target.parts[0] != "..":
        folders = len(target.parent.parts) + max(path.parts.count("..") for path in outside)
        raise UserError(
            f"{name} extends a recipe, whose copy would be {outside[0]}, outside this folder; expected --output "
            f"{Path(*source.parts[-1 - folders :])} or the like, got {target}."
        )
    for path, original in wanted.items():
        if path.exists():
            typer.echo(f"kept {path}, which was already there")
            continue
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(original.read_bytes())
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror}); choose another name with --output.") from None
        typer.echo(f"wrote {path}")
    if any("path: examples/" in path.read_text(encoding="utf-8") for path in wanted.values()) and not Path("examples").exists():
        _bring_examples()
    typer.echo(f"Edit it, then: sslsr train --config {shlex.quote(str(target))} --dry-run")


def _bring_examples() -> None:
    """The photographs that the recipe names, which a package that was installed brings along."""
    from sslsr_diffusion.config import shipped_folder

    for name in EXAMPLES:
        source = shipped_folder("examples") / name
        try:
            if source.is_dir():
                shutil.copytree(source, Path("examples") / name)
            else:
                shutil.copy(source, "examples")
        except OSError as error:
            raise UserError(f"examples/{name} cannot be written ({error.strerror}); work in a folder of your own.") from None
    typer.echo("wrote examples/, the photographs that it names (authors and licences: examples/SOURCES.md)")
