"""`train.py` and `sslsr train`: one run from one recipe."""

import os
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from sslsr_diffusion.training.job import TrainResult


def train(
    config: Annotated[str, typer.Option("--config", "-c", help="A recipe file, or the name of a shipped one (see `sslsr init`).")],
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a value: --set training.steps=100 (repeatable).")] = None,
    resume: Annotated[str | None, typer.Option(help="`latest`, a checkpoint folder, a run folder, or a hub id.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved recipe and the checks, then stop.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Move an earlier run in output.dir aside and begin anew.")] = False,
    allow_recipe_change: Annotated[bool, typer.Option(help="Go on from a checkpoint of another recipe all the same.")] = False,
) -> None:
    """Fine-tune an upscaler (or train an autoencoder) as a recipe says."""
    from sslsr_diffusion.cli.flags import as_flags
    from sslsr_diffusion.runs.recipe import load_recipe

    recipe = load_recipe(config, set_ or [])
    with as_flags("resume", "restart"):
        if dry_run:
            from sslsr_diffusion.runs.check import dry_run as check

            fine = check(recipe, typer.echo, resume=resume, restart=restart, allow_recipe_change=allow_recipe_change)
            raise typer.Exit(0 if fine else 2)
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
