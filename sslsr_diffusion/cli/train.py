"""`train.py` and `sslsr train`: one run from one recipe."""

from __future__ import annotations

from typing import Annotated, Any

import typer


def train(
    config: Annotated[str, typer.Option("--config", "-c", help="A recipe file, or the name of a shipped one (see `sslsr init`).")],
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a value: --set training.steps=100 (repeatable).")] = None,
    resume: Annotated[str | None, typer.Option(help="`latest`, a checkpoint folder, a run folder, or a hub id.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved recipe and the checks, then stop.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Move an earlier run in output.dir aside and begin anew.")] = False,
    allow_recipe_change: Annotated[bool, typer.Option(help="Go on from a checkpoint of another recipe all the same.")] = False,
) -> None:
    """Fine-tune an upscaler (or train an autoencoder) as a recipe says."""
    from sslsr_diffusion.errors import UserError
    from sslsr_diffusion.runs.recipe import load_recipe

    if restart and resume is not None:
        raise UserError("--restart begins anew and --resume goes on; choose one of them.")
    recipe = load_recipe(config, set_ or [])
    if dry_run:
        from sslsr_diffusion.runs.check import dry_run as check

        fine = check(recipe, typer.echo, resume=resume, restart=restart, allow_recipe_change=allow_recipe_change)
        raise typer.Exit(0 if fine else 2)
    _train(recipe, resume, restart=restart, allow_recipe_change=allow_recipe_change)


def _train(recipe: Any, resume: str | None, *, restart: bool, allow_recipe_change: bool) -> None:
    import os

    import torch

    from sslsr_diffusion.errors import UserError
    from sslsr_diffusion.runs.pin import pinned
    from sslsr_diffusion.runs.recipe import run_folder
    from sslsr_diffusion.runs.start import build
    from sslsr_diffusion.training.checkpoints import find_checkpoint
    from sslsr_diffusion.training.loop import train_job
    from sslsr_diffusion.training.run_folder import RunFolder

    main = int(os.environ.get("RANK", "0")) == 0
    folder = RunFolder(run_folder(recipe))
    if resume is None and main:
        if restart:
            folder.move_aside()
        folder.check_free()
    checkpoint = find_checkpoint(resume, folder.path) if resume is not None else None
    recipe = pinned(recipe, checkpoint)
    publisher = None
    if recipe.output.push_to_hub and main:
        from sslsr_diffusion.training.publisher import HubPublisher

        publisher = HubPublisher(recipe.output.hub_id, private=recipe.output.private)
    try:
        result = train_job(
            build(recipe, publisher=publisher), resume=str(checkpoint) if checkpoint else None, allow_recipe_change=allow_recipe_change
        )
    except Exception as error:
        from sslsr_diffusion.inference.memory import device_bytes, is_out_of_memory

        if not is_out_of_memory(error):
            raise
        from sslsr_diffusion.runs.memory import describe_memory

        reason = next(iter(str(error).splitlines()), type(error).__name__)[:200]
        device = torch.device("cuda" if torch.cuda.is_available() and not os.environ.get("ACCELERATE_USE_CPU") else "cpu")
        advice = "\n".join(describe_memory(recipe, device_bytes(device)))
        onward = "go on with --resume latest (and --allow-recipe-change where it asks for that), or begin anew with --restart."
        raise UserError(f"out of memory: {reason}\n{advice}\nChange one of these under training and {onward}") from None
    if not main:
        return
    for problem in result.problems:
        typer.echo(f"training data: {problem}", err=True)
    if result.stopped:
        typer.echo(f"Stopped at step {result.step} ({result.stopped}). Go on with: --resume latest")
        return
    typer.echo(f"Done: {result.step} steps. Pipeline: {result.pipeline}  Pictures: {result.run}/pictures  Curves: {result.run}/loss.png")
