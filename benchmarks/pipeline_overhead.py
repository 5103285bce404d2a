"""How much of the sampling loop is the networks: `python benchmarks/pipeline_overhead.py [--device cuda] [--steps 10] [--runs 5]`.

Times the loop of StableSRPipeline (tiles, guidance, sampler, blending) and the calls of the UNet and the structural
encoder inside it; random weights, at a width whose call takes at least 50 ms.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time

import torch

from sslsr_diffusion import StableSRPipeline
from sslsr_diffusion.models.stablesr.build import build_networks
from sslsr_diffusion.models.stablesr.settings import StableSRSettings


class Stopwatch:
    """Sums the time inside the networks' forward."""

    def __init__(self, *networks: torch.nn.Module) -> None:
        self.seconds, self.calls = 0.0, 0
        for network in networks:
            network.register_forward_pre_hook(self._start)
            network.register_forward_hook(self._stop)

    def _start(self, *_: object) -> None:
        self._began = now()

    def _stop(self, *_: object) -> None:
        self.seconds += now() - self._began
        self.calls += 1


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(pipe: StableSRPipeline, watch: Stopwatch, side: int, steps: int, tile: int | None, batch: int) -> tuple[float, float, float]:
    """(loop seconds, share of the networks, seconds per UNet call with its encoder call)."""
    marks: list[float] = []
    watch.seconds, watch.calls = 0.0, 0

    def on_step_end(pipe: StableSRPipeline, step: int, t: float, values: dict) -> None:
        if step == 0:  # the first step warms up and begins the measurement
            watch.seconds, watch.calls = 0.0, 0
        marks.append(now())

    picture = torch.rand(1, 3, side // 4, side // 4, generator=torch.Generator().manual_seed(0))
    pipe(picture, num_inference_steps=steps + 1, tile=tile, tile_batch_size=batch, output_type="pt", callback_on_step_end=on_step_end)
    loop = marks[-1] - marks[0]
    return loop, watch.seconds / loop, 2 * watch.seconds / watch.calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--preset", default="tiny", help="architecture; sd21 on a GPU")
    parser.add_argument("--side", type=int, default=512, help="output pixels")
    parser.add_argument("--tile", type=int, default=256)
    parser.add_argument("--batch", type=int, default=2, help="tiles per network call")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    parts = build_networks(StableSRSettings(init="random", preset=arguments.preset)).components()
    pipe = StableSRPipeline(**parts).to(arguments.device)
    pipe.set_progress_bar_config(disable=True)
    watch = Stopwatch(pipe.unet, pipe.structural_encoder)
    print(f"{arguments.preset} on {arguments.device} ({platform.processor() or platform.machine()}), torch {torch.__version__}")
    for tile in (None, arguments.tile):
        rows = [measure(pipe, watch, arguments.side, arguments.steps, tile, arguments.batch) for _ in range(arguments.runs)]
        loops, shares, calls = (sorted(column) for column in zip(*rows))
        share, low, high = (100 * value for value in (statistics.median(shares), shares[0], shares[-1]))
        print(
            f"side {arguments.side}, tile {tile or 'none'}: call {1e3 * statistics.median(calls):.0f} ms, "
            f"loop {statistics.median(loops):.2f} s, networks {share:.2f} % of it (median of {arguments.runs}; {low:.2f} to {high:.2f} %)"
        )


if __name__ == "__main__":
    main()
