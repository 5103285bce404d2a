"""`train.py` and `sslsr train`: one run from one recipe."""

import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sslsr_diffusion.errors import UserError

if TYPE_CHECKING:
    from sslsr_diffusion.training.job import TrainResult


def train(
    config: Annotated[str, typer.Option("--config", "-c", help="A recipe file, or the name of a shipped one (see `sslsr init`).")],
    preset: Annotated[
        str | None, typer.Option(help="The recipe for a card of this memory: 8gb, 12gb, 16gb, 24gb, 48gb (see --dry-run).")
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a value: --set training.steps=100 (repeatable).")] = None,
    find_batch: Annotated[bool, typer.Option("--find-batch", help="Try steps first, and train with the largest batch that fits.")] = False,
    memory_budget: Annotated[
        str | None, typer.Option(help="For --find-batch and --dry-run: memory that the run may take, as 16GB; default: the device's.")
    ] = None,
    resume: Annotated[str | None, typer.Option(help="`latest`, a checkpoint folder, a run folder, or a hub id.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved recipe and the checks, then stop.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Move an earlier run in output.dir aside and begin anew.")] = False,
    allow_recipe_change: Annotated[bool, typer.Option(help="Go on from a checkpoint of another recipe all the same.")] = False,
) -> None:
    """Fine-tune an upscaler (or train an autoencoder) as a recipe says."""
    from sslsr_diffusion.cli.flags import as_flags
    from sslsr_diffusion.devices import parse_bytes
    from sslsr_diffusion.runs.recipe import load_recipe

    if find_batch and resume is not None:
        raise UserError("--find-batch is for a new run, and --resume goes on with the batch of an old one; choose one of them.")
    if memory_budget is not None and not (find_batch or dry_run):
        raise UserError("--memory-budget: expected --find-batch or --dry-run beside it, got neither; a run takes what it needs.")
    budget = None if memory_budget is None else parse_bytes(memory_budget)
    with as_flags("resume", "restart", "preset", "find_batch"):
        recipe = load_recipe(config, set_ or [], preset=preset)
        if dry_run:
            from sslsr_diffusion.runs.check import dry_run as check
            from sslsr_diffusion.runs.presets import load_presets

            known: dict[str, Any] = {"presets": load_presets(config, set_ or []), "memory_budget": budget}
            fine = check(recipe, typer.echo, **known, resume=resume, restart=restart, allow_recipe_change=allow_recipe_change)
            if not (fine and find_batch):
                raise typer.Exit(0 if fine else 2)
        if find_batch:
            from sslsr_diffusion.runs.find_batch import find_batch as largest

            recipe = largest(recipe, typer.echo, memory_budget=budget, restart=restart)
        if not dry_run:
            from sslsr_diffusion.runs.start import train as run

            _say(run(recipe, resume=resume, restart=restart, allow_recipe_change=allow_recipe_change))


def _say(result: "TrainResult") -> None:
    """How the run ended, once for all processes."""
    if int(os.environ.get("RANK", "0")) != 0:
        return
    for problem in result.problems:
        typer.echo(f"training data: {problem}", err=True)
    if result.pipeline is None:
        typer.echo(f"Stopped at step {result.step} ({result.stopped}). Go on with: --resume latest")
        return
    done = f"Stopped at step {result.step}: {result.stopped}." if result.stopped else f"Done: {result.step} steps."
    typer.echo(f"{done} Pipeline: {result.pipeline}  Pictures: {result.run}/pictures  Curves: {result.run}/loss.png")
