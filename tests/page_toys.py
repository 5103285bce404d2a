"""What the tests of the page share: two quick models, a slow one, pictures, and a run folder."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from evaluation_samples import picture, write
from restorers import ToyPixelFamily, ToyPixels

from sslsr_diffusion.models import FAMILIES

SLOW = 400  # calls of its layers, each with a pause, which a job of the slow toy takes


class SlowPixels(ToyPixels):
    """A minute for a picture, most of it between layers."""

    def forward(self, lr: torch.Tensor) -> torch.Tensor:
        for _ in range(SLOW if lr.device.type == "cpu" else 1):
            time.sleep(0.05)
            self.body(torch.zeros(1, 12, 4, 4))
        return super().forward(lr)


class Toys(ToyPixelFamily):
    def read(self, path, *, meta=False):
        return SlowPixels(str(path)) if "slow" in path.name and not meta else super().read(path, meta=meta)


@contextmanager
def toys_in(folder: Path) -> Iterator[Path]:
    """Two quick models, one slow, and pictures, in the folder where one stands."""
    for name in ("one.toy", "two.toy", "slow.toy"):
        (folder / name).write_bytes(name.encode())
    write(folder / "a.png", picture(1))
    write(folder / "more" / "b.png", picture(2))
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "toy_pixels", Toys())
        patch.chdir(folder)
        yield folder


def names(folder: Path, *chosen: str) -> list[str]:
    return [str(folder / f"{name}.toy") for name in chosen]


def make_run(folder: Path, steps: int = 3) -> None:
    (folder / "pictures").mkdir(parents=True)
    (folder / "recipe.yaml").write_text("seed: 3\n")
    rows = [{"step": step, "loss/pixel_l1": 1 / step, "validation/psnr": 20.0 + step} for step in range(1, steps + 1)]
    (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "lo')
    for step in range(1, steps + 1):
        write(folder / "pictures" / f"step-{step:06d}.png", picture(step))
