"""training.channels_last: another layout in memory, the same training, and the same files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from toys import assert_same_checkpoint, wave_photos

from sslsr_diffusion.config import parse
from sslsr_diffusion.runs.recipe import Recipe
from sslsr_diffusion.runs.start import build
from sslsr_diffusion.training.checkpoints import read_checkpoint
from sslsr_diffusion.training.loop import train_job

STAGES = {
    "diffusion": [{"kind": "diffusion"}, {"kind": "pixel_l1"}],
    "autoencoder": [{"kind": "pixel_l1"}],
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wave_photos(tmp_path_factory.mktemp("photos"))


def recipe(stage: str, photos: Path, run: Path, *, steps: int, channels_last: bool = True) -> Recipe:
    training: dict[str, Any] = {"steps": steps, "batch_size": 2, "crop_size": 32, "channels_last": channels_last, "ema": {"decay": 0.9}}
    return parse(
        Recipe,
        {
            "stage": stage,
            "model": {"init": "random", "preset": "tiny", "train": "all"},
            "data": {"sources": [{"kind": "folder", "path": str(photos)}], "degradation": {"preset": "bicubic"}, "workers": 0},
            "losses": STAGES[stage],
            "training": {**training, "optimizer": {"lr": 1e-3}},
            "validation": {"limit": 0},
            "output": {"dir": str(run), "trackers": []},
        },
    )


@pytest.mark.parametrize("stage", STAGES)
def test_resumes_to_the_same_bits_and_saves_plain_tensors(stage: str, photos: Path, tmp_path: Path) -> None:
    train_job(build(recipe(stage, photos, tmp_path / "whole", steps=4)))
    train_job(build(recipe(stage, photos, tmp_path / "parts", steps=2)))
    train_job(build(recipe(stage, photos, tmp_path / "parts", steps=4)), resume="latest")
    assert_same_checkpoint(tmp_path / "whole" / "checkpoint-4", tmp_path / "parts" / "checkpoint-4")
    tensors, _ = read_checkpoint(tmp_path / "whole" / "checkpoint-4")
    assert all(tensor.is_contiguous() for part in tensors.values() for tensor in part.values())


@pytest.mark.parametrize("stage", STAGES)
def test_the_numbers_stay_and_only_the_layout_changes(stage: str, photos: Path, tmp_path: Path) -> None:
    jobs = [build(recipe(stage, photos, tmp_path / str(last), steps=1, channels_last=last)) for last in (False, True)]
    kernels = [next(p for p in job.objective.module.parameters() if p.dim() == 4 and p.shape[1] > 1 and p.shape[2] > 1) for job in jobs]
    assert [kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels] == [False, True]
    for job in jobs:
        train_job(job)
    plain, last = (read_checkpoint(tmp_path / str(kind) / "checkpoint-1")[0]["optimizer"] for kind in (False, True))
    moments = [name for name in plain if name.endswith("|exp_avg")]
    assert moments
    for name in moments:  # a tenth of the first gradient
        assert torch.allclose(plain[name], last[name], atol=1e-4 * max(1e-6, float(plain[name].abs().max())) + 1e-7), name
