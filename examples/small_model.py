"""The small model: how it is made, and how it is compared with bicubic, with other models and with its teacher.

    python examples/small_model.py train               # teacher, pairs, training, and results/small-v4 in float16; goes on where it stopped
    python examples/small_model.py compare             # that model beside bicubic and the teacher, on held-out photographs
    python examples/small_model.py compare --model small-v4 --also runs/mine --dataset pairs/realsr

The photographs come from `python examples/collect_photographs.py --output photos --crops 256`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from sslsr_diffusion.evaluation.scoring import load_rgb
from sslsr_diffusion.images import to_array, to_tensor
from sslsr_diffusion.inference.restorer import enlarged
from sslsr_diffusion.ops.edge_mask import laplacian_edge_mask
from sslsr_diffusion.shipped_model import SMALL

PHOTOS, TESTS, RUN = Path("photos"), Path("results/test-sets"), Path("runs") / SMALL
TEACHER = PHOTOS / "realesrgan_x4plus.safetensors"
PAIRS = {"small_pairs": ("pairs", 2000), "small_pairs_clean": ("pairs_clean", 1000)}  # recipe -> folder in PHOTOS, how many
ANCHOR = 0.4  # of what the teacher gets wrong at the low resolution is taken back
PRESETS = ("mild", "stablesr_ssl", "bicubic")  # how the held-out photographs are reduced
SIDE, PER_PHOTOGRAPH, LONGEST = 384, 3, 1280  # pixels of a test crop; crops per photograph; larger photographs are shrunk first
SSLSR = [sys.executable, "-c", "from sslsr_diffusion.cli import main; main()"]
METRICS, BORDER = "psnr,ssim,niqe,ssg_l1,features,grid", 4  # pixels cut from each side, as in the SSL paper's tables
MODEL = Path("results") / SMALL


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Make the small model, and measure it.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("train", help="teacher, pairs, training, and the model in float16")
    compare = commands.add_parser("compare", help="a model beside bicubic, other models and the teacher, where its file is there")
    compare.add_argument("--model", default=str(MODEL))
    compare.add_argument("--also", nargs="*", default=[], metavar="MODEL", help="more models, each a column of its own")
    compare.add_argument("--dataset", type=Path, nargs="*", default=[], help="more test sets, folders with lr/ and hr/")
    given = parser.parse_args(arguments)
    if given.command == "train":
        train()
    else:
        compare_models([given.model, *given.also, *([str(TEACHER)] if TEACHER.is_file() else [])], given.dataset)


def train() -> None:
    if not (PHOTOS / "crops/train").is_dir():
        no_photographs(PHOTOS / "crops/train")
    run([sys.executable, "examples/teacher.py", "--output", str(TEACHER)])
    for recipe, (folder, count) in PAIRS.items():
        made = ["--output", str(PHOTOS / folder), "--count", str(count), "--anchor", str(ANCHOR), "--crop-size", "256", "--batch-size", "4"]
        run([*SSLSR, "prepare", "teacher", "--config", f"configs/{recipe}.yaml", "--model", str(TEACHER), *made])
    if not (RUN / "pipeline").is_dir():
        resume = ["--resume", "latest"] if any(RUN.glob("checkpoint-*")) else []
        run([sys.executable, "train.py", "--config", "configs/small.yaml", *resume])
    if not MODEL.exists():
        run([*SSLSR, "export", str(RUN), "--half", "--output", str(MODEL)])


def compare_models(models: Sequence[str], more: Sequence[Path]) -> None:
    """One report per test set, with a column for bicubic and for each model."""
    names = [Path(model).name.removesuffix(".safetensors").removesuffix(".pth") for model in models]
    if len(set(names)) < len(names):
        sys.exit(f"small_model: expected models of different names, each a column, got {', '.join(names)}; copy or link one of them.")
    for dataset in [*test_sets(), *more]:
        columns = [("bicubic", bicubic(dataset))]
        columns += [(name, upscaled(dataset, model, name)) for name, model in zip(names, models, strict=True)]
        evaluate(dataset, columns, f"results/compare/{names[0]}/{dataset.name}")


def test_sets() -> list[Path]:
    """Crops of the held-out photographs under each preset: folders with hr/ and lr/."""
    crops = TESTS / "crops"
    if not crops.is_dir():
        photographs = sorted((PHOTOS / "validation").glob("*.png"))
        if not photographs:
            no_photographs(PHOTOS / "validation")
        for photograph in photographs:
            cut(photograph, crops)
    for preset in PRESETS:
        if not (TESTS / preset).is_dir():
            run([*SSLSR, "prepare", "lr", str(crops), "--preset", preset, "--seed", "1", "--output", str(TESTS / preset)])
    return [TESTS / preset for preset in PRESETS]


def no_photographs(folder: Path) -> None:
    sys.exit(f"{folder}/ has no photographs; run `python examples/collect_photographs.py --output photos --crops 256`.")


def cut(photograph: Path, folder: Path, most: int = PER_PHOTOGRAPH) -> None:
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
    for number, crop in enumerate(crops[:most], start=1):
        crop.save(folder / f"{photograph.stem}-{number}.png")


def edge_density(picture: Image.Image) -> float:
    return float(laplacian_edge_mask(to_tensor(np.asarray(picture))[None]).float().mean())


def bicubic(dataset: Path) -> Path:
    folder = Path("results/upscaled") / dataset.name / "bicubic"
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted((dataset / "lr").iterdir()):
        Image.fromarray(to_array(enlarged(load_rgb(file), 4)[0])).save(folder / f"{file.stem}.png")
    return folder


def upscaled(dataset: Path, model: str, name: str) -> Path:
    folder = Path("results/upscaled") / dataset.name / name
    run([sys.executable, "infer.py", "--input", str(dataset / "lr"), "--model", model, "--output", str(folder)])
    return folder


def evaluate(dataset: Path, columns: Sequence[tuple[str, Path]], output: str) -> None:
    named = [part for name, folder in columns for part in ("--restored", f"{name}={folder}")]
    truth = ["--reference", str(dataset / "hr"), "--lr", str(dataset / "lr")]
    run([*SSLSR, "evaluate", *named, *truth, "--metrics", METRICS, "--crop-border", str(BORDER), "-o", output])


def run(command: list[str]) -> None:
    shown = ["sslsr", *command[3:]] if command[: len(SSLSR)] == SSLSR else ["python", *command[1:]]
    print(f"\n$ {' '.join(shown)}", flush=True)
    code = subprocess.run(command, check=False).returncode
    if code:
        sys.exit(f"small_model: the command above ended with exit code {code}; what it printed says why.")


if __name__ == "__main__":
    main()
