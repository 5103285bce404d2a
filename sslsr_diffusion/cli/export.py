"""`sslsr export`: a complete result from a checkpoint."""

from pathlib import Path
from typing import Annotated

import typer

from sslsr_diffusion.cli.flags import as_flags, as_folder
from sslsr_diffusion.errors import UserError


def export(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint folder, a run's best/ folder, or a run folder (its newest checkpoint).")],
    output: Annotated[Path, typer.Option("--output", "-o", callback=as_folder, help="Folder to write the result to.")],
    raw: Annotated[bool, typer.Option("--raw", help="The trained weights themselves, not their moving average.")] = False,
    half: Annotated[bool, typer.Option("--half", help="Weights in float16: half the size on disk.")] = False,
    blend: Annotated[str | None, typer.Option(help="Another network of the same kind: run, file or hub id; weights between both.")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Of a LoRA: the whole model with the LoRA in its weights.")] = False,
    comfyui: Annotated[bool, typer.Option("--comfyui", help="Of a LoRA: files for ComfyUI, too, with an example workflow.")] = False,
    onnx: Annotated[bool, typer.Option("--onnx", help="An ONNX graph, too: plain networks, one-step upscalers, decoders.")] = False,
    alpha: Annotated[float | None, typer.Option(help="Share of the checkpoint where --blend names another: 1 is all of it.")] = None,
) -> None:
    """Make the result of a checkpoint, a folder to use: frozen weights come from its base, trained ones from the checkpoint."""
    from sslsr_diffusion.runs.task import export_checkpoint
    from sslsr_diffusion.training.checkpoints import find_checkpoint

    if (blend is None) != (alpha is None):
        raise UserError("--blend and --alpha belong together: the other network, and this one's share from 0 to 1; give both or none.")
    if merge and comfyui:
        raise UserError("--comfyui: is for a LoRA, and --merge leaves none; choose one of them.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output}: expected a new or empty folder; this one is a file or has files in it.")
    try:
        folder = find_checkpoint(str(checkpoint), checkpoint)
    except UserError:
        raise UserError(
            f"{checkpoint}: expected a checkpoint folder, a run's best/ or a run folder; there is no whole checkpoint in it."
        ) from None
    mixture = None if blend is None or alpha is None else (blend, alpha)
    with as_flags("blend", "alpha", "merge", "comfyui", "onnx"):
        step, notes = export_checkpoint(folder, output, averaged=not raw, half=half, blend=mixture, merge=merge, comfyui=comfyui, onnx=onnx)
    typer.echo("\n".join([f"{folder} (step {step}) -> {output}", *(f"note: {note}" for note in notes)]))
