from __future__ import annotations

import contextlib
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sslsr_diffusion.cli.flags import as_flags, flagged
from sslsr_diffusion.errors import UserError

if TYPE_CHECKING:
    from sslsr_diffusion.inference.restorer import Restorer
    from sslsr_diffusion.inference.runner import Progress, RunnerReport, Work


class ColorFix(StrEnum):
    wavelet = "wavelet"
    adain = "adain"
    none = "none"


class Format(StrEnum):
    png = "png"
    jpg = "jpg"
    webp = "webp"
    tif = "tif"


class Dtype(StrEnum):
    auto = "auto"
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


FLAGS = (
    *("model", "revision", "device", "dtype", "memory_budget", "scale", "seed", "steps", "tile", "detail", "antiring", "color_fix"),
    *("fidelity", "sampler", "strength", "prompt", "negative_prompt", "guidance_scale"),
)
Input = Annotated[str, typer.Option("--input", "-i", help="Picture, folder or glob pattern (quote it).")]
Model = Annotated[
    str | None,
    typer.Option(
        help="Run folder, its result, a model's folder or file, or hub id; without it the newest finished run in runs/, else the shipped "
        "small model."
    ),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")]
Scale = Annotated[
    float | None,
    typer.Option(min=0.01, max=64, help="Enlargement: the output has round(scale * size) pixels; without it the model's own."),
]
Steps = Annotated[
    int | None, typer.Option(min=1, max=1000, help="Sampling steps; without it the model's own default (200 where it names none).")
]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of every picture.")]
TileSide = Annotated[str, typer.Option(help="Side of a tile in output pixels, 'auto' (by free memory) or 'none' (whole picture).")]
Detail = Annotated[
    float | None, typer.Option(min=0, max=1, help="0 bicubic to 1 all that the model adds; without it the model's own default.")
]
Antiring = Annotated[
    float | None, typer.Option(min=0, max=1, help="0 to 1: takes back seams beside edges; without it the model's own default.")
]
Fidelity = Annotated[
    float | None, typer.Option(min=0, max=1, help="Models with CFW: how much of the input the decoder takes over. [default: 0.5]")
]
Sampler = Annotated[
    str | None, typer.Option(help="ddpm, ddim, ddim-original, dpm++, unipc, euler or a diffusers scheduler. [default: the model's]")
]
Strength = Annotated[
    float | None,
    typer.Option(min=0.001, max=1, help="1 all steps; 0.3 the last 30 % of them, from a less noised picture. [default: 1]"),
]
Prompt = Annotated[str | None, typer.Option(help="Text, for models with a text encoder.")]
NegativePrompt = Annotated[str | None, typer.Option(help="What the guidance leads away from.")]
GuidanceScale = Annotated[float | None, typer.Option(min=0, max=30, help="Strength of the guidance; 1 is off. [default: 1]")]
ColorFixKind = Annotated[
    ColorFix | None, typer.Option(help="Takes the colours from the input. [default: wavelet; none for plain networks]")
]
FormatKind = Annotated[Format | None, typer.Option(help="Format of the results; without it the input's, and png for gif, bmp, ...")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Redo what is done with the same settings, replace files of others.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
DtypeKind = Annotated[Dtype, typer.Option(help="auto: float16 on a GPU, float32 on the CPU.")]
MemoryBudget = Annotated[
    str | None, typer.Option(help="For model and work together, such as 8GB: chooses dtype, tile and CPU offload that stay below it.")
]


def infer(
    input: Input,
    model: Model = None,
    revision: Revision = None,
    output: Output = Path("results"),
    scale: Scale = None,
    steps: Steps = None,
    seed: Seed = 0,
    tile: TileSide = "auto",
    detail: Detail = None,
    antiring: Antiring = None,
    fidelity: Fidelity = None,
    sampler: Sampler = None,
    strength: Strength = None,
    prompt: Prompt = None,
    negative_prompt: NegativePrompt = None,
    guidance_scale: GuidanceScale = None,
    color_fix: ColorFixKind = None,
    format: FormatKind = None,
    overwrite: Overwrite = False,
    device: Device = "auto",
    dtype: DtypeKind = Dtype.auto,
    memory_budget: MemoryBudget = None,
) -> None:
    """Upscale pictures. Sub-folders, colour profile, EXIF, alpha and 16 bits are kept; what is done with these settings is skipped."""
    given = {
        "num_inference_steps": steps,
        "detail": detail,
        "antiring": antiring,
        "fidelity": fidelity,
        "sampler": sampler,
        "strength": strength,
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "guidance_scale": guidance_scale,
        "color_fix": color_fix.value if color_fix else None,
    }
    call: dict[str, Any] = {"tile": _tile(tile), **{name: value for name, value in given.items() if value is not None}}
    from sslsr_diffusion.devices import find_device, parse_bytes
    from sslsr_diffusion.inference.open import default_model, find_model, open_model
    from sslsr_diffusion.inference.runner import FORMATS, RunnerOptions, find_work, run_work

    with as_flags(*FLAGS):
        where: dict[str, Any] = {"device": device, "dtype": dtype.value}
        if memory_budget is not None:
            call["memory_budget"] = parse_bytes(memory_budget)
            where.update(memory_budget=call["memory_budget"], tile=call["tile"])
        find_device(device)
        if model is None:
            model, why = default_model(Path("runs"))
            typer.echo(f"model: {model} ({why}; --model chooses another)")
        found = find_model(model, revision)
        options = RunnerOptions(scale, seed, call, FORMATS[format.value] if format else None, overwrite=overwrite, model=found.fingerprint)
        work = find_work(input, output, options)
        with _interruptible(work):
            if work.todo:
                restorer = open_model(found, **where)
                _say_how(restorer, call)
                with _progress(len(work.todo)) as progress:
                    run_work(restorer, work, progress=progress)
    _show(work.report, output)


def _tile(text: str) -> int | str | None:
    if text in ("auto", "none"):
        return None if text == "none" else text
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise UserError(f"--tile {text}: expected a side in output pixels such as 512, auto or none.")
    return int(text)


def _say_how(restorer: Restorer, call: dict[str, Any]) -> None:
    """A line on what it will be called with (what was given, else its own defaults), and notes on what has no effect.

    Raises:
        UserError: it does not have what was asked for.
    """
    notes = restorer.check(**call)
    values = {**restorer.defaults, **call}
    names = {"num_inference_steps": "steps", "detail": "detail", "antiring": "antiring"}
    shown = [f"{names[name]} {values[name]}" for name in names if name in values and name in restorer.options]
    for line in ([", ".join(shown)] if shown else []) + [f"note: {flagged(note, *FLAGS)}" for note in notes]:
        typer.echo(line)


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Progress]:
    from tqdm import tqdm

    with tqdm(total=total, unit="picture", dynamic_ncols=True) as bar:

        def progress(done: int, total: int, name: str) -> None:
            bar.update(done - bar.n)
            bar.set_postfix_str(name[-40:])

        yield progress


@contextlib.contextmanager
def _interruptible(work: Work) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        _show(work.report, work.output)
        typer.echo("interrupted; the same command goes on from here", err=True)
        raise typer.Exit(130) from None


def _show(report: RunnerReport, output: Path) -> None:
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
    if report.failed:
        raise typer.Exit(1)
