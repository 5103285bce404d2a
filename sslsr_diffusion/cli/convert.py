from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sslsr_diffusion.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

app = typer.Typer(no_args_is_help=True, help="Convert released checkpoints to diffusers pipelines and back.")

VARIANTS = ("auto", "512", "768v", "turbo", "face")


@app.callback()
def _root() -> None:
    pass


@app.command("stablesr")
def stablesr(
    checkpoint: Annotated[Path, typer.Option(help="The StableSR .ckpt or .safetensors; with --to-original the pipeline folder.")],
    output: Annotated[Path, typer.Option(help="Folder of the pipeline; with --to-original the .ckpt or .safetensors file.")],
    vqgan: Annotated[Path | None, typer.Option(help="The CFW autoencoder's file (vqgan_cfw_00011.ckpt).")] = None,
    base: Annotated[str | None, typer.Option(help="Stable Diffusion 2.1 folder or hub id for what the checkpoint lacks.")] = None,
    variant: Annotated[str, typer.Option(help="auto (by the file's name), 512, 768v, turbo or face.")] = "auto",
    to_original: Annotated[bool, typer.Option("--to-original", help="The other way: a pipeline folder to the original's naming.")] = False,
) -> None:
    """Convert a StableSR checkpoint into a pipeline folder, or (--to-original) a pipeline folder into a checkpoint."""
    if variant not in VARIANTS:
        raise UserError(f"--variant {variant!r}: expected one of {', '.join(VARIANTS)}.")
    if to_original:
        _to_original(checkpoint, output, vqgan)
    else:
        _to_pipeline(checkpoint, output, vqgan, base, variant)


def _to_pipeline(checkpoint: Path, output: Path, vqgan: Path | None, base: str | None, variant: str) -> None:
    from sslsr_diffusion.inference import StableSRPipeline
    from sslsr_diffusion.models.stablesr.convert import VARIANTS, components_from_checkpoint

    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output}: already exists and is not empty; choose another folder.")
    chosen = None if variant == "auto" else variant
    result = components_from_checkpoint(checkpoint, vqgan=vqgan, base=base, variant=chosen)  # type: ignore[arg-type]
    pipe = StableSRPipeline(**result.components, default_num_inference_steps=VARIANTS[result.variant].steps)
    pipe.save_pretrained(output, safe_serialization=True)
    typer.echo(f"StableSR {result.variant} ({result.components['scheduler'].config.prediction_type}) -> {output}")
    for name, component in result.components.items():
        if hasattr(component, "parameters"):
            typer.echo(f"  {name:<19} {sum(p.numel() for p in component.parameters()) / 1e6:8.2f} M  {type(component).__name__}")
    for note in result.notes:
        typer.echo(f"note: {note}")
    if result.unknown:
        typer.echo("\n  ".join([f"not used: {len(result.unknown)} tensors of the checkpoint", *result.unknown]))


def _to_original(folder: Path, output: Path, vqgan: Path | None) -> None:
    from sslsr_diffusion.models.stablesr.convert import original_from_folder

    state, cfw = original_from_folder(folder)
    _write(state, output)
    if cfw:
        _write(cfw, vqgan or output.with_name(f"{output.stem}_vqgan_cfw{output.suffix}"))


def _write(state: "dict[str, Tensor]", path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from sslsr_diffusion.files import atomic_file, disk_errors

    if path.suffix not in (".ckpt", ".safetensors"):
        raise UserError(f"--output {path}: expected a name that ends in .ckpt or .safetensors.")
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as new, disk_errors():
            if path.suffix == ".ckpt":
                with new.open("xb") as stream:
                    torch.save({"state_dict": state}, stream)
            else:
                save_file(state, new)
    except (OSError, RuntimeError) as error:  # torch reports a full disk in its own way
        reason = getattr(error, "strerror", None) or ("is the disk full?" if isinstance(error, RuntimeError) else error)
        raise UserError(f"--output {path}: cannot be written ({reason}); name a file in a folder of yours.") from None
    typer.echo(f"{len(state)} tensors -> {path}")
