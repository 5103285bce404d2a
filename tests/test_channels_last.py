"""training.channels_last: another layout in memory, the same training, and the same files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_runs import tiny
from toys import assert_same_checkpoint, wave_photos

from sslsr_diffusion.runs.recipe import Recipe
from sslsr_diffusion.runs.start import build_job, train
from sslsr_diffusion.training.checkpoints import read_checkpoint
from sslsr_diffusion.training.loop import train_job

TASKS = {
    "diffusion": ({"kind": "diffusion", "train": "all"}, [{"kind": "diffusion"}, {"kind": "pixel_l1"}]),
    "autoencoder": ({"kind": "autoencoder"}, [{"kind": "pixel_l1"}]),
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wave_photos(tmp_path_factory.mktemp("photos"))


def recipe(kind: str, photos: Path, run: Path, *, steps: int, channels_last: bool = True) -> Recipe:
    task, losses = TASKS[kind]
    training = {"steps": steps, "batch_size": 2, "crop_size": 32, "channels_last": channels_last, "ema": {"decay": 0.9}}
    return tiny(photos, run, task=task, losses=losses, training={**training, "optimizer": {"lr": 1e-3}})


@pytest.mark.parametrize("kind", TASKS)
def test_resumes_to_the_same_bits_and_saves_plain_tensors(kind: str, photos: Path, tmp_path: Path) -> None:
    train(recipe(kind, photos, tmp_path / "whole", steps=4))
    train(recipe(kind, photos, tmp_path / "parts", steps=2))
    train(recipe(kind, photos, tmp_path / "parts", steps=4), resume="latest")
    assert_same_checkpoint(tmp_path / "whole" / "checkpoint-4", tmp_path / "parts" / "checkpoint-4")
    tensors, _ = read_checkpoint(tmp_path / "whole" / "checkpoint-4")
    assert all(tensor.is_contiguous() for part in tensors.values() for tensor in part.values())


@pytest.mark.parametrize("kind", TASKS)
def test_the_numbers_stay_and_only_the_layout_changes(kind: str, photos: Path, tmp_path: Path) -> None:
    jobs = [build_job(recipe(kind, photos, tmp_path / str(last), steps=1, channels_last=last)) for last in (False, True)]
    kernels = [next(p for p in job.task.module.parameters() if p.dim() == 4 and p.shape[1] > 1 and p.shape[2] > 1) for job in jobs]
    assert [kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels] == [False, True]
    for job in jobs:
        train_job(job)
    plain, last = (read_checkpoint(tmp_path / str(layout) / "checkpoint-1")[0]["optimizer"] for layout in (False, True))
    moments = [name for name in plain if name.endswith("|exp_avg")]
    assert moments
    for name in moments:  # a tenth of the first gradient
        assert torch.allclose(plain[name], last[name], atol=1e-4 * max(1e-6, float(plain[name].abs().max())) + 1e-7), name
