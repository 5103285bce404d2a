"""`sslsr init`: copy a shipped recipe to edit it."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Annotated

import typer


def init(
    name: Annotated[str | None, typer.Argument(help="A shipped recipe; without it they are listed.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write; default: NAME.yaml here.")] = None,
) -> None:
    """Copy a shipped recipe (and what it extends) into the current folder."""
    import yaml

    from sslsr_diffusion.config import find_recipe, shipped_recipes
    from sslsr_diffusion.errors import UserError

    shipped = shipped_recipes()
    if name is None:
        for stem, path in shipped.items():
            comment = itertools.takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
            first = re.split(r"(?<=[.?])\s", " ".join(line.lstrip("# ") for line in comment))[0]
            typer.echo(f"{stem:<24} {first}")
        return
    source = find_recipe(name)
    target = output or Path(f"{source.stem}.yaml")
    wanted = {target: source}
    last = source
    while parent := (yaml.safe_load(last.read_text(encoding="utf-8")) or {}).get("extends"):
        last = last.parent / parent
        wanted[target.parent / parent] = last
    for path in wanted:
        if path.exists() and path == target:
            raise UserError(f"{path} is already there; choose another name with --output.")
    for path, original in wanted.items():
        if not path.exists():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(original.read_bytes())
            except OSError as error:
                raise UserError(f"{path} cannot be written ({error.strerror}); choose another name with --output.") from None
            typer.echo(f"wrote {path}")
    typer.echo(f"Edit it, then: sslsr train --config {target} --dry-run")
