"""`sslsr check-gpu`: what works on this machine's GPU, as a table for an issue."""

from pathlib import Path
from typing import Annotated

import typer

from sslsr_diffusion.cli.flags import as_folder


def check_gpu(
    minutes: Annotated[float, typer.Option(help="For all steps together; what may not fit is listed as not run.")] = 10.0,
    output: Annotated[
        Path, typer.Option(help="Folder of the result: JSON, a Markdown table, what each step printed.", callback=as_folder)
    ] = Path("runs/check_gpu"),
) -> None:
    """Try everything on this machine's GPU, each step in a process of its own: kernels, half precision, FSDP2, full-size recipes.

    Without a GPU it prints what it would do, and exits with 2.
    """
    from sslsr_diffusion.checkup.everything import check_gpu as check

    raise typer.Exit(check(minutes, output, typer.echo))
