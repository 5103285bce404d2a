from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def preview(
    config: Annotated[str, typer.Option(help="Recipe file, or the name of a shipped recipe.")],
    count: Annotated[int, typer.Option(min=1, max=400, help="How many samples.")] = 16,
    output: Annotated[Path, typer.Option(help="The picture to write.")] = Path("sheet.png"),
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Override a value: --set data.degradation.preset=mild.")] = None,
) -> None:
    """Write a contact sheet of training samples: HR, LR and edge mask, with the drawn parameters under each."""
    from sslsr_diffusion.data.loader import open_samples
    from sslsr_diffusion.data.sheet import contact_sheet
    from sslsr_diffusion.recipe import load_recipe

    recipe = load_recipe(config, overrides or ())
    samples, problems = open_samples(recipe.data, crop_size=recipe.training.crop_size, scale=recipe.scale, seed=recipe.seed, count=count)
    output.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(samples).save(output)
    for problem in problems:
        typer.echo(problem, err=True)
    typer.echo(f"{len(samples)} samples (HR, LR, edge mask) in {output}")
