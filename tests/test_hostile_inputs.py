"""Two hundred bad inputs through upscaling, training and evaluation: no run ends, nothing escapes, no good neighbour is lost."""

from __future__ import annotations

import csv
import json
import os
import resource
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from hostile import GOOD, hostile_folder
from restorers import Nearest
from typer.testing import CliRunner

from sslsr_diffusion.cli import app
from sslsr_diffusion.config import parse
from sslsr_diffusion.data import DataSettings, open_training_data
from sslsr_diffusion.inference.runner import RunnerOptions, upscale_files

COUNT = 200


@pytest.fixture
def source(tmp_path, monkeypatch) -> Path:
    """The hostile folder; afterwards it must be as it was, and nothing may lie beside it."""
    monkeypatch.chdir(tmp_path)
    AcceleratorState._reset_state()
    folder = tmp_path / "in"
    hostile_folder(folder, COUNT)
    before = state_of(folder)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield folder
    assert state_of(folder) == before
    assert sorted(os.listdir(tmp_path)) in (["in"], ["in", "out"])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 1_500_000  # KB: no bomb was unpacked


def state_of(folder: Path) -> dict[str, tuple[int, int, int]]:
    states = {}
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            status = os.lstat(os.path.join(root, name))
            states[os.path.join(root, name)] = (status.st_mode, status.st_size, status.st_mtime_ns)
    return states


def written(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))


def test_upscaling(source, tmp_path):
    report = upscale_files(Nearest(), source, tmp_path / "out", RunnerOptions(scale=2))
    assert sorted(report.done) == sorted(GOOD)
    assert len(report.failed) > COUNT - 30  # links, pipes and the like are passed over when listing
    assert all(name.isprintable() and reason.isprintable() for name, reason in report.failed)
    assert written(tmp_path / "out") == sorted(GOOD)


@pytest.mark.parametrize("workers", [0, 1])
def test_training_data(source, workers):
    """A whole round: each good picture is used, each bad one is replaced and named."""
    settings = {"sources": [{"kind": "folder", "path": str(source)}], "workers": workers, "degradation": {"preset": "bicubic"}}
    loader = open_training_data(parse(DataSettings, settings), crop_size=32, scale=4, seed=0, batch_size=8)
    batches = iter(loader)
    used = {name for _ in range(COUNT // 8 + 2) for name in next(batches).names}
    loader.close()
    assert {str(source / name) for name in GOOD} == used
    problems = loader.problems()
    assert len(problems) > COUNT - 30
    assert all(text.isprintable() for text in problems)


def test_a_training_run(source, tmp_path):
    values = {
        "data.sources": json.dumps([{"kind": "folder", "path": str(source)}]),
        "data.validation": json.dumps([{"kind": "folder", "path": str(source)}]),
        "data.workers": 0,
        "losses": "[{kind: pixel_l1}]",
        "output.dir": "out",
        "output.trackers": "[]",
        "training.batch_size": 4,
        "training.crop_size": 32,
        "training.steps": 6,
        "validation.limit": 300,
        "validation.size": 32,
        "validation.metrics": "[psnr]",
    }
    result = CliRunner().invoke(app, ["train", "--config", "tiny_autoencoder", *(f"--set={k}={v}" for k, v in values.items())])
    assert "Done: 6 steps" in result.output, result.output
    assert result.exit_code == 0
    log = (tmp_path / "out/log.txt").read_text(encoding="utf-8")
    assert "training pictures could not be used" in log
    assert all(line.isprintable() for line in log.splitlines())


def test_evaluation(source, tmp_path):
    """Both columns and the references hold the same bad files; the good ones are scored, the others are left out by name."""
    arguments = ["--restored", f"ours={source}", "--reference", str(source), "--metrics", "psnr", "--output", "out"]
    result = CliRunner().invoke(app, ["evaluate", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert all(line.isprintable() for line in result.output.replace("\r", "\n").replace("\t", " ").splitlines())
    with (tmp_path / "out/metrics.csv").open(newline="") as file:
        scored = {row["image"] for row in csv.DictReader(file)}
    assert scored == {str(Path(name)) for name in GOOD} or {Path(name).stem for name in GOOD} == {Path(s).stem for s in scored}
    html = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert "<script" not in html.lower()
    assert len(json.loads((tmp_path / "out/summary.json").read_text())["problems"]) > 0


def test_photographs_of_a_data_set(source, tmp_path):
    """Low-resolution partners are made below the output alone."""
    from sslsr_diffusion.evaluation.dataset import find_dataset

    pairs = find_dataset(str(source), scale=4, made=tmp_path / "out")
    assert written(pairs.lr) == written(pairs.hr) == sorted(str(Path(name).with_suffix(".png")) for name in GOOD)
    assert len(pairs.left_out) > COUNT - 30
    assert all(line.isprintable() for line in pairs.left_out)
