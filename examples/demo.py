"""`make demo`: train the tiny recipes on the shipped photographs, upscale examples/lr/, and say what came out.

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
    run([*LAUNCH, "train.py", "--config", "configs/tiny_autoencoder.yaml", "--restart"])
    run([*LAUNCH, "train.py", "--config", "configs/tiny.yaml", "--restart"])
    run([sys.executable, "infer.py", "--input", "examples/lr/", "--model", "runs/tiny/pipeline", "--output", str(OUTPUT), "--overwrite"])
    print_table()
    print(f"\nUpscaled pictures: {OUTPUT}/   Validation grids: runs/tiny/pictures/   Loss curves: runs/tiny/loss.png")
    print(f"The whole demo took {(time.monotonic() - began) / 60:.1f} minutes.")


def run(command: list[str]) -> None:
    shown = ["accelerate", "launch", *command[len(LAUNCH) :]] if command[: len(LAUNCH)] == LAUNCH else ["python", *command[1:]]
    print(f"\n$ {' '.join(shown)}", flush=True)
    code = subprocess.run(command, check=False).returncode
    if code:
        sys.exit(f"demo: the command above ended with exit code {code}; what it printed says why.")


def print_table() -> None:
    """PSNR and SSIM (RGB, no border cut) of bicubic and of the model on held-out photographs."""
    import torch

    from sslsr_diffusion import StableSRPipeline
    from sslsr_diffusion.data import open_validation_pairs
    from sslsr_diffusion.evaluation.metrics import psnr, ssim
    from sslsr_diffusion.images import resize_bicubic
    from sslsr_diffusion.recipe import load_recipe

    recipe = load_recipe("configs/tiny.yaml")
    look = recipe.validation
    pairs = open_validation_pairs(recipe.data, crop_size=look.size, scale=recipe.scale, seed=look.seed, limit=look.limit)
    pipe = StableSRPipeline.from_pretrained("runs/tiny/pipeline")
    pipe.set_progress_bar_config(disable=True)
    print(f"\n{'validation picture':<24}{'PSNR bicubic':>14}{'PSNR model':>12}{'SSIM bicubic':>14}{'SSIM model':>12}")
    rows = []
    for pair in pairs:
        hr = pair.hr[None]
        generator = torch.Generator().manual_seed(look.seed)
        restored = pipe(pair.lr, scale=recipe.scale, num_inference_steps=look.steps, generator=generator, output_type="pt").images.float()
        bicubic = resize_bicubic(pair.lr[None], size=hr.shape[-2:]).clamp(0, 1)
        rows.append([float(metric(image, hr)) for metric in (psnr, ssim) for image in (bicubic, restored)])
        print_row(Path(pair.name).name, rows[-1])
    print_row("mean", [sum(column) / len(rows) for column in zip(*rows)])


def print_row(name: str, values: list[float]) -> None:
    print(f"{name[:23]:<24}{values[0]:>14.2f}{values[1]:>12.2f}{values[2]:>14.3f}{values[3]:>12.3f}")


if __name__ == "__main__":
    main()
