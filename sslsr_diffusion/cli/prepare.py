from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from sslsr_diffusion.cli.flags import as_folder
from sslsr_diffusion.errors import UserError

app = typer.Typer(no_args_is_help=True, help="Prepare and inspect training data.")

Place = Annotated[str | None, typer.Argument(metavar="INPUT", help="A folder, a picture or a pattern.", show_default=False)]
Input = Annotated[str | None, typer.Option("--input", help="The same by name.", show_default=False)]
Output = Annotated[Path, typer.Option("--output", callback=as_folder, help="Folder for the results; what is there already is kept.")]
Processes = Annotated[int, typer.Option(min=0, help="Processes; 0: one per core.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override a value of the recipe (repeatable).")]
Edge = Annotated[int, typer.Option(min=1, help="Pixels.")]
Size = Annotated[int, typer.Option(min=1, help="Side of a sub-image in pixels.")]
Step = Annotated[int, typer.Option(min=1, help="Distance of sub-images in pixels.")]
Kind = Annotated[str, typer.Option(help="laplacian, laplacian_abs, sobel, canny, all or random.")]
Level = Annotated[float, typer.Option(help="Grey levels.")]
Preset = Annotated[str, typer.Option(help="A preset of data.degradation; an unknown name lists them all.")]
Scale = Annotated[int, typer.Option(min=1, max=8, help="How many times smaller.")]
Seed = Annotated[int, typer.Option(help="The same seed and names give the same pictures.")]


@app.command()
def multiscale(output: Output, place: Place = None, source: Input = None, shortest_edge: Edge = 512, processes: Processes = 0) -> None:
    """Copies at 0.75, 0.6, 1/3 and with the shorter side exactly --shortest-edge, as in the published preparation."""
    _run("multiscale", _input(place, source), output, processes, shortest_edge=shortest_edge)


@app.command()
def crops(output: Output, place: Place = None, source: Input = None, size: Size = 512, step: Step = 256, processes: Processes = 0) -> None:
    """Cut pictures into overlapping sub-images; pictures that are too small are named, never lost."""
    _run("crops", _input(place, source), output, processes, size=size, step=step)


@app.command()
def masks(
    output: Output, place: Place = None, source: Input = None, kind: Kind = "laplacian", threshold: Level = 20.0, processes: Processes = 0
) -> None:
    """Write edge masks as mat/NAME.mat and png/NAME.png, in the layout of the published script."""
    from sslsr_diffusion.config import parse
    from sslsr_diffusion.data.settings import MaskSettings

    settings = parse(MaskSettings, {"kind": kind, "threshold": threshold})
    _run("masks", _input(place, source), output, processes, settings=settings)


@app.command()
def lr(
    output: Output,
    place: Place = None,
    source: Input = None,
    preset: Preset = "stablesr_ssl",
    scale: Scale = 4,
    seed: Seed = 0,
    processes: Processes = 0,
) -> None:
    """Make a test set: hr/ cut to a multiple of the scale and lr/ degraded by preset and seed."""
    from sslsr_diffusion.config import parse
    from sslsr_diffusion.data.degradation import DegradationSettings

    settings = parse(DegradationSettings, {"preset": preset})
    _run("low_resolution", _input(place, source), output, processes, degradation=settings, scale=scale, seed=seed)


@app.command()
def pairs(
    output: Output,
    place: Annotated[str | None, typer.Argument(metavar="INPUT", help="A folder with the two folders in it.", show_default=False)] = None,
    source: Input = None,
    hr: Annotated[str, typer.Option(help="The folder of high-resolution pictures, below INPUT (or absolute).")] = "hr",
    lr: Annotated[str, typer.Option(help="The folder of low-resolution pictures.")] = "lr",
    scale: Annotated[int, typer.Option(min=1, max=8, help="How many times larger the hr of a pair is to be.")] = 4,
    processes: Processes = 0,
) -> None:
    """Make real pairs fit: hr/ cut to exactly --scale times lr/; an lr that is already as large as its hr (RealSR) is shrunk."""
    base = Path(_input(place, source)).expanduser()
    sides = {"hr": str(base / hr), "lr": str(base / lr)}
    for side in sides.values():
        if not Path(side).is_dir():
            raise UserError(f"expected a folder {side}, found none; name the two folders by --hr and --lr.")
    _run("pairs", sides["hr"], output, processes, **sides, scale=scale)


