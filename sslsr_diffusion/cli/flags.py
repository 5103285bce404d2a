"""What several verbs say alike: flags where messages carry a keyword, a bar, and what Ctrl-C gets."""

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import typer

from sslsr_diffusion.errors import UserError

FILE = re.compile(r"\.(png|jpe?g|webp|tiff?|bmp|gif|html|csv|json|ya?ml|safetensors|pth|zip)", re.IGNORECASE)
RENAMED = {"num_inference_steps": "steps", "vae_tile": "tile"}


def flagged(text: str, *names: str) -> str:
    """`model runs/x: no such folder` becomes `--model runs/x: no such folder` where `model` is among the names."""
    found = re.match(r"(\w+)(?=[: ])", text)
    name = RENAMED.get(found[1], found[1]) if found else None
    return text if found is None or name not in names else f"--{name.replace('_', '-')}{text[found.end() :]}"


def one_of(table: Iterable[str], help: str) -> Any:
    """The option that is one of a table's names, which its help shows; another one is refused by the parser."""
    names = list(table)

    def check(value: str | None) -> str | None:
        if value is not None and value not in names:
            raise typer.BadParameter(f"expected one of {', '.join(names)}, got {value!r}.")
        return value

    return typer.Option(help=help, metavar=f"[{'|'.join(names)}]", callback=check)


def as_folder(value: Path | None) -> Path | None:
    """The callback of an option that names a folder to write to: UserError for the name of a file that is not there."""
    if value is not None and FILE.fullmatch(value.suffix) and not value.exists():
        raise UserError(f"--output {value}: expected a folder, got a name that files have; what is written there keeps its own names.")
    return value


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
def interruptible(at_stop: Callable[[], None] | None = None) -> Iterator[None]:
    """Ctrl-C calls `at_stop`, says how to go on and exits with 130."""
    try:
        yield
    except KeyboardInterrupt:
        if at_stop:
            at_stop()
        typer.echo("interrupted; the same command goes on from here", err=True)
        raise typer.Exit(130) from None


@contextlib.contextmanager
def progress_bar(total: int, at_stop: Callable[[], None] | None = None, **options: Any) -> Iterator[Any]:
    """tqdm's bar around what is `interruptible`."""
    from tqdm import tqdm

    with interruptible(at_stop), tqdm(total=total, dynamic_ncols=True, **options) as bar:
        yield bar
