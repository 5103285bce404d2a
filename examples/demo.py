"""`make demo`: fine-tune the shipped small model on the photographs of examples/, upscale examples/lr/, and say what came out.

Run from the root of a checkout with the package installed. Earlier runs are moved aside, never deleted.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

OUTPUT = Path("results/demo")
LAUNCH = [
    sys.executable,
    "-m",
    "accelerate.commands.launch",
    "--num_processes=1",
    "--num_machines=1",
    "--mixed_precision=no",
    "--dynamo_backend=no",
]


def main() -> None:
    began = time.monotonic()
    run([*LAUNCH, "train.py", "--config", "configs/demo.yaml", "--restart"])
    run([sys.executable, "infer.py", "--input", "examples/lr/", "--model", "runs/demo/pipeline", "--output", str(OUTPUT), "--overwrite"])
    print_table()
    print(f"\nUpscaled pictures: {OUTPUT}/   Validation grids: runs/demo/pictures/   Loss curves: runs/demo/loss.png")
    print(f"The whole demo took {(time.monotonic() - began) / 60:.1f} minutes.")


def run(command: list[str]) -> None:
    shown = ["accelerate", "launch", *command[len(LAUNCH) :]] if command[: len(LAUNCH)] == LAUNCH else ["python", *command[1:]]
    print(f"\n$ {' '.join(shown)}", flush=True)
    code = subprocess.run(command, check=False).returncode
    if code:
        sys.exit(f"demo: the command above ended with exit code {code}; what it printed says why.")


def print_table() -> None:
    """PSNR (RGB, no border cut) and SSG distance, L1 part, of bicubic, the shipped and the fine-tuned model on held-out photographs."""
    import torch

    from sslsr_diffusion import StableSRPipeline
    from sslsr_diffusion.data import open_validation_pairs
    from sslsr_diffusion.evaluation.metrics import METRICS
    from sslsr_diffusion.images import resize_bicubic
    from sslsr_diffusion.runs.recipe import load_recipe

    recipe = load_recipe("configs/demo.yaml")
    look = recipe.validation
    pairs = open_validation_pairs(recipe.data, crop_size=look.size, scale=recipe.scale, seed=look.seed, limit=look.limit)
    pipes = {
        "shipped": StableSRPipeline.from_pretrained(recipe.model.base),
        "fine-tuned": StableSRPipeline.from_pretrained("runs/demo/pipeline"),
    }
    measured = {name: METRICS[name].fn for name in ("psnr", "ssg_l1")}
    rows = []
    for pair in pairs:
        hr = pair.hr[None]
        restored = {"bicubic": resize_bicubic(pair.lr[None], size=hr.shape[-2:]).clamp(0, 1)}
        for name, pipe in pipes.items():
            pipe.set_progress_bar_config(disable=True)
            generator = torch.Generator().manual_seed(look.seed)
            restored[name] = pipe(pair.lr, scale=recipe.scale, generator=generator, output_type="pt").images.float()
        rows.append([float(fn(image, hr, crop_border=0, y_channel=False)) for fn in measured.values() for image in restored.values()])
    print(f"\n{'':<20}{'PSNR in dB (higher is better)':^36}{'SSG L1 x 1000 (lower is better)':^36}")
    print(f"{'validation picture':<20}" + "".join(f"{name:>12}" for name in restored) * 2)
    for pair, row in zip(pairs, rows):
        print_row(Path(pair.name).name, row)
    print_row("mean", [sum(column) / len(rows) for column in zip(*rows)])


def print_row(name: str, values: list[float]) -> None:
    psnr, ssg = values[: len(values) // 2], values[len(values) // 2 :]
    print(f"{name[:19]:<20}" + "".join(f"{value:>12.2f}" for value in psnr) + "".join(f"{1000 * value:>12.3f}" for value in ssg))


if __name__ == "__main__":
    main()