@app.command()
def cfw(
    config: Annotated[str, typer.Option("--config", "-c", help="The training's recipe (task decoder): pictures, degradation, crop, seed.")],
    model: Annotated[str, typer.Option(help="The upscaler of stage 1: pipeline folder, run folder or hub id.")],
    output: Output,
    count: Annotated[int, typer.Option(min=1, help="Samples in all (StableSR: about 5000).")] = 5000,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Sampling steps (StableSR: 200).")] = 200,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples at once.")] = 1,
    set_: Set = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
) -> None:
    """Make the samples of task decoder: hr/, lr/ and the upscaler's latents/. The same command goes on where it was stopped."""
    from tqdm import tqdm

    from sslsr_diffusion.devices import find_device
    from sslsr_diffusion.inference.open import find_model
    from sslsr_diffusion.runs.decoder_samples import make_cfw_data
    from sslsr_diffusion.runs.recipe import load_recipe

    recipe = load_recipe(config, set_ or [])
    found = find_model(model)
    place = str(find_device(device))
    options: dict[str, Any] = {"count": count, "steps": steps, "batch_size": batch_size, "device": place, "fingerprint": found.fingerprint}
    try:
        with tqdm(total=count, unit="sample", disable=None) as bar:
            for present in make_cfw_data(recipe, found.path, output, **options):
                bar.update(present - bar.n)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error.strerror}); mend that, and the same command goes on.") from None
    typer.echo(f"{count} samples in {output}; train on them with --set 'data.sources=[{{kind: cfw, path: {output}}}]'")


@app.command()
def teacher(
    model: Annotated[str, typer.Option(help="The upscaler whose pictures are learned: by any name that infer --model takes.")],
    output: Output,
    place: Place = None,
    source: Input = None,
    config: Annotated[
        str | None, typer.Option("--config", "-c", help="Instead of INPUT: pictures, degradation, scale and seed of this recipe.")
    ] = None,
    set_: Set = None,
    count: Annotated[int, typer.Option(min=1, help="Pairs in all.")] = 1000,
    crop_size: Annotated[int, typer.Option(min=32, help="Side of a pair's high-resolution crop in pixels.")] = 384,
    preset: Annotated[str | None, typer.Option(help="A preset of data.degradation.", show_default="stablesr_ssl")] = None,
    scale: Annotated[int | None, typer.Option(min=1, max=8, help="How many times smaller.", show_default="4")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed and pictures give the same pairs.", show_default="0")] = None,
    anchor: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Share of what the model gets wrong at the low resolution that is taken back.",
            show_default="the recipe's, or 0",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Crops at once.")] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
) -> None:
    """Make pairs to distil an upscaler: lr/ degraded crops, hr/ what the model makes of them. The same command goes on where it stopped."""
    from tqdm import tqdm

    from sslsr_diffusion.config import parse
    from sslsr_diffusion.data.settings import DataSettings
    from sslsr_diffusion.devices import find_device
    from sslsr_diffusion.inference.open import find_model
    from sslsr_diffusion.runs.recipe import load_recipe
    from sslsr_diffusion.runs.stored_samples import Wanted
    from sslsr_diffusion.runs.teacher import make_pairs

    if config is None:
        if set_:
            raise UserError("prepare teacher: expected --config beside --set, got none; give the recipe, or leave --set out.")
        sources = [{"kind": "folder", "path": _input(place, source)}]
        data = parse(DataSettings, {"sources": sources, "degradation": {"preset": preset or "stablesr_ssl"}})
        wanted = Wanted(data, crop_size, 4 if scale is None else scale, seed or 0, count)
    else:
        if place or source:
            raise UserError("prepare teacher: expected either --config or an input, got both.")
        given = {"--preset": preset, "--scale": scale, "--seed": seed}
        if both := [name for name, value in given.items() if value is not None]:
            raise UserError(f"{both[0]}: with --config the recipe says it; leave it out, or change the recipe by --set.")
        recipe = load_recipe(config, set_ or [])
        wanted = Wanted(recipe.data, crop_size, recipe.scale, recipe.seed, count)
    if anchor is not None:
        wanted = replace(wanted, data=parse(DataSettings, {**wanted.data.model_dump(), "teacher_anchor": anchor}))
    try:
        with tqdm(total=count, unit="pair", disable=None) as bar:
            for present in make_pairs(wanted, find_model(model), output, batch_size=batch_size, device=str(find_device(device))):
                bar.update(present - bar.n)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error.strerror}); mend that, and the same command goes on.") from None
    typer.echo(f"{count} pairs in {output}; train on them with --set 'data.sources=[{{kind: pairs, path: {output}}}]'")


