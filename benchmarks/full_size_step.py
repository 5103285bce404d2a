"""Time and memory of a training step at full size, and the self-similarity loss's share of it:

    python benchmarks/full_size_step.py [--config sd_upscaler_trial] [--set task.decode_crop=16 ...] [--steps 2] [--append FILE]

Builds what the recipe says (random weights, shipped photographs) and runs optimizer steps exactly as training does; nothing is
written but one row of JSON. Seconds of wall clock and of processor time: on a busy machine only the latter means something.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from sslsr_diffusion.runs.memory import step_bytes
from sslsr_diffusion.runs.recipe import load_recipe
from sslsr_diffusion.runs.start import build_job
from sslsr_diffusion.training.session import Session

REPEATS = 5  # of the loss alone


class Remembering:
    """A loss that keeps what it was last given."""

    def __init__(self, loss: Any) -> None:
        self._loss, self.given = loss, None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loss, name)

    def __call__(self, outputs: Any, count: Any = None) -> Any:
        self.given = (outputs, count)
        return self._loss(outputs, count)


def clocks() -> tuple[float, float]:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def since(begin: tuple[float, float]) -> tuple[float, float]:
    now = clocks()
    return now[0] - begin[0], now[1] - begin[1]


def loss_alone(loss: Remembering) -> tuple[float, float]:
    """Fastest forward and backward of the loss on the pixels of the last step."""
    outputs, count = loss.given
    found = []
    for _ in range(REPEATS):
        sr = outputs.sr.detach().requires_grad_()
        begin = clocks()
        loss(type(outputs)(**{**vars(outputs), "sr": sr}), count)[0].backward()
        found.append(since(begin))
    return min(wall for wall, _ in found), min(busy for _, busy in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="sd_upscaler_trial")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--append", type=Path, help="add the row to this file")
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.config, arguments.overrides)
    job = build_job(recipe)
    places = [place for place, loss in enumerate(job.losses) if loss.name == "self_similarity"]
    for place in places:
        job.losses[place] = Remembering(job.losses[place])  # type: ignore[call-overload]
    steps = []
    with tempfile.TemporaryDirectory() as folder:
        session = Session(job.task, job.losses, job.training, seed=recipe.seed, trackers=(), run=Path(folder))
        loader = job.open_data(0, 1, None, session.device)
        batches = iter(loader)
        for _ in range(arguments.steps):
            micro = [next(batches) for _ in range(job.training.accumulate)]
            begin = clocks()
            session.step(micro)
            steps.append(since(begin))
        alone = loss_alone(job.losses[places[0]]) if places else (0.0, 0.0)  # type: ignore[arg-type]
        loader.close()
    cuda = session.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    row = {
        "config": arguments.config,
        "set": arguments.overrides,
        "device": torch.cuda.get_device_name() if cuda else f"cpu {platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "step_seconds": [round(wall, 2) for wall, _ in steps],
        "step_cpu_seconds": [round(busy, 2) for _, busy in steps],
        "ssl_seconds": round(alone[0], 3),
        "ssl_cpu_seconds": round(alone[1], 3),
        "ssl_share": round(job.training.accumulate * alone[1] / steps[-1][1], 4),
        "peak_gib": round(peak / 2**30, 2),
        "estimated_gib": round(sum(step_bytes(recipe).values()) / 2**30, 2),
    }
    print(json.dumps(row))
    if arguments.append:
        with arguments.append.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
