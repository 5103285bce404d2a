"""Times the complete self-similarity loss, forward and forward + backward, against its baseline in the same process.

    python benchmarks/ssg.py --device cpu                  # baseline: the unfold definition, where it fits into memory
    python benchmarks/ssg.py --device cuda                 # baseline: the direct kernels (one thread per pixel and offset, atomics)

Needs torch and numpy, and numba (cpu) or CuPy (cuda). Appends one JSON line per row to benchmarks/results/ssg_<device>.jsonl,
prints a Markdown table and, with matplotlib, draws the newest row of each case as benchmarks/results/ssg_<device>.png.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from sslsr_diffusion.checkup.cases import Case, Inputs
from sslsr_diffusion.checkup.operator import PATHS, make_pair, run_path
from sslsr_diffusion.ops import SelfSimilarityLoss
from sslsr_diffusion.ops.settings import GraphSettings

RESULTS = Path(__file__).parent / "results"
WEIGHT = 1000.0
NAMES = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "direct")}


def measure(call: Callable[[], object], device: str, repeats: int, warm_up: int = 2) -> dict[str, float]:
    for _ in range(warm_up):
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
        "repeats": repeats,
    }


def peak_extra_mb(backend: str, device: str, case: tuple[int, float, int, bool]) -> float:
    """Peak memory of one call beyond what was there before it: its inputs, the interpreter, the compiled code.

    cuda: what torch allocated, after a warm-up. cpu: peak resident memory (VmHWM) of a new process that has only made a call on a
    16-pixel image; large blocks come fresh from the system there, so that none hides in what an earlier call had freed.
    """
    if device == "cuda":
        call = loss_call(backend, make_pair(*case[:3], device), case[3])
        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    command = [sys.executable, __file__, "--memory-of", json.dumps([backend, case])]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"})
    return float(done.stdout)


def print_own_peak(backend: str, case: tuple[int, float, int, bool]) -> None:
    size, density, stride, backward = case
    loss_call(backend, make_pair(16, 0.1, 1, "cpu"), backward)()
    call = loss_call(backend, make_pair(size, density, stride, "cpu"), backward)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before = _status("VmRSS")
    call()
    print(round((_status("VmHWM") - before) / 1024, 1))


def _status(key: str) -> int:
    """A line of /proc/self/status, in kB."""
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))


def loss_call(backend: str, inputs: tuple[Tensor, Tensor, Tensor], backward: bool) -> Callable[[], object]:
    sr, gt, mask = inputs
    sr = sr.clone().requires_grad_(backward)
    run: Callable[..., Any] = SelfSimilarityLoss(l1_weight=WEIGHT, kl_weight=WEIGHT, backend="auto" if backend == "direct" else backend)
    if backend == "direct":
        from ssg_direct import direct_loss  # beside this file: only the GPU needs it, with CuPy

        run = functools.partial(direct_loss, settings=GraphSettings(25, 9, 0.004, True), weights=(WEIGHT, WEIGHT), num_rows=None)

    def call() -> object:
        loss = run(sr, gt, mask)
        loss = loss[0] if isinstance(loss, tuple) else loss
        return torch.autograd.grad(loss, sr) if backward else loss

    return call


def path_call(path: str, inputs: tuple[Tensor, Tensor, Tensor]) -> Callable[[], object]:
    """Values and gradient by one of the CUDA loss's paths, whichever the mask is for."""
    case = Case((1, 3, *inputs[0].shape[2:]), sigma=0.004)
    return lambda: run_path(path, Inputs(*inputs), case, (WEIGHT, WEIGHT))


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


