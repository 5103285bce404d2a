import re
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sslsr_diffusion.cli.flags import RENAMED, as_flags, as_folder, flagged, interruptible, one_of, progress_bar
from sslsr_diffusion.errors import UserError
from sslsr_diffusion.inference.choices import COLOR_FIXES, FORMATS, SAMPLERS, parse_tile

if TYPE_CHECKING:
    from sslsr_diffusion.inference.restorer import Restorer
    from sslsr_diffusion.inference.runner import RunnerReport

Dtype = StrEnum("Dtype", "auto float32 float16 bfloat16")

FLAGS = (
    *("model", "revision", "device", "dtype", "memory_budget", "compile", "scale", "seed", "steps", "tile", "detail"),
    *("back_projection", "antiring", "color_fix", "fidelity", "sampler", "strength", "prompt", "negative_prompt", "guidance_scale"),
    *("noise_level", "lora_scale"),
)
CALL = (  # what goes to the restorer where it was given
    *("num_inference_steps", "detail", "back_projection", "antiring", "fidelity", "sampler", "strength"),
    *("prompt", "negative_prompt", "guidance_scale", "noise_level", "lora_scale", "color_fix"),
)
Model = Annotated[
    str | None,
    typer.Option(
        help="Run folder, its result, a model's folder or file, or hub id; without it the newest finished run in runs/, else the shipped "
        "small model."
    ),
]
ColorFix = Annotated[str | None, one_of(COLOR_FIXES, "Colours of the input. [default: wavelet; none for plain networks]")]
Photos = Annotated[list[str] | None, typer.Argument(metavar="[INPUT]...", help="The same, and what a pattern without quotes becomes.")]
Format = Annotated[str | None, one_of(FORMATS, "Format of the results; without it the input's, and png for gif, bmp, ...")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Redo what is done with the same settings, replace files of others.")]
MemoryBudget = Annotated[
    str | None, typer.Option(help="For model and work together, such as 8GB: chooses dtype, tile and CPU offload that stay below it.")
]
Scale = Annotated[
    float | None,
    typer.Option(min=0.01, max=64, help="Enlargement: the output has round(scale * size) pixels; without it the model's own."),
]
Detail = Annotated[
    float | None, typer.Option(min=0, max=1, help="0 bicubic to 1 all that the model adds; without it the model's own default.")
]
BackProjection = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="0 to 1: puts back what the picture lacks of the input; without it the model's own default."),
]
Antiring = Annotated[
    float | None, typer.Option(min=0, max=1, help="0 to 1: takes back seams beside edges; without it the model's own default.")
]
Fidelity = Annotated[
    float | None, typer.Option(min=0, max=1, help="Models with CFW: how much of the input the decoder takes over. [default: 0.5]")
]
Strength = Annotated[
    float | None,
    typer.Option(min=0.001, max=1, help="1 all steps; 0.3 the last 30 % of them, from a less noised picture. [default: 1]"),
]
LoRAScale = Annotated[
    float | None, typer.Option(min=0, max=2, help="One-step models: how much of the LoRA is taken; 0 the base alone. [default: 1]")
]
NoiseLevel = Annotated[
    int | None, typer.Option(min=0, help="x4 upscalers: noise on the input; more adds more of the model's own. [default: 20]")
]
Precision = Annotated[
    Dtype,
    typer.Option(help="auto: float16 on a GPU; on the CPU float32, for networks bfloat16 where that is faster and the picture the same."),
]
Compile = Annotated[
    bool, typer.Option("--compile", help="By torch.compile: the first pictures wait for it, others may take less; for many of one size.")
]
MaxMegapixels = Annotated[float, typer.Option(min=1, help="A larger input is refused: small files can claim to be pictures without end.")]


