"""The console command `sslsr`. One file per verb; heavy imports happen inside the commands, so `--help` answers at once."""

import errno
import sys
from typing import Annotated

import typer

from sslsr_diffusion.cli import check_gpu, convert, evaluate, explore, export, infer, init, page, prepare, preview, train
from sslsr_diffusion.errors import MissingDependency, UserError

_NOT_OUR_FAULT = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}  # disks and permissions

app = typer.Typer(
    name="sslsr",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fine-tune and run diffusion upscalers with the self-similarity loss.",
)
for verb in (
    train.train,
    infer.infer,
    evaluate.evaluate,
    preview.preview,
    explore.explore,
    page.page,
    init.init,
    export.export,
    check_gpu.check_gpu,
):
    app.command()(verb)
app.add_typer(prepare.app, name="prepare")
app.add_typer(convert.app, name="convert")


def _version(wanted: bool) -> None:
    if wanted:
        from sslsr_diffusion import __version__

        typer.echo(__version__)
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")] = False,
) -> None:
    pass


def run(application: typer.Typer) -> None:
    """Run a typer application; a user's mistake becomes one line on stderr and exit code 2."""
    try:
        application()
    except (UserError, MissingDependency) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except OSError as error:
        if error.errno not in _NOT_OUR_FAULT:
            raise
        where = f"{error.filename}: " if error.filename else ""
        typer.echo(f"error: {where}{error.strerror}; make room, or name another place, and give the same command again.", err=True)
        sys.exit(2)


def single(command: object) -> None:
    """Run one verb as a script of its own (train.py, infer.py)."""
    script = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    script.command()(command)  # type: ignore[type-var]
    run(script)


def main() -> None:
    run(app)
