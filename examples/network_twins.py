"""Twins at real size: one network, fine-tuned with and without the self-similarity loss, scored by judges that none was trained on.

    python examples/network_twins.py discriminator --base weights/realesrgan_x4plus.safetensors     # learns before it counts
    python examples/network_twins.py choose --base weights/realesrgan_x4plus.safetensors            # which prefilter?
    python examples/network_twins.py train --base weights/realesrgan_x4plus.safetensors --seeds 1 2 3
    python examples/network_twins.py score --base weights/realesrgan_x4plus.safetensors --pairs realsr=pairs/realsr

Every twin is configs/network_ssl.yaml but for the loss in question: weights of a tenth, a quarter and all of the published ones, with and
without the prefilter, beside a twin without the loss; with `--plain` all of them without the perceptual term. The discriminator of all
twins has learned on what the network makes that they start from. The prefilter is chosen on photographs (CHOOSING) that are neither
trained on nor reported. Finished runs are skipped, stopped ones go on, so every command can be repeated. The photographs come from
`python examples/collect_photographs.py --output photos --crops 256`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from small_model import SSLSR, cut, enlarged, no_photographs, run
from torch.nn.functional import softplus

from sslsr_diffusion.images import read_image, to_tensor
from sslsr_diffusion.losses.discriminators import UNetDiscriminator

PUBLISHED = 1000  # l1_weight and kl_weight of Real-ESRGAN's recipe (Chen et al., ACM MM 2024)
WEIGHTS = {"tenth": 100, "quarter": 250, "full": PUBLISHED}
SIGMAS = (0.0, 0.8, 1.2, 1.8)  # pixels; what `choose` tries, at a quarter of the published weight
CHOOSING = ("brick", "butterfly", "coffee", "garden", "grass-blades", "page-3", "table", "window")
METRICS = "features,psnr,ssim,niqe,grid,ssg_l1"
PRESETS = ("mild", "real_esrgan")
RUNS, RESULTS = Path("runs/network_twins"), Path("results/network_twins")
OPPONENT, OPPONENT_CROPS = RUNS / "discriminator", 240
LEARNED = OPPONENT / "unet_sn.safetensors"
Twins = dict[str, dict[str, Any] | None]  # name -> changes of the self-similarity loss; None: without it


def ssl(weight: float, sigma: float) -> dict[str, Any]:
    return {"l1_weight": weight, "kl_weight": weight, "prefilter_sigma": sigma}


def all_twins(prefilter: float) -> Twins:
    found: Twins = {"without": None}
    for name, weight in WEIGHTS.items():
        found |= {name: ssl(weight, 0.0), f"{name}-smoothed": ssl(weight, prefilter)}
    return found


def trained_crops(photos: Path) -> Path:
    """The crops of all photographs but those that the prefilter is chosen on: a folder of links."""
    folder = RUNS / "crops"
    if not folder.is_dir():
        if not (photos / "crops" / "train").is_dir():
            no_photographs(photos / "crops" / "train")
        made = folder.with_name("crops.part")
        made.mkdir(parents=True, exist_ok=True)
        for crop in (photos / "crops" / "train").glob("*.png"):
            photograph = crop.stem.rsplit("_", 1)[0]  # and perhaps S, T0, T1 or T2: its scale
            if photograph.rstrip("0123456789").rstrip("ST") not in CHOOSING and photograph not in CHOOSING:
                (made / crop.name).symlink_to(crop.resolve())
        made.rename(folder)
    return folder


def recipe(losses: list[dict[str, Any]], folder: Path, options: argparse.Namespace, **training: Any) -> Path:
    """A recipe beside its run; everything but `losses` and `training` is shared."""
    base = yaml.safe_load(Path("configs/network_ssl.yaml").read_text(encoding="utf-8"))
    shared = {"batch_size": options.batch, "crop_size": options.crop, "mixed_precision": "bf16", "channels_last": True}
    made = {
        **base,
        "model": {"kind": "network", "base": str(options.base)},
        "data": {
            **base["data"],
            "sources": [{"kind": "folder", "path": str(trained_crops(options.photos))}],
            "validation": [{"kind": "folder", "path": str(options.photos / "validation")}],
        },
        "losses": losses,
        "training": {**base["training"], **shared, "ema": {"decay": 0.98, "warmup": True}, **training},
        "validation": {**base["validation"], "every": 0, "limit": 1, "size": 256},
        "checkpoints": {"every": 100, "keep": 1},
        "output": {"dir": str(folder), "trackers": []},
    }
    path = folder.with_suffix(".yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(made, sort_keys=False), encoding="utf-8")
    return path


def twin(changes: dict[str, Any] | None, folder: Path, options: argparse.Namespace) -> Path:
    base = yaml.safe_load(Path("configs/network_ssl.yaml").read_text(encoding="utf-8"))
    own: dict[str, dict[str, Any]] = {
        "self_similarity": changes or {},
        "gan": {"width": options.width, "lr": 1e-4, "file": str(LEARNED), "start_step": 1},
    }
    losses = [{**loss, **own.get(loss["kind"], {})} for loss in base["losses"]]
    left_out = {"self_similarity": changes is None, "perceptual": options.plain}
    return recipe([loss for loss in losses if not left_out.get(loss["kind"])], folder, options, steps=options.steps)


def discriminator(options: argparse.Namespace) -> None:
    """Let the discriminator learn to tell photographs from what the network makes of them, while that stands still."""
    if LEARNED.is_file():
        return
    torch.manual_seed(0)
    crops, made = OPPONENT / "crops", OPPONENT / "made"
    if not crops.is_dir():
        every = sorted(trained_crops(options.photos).iterdir())
        crops.mkdir(parents=True)
        for crop in every[:: max(1, len(every) // OPPONENT_CROPS)]:
            (crops / crop.name).symlink_to(crop.resolve())
    if not (OPPONENT / "mild").is_dir():
        run([*SSLSR, "prepare", "lr", str(crops), "--preset", "mild", "--seed", "1", "--output", str(OPPONENT / "mild")])
    run([sys.executable, "infer.py", "--input", str(OPPONENT / "mild" / "lr"), "--model", str(options.base), "--output", str(made)])
    pictures = sorted(made.glob("*.png"))
    real, fake = (
        torch.stack([to_tensor(read_image(folder / path.name).rgb) for path in pictures]) for folder in (OPPONENT / "mild/hr", made)
    )
    network = UNetDiscriminator(options.width).to(memory_format=torch.channels_last)
    optimizer, seen = torch.optim.Adam(network.parameters(), lr=4e-4, betas=(0.9, 0.99)), 0.0
    for step in range(1, options.steps + 1):
        y, x = torch.randint(0, real.shape[-1] - options.crop + 1, (2,)).tolist()
        chosen = torch.randint(0, len(real), (options.batch,))
        sides = [side[chosen, :, y : y + options.crop, x : x + options.crop] for side in (real, fake)]
        with torch.autocast("cpu", torch.bfloat16):
            logits = [network(side) for side in sides]
        loss = softplus(-logits[0].float()).mean() + softplus(logits[1].float()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen += loss.item()
        if step % 100 == 0:
            print(f"step {step}: discriminator's loss {seen / 100:.4f} (2 log 2 = 1.3863 before it knows anything)", flush=True)
            seen = 0.0
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, LEARNED)


def choose(options: argparse.Namespace) -> None:
    """Twins of other prefilters, scored on the photographs that are kept for that."""
    kinds: Twins = {"without": None} | {f"quarter-{round(10 * sigma):02}": ssl(WEIGHTS["quarter"], sigma) for sigma in SIGMAS}
    recipes = [(twin(changes, RUNS / "choosing" / "seed0" / name, options), 0) for name, changes in kinds.items()]
    fit(recipes, jobs=options.jobs)
    photographs = [options.photos / "train" / f"{name}.png" for name in CHOOSING]
    judge(RUNS / "choosing", RESULTS / "choosing", test_sets(photographs, RESULTS / "choosing"), options)


def train(options: argparse.Namespace) -> None:
    kinds = {name: changes for name, changes in all_twins(options.prefilter).items() if not options.only or name in options.only}
    recipes = [(twin(kinds[name], _set(options) / f"seed{seed}" / name, options), seed) for seed in options.seeds for name in kinds]
    fit(recipes, jobs=options.jobs)


def score(options: argparse.Namespace) -> None:
    photographs = sorted((options.photos / "validation").glob("*.png"))
    if not photographs:
        no_photographs(options.photos / "validation")
    sets = test_sets(photographs, RESULTS)
    sets |= {name: Path(path) for name, _, path in (pair.partition("=") for pair in options.pairs)}
    judge(_set(options), RESULTS / _set(options).name, sets, options)


def _set(options: argparse.Namespace) -> Path:
    return RUNS / ("plain" if options.plain else "twins")


def fit(recipes: Iterable[tuple[Path, int]], *, jobs: int) -> None:
    """Train what is not finished, `jobs` at a time with a share of the cores each; what it prints goes into a file beside the run."""
    if not LEARNED.is_file():
        sys.exit(f"network_twins: {LEARNED} is not there; run `python examples/network_twins.py discriminator` first.")

    def one(recipe: Path, seed: int) -> None:
        folder = recipe.with_suffix("")
        if (folder / "pipeline").is_dir():
            return
        resume = ["--resume", "latest"] if any(folder.glob("checkpoint-*")) else []
        command = [sys.executable, "train.py", "--config", str(recipe), "--set", f"seed={seed}", *resume]
        threads = str(max(1, (os.cpu_count() or 1) // jobs))
        with folder.with_suffix(".log").open("a", encoding="utf-8") as log:
            code = subprocess.run(command, check=False, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": threads}).returncode
        print(f"{folder}: {'finished' if code == 0 else f'ended with exit code {code}; {log.name} says why'}", flush=True)

    in_parallel(one, recipes, jobs)


def in_parallel(work: Callable[..., None], items: Iterable[tuple[Any, ...]], jobs: int) -> None:
    with ThreadPoolExecutor(jobs) as pool:
        for done in [pool.submit(work, *item) for item in items]:
            done.result()


def test_sets(photographs: Sequence[Path], folder: Path) -> dict[str, Path]:
    """Crops of photographs under each preset: folders with hr/ and lr/."""
    crops = folder / "crops"
    if not crops.is_dir():
        for photograph in photographs:
            cut(photograph, crops, most=2)
    for preset in PRESETS:
        if not (folder / preset).is_dir():
            run([*SSLSR, "prepare", "lr", str(crops), "--preset", preset, "--seed", "1", "--output", str(folder / preset)])
    return {preset: folder / preset for preset in PRESETS}


def judge(runs: Path, results: Path, sets: dict[str, Path], options: argparse.Namespace) -> None:
    """One report per set: the twin without the loss, the others as paired differences from it, their start; seeds are averaged."""
    models = [(path.parent.name, path.parent.parent.name, path.parent) for path in sorted(runs.glob("seed*/*/pipeline"))]
    models = [*sorted(models, key=lambda model: model[0] != "without"), ("start", "seed0", options.base)]

    def upscale(folder: Path, model: Path, made: Path) -> None:
        command = [sys.executable, "infer.py", "--input", str(folder / "lr"), "--model", str(model), "--output", str(made)]
        threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // options.jobs))}
        if subprocess.run(command, check=False, stdout=subprocess.DEVNULL, env={**os.environ, **threads}).returncode:
            sys.exit(f"network_twins: `{' '.join(['python', *command[1:]])}` failed; what it printed says why.")

    made = {set_: [(name, model, results / "upscaled" / set_ / seed / name) for name, seed, model in models] for set_ in sets}
    in_parallel(upscale, [(sets[set_], model, folder) for set_, columns in made.items() for _, model, folder in columns], options.jobs)
    for set_, columns in made.items():
        shown = [*((name, folder) for name, _, folder in columns), ("bicubic", enlarged(sets[set_], Image.Resampling.BICUBIC))]
        named = [part for name, folder in shown for part in ("--restored", f"{name}={folder}")]
        where = ["--reference", str(sets[set_] / "hr"), "--lr", str(sets[set_] / "lr")]
        run([*SSLSR, "evaluate", *named, *where, "--metrics", METRICS, "-o", str(results / "scores" / set_)])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    work: dict[str, tuple[Callable[[argparse.Namespace], None], str]] = {
        "discriminator": (discriminator, "let the discriminator of all twins learn first"),
        "choose": (choose, "twins of several prefilters, judged on photographs of their own"),
        "train": (train, "all twins of every seed"),
        "score": (score, "judge all finished twins"),
    }
    for name, (do, says) in work.items():
        command = commands.add_parser(name, help=says)
        command.set_defaults(do=do, plain=False)
        command.add_argument("--photos", type=Path, default=Path("photos"))
        command.add_argument("--base", type=Path, required=True, help="the network that all start from")
        if name != "discriminator":
            command.add_argument("--jobs", type=int, default=2, help="how many runs at a time")
        if name in ("train", "score"):
            command.add_argument("--plain", action="store_true", help="the set without the perceptual term")
        if name == "score":
            command.add_argument("--pairs", nargs="*", default=[], metavar="NAME=FOLDER", help="more test sets, folders with lr/ and hr/")
            continue
        command.add_argument("--steps", type=int, default=3500 if name == "discriminator" else 400)
        command.add_argument("--batch", type=int, default=4 if name == "discriminator" else 2, help="crops per step")
        command.add_argument("--crop", type=int, default=96, help="HR pixels")
        command.add_argument("--width", type=int, default=32, help="channels of the discriminator's first layer (published: 64)")
        if name == "train":
            command.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
            command.add_argument("--prefilter", type=float, default=1.8, help="pixels; what `choose` found")
            command.add_argument("--only", nargs="*", default=[], help="names of twins")
    options = parser.parse_args(arguments)
    options.do(options)


if __name__ == "__main__":
    main()
