import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sslsr_diffusion.cli.flags import as_flags, as_folder, flagged, interruptible, progress_bar
from sslsr_diffusion.errors import UserError

if TYPE_CHECKING:
    from sslsr_diffusion.evaluation.dataset import Dataset
    from sslsr_diffusion.evaluation.pairing import Pairing
    from sslsr_diffusion.evaluation.scoring import Scores

FLAGS = ("model", "device", "steps")  # what a restorer's messages may be about

Restored = Annotated[
    list[str] | None,
    typer.Option(help="[NAME=]DIR of a model's results; repeat for more columns. The same NAME again is another seed of that model."),
]
Model = Annotated[
    list[str] | None, typer.Option(help="[NAME=]run folder, model folder or file, or hub id: upscales the dataset first; repeatable.")
]
DatasetName = Annotated[
    str | None,
    typer.Option(help="Folder with lr/ and hr/, or LR_DIR,HR_DIR, or a folder of photographs (shrunk by --scale). Replaces --reference."),
]
Metrics = Annotated[str, typer.Option(help="Names with commas between them, 'default' or 'all'; --list-metrics shows them.")]
WeightsDir = Annotated[
    Path | None, typer.Option(help="Where the weights lie: a folder with pyiqa/, checkpoints/, clip/. [default: ~/.cache/torch/hub]")
]
ListMetrics = Annotated[bool, typer.Option("--list-metrics", help="Show every metric, its convention and what it lacks; then exit.")]
LowResolution = Annotated[
    Path | None, typer.Option(help="Folder of the low-resolution inputs: shown in the report, and what grid compares with.")
]
ReportFolder = Annotated[
    Path, typer.Option("--output", "-o", callback=as_folder, help="Folder for report.html, summary.json, metrics.csv.")
]
Explore = Annotated[
    int, typer.Option(min=0, max=20, help="Worst and best images per metric that get a page of their graphs, linked from the report.")
]