@app.command()
def check(
    place: Annotated[
        str | None,
        typer.Argument(metavar="INPUT", show_default=False, help="Folder, hr/ and lr/, picture, pattern, .txt list, .parquet, .tar."),
    ] = None,
    source: Input = None,
    config: Annotated[
        str | None, typer.Option("--config", "-c", help="Instead: everything that this recipe reads, as it reads it.")
    ] = None,
    set_: Set = None,
    kind: Annotated[
        str | None,
        typer.Option(help="folder, files, pairs, cfw, hub, parquet or webdataset; default: by what is there.", show_default=False),
    ] = None,
    column: Annotated[str | None, typer.Option(help="hub, parquet: the column of the pictures.", show_default="image")] = None,
    lr_column: Annotated[str | None, typer.Option(help="hub, parquet: the column of the partners.", show_default=False)] = None,
    crop_size: Annotated[int | None, typer.Option(min=1, help="Side of a crop in pixels.", show_default="the recipe's, or 512")] = None,
    scale: Annotated[int, typer.Option(min=1, max=8, help="Without a recipe: how many times larger the hr of a pair is.")] = 4,
    processes: Processes = 0,
) -> None:
    """Read every picture and print sizes, formats, unusable ones, duplicates, mask densities and estimated crops.

    The exit code is 1 if something cannot be used, 0 if not; small pictures and duplicates are mentioned only.
    """
    from sslsr_diffusion.data import check as checking
    from sslsr_diffusion.data.preparation import default_processes, spread
    from sslsr_diffusion.data.settings import MaskSettings
    from sslsr_diffusion.runs.recipe import load_recipe

    mask, size = MaskSettings(), crop_size or 512
    if config is None:
        sources = [checking.guess_source(_input(place, source), kind=kind, column=column, lr_column=lr_column)]
    elif place or source or kind or column or lr_column:
        raise UserError("check: expected either --config or an input with its options, got both.")
    else:
        recipe = load_recipe(config, set_ or [])
        sources, mask = [*recipe.data.sources, *recipe.data.validation], recipe.data.mask
        size, scale = crop_size or recipe.training.crop_size, recipe.scale
        if not sources:
            raise UserError(f"{config}: expected data.sources, the recipe names none; set them, or name a folder instead of --config.")
    found: list[checking.Finding] = []
    looker = checking.Looker(size, scale, mask, settled=config is not None)
    for settings in sources:
        total, items = checking.contents(settings)
        found += _progress(spread(looker, items, processes or default_processes()), total)
        typer.echo(f"{settings.kind} {settings.path}{'' if total is None else f': {total}'}")
    for line in checking.report(found, size):
        typer.echo(line)
    if any(one.problem for one in found):
        raise typer.Exit(1)


@app.command()
def fit(
    place: Annotated[
        str | None, typer.Argument(metavar="LR_FOLDER", show_default=False, help="Folder of real low-resolution pictures.")
    ] = None,
    lr_folder: Annotated[str | None, typer.Option("--lr-folder", help="The same by name.", show_default=False)] = None,
    output: Annotated[Path | None, typer.Option(help="Where to write the degradation section; default: print it.")] = None,
    scale: Annotated[int, typer.Option(min=1, max=8, help="The scale of the training.")] = 4,
) -> None:
    """Estimate noise, JPEG quality and blur of your pictures, and write a degradation section for a recipe."""
    import yaml

    from sslsr_diffusion.data.estimate import degradation_section, estimate

    paths = _listed(_input(place, lr_folder, "--lr-folder"))
    estimates = []
    for path in _progress(paths, len(paths)):
        try:
            estimates.append(estimate(path))
        except (UserError, OSError) as error:
            typer.echo(str(error), err=True)
    typer.echo(f"{'file':40}{'noise':>8}{'jpeg':>7}{'blur':>7}", err=True)
    for one in estimates:
        quality = "-" if one.quality is None else f"{one.quality}{'' if one.from_tables else '~'}"
        noise = f"{'' if one.noise_measured else '<='}{one.noise:.1f}"
        typer.echo(f"{one.name[-39:]:40}{noise:>8}{quality:>7}{one.blur:7.2f}", err=True)
    hidden = sum(not one.noise_measured for one in estimates)
    if hidden:
        what = f"noise of {hidden} of {len(estimates)} pictures is not measurable under compression or texture"
        typer.echo(f"{what}: at most the number after <=", err=True)
    text = yaml.safe_dump({"degradation": degradation_section(estimates, scale)}, sort_keys=False, default_flow_style=None)
    if output is None:
        typer.echo(text)
    else:
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"--output {output}: cannot be written ({error.strerror}); name a file in a folder of yours.") from None
        typer.echo(f"degradation section for `data:` of a recipe in {output}")


def _input(place: str | None, source: str | None, option: str = "--input") -> str:
    if (place is None) == (source is None):
        got = "none" if place is None else "both"
        raise UserError(f"expected one folder, picture or pattern, as the argument or as {option}, got {got}.")
    return place or source or ""


def _listed(source: str) -> list[Path]:
    from sslsr_diffusion.images import list_images

    paths = list_images(source)
    if not paths:
        raise UserError(f"{source}: expected pictures, found none.")
    return paths


def _run(name: str, source: str, output: Path, processes: int, **options: object) -> None:
    """A job of data/preparation.py for every picture of the input."""
    import os
    from functools import partial

    from sslsr_diffusion.data import preparation

    job, paths = partial(getattr(preparation, name), output=output, **options), _listed(source)
    preparation.check_settings(job)
    base = Path(source).expanduser()
    base = base if base.is_dir() else Path(os.path.commonpath([path.parent for path in paths]))
    found = preparation.run_jobs(job, paths, base, processes or preparation.default_processes())
    outcomes = list(_progress(found, len(paths)))
    bad = sorted((o for o in outcomes if o.problem), key=lambda o: o.name)
    for outcome in bad:
        typer.echo(f"not done: {outcome.problem}", err=True)
    written = sum(o.written for o in outcomes)
    typer.echo(f"{len(outcomes) - len(bad)} of {len(outcomes)} pictures done, {written} new files in {output}")
    if bad:
        raise typer.Exit(1)


def _progress(items: Any, total: int | None) -> Any:
    from tqdm import tqdm

    return tqdm(items, total=total, unit="picture", disable=None)
