"""The small model: training, test sets, comparison with bicubic and Lanczos, and its twins with and without the self-similarity loss.

    python examples/small_model.py train               # the chain, and results/small-v3 in float16; goes on where it stopped
    python examples/small_model.py twins --seeds 1 2 3 # small_ssl and small_nossl side by side, one pair per seed
    python examples/small_model.py compare --model results/small-v3   # against bicubic and Lanczos, on every test set

The photographs come from `python examples/collect_photographs.py --output photos --crops 256`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sslsr_diffusion.ops.edge_mask import laplacian_edge_mask
from sslsr_diffusion.shipped_model import SMALL

CHAIN = ("small_autoencoder", "small_base", "small_ssl", "small_decoder", "small_texture", "small_sharp")
PHOTOS, TESTS = Path("photos/validation"), Path("results/test-sets")
SIDE, PER_PHOTOGRAPH, LONGEST = 384, 3, 1280  # pixels of a test crop; crops per photograph; larger photographs are shrunk first
SSLSR = [sys.executable, "-c", "from sslsr_diffusion.cli import main; main()"]
METRICS = "psnr,ssim,niqe,ssg_l1"
MODEL = Path("results") / SMALL


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Make the small model, and measure it.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("train", help="the six recipes, and the pipeline in float16")
    twins = commands.add_parser("twins", help="small_ssl and small_nossl for each seed, then the comparison")
    twins.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    twins.add_argument("--steps", type=int, default=300, help="optimizer steps of each run")
    twins.add_argument("--weights", nargs=2, default=["30", "25"], metavar=("L1", "KL"), help="of the self-similarity loss")
    twins.add_argument(
        "--change", nargs="*", default=[], metavar="KEY=VALUE", help="more of that loss: mask_stride=1, sigma=0.016, weight=auto"
    )
    compare = commands.add_parser("compare", help="a model against bicubic and Lanczos")
    compare.add_argument("--model", default=str(MODEL))
    compare.add_argument("--steps", type=int, help="sampling steps instead of the model's own")
    compare.add_argument("--dataset", type=Path, nargs="*", default=[], help="more test sets, folders with lr/ and hr/")
    given = parser.parse_args(arguments)
    if given.command == "train":
        train()
    elif given.command == "twins":
        train_twins(given.seeds, given.steps, given.weights, given.change)
    else:
        compare_model(given.model, given.steps, given.dataset)


def train() -> None:
    for name in CHAIN:
        run_recipe(name, Path("runs") / name)
    if not MODEL.exists():
        run([*SSLSR, "export", f"runs/{CHAIN[-1]}", "--half", "--output", str(MODEL)])


def run_recipe(recipe: str, folder: Path, *changes: str, environment: dict[str, str] | None = None) -> subprocess.Popen[bytes] | None:
    """Train a recipe unless it is finished; with an environment in the background."""
    if (folder / "pipeline").is_dir():
        return None
    resume = ["--resume", "latest"] if any(folder.glob("checkpoint-*")) else []
    sets = [part for change in (f"output.dir={folder}", *changes) for part in ("--set", change)]
    command = [sys.executable, "train.py", "--config", f"configs/{recipe}.yaml", *sets, *resume]
    if environment is None:
        run(command)
        return None
    folder.parent.mkdir(parents=True, exist_ok=True)
    return subprocess.Popen(command, env={**os.environ, **environment}, stderr=(folder.parent / f"{folder.name}.log").open("ab"))


def train_twins(seeds: Sequence[int], steps: int, weights: Sequence[str], changes: Sequence[str]) -> None:
    """Both twins of a seed run at the same time, each on half of the cores, so that a busy machine disturbs both.

    They are the recipes in short, on the finished decoder, with other weights of the self-similarity loss; the discriminator, the third
    loss of both, begins after a third of the steps.
    """
    half = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 2) // 2))}
    short = [f"training.steps={steps}", f"losses.2.start_step={steps // 3 + 1}", "validation.limit=0", "output.trackers=[]"]
    short.append("model.vae=runs/small_texture/pipeline")
    l1, kl = weights
    own = [f"losses.3.{change}" for change in (f"l1_weight={l1}", f"kl_weight={kl}", *changes)]
    name = "-".join(["ssl", l1, kl, *(change.replace("=", "-") for change in changes)])
    kinds: dict[str, tuple[str, list[str]]] = {"nossl": ("small_nossl", []), name: ("small_ssl", own)}
    for seed in seeds:
        pair = [
            run_recipe(recipe, Path(f"runs/twins/{kind}-{seed}"), f"seed={seed}", *short, *more, environment=half)
            for kind, (recipe, more) in kinds.items()
        ]
        codes = [process.wait() for process in pair if process is not None]
        if any(codes):
            sys.exit(f"twins: a run of seed {seed} failed; runs/twins/*-{seed}.log say why.")
    for dataset in test_sets():
        columns = [(kind, upscaled(dataset, f"runs/twins/{kind}-{seed}", f"{kind}-{seed}")) for kind in kinds for seed in seeds]
        evaluate(dataset, [*columns, ("bicubic", enlarged(dataset, Image.Resampling.BICUBIC))], f"results/twins/{dataset.name}-{name}")


def compare_model(model: str, steps: int | None, more: Sequence[Path]) -> None:
    name = Path(model).name if steps is None else f"{Path(model).name}-{steps}-steps"
    for dataset in [*test_sets(), *more]:
        columns = [
            ("bicubic", enlarged(dataset, Image.Resampling.BICUBIC)),
            ("lanczos", enlarged(dataset, Image.Resampling.LANCZOS)),
            (name, upscaled(dataset, model, name, steps)),
        ]
        evaluate(dataset, columns, f"results/compare/{name}/{dataset.name}")


def test_sets() -> list[Path]:
    """Crops of the held-out photographs, degraded by mild and by stablesr_ssl: folders with hr/ and lr/."""
    crops = TESTS / "crops"
    if not crops.is_dir():
        photographs = sorted(PHOTOS.glob("*.png"))
        if not photographs:
            sys.exit(
                f"small_model: {PHOTOS}/ has no photographs; run `python examples/collect_photographs.py --output photos --crops 256`."
            )
        for photograph in photographs:
            cut(photograph, crops)
    for preset in ("mild", "stablesr_ssl"):
        if not (TESTS / preset).is_dir():
            run([*SSLSR, "prepare", "lr", str(crops), "--preset", preset, "--seed", "1", "--output", str(TESTS / preset)])
    return [TESTS / "mild", TESTS / "stablesr_ssl"]


def cut(photograph: Path, folder: Path) -> None:
    """The crops with the most edge pixels, side by side; smaller where the photograph is smaller."""
    picture = Image.open(photograph).convert("RGB")
    if max(picture.size) > LONGEST:
        picture.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
    width, height = (min(SIDE, side // 4 * 4) for side in picture.size)
    boxes = [
        (x, y, x + width, y + height)
        for y in range(0, picture.height - height + 1, height)
        for x in range(0, picture.width - width + 1, width)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    crops = sorted((picture.crop(box) for box in boxes), key=edge_density, reverse=True)
    for number, crop in enumerate(crops[:PER_PHOTOGRAPH], start=1):
        crop.save(folder / f"{photograph.stem}-{number}.png")


def edge_density(picture: Image.Image) -> float:
    pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None] / 255
    return float(laplacian_edge_mask(pixels).float().mean())


def enlarged(dataset: Path, method: Image.Resampling) -> Path:
    folder = dataset / method.name.lower()
    folder.mkdir(exist_ok=True)
    for file in sorted((dataset / "lr").iterdir()):
        picture = Image.open(file).convert("RGB")
        picture.resize((4 * picture.width, 4 * picture.height), method).save(folder / f"{file.stem}.png")
    return folder


def upscaled(dataset: Path, model: str, name: str, steps: int | None = None) -> Path:
    folder = Path("results/upscaled") / dataset.name / name
    more = [] if steps is None else ["--steps", str(steps)]
    run([sys.executable, "infer.py", "--input", str(dataset / "lr"), "--model", model, "--output", str(folder), *more])
    return folder


def evaluate(dataset: Path, columns: Sequence[tuple[str, Path]], output: str) -> None:
    named = [part for name, folder in columns for part in ("--restored", f"{name}={folder}")]
    run([*SSLSR, "evaluate", *named, "--reference", str(dataset / "hr"), "--lr", str(dataset / "lr"), "--metrics", METRICS, "-o", output])


def run(command: list[str]) -> None:
    shown = ["sslsr", *command[3:]] if command[: len(SSLSR)] == SSLSR else ["python", *command[1:]]
    print(f"\n$ {' '.join(shown)}", flush=True)
    code = subprocess.run(command, check=False).returncode
    if code:
        sys.exit(f"small_model: the command above ended with exit code {code}; what it printed says why.")


if __name__ == "__main__":
    main()