def evaluate(
    restored: Restored = None,
    reference: Annotated[Path | None, typer.Option(help="Folder of the ground truths.")] = None,
    lr: LowResolution = None,
    model: Model = None,
    dataset: DatasetName = None,
    metrics: Metrics = "default",
    crop_border: Annotated[int, typer.Option(min=0, help="Pixels cut from each side before scoring (FID: none). The SSL paper: 4.")] = 0,
    y_channel: Annotated[bool, typer.Option("--y-channel", help="PSNR and SSIM on Y of YCbCr instead of RGB.")] = False,
    suffix: Annotated[str, typer.Option(help="What restored files have after the reference's stem, for example _x4.")] = "",
    output: ReportFolder = Path("evaluation"),
    examples: Annotated[int, typer.Option(min=0, max=20, help="Worst and best images shown per metric.")] = 2,
    explore: Explore = 0,
    strict: Annotated[bool, typer.Option("--strict", help="A metric that cannot be computed, or an image left out, is an error.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Download no weights.")] = False,
    weights_dir: WeightsDir = None,
    list_metrics: ListMetrics = False,
    scale: Annotated[int, typer.Option(min=1, max=16, help="Shrinking of a --dataset of photographs.")] = 4,
    seeds: Annotated[int, typer.Option(min=1, help="With --model: results per image, to measure their spread.")] = 1,
    seed: Annotated[int, typer.Option(min=0, max=2**62, help="With --model: the first seed.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, max=1000, help="With --model: sampling steps. [default: the pipeline's]")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
) -> None:
    """Score results (or a model, which upscales first) and put the columns side by side: table, CSV, JSON and an HTML report.

    What was computed before is kept in results.jsonl of the output folder: an interrupted run goes on where it was.
    """
    import os

    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    if weights_dir:
        from sslsr_diffusion.weights import use_folder

        use_folder(weights_dir)
    if list_metrics:
        return _list_metrics()
    import numpy as np

    from sslsr_diffusion.devices import find_device

    _check_arguments(restored, reference, model, dataset, lr, explore)
    if not model and (seeds > 1 or steps is not None):
        raise UserError("--seeds and --steps are for --model, which upscales; results that are there already are taken as they are.")
    device = str(find_device(device))
    chosen, lacking = _available(metrics, has_reference=bool(reference or dataset), strict=strict)
    columns = _columns(restored or [])
    if dataset:
        from sslsr_diffusion.evaluation.dataset import find_dataset

        pairs = find_dataset(dataset, scale=scale, made=output / "dataset", suffix=suffix)
        for line in pairs.left_out:
            typer.echo(f"left out: {line}", err=True)
        reference, lr = pairs.hr, pairs.lr
        for name, path in map(_named, model or []):
            if name in columns:
                raise UserError(f"--model {name}: a column of that name is there already; choose another with NAME=PATH.")
            columns[name] = _upscale(path, pairs, output / "images" / name, range(seed, seed + seeds), steps, device)
    from sslsr_diffusion.evaluation.pairing import pair_files

    pairing = pair_files(columns, reference, lr, suffix=suffix)
    scores = _score(pairing, chosen, output, crop_border, y_channel, device)
    options = {"crop_border": crop_border, "y_channel": y_channel, **({"suffix": suffix} if suffix else {})}
    problems = _write(scores, pairing, metrics, lacking, output, options, examples, explore)
    if not any((~np.isnan(values)).any() for by in (*scores.values.values(), *scores.whole_set.values()) for values in by.values()):
        raise UserError(f"no metric has a value for any image, see the remarks; the first: {problems[0] if problems else 'none'}")
    if strict and problems:
        raise UserError(f"--strict: {len(problems)} remark(s), see above; the first: {problems[0]}")


def _check_arguments(restored: Any, reference: Path | None, model: Any, dataset: str | None, lr: Path | None, explore: int) -> None:
    if not restored and not model:
        raise UserError("expected --restored DIR (with --reference DIR), or --model PATH with --dataset DIR; got neither.")
    if model and not dataset:
        raise UserError("--model needs --dataset: a folder with lr/ and hr/, LR_DIR,HR_DIR or a folder of photographs.")
    if dataset and reference:
        raise UserError("--dataset brings its own references; give either --dataset or --reference.")
    if explore and not (reference or dataset):
        raise UserError("--explore shows graphs beside those of the truth; give --reference DIR.")
    if dataset and lr:
        raise UserError("--dataset brings its own low-resolution inputs; give either --dataset or --lr.")


def _available(names: str, *, has_reference: bool, strict: bool) -> tuple[list[str], dict[str, str]]:
    """What can be computed, and why the rest cannot."""
    from sslsr_diffusion.evaluation.metrics import METRICS, select, unavailable

    wanted = select(names)
    lacking: dict[str, str] = {}
    for name in wanted:
        if METRICS[name].needs_reference and not has_reference:
            reason: str | None = "compares with a reference; give --reference DIR"
        else:
            reason = unavailable(name)
            if reason and strict:
                raise UserError(f"--strict: {METRICS[name].label} {reason}.")
        if reason:
            lacking[name] = reason
    chosen = [name for name in wanted if name not in lacking]
    if not chosen:
        raise UserError("no metric can be computed: " + "; ".join(f"{METRICS[n].label} {reason}" for n, reason in lacking.items()) + ".")
    return chosen, lacking


def _columns(texts: Sequence[str]) -> dict[str, list[Path]]:
    columns: dict[str, list[Path]] = {}
    for text in texts:
        name, path = _named(text)
        if name in columns and path == text:
            raise UserError(
                f"--restored {text}: a column named {name!r} is there already. Write NAME={text}: another name for another model, "
                f"{name} for one more seed of the same."
            )
        columns.setdefault(name, []).append(Path(path).expanduser())
    return columns


def _named(text: str) -> tuple[str, str]:
    """`NAME=PATH`, or a path whose last part is the name (of a run's pipeline/: the run's name)."""
    name, equals, path = text.partition("=")
    if equals and name and "/" not in name and not Path(text).exists():
        return name, path
    folder = Path(text)
    return (folder.parent.name if folder.name == "pipeline" else folder.name) or text, text


def _upscale(path: str, pairs: "Dataset", folder: Path, seeds: range, steps: int | None, device: str) -> list[Path]:
    """One folder of results per seed, made by the same runner as `sslsr infer`; what is done is skipped."""
    from sslsr_diffusion.inference.open import find_model, open_model
    from sslsr_diffusion.inference.restorer import Restorer
    from sslsr_diffusion.inference.runner import RunnerOptions, find_work, run_work

    restorer: Restorer | None = None
    folders = [folder / f"seed{seed}" for seed in seeds]
    with interruptible(), as_flags(*FLAGS):
        found = find_model(path)
        for seed, output in zip(seeds, folders):
            call = {} if steps is None else {"num_inference_steps": steps}
            options = RunnerOptions(pairs.scale, seed, call, "PNG", replace_own=True, model=found.fingerprint)
            work = find_work(pairs.lr, output, options)
            for picture in work.todo:  # what cannot be made now must not be scored as it was made before
                (work.output / picture.target).unlink(missing_ok=True)
            if work.todo:
                restorer = restorer or open_model(found, device=device)
                with progress_bar(len(work.todo), desc=f"upscaling with {folder.name}, seed {seed}", unit="image") as bar:
                    run_work(restorer, work, progress=lambda done, *_: bar.update(done - bar.n))
            for name, note in work.report.notes:
                if not name and seed == seeds[0]:
                    typer.echo(f"note: {flagged(note, *FLAGS)}", err=True)
            for name, reason in work.report.failed:
                typer.echo(f"failed: {name}: {reason}", err=True)
    return folders


def _score(pairing: "Pairing", chosen: list[str], output: Path, crop_border: int, y_channel: bool, device: str) -> "Scores":
    from sslsr_diffusion.evaluation.results import ResultStore
    from sslsr_diffusion.evaluation.scoring import score

    options: dict[str, Any] = {"crop_border": crop_border, "y_channel": y_channel, "device": device}
    with (
        contextlib.closing(ResultStore(output / "results.jsonl")) as store,
        progress_bar(len(pairing.scenes), desc="scoring", unit="image") as bar,
    ):
        return score(pairing.scenes, chosen, store, progress=lambda _: bar.update(), **options)


def _write(
    scores: "Scores",
    pairing: "Pairing",
    metrics: str,
    lacking: dict[str, str],
    output: Path,
    options: dict[str, Any],
    examples: int,
    explore: int,
) -> list[str]:
    from sslsr_diffusion.evaluation.metrics import METRICS
    from sslsr_diffusion.evaluation.report import render_report
    from sslsr_diffusion.evaluation.statistics import LEAST
    from sslsr_diffusion.evaluation.summary import summarize, text_table, to_csv, to_json
    from sslsr_diffusion.files import atomic_write

    summary = summarize(scores, options=options, unavailable=lacking, problems=pairing.problems)
    atomic_write(output / "metrics.csv", to_csv(scores).encode())
    atomic_write(output / "summary.json", to_json(summary).encode())
    links = _explorers(scores, explore, output) if explore else {}
    report = render_report(summary, scores, examples=max(examples, explore), links=links)
    atomic_write(output / "report.html", report.encode("utf-8", "backslashreplace"))
    intervals = "with 95 % bootstrap intervals" if summary.images >= LEAST else f"without intervals, which need {LEAST} images"
    typer.echo(f"\n{summary.images} images; means {intervals}, * best, ↑ higher is better, ↓ lower is better\n")
    typer.echo(text_table(summary))
    named = {name.strip() for name in metrics.split(",")} & lacking.keys()
    for name in sorted(named):
        typer.echo(f"not computed: {METRICS[name].label} {lacking[name]}", err=True)
    if others := [METRICS[name].label for name in lacking if name not in named]:
        typer.echo(f"not computed: {', '.join(others)} (report.html says why)", err=True)
    for problem in summary.problems:
        typer.echo(f"remark: {problem}", err=True)
    typer.echo(f"\n{output / 'report.html'}, summary.json, metrics.csv")
    return summary.problems


def _explorers(scores: "Scores", count: int, output: Path) -> dict[tuple[str, str], str]:
    """A page of graphs for each column of each of the worst and best images; (anchor, column) -> its address from the report."""
    from sslsr_diffusion.evaluation.gallery import anchor, pick
    from sslsr_diffusion.evaluation.scoring import load_rgb
    from sslsr_diffusion.files import atomic_write
    from sslsr_diffusion.images import printable
    from sslsr_diffusion.page.explorer import Measured, explore

    chosen = {p.anchor for picks in pick(scores, count).values() for p in picks}
    scenes = [(i, scene) for i, scene in enumerate(scores.scenes) if anchor(i) in chosen]
    folder = output / "explore"
    folder.mkdir(exist_ok=True)
    links: dict[tuple[str, str], str] = {}
    with progress_bar(len(scenes), desc="pages of graphs", unit="image") as bar:
        for i, scene in scenes:
            assert scene.reference is not None
            truth, low = load_rgb(scene.reference), load_rgb(scene.lr) if scene.lr else None
            for number, (column, paths) in enumerate(scene.restored.items()):
                values = {name: Measured(float(by[column][i, 0]), scores.conventions[name]) for name, by in scores.values.items()}
                title = f"{printable(scene.name)}, {column}"
                try:
                    page = explore(load_rgb(paths[0]), truth, low, title=title, name=column, numbers=values).page
                except UserError as error:  # too small for a graph
                    typer.echo(f"no page of graphs for {title}: {error}", err=True)
                    continue
                links[anchor(i), column] = f"explore/{anchor(i)}-{number}.html"
                atomic_write(output / links[anchor(i), column], page.encode("utf-8", "backslashreplace"))
            bar.update()
    return links


def _list_metrics() -> None:
    from sslsr_diffusion.evaluation.metrics import METRICS, convention, unavailable

    for name, metric in METRICS.items():
        arrow = "higher is better" if metric.higher_is_better else "lower is better"
        typer.echo(f"{name}: {arrow}{'' if metric.needs_reference else ', needs no reference'}{'' if metric.default else ', only by name'}")
        typer.echo(f"    {convention(name, crop_border=0, y_channel=False)}")
        reason = unavailable(name, download=False)
        typer.echo(f"    {'ready' if reason is None else reason}")
