"""Twins at real size: one network, fine-tuned with and without the self-similarity loss, scored by judges that none was trained on.

    python examples/network_twins.py train --base weights/realesrgan_x4plus.safetensors --photos photos --seeds 1 2 3
    python examples/network_twins.py score --photos photos --pairs realsr=pairs/realsr

Every twin is configs/network_ssl.yaml but for the loss in question: weights of a tenth, a quarter and all of the published ones, with and
without the prefilter, beside a twin without the loss; and once more all of them without the perceptual term (`--plain`). Finished runs are
skipped, stopped ones go on, so both commands can be repeated. The photographs come from `python examples/collect_photographs.py`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from PIL import Image
from small_model import SSLSR, cut, enlarged, run

PUBLISHED = 1000  # l1_weight and kl_weight of Real-ESRGAN's recipe (Chen et al., ACM MM 2024)
WEIGHTS = {"tenth": 100, "quarter": 250, "full": PUBLISHED}
METRICS = "features,psnr,ssim,niqe,grid,ssg_l1"
PRESETS = ("mild", "real_esrgan")
RUNS, RESULTS = Path("runs/network_twins"), Path("results/network_twins")


def twins(prefilter: float, *, plain: bool) -> dict[str, list[dict[str, Any]] | None]:
    """Name -> changes of the self-similarity loss; None: without it."""
    end = "-plain" if plain else ""
    found: dict[str, Any] = {f"without{end}": None}
    for name, weight in WEIGHTS.items():
        for sigma in (0.0, prefilter):
            found[f"{name}{'-smoothed' if sigma else ''}{end}"] = {"l1_weight": weight, "kl_weight": weight, "prefilter_sigma": sigma}
    return found


def write_recipe(name: str, changes: dict[str, Any] | None, folder: Path, options: argparse.Namespace) -> Path:
    """A recipe of its own beside the run; everything but `changes` is shared by all twins."""
    base = yaml.safe_load(Path("configs/network_ssl.yaml").read_text(encoding="utf-8"))
    losses = []
    for loss in base["losses"]:
        if (loss["kind"] == "self_similarity" and changes is None) or (loss["kind"] == "perceptual" and options.plain):
            continue
        own = {"self_similarity": changes or {}, "gan": {"start_step": options.steps // 4 + 1}}.get(loss["kind"], {})
        losses.append({**loss, **own})
    crops, photographs = options.photos / "crops" / "train", options.photos / "validation"
    recipe = {
        **base,
        "model": {"kind": "network", "base": str(options.base)},
        "data": {
            **base["data"],
            "sources": [{"kind": "folder", "path": str(crops)}],
            "validation": [{"kind": "folder", "path": str(photographs)}],
        },
        "losses": losses,
        "training": {**base["training"], "steps": options.steps, "crop_size": options.crop, "ema": {"decay": 0.98, "warmup": True}},
        "validation": {**base["validation"], "every": 0, "limit": 4},
        "checkpoints": {"every": 100, "keep": 1},
        "output": {"dir": str(folder), "trackers": []},
    }
    path = RUNS / f"{folder.name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


def train(options: argparse.Namespace) -> None:
    kinds = {
        name: changes for name, changes in twins(options.prefilter, plain=options.plain).items() if not options.only or name in options.only
    }
    for seed in options.seeds:
        for name, changes in kinds.items():
            folder = RUNS / f"{name}-{seed}"
            recipe = write_recipe(name, changes, folder, options)
            if (folder / "pipeline").is_dir():
                continue
            resume = ["--resume", "latest"] if any(folder.glob("checkpoint-*")) else []
            run([sys.executable, "train.py", "--config", str(recipe), "--set", f"seed={seed}", *resume])


def test_sets(photos: Path) -> list[Path]:
    """Crops of the held-out photographs under each preset: folders with hr/ and lr/."""
    crops = RESULTS / "crops"
    if not crops.is_dir():
        for photograph in sorted((photos / "validation").iterdir()):
            cut(photograph, crops)
    for preset in PRESETS:
        if not (RESULTS / preset).is_dir():
            run([*SSLSR, "prepare", "lr", str(crops), "--preset", preset, "--seed", "1", "--output", str(RESULTS / preset)])
    return [RESULTS / preset for preset in PRESETS]


def score(options: argparse.Namespace) -> None:
    """One report per set: every run beside the start and bicubic, with paired intervals against the first column."""
    finished = sorted(path.parent for path in RUNS.glob("*/pipeline"))
    sets = {folder.name: folder for folder in test_sets(options.photos)}
    sets |= {name: Path(path) for name, _, path in (pair.partition("=") for pair in options.pairs)}
    for name, folder in sets.items():
        columns = [("bicubic", enlarged(folder, Image.Resampling.BICUBIC))]
        for title, model in [*(("start", Path(base)) for base in options.start), *((found.name, found) for found in finished)]:
            made = RESULTS / "upscaled" / name / title
            run([sys.executable, "infer.py", "--input", str(folder / "lr"), "--model", str(model), "--output", str(made)])
            columns.append((title, made))
        named = [part for title, made in columns for part in ("--restored", f"{title}={made}")]
        where = ["--reference", str(folder / "hr"), "--lr", str(folder / "lr")]
        run([*SSLSR, "evaluate", *named, *where, "--metrics", METRICS, "-o", str(RESULTS / "scores" / name)])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="all twins of every seed, one after the other")
    training.add_argument("--base", type=Path, required=True, help="the network that all start from")
    training.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    training.add_argument("--steps", type=int, default=400)
    training.add_argument("--crop", type=int, default=96, help="HR pixels")
    training.add_argument("--prefilter", type=float, default=1.2, help="pixels")
    training.add_argument("--plain", action="store_true", help="without the perceptual term")
    training.add_argument("--only", nargs="*", default=[], help="names of twins")
    scoring = commands.add_parser("score", help="judge all finished runs")
    scoring.add_argument("--start", nargs="*", default=[], help="the network that all started from, as another column")
    scoring.add_argument("--pairs", nargs="*", default=[], metavar="NAME=FOLDER", help="more test sets, folders with lr/ and hr/")
    for each in (training, scoring):
        each.add_argument("--photos", type=Path, default=Path("photos"))
    options = parser.parse_args(arguments)
    (train if options.command == "train" else score)(options)


if __name__ == "__main__":
    main()
