from pathlib import Path
from typing import Annotated

import typer

from sslsr_diffusion.errors import UserError


def preview(
    config: Annotated[str, typer.Option(help="Recipe file, or the name of a shipped recipe.")],
    count: Annotated[int, typer.Option(min=1, max=400, help="How many samples.")] = 16,
    output: Annotated[Path, typer.Option(help="The picture to write.")] = Path("sheet.png"),
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Override a value: --set data.degradation.preset=mild.")] = None,
) -> None:
    """Write a contact sheet of training samples: HR, LR and edge mask, with the drawn parameters under each."""
    from PIL import Image

    from sslsr_diffusion.data.loader import open_samples
    from sslsr_diffusion.data.sheet import contact_sheet
    from sslsr_diffusion.runs.recipe import load_recipe

    if Image.registered_extensions().get(output.suffix.lower()) not in Image.SAVE:
        raise UserError(f"--output {output}: expected a name that ends in a picture's suffix such as .png or .jpg.")

    recipe = load_recipe(config, overrides or ())
    samples, problems = open_samples(recipe.data, crop_size=recipe.training.crop_size, scale=recipe.scale, seed=recipe.seed, count=count)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(samples).save(output)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error.strerror or error}); name a file in a folder of yours.") from None
    for problem in problems:
        typer.echo(problem, err=True)
    typer.echo(f"{len(samples)} samples (HR, LR, edge mask) in {output}")
