"""Times the complete self-similarity loss, forward and forward + backward, against its baseline in the same process.

    python benchmarks/ssg.py --device cpu                  # baseline: the unfold definition, where it fits into memory
    python benchmarks/ssg.py --device cuda                 # baseline: the direct kernels (one thread per pixel and offset, atomics)

Needs torch and numpy, and numba (cpu) or CuPy (cuda). Appends one JSON line per row to benchmarks/results/ssg_<device>.jsonl,
prints a Markdown table and, with matplotlib, draws benchmarks/results/ssg_<device>.png.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
from sslsr_diffusion.ops import SelfSimilarityLoss, apply_mask_stride

RESULTS = Path(__file__).parent / "results"
WEIGHT = 1000.0


def make_pair(size: int, density: float, stride: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """A smooth picture with edges, a blurred and noised copy, and a random mask."""
    generator = torch.Generator().manual_seed(size)
    coarse = torch.rand(1, 3, size // 4 + 2, size // 4 + 2, generator=generator)
    gt = F.interpolate(coarse, size=(size, size), mode="bicubic").clamp(0, 1)
    sr = F.avg_pool2d(F.pad(gt, (1,) * 4, mode="reflect"), 3, stride=1) + 0.02 * torch.randn(gt.shape, generator=generator)
    mask = torch.rand(1, 1, size, size, generator=generator) < density
    if density >= 1:
        mask[:] = True
    return sr.to(device), gt.to(device), apply_mask_stride(mask, stride).to(device)


class PeakMemory:
    """Growth of the device's allocation, or of the process's resident memory, while a call runs."""

    def __init__(self, device: str):
        self.device, self.bytes = device, 0

    def __enter__(self) -> PeakMemory:
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return self
        self.before = self.peak = _resident()
        self.done = threading.Event()
        self.watch = threading.Thread(target=self._sample)
        self.watch.start()
        return self

    def _sample(self) -> None:
        while not self.done.wait(0.0005):
            self.peak = max(self.peak, _resident())

    def __exit__(self, *_: object) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
            self.bytes = torch.cuda.max_memory_allocated() - self.before
            return
        self.done.set()
        self.watch.join()
        self.bytes = max(self.peak, _resident()) - self.before


def _resident() -> int:
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * 4096 if statm.exists() else 0


def measure(call: Callable[[], object], device: str, repeats: int, warm_up: int = 2) -> dict[str, float]:
    for _ in range(warm_up):
        call()
    with PeakMemory(device) as memory:
        call()
    times = []
    for _ in range(repeats):
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - started) * 1e3)
    return {
        "median_ms": round(statistics.median(times), 3),
        "fastest_ms": round(min(times), 3),
        "slowest_ms": round(max(times), 3),
        "extra_mb": round(memory.bytes / 2**20, 1),
        "repeats": repeats,
    }


def loss_call(backend: str, inputs: tuple[Tensor, Tensor, Tensor], backward: bool) -> Callable[[], object]:
    sr, gt, mask = inputs
    sr = sr.clone().requires_grad_(backward)
    run: Callable[..., Any] = SelfSimilarityLoss(l1_weight=WEIGHT, kl_weight=WEIGHT, backend="auto" if backend == "direct" else backend)
    if backend == "direct":
        from sslsr_diffusion.ops.ssg_direct import direct_loss

        sizes = {"search_size": 25, "window_size": 9, "sigma": 0.004, "normalize": True, "num_rows": None}
        run = functools.partial(direct_loss, **sizes, l1_weight=WEIGHT, kl_weight=WEIGHT)

    def call() -> object:
        loss = run(sr, gt, mask)
        loss = loss[0] if isinstance(loss, tuple) else loss
        return torch.autograd.grad(loss, sr) if backward else loss

    return call


def hardware(device: str) -> dict[str, str]:
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("numba", "cupy", "numpy"):
        if importlib.util.find_spec(package):
            versions[package] = __import__(package).__version__
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
        name += f", {torch.get_num_threads()} threads"
    return {"hardware": name, **versions}


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    device = options.device
    ours, baseline = ("cpu", "reference") if device == "cpu" else ("cuda", "direct")
    rows = []
    for size in options.sizes:
        for density, stride in ((0.1, 3), (0.03, 1), (0.1, 1), (0.3, 1), (1.0, 1)):
            inputs = make_pair(size, density, stride, device)
            masked = int(inputs[2].sum())
            # the definition keeps about 2.5 MB per masked pixel for its backward
            fits = device == "cuda" or masked * 2.5 <= options.baseline_mb
            for backward in (False, True):
                row: dict[str, Any] = {"size": size, "density": density, "stride": stride, "rows": masked, "backward": backward}
                row["ours"] = measure(loss_call(ours, inputs, backward), device, options.repeats)
                if fits:
                    row["baseline"] = measure(loss_call(baseline, inputs, backward), device, min(3, options.repeats), warm_up=1)
                    row["times_faster"] = round(row["baseline"]["median_ms"] / row["ours"]["median_ms"], 1)
                row.update(device=device, backend=ours, baseline_backend=baseline, note=options.note, **hardware(device))
                rows.append(row)
                with (options.output / f"ssg_{device}.jsonl").open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(table_row(row), flush=True)
    return rows


HEAD = (
    "| size | mask | rows | pass | median ms (fastest..slowest) | extra MB | baseline ms | baseline MB | times faster |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def table_row(row: dict[str, Any]) -> str:
    ours, base = row["ours"], row.get("baseline")
    mask = f"{row['density']:.0%}" + (f", stride {row['stride']}" if row["stride"] > 1 else "")
    spread = f"{ours['median_ms']:.2f} ({ours['fastest_ms']:.2f}..{ours['slowest_ms']:.2f})"
    compared = f"{base['median_ms']:.0f} | {base['extra_mb']:.0f} | {row['times_faster']:.0f}" if base else "- | - | -"
    passes = "forward + backward" if row["backward"] else "forward"
    return f"| {row['size']} | {mask} | {row['rows']} | {passes} | {spread} | {ours['extra_mb']:.0f} | {compared} |"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    chosen = [row for row in rows if row["backward"] and row["density"] == 0.1 and row["stride"] == 1]
    for key, label in (("ours", rows[0]["backend"]), ("baseline", rows[0]["baseline_backend"])):
        points = [(row["size"], row[key]["median_ms"]) for row in chosen if key in row]
        if points:
            axes.plot(*zip(*points), marker="o", label=label)
    axes.set(
        xscale="log", yscale="log", xlabel="image side (pixels)", ylabel="forward + backward (ms)", title="Self-similarity loss, 10 % mask"
    )
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 96, 128, 256, 512, 1024])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--baseline-mb", type=float, default=4000, help="memory that the CPU baseline may take")
    parser.add_argument("--note", default="", help="kept with every row, for example how busy the machine was")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    print(HEAD)
    rows = run(options)
    draw(rows, options.output / f"ssg_{options.device}.png")


if __name__ == "__main__":
    main()