def run(options: argparse.Namespace) -> None:
    device = options.device
    ours, baseline = NAMES[device]
    for size in options.sizes:
        for density, stride in options.masks:
            inputs = make_pair(size, density, stride, device)
            masked = int(inputs[2].sum())
            # the definition keeps about 2.5 MB per masked pixel for its backward, the direct kernels about nine values per entry
            fits = masked * 2.5 <= options.baseline_mb if device == "cpu" else masked * 625 * 4 * 9.5 <= torch.cuda.mem_get_info()[0]
            for backward in (False, True):
                case = (size, density, stride, backward)
                row: dict[str, Any] = {"size": size, "density": density, "stride": stride, "rows": masked, "backward": backward}
                row["ours"] = measure(loss_call(ours, inputs, backward), device, options.repeats)
                row["ours"]["extra_mb"] = peak_extra_mb(ours, device, case)
                if fits:
                    row["baseline"] = measure(loss_call(baseline, inputs, backward), device, min(3, options.repeats), warm_up=1)
                    row["baseline"]["extra_mb"] = peak_extra_mb(baseline, device, case)
                    row["times_faster"] = round(row["baseline"]["median_ms"] / row["ours"]["median_ms"], 1)
                if device == "cuda" and backward:
                    row["paths"] = {path: measure(path_call(path, inputs), device, options.repeats)["median_ms"] for path in PATHS}
                row.update(device=device, backend=ours, baseline_backend=baseline, note=options.note, **hardware(device))
                with (options.output / f"ssg_{device}.jsonl").open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(table_row(row), flush=True)


def newest_rows(path: Path) -> list[dict[str, Any]]:
    """The last row of each case in the file, so that a benchmark may be run in pieces."""
    rows = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        rows[row["size"], row["density"], row["stride"], row["backward"]] = row
    return list(rows.values())


HEAD = (
    "| size | mask | rows | pass | median ms (fastest..slowest) | extra MB | rows / tiles ms | baseline ms | baseline MB | times faster |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)


def table_row(row: dict[str, Any]) -> str:
    ours, base = row["ours"], row.get("baseline")
    mask = f"{row['density']:.0%}" + (f", stride {row['stride']}" if row["stride"] > 1 else "")
    spread = f"{ours['median_ms']:.2f} ({ours['fastest_ms']:.2f}..{ours['slowest_ms']:.2f})"
    compared = f"{base['median_ms']:.0f} | {base['extra_mb']:.0f} | {row['times_faster']:.0f}" if base else "- | - | -"
    passes = "forward + backward" if row["backward"] else "forward"
    paths = " / ".join(f"{time:.2f}" for time in row.get("paths", {}).values()) or "-"
    return f"| {row['size']} | {mask} | {row['rows']} | {passes} | {spread} | {ours['extra_mb']:.0f} | {paths} | {compared} |"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    chosen = [row for row in rows if row["backward"] and row["density"] == 0.1 and row["stride"] == 1]
    if importlib.util.find_spec("matplotlib") is None or not chosen:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for key, label in (("ours", f"ours ({rows[0]['backend']})"), ("baseline", f"baseline ({rows[0]['baseline_backend']})")):
        points = sorted((row["size"], row[key]["median_ms"]) for row in chosen if key in row)
        if points:
            axes.plot(*zip(*points), marker="o", label=label)
    axes.set(
        xscale="log", yscale="log", xlabel="image side (pixels)", ylabel="forward + backward (ms)", title="Self-similarity loss, 10 % mask"
    )
    sizes = sorted({row["size"] for row in chosen})
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_xticks([], minor=True)
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def mask_option(text: str) -> tuple[float, int]:
    density, _, stride = text.partition(":")
    return float(density), int(stride or 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 96, 128, 256, 512, 1024])
    parser.add_argument("--masks", type=mask_option, nargs="+", default=[(0.1, 3), (0.03, 1), (0.1, 1), (0.3, 1), (1.0, 1)],
                        metavar="DENSITY[:STRIDE]")  # fmt: skip
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--baseline-mb", type=float, default=4000, help="memory that the CPU baseline may take")
    parser.add_argument("--note", default="", help="kept with every row, for example how busy the machine was")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        backend, case = json.loads(options.memory_of)
        print_own_peak(backend, case)
        return
    options.output.mkdir(parents=True, exist_ok=True)
    print(HEAD)
    run(options)
    draw(newest_rows(options.output / f"ssg_{options.device}.jsonl"), options.output / f"ssg_{options.device}.png")


if __name__ == "__main__":
    main()
