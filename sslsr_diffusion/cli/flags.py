"""What several verbs say alike: flags where messages carry a keyword, and a bar that Ctrl-C ends in one sentence."""

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import typer

from sslsr_diffusion.errors import UserError

RENAMED = {"num_inference_steps": "steps", "vae_tile": "tile"}


def flagged(text: str, *names: str) -> str:
    """`model runs/x: no such folder` becomes `--model runs/x: no such folder` where `model` is among the names."""
    found = re.match(r"(\w+)(?=[: ])", text)
    name = RENAMED.get(found[1], found[1]) if found else None
    return text if found is None or name not in names else f"--{name.replace('_', '-')}{text[found.end() :]}"


@contextlib.contextmanager
def as_flags(*names: str) -> Iterator[None]:
    """A UserError that begins with one of these keywords begins with the flag of that name instead."""
    try:
        yield
    except UserError as error:
        text = flagged(str(error), *names)
        if text == str(error):
            raise
        raise UserError(text) from error


@contextlib.contextmanager
def progress_bar(total: int, at_stop: Callable[[], None] | None = None, **options: Any) -> Iterator[Any]:
    """tqdm's bar; Ctrl-C closes it, calls `at_stop` and exits with 130."""
    from tqdm import tqdm

    with tqdm(total=total, dynamic_ncols=True, **options) as bar:
        try:
            yield bar
        except KeyboardInterrupt:
            bar.close()
            if at_stop:
                at_stop()
            typer.echo("interrupted; the same command goes on from here", err=True)
            raise typer.Exit(130) from None
