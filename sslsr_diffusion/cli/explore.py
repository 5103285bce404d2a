from pathlib import Path
from typing import Annotated

import typer

from sslsr_diffusion.cli.flags import as_flags
from sslsr_diffusion.errors import UserError


def explore(
    sr: Annotated[Path | None, typer.Option(help="The result, or another version of the truth.")] = None,
    gt: Annotated[Path | None, typer.Option(help="The truth (ground truth).")] = None,
    lr: Annotated[Path | None, typer.Option(help="The low-resolution input, shown enlarged beside them.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The page to write.")] = Path("explorer.html"),
    align: Annotated[bool, typer.Option("--align", help="Resize a result of another size to the truth's (bicubic).")] = False,
) -> None:
    """Write one HTML page to look at a result as the self-similarity loss does: edge pixels, their graphs, where the loss acts.

    Without pictures it shows an example. The page needs a browser and no network.
    """
    from sslsr_diffusion.files import atomic_write
    from sslsr_diffusion.page.explorer import EXAMPLE, explore_files

    if sr is None and gt is None and lr is None:
        sr, gt, lr = (EXAMPLE / f"{name}.png" for name in ("result", "truth", "lr"))
        typer.echo("an example, four times enlarged by the shipped model; --sr RESULT --gt TRUTH shows yours")
    if sr is None or gt is None:
        raise UserError(f"expected --sr RESULT and --gt TRUTH, got {'no --sr' if sr is None else 'no --gt'}.")
    with as_flags("sr", "gt", "lr"):
        explored = explore_files(sr, gt, lr, align=align)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(output, explored.page.encode())
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error.strerror or error}); name a file in a folder of yours.") from None
    for note in explored.notes:
        typer.echo(f"note: {note}")
    typer.echo(f"{output} ({len(explored.page) / 1e6:.1f} MB): open it in a browser")
