from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sslsr_diffusion.errors import UserError

if TYPE_CHECKING:
    from sslsr_diffusion.inference.runner import RunnerReport


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


def infer(
    input: Annotated[str, typer.Option("--input", "-i", help="Picture, folder or glob pattern (quote it).")],
    model: Annotated[
        str | None,
        typer.Option(help="Pipeline or run folder, or hub id; without it the newest finished run in runs/, else the shipped small model."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")] = Path("results"),
    scale: Annotated[float, typer.Option(min=0.01, max=64, help="Enlargement: the output has round(scale * size) pixels.")] = 4.0,
    steps: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Sampling steps; without it the model's own default (200 where it names none).")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of every picture.")] = 0,
    tile: Annotated[str, typer.Option(help="Side of a tile in output pixels, 'auto' (by free memory) or 'none' (whole picture).")] = "auto",
    detail: Annotated[
        float | None, typer.Option(min=0, max=1, help="0 bicubic to 1 all that the model adds; without it the model's own default.")
    ] = None,
    antiring: Annotated[
        float | None, typer.Option(min=0, max=1, help="0 to 1: takes back seams beside edges; without it the model's own default.")
    ] = None,
    color_fix: Annotated[ColorFix, typer.Option(help="Takes the colours from the input.")] = ColorFix.wavelet,
    format: Annotated[Format | None, typer.Option(help="Format of the results; without it the input's, and png for gif, bmp, ...")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Redo what is done with the same settings, replace files of others.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    dtype: Annotated[Dtype, typer.Option(help="auto: float16 on a GPU, float32 on the CPU.")] = Dtype.auto,
    memory_budget: Annotated[
        str | None, typer.Option(help="For model and work together, such as 8GB: chooses dtype, tile and CPU offload that stay below it.")
    ] = None,
) -> None:
    """Upscale pictures. Sub-folders, colour profile, EXIF, alpha and 16 bits are kept; what is done with these settings is skipped."""
    call: dict[str, Any] = {"tile": _tile(tile), "color_fix": color_fix.value}
    named = {"num_inference_steps": steps, "detail": detail, "antiring": antiring}
    call |= {name: value for name, value in named.items() if value is not None}
    from sslsr_diffusion.devices import find_device, parse_bytes
    from sslsr_diffusion.inference.open import default_model, find_model, load_pipeline
    from sslsr_diffusion.inference.placement import check_tile_of
    from sslsr_diffusion.inference.runner import FORMATS, RunnerOptions, plan_files, run_plan

    where: dict[str, Any] = {"device": device, "dtype": dtype.value}
    if memory_budget is not None:
        call["memory_budget"] = parse_bytes(memory_budget)
        where.update(memory_budget=call["memory_budget"], tile=call["tile"])
    find_device(device)
    if model is None:
        model, why = default_model(Path("runs"))
        typer.echo(f"model: {model} ({why}; --model chooses another)")
    folder, fingerprint = find_model(model, revision)
    check_tile_of(folder, call["tile"])
    options = RunnerOptions(scale, seed, call, FORMATS[format.value] if format else None, overwrite=overwrite, model=fingerprint)
    plan = plan_files(input, output, options)
    if plan.todo:
        plan.report = _run(lambda progress: run_plan(_saying_how(load_pipeline(folder, **where), call), plan, progress=progress), plan)
    _show(plan.report, output)


def _tile(text: str) -> int | str | None:
    if text in ("auto", "none"):
        return None if text == "none" else text
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise UserError(f"--tile {text}: expected a side in output pixels such as 512, auto or none.")
    return int(text)


def _saying_how(pipe: Any, call: dict[str, Any]) -> Any:
    """The pipeline, after a line on what it will be called with: what was given, else its own defaults."""
    from tqdm import tqdm

    names = {"num_inference_steps": "steps", "detail": "detail", "antiring": "antiring"}
    tqdm.write(", ".join(f"{shown} {call.get(name, pipe.config[f'default_{name}'])}" for name, shown in names.items()))
    return pipe


def _run(work: Any, plan: Any) -> RunnerReport:
    from tqdm import tqdm

    with tqdm(total=len(plan.todo), unit="picture", dynamic_ncols=True) as bar:

        def progress(done: int, total: int, name: str) -> None:
            bar.update(done - bar.n)
            bar.set_postfix_str(name[-40:])

        try:
            return work(progress)
        except KeyboardInterrupt:
            bar.close()
            _show(plan.report, plan.output)
            typer.echo("interrupted; the same command goes on from here", err=True)
            raise typer.Exit(130) from None


def _show(report: RunnerReport, output: Path) -> None:
    from sslsr_diffusion.images import printable

    for name, target in report.renamed:
        typer.echo(f"renamed: {name} -> {target} (another picture has its name)")
    for name, note in report.notes:
        typer.echo(f"note: {name}: {note}")
    replaced = len(set(report.done) & set(report.replaced))
    parts = [f"{len(report.done)} done" + (f" ({replaced} in place of results of other settings or inputs)" if replaced else "")]
    if report.skipped:
        parts.append(f"{len(report.skipped)} skipped (done before with the same settings; --overwrite redoes them)")
    if report.failed:
        parts.append(f"{len(report.failed)} failed")
    typer.echo(f"{', '.join(parts)}; results in {printable(output)}")
    for name, reason in report.failed:
        typer.echo(f"failed: {name}: {reason}", err=True)
    if report.failed:
        raise typer.Exit(1)