def infer(
    photos: Photos = None,
    input: Annotated[list[str] | None, typer.Option("--input", "-i", help="Picture, folder or glob pattern; repeatable.")] = None,
    model: Model = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", callback=as_folder, help="Folder for the results.")] = Path("results"),
    scale: Scale = None,
    longest_side: Annotated[int | None, typer.Option(min=1, help="In the place of --scale: pixels of each result's longest side.")] = None,
    size: Annotated[str | None, typer.Option(help="In the place of --scale: results as large as fit into 3840x2160, undistorted.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, max=1000, help="Sampling steps; without it the model's own, or 200.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of every picture.")] = 0,
    tile: Annotated[str, typer.Option(help="Side of a tile in output pixels, 'auto' (by free memory) or 'none' (whole picture).")] = "auto",
    detail: Detail = None,
    back_projection: BackProjection = None,
    antiring: Antiring = None,
    fidelity: Fidelity = None,
    sampler: Annotated[str | None, typer.Option(help=f"{', '.join(SAMPLERS)} or a diffusers scheduler. [default: the model's]")] = None,
    strength: Strength = None,
    prompt: Annotated[str | None, typer.Option(help="Text, for models with a text encoder.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What the guidance leads away from.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(min=0, max=30, help="Strength of the guidance; 1 is off. [default: 1]")] = None,
    lora_scale: LoRAScale = None,
    noise_level: NoiseLevel = None,
    color_fix: ColorFix = None,
    format: Format = None,
    overwrite: Overwrite = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    dtype: Precision = Dtype.auto,
    memory_budget: MemoryBudget = None,
    compile: Compile = False,
    max_megapixels: MaxMegapixels = 1000,
) -> None:
    """Upscale pictures. Sub-folders, colour profile, EXIF, alpha and 16 bits are kept; what is done with these settings is skipped."""
    given = {**locals(), "num_inference_steps": steps}
    inputs, box = [*(input or ()), *(photos or ())], _box(scale, longest_side, size)
    if not inputs:
        raise UserError("expected --input with a picture, a folder or a pattern such as 'photos/*.jpg', got none.")
    with as_flags("tile"):
        call: dict[str, Any] = {"tile": parse_tile(tile)}
    call |= {name: given[name] for name in CALL if given[name] is not None}
    with interruptible(), as_flags(*FLAGS):
        from sslsr_diffusion.devices import find_device, parse_bytes
        from sslsr_diffusion.inference.open import default_model, find_model, open_model
        from sslsr_diffusion.inference.runner import RunnerOptions, find_work

        where: dict[str, Any] = {"device": device, "dtype": dtype.value, "compile": compile}
        if memory_budget is not None:
            call["memory_budget"] = parse_bytes(memory_budget)
            where.update(memory_budget=call["memory_budget"], tile=call["tile"])
        find_device(device)
        if model is None:
            model, why = default_model(Path("runs"))
            typer.echo(f"model: {model} ({why}; --model chooses another)")
        found = find_model(model, revision)
        options = RunnerOptions(
            scale,
            seed,
            call,
            FORMATS[format] if format else None,
            overwrite=overwrite,
            model=found.fingerprint,
            box=box,
            max_pixels=round(max_megapixels * 1e6),
        )
        work = find_work(inputs, output, options)
        if work.todo:
            _upscale(open_model(found, **where), work, call, output)
    _show(work.report, output)
    if work.report.failed:
        raise typer.Exit(1)


def _upscale(restorer: Any, work: Any, call: dict[str, Any], output: Path) -> None:
    from sslsr_diffusion.inference.runner import run_work

    _say_how(restorer, call)
    with progress_bar(len(work.todo), lambda: _show(work.report, output), unit="picture") as bar:

        def progress(done: int, total: int, name: str) -> None:
            bar.update(done - bar.n)
            bar.set_postfix_str(name[-40:])

        run_work(restorer, work, progress=progress)


def _box(scale: float | None, longest_side: int | None, size: str | None) -> tuple[int, int] | None:
    """Width and height that each result fits into; None: it is enlarged by a scale."""
    given = {"--scale": scale, "--longest-side": longest_side, "--size": size}
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise UserError(f"{' and '.join(named)} say the same in two ways; give one of them.")
    if size is None:
        return None if longest_side is None else (longest_side, longest_side)
    found = re.fullmatch(r"([1-9]\d{0,5})[xX]([1-9]\d{0,5})", size, re.ASCII)
    if found is None:
        raise UserError(f"--size {size}: expected width and height in pixels such as 3840x2160.")
    return int(found[1]), int(found[2])


def _say_how(restorer: "Restorer", call: dict[str, Any]) -> None:
    """A line on what it will be called with (what was given, else its own defaults), and notes on what has no effect.

    Raises UserError where it does not have what was asked for.
    """
    notes = restorer.check(**call)
    values = {**restorer.defaults, **call}
    names = [
        name for name in ("num_inference_steps", "detail", "back_projection", "antiring") if name in values and name in restorer.options
    ]
    shown = ["called with " + ", ".join(f"{RENAMED.get(name, name)} {values[name]}" for name in names)] if names else []
    for line in [*shown, *(f"note: {flagged(note, *FLAGS)}" for note in notes)]:
        typer.echo(line)


def _show(report: "RunnerReport", output: Path) -> None:
    from sslsr_diffusion.images import printable

    for name, target in report.renamed:
        typer.echo(f"renamed: {name} -> {target} (another picture has its name)")
    for name, note in report.notes:
        if name:  # those of every picture were shown before the first
            typer.echo(f"note: {name}: {note}")
    replaced = len(set(report.done) & set(report.replaced))
    parts = [f"{len(report.done)} done" + (f" ({replaced} in place of results of other settings or inputs)" if replaced else "")]
    if report.skipped:
        parts.append(f"{len(report.skipped)} skipped (done before with the same settings; --overwrite redoes them)")
    if report.failed:
        parts.append(f"{len(report.failed)} failed")
    typer.echo(f"{', '.join(parts)}; results in {printable(output)}")
    for name, reason in report.failed:
        typer.echo(f"failed: {name}: {flagged(reason, *FLAGS)}", err=True)
