"""`sslsr export`: a complete pipeline folder from a checkpoint."""

from pathlib import Path
from typing import Annotated

import typer

from sslsr_diffusion.errors import UserError


def export(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint folder, a run's best/ folder, or a run folder (its newest checkpoint).")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write the pipeline to.")],
    raw: Annotated[bool, typer.Option("--raw", help="The trained weights themselves, not their moving average.")] = False,
    half: Annotated[bool, typer.Option("--half", help="Weights in float16: half the size on disk.")] = False,
) -> None:
    """Make a diffusers pipeline folder from a checkpoint: frozen weights come from its base, trained ones from the checkpoint."""
    from sslsr_diffusion.runs.export import export_checkpoint
    from sslsr_diffusion.training.checkpoints import find_checkpoint

    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output}: expected a new or empty folder; this one is a file or has files in it.")
    try:
        folder = find_checkpoint(str(checkpoint), checkpoint)
    except UserError:
        raise UserError(
            f"{checkpoint}: expected a checkpoint folder, a run's best/ or a run folder; there is no whole checkpoint in it."
        ) from None
    step = export_checkpoint(folder, output, averaged=not raw, half=half)
    typer.echo(f"{folder} (step {step}) -> {output}")
