"""`make demo`: fine-tune the shipped small model on hard JPEG, made of the photographs of examples/, upscale examples/lr/, print a table.

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
SHOWN = {  # metric -> title, factor and digits of its columns
    "psnr": ("PSNR in dB (higher is better)", 1, 2),
    "ssim": ("SSIM (higher is better)", 1, 3),
    "ssg_l1": ("SSG L1 x 1000 (lower is better)", 1000, 3),
}
WIDTH = 11


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
    """PSNR (RGB, no border cut), SSIM and SSG L1 of bicubic, the shipped and the fine-tuned model on held-out photographs."""
    import torch

    from sslsr_diffusion import open_upscaler
    from sslsr_diffusion.data import open_validation_pairs
    from sslsr_diffusion.evaluation.metrics import METRICS
    from sslsr_diffusion.images import resize_bicubic
    from sslsr_diffusion.runs.recipe import load_recipe

    recipe = load_recipe("configs/demo.yaml")
    look = recipe.validation
    pairs = open_validation_pairs(recipe.data, crop_size=look.size, scale=recipe.scale, seed=look.seed, limit=look.limit)
    models = {"shipped": open_upscaler(recipe.model.base), "fine-tuned": open_upscaler("runs/demo")}
    rows = []
    for pair in pairs:
        hr = pair.hr[None]
        restored = {"bicubic": resize_bicubic(pair.lr[None], size=hr.shape[-2:]).clamp(0, 1)}
        for name, up in models.items():
            generator = torch.Generator().manual_seed(look.seed)
            restored[name] = up(pair.lr, scale=recipe.scale, generator=generator, output_type="pt").images.float()
        rows.append([float(METRICS[name].fn(image, hr, crop_border=0, y_channel=False)) for name in SHOWN for image in restored.values()])
    print(f"\n{'':<20}" + "".join(f"{title:^{3 * WIDTH}}" for title, _, _ in SHOWN.values()))
    print(f"{'validation picture':<20}" + "".join(f"{name:>{WIDTH}}" for name in restored) * len(SHOWN))
    for pair, row in zip(pairs, rows):
        print_row(Path(pair.name).name, row)
    print_row("mean", [sum(column) / len(rows) for column in zip(*rows)])


def print_row(name: str, values: list[float]) -> None:
    how = [(factor, digits) for _, factor, digits in SHOWN.values() for _ in range(len(values) // len(SHOWN))]
    print(f"{name[:19]:<20}" + "".join(f"{factor * value:>{WIDTH}.{digits}f}" for value, (factor, digits) in zip(values, how)))


if __name__ == "__main__":
    main()
