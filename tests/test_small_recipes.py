"""How the small model is made: each step takes what the one before writes, and the recipes are what its script runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from scripts import ROOT, load_script

from sslsr_diffusion.runs.recipe import load_recipe, resolved
from sslsr_diffusion.shipped_model import SMALL
from sslsr_diffusion.training.resume import differences

TRAINING, PAIRS = "configs/small.yaml", ["configs/small_pairs.yaml", "configs/small_pairs_clean.yaml"]


def value(command: list[str], option: str) -> str:
    return command[command.index(option) + 1]


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What `small_model.py train` runs in a folder with photographs and nothing else."""
    script, found = load_script("examples/small_model.py"), []
    monkeypatch.setattr(script, "run", found.append)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="photos/crops/train/ has no photographs; run `python examples/collect_photographs"):
        script.main(["train"])
    (tmp_path / "photos/crops/train").mkdir(parents=True)
    script.main(["train"])
    return found


def test_each_step_takes_what_the_one_before_writes(commands: list[list[str]]) -> None:
    teacher, *pairs, training, export = commands
    small = load_recipe(str(ROOT / TRAINING))
    assert [value(made, "--config") for made in pairs] == PAIRS
    assert [(source.kind, source.path) for source in small.data.sources] == [("pairs", value(made, "--output")) for made in pairs]
    for made in pairs:
        assert [source.path for source in load_recipe(str(ROOT / value(made, "--config"))).data.sources] == ["photos/crops/train"]
        assert value(made, "--model") == value(teacher, "--output")
        assert int(value(made, "--crop-size")) >= 2 * small.training.crop_size  # the teacher's own edges are rare
        anchor, count = (value(made, option) for option in ("--anchor", "--count"))
        assert f"--anchor {anchor}`" in (ROOT / TRAINING).read_text(encoding="utf-8")
        assert f"--count {count} --crop-size 256 --batch-size 4 --anchor {anchor}" in (ROOT / "docs/data.md").read_text(encoding="utf-8")
    assert value(training, "--config") == TRAINING
    assert small.output.dir in export
    assert Path(value(export, "--output")).name == SMALL


def test_a_stopped_training_goes_on_and_a_finished_one_is_left(tmp_path: Path, commands: list[list[str]]) -> None:
    script = load_script("examples/small_model.py")
    script.run = (again := []).append
    (tmp_path / script.RUN / "checkpoint-100").mkdir(parents=True)
    script.main(["train"])
    assert [command[-2:] for command in again if "train.py" in command] == [["--resume", "latest"]]
    (tmp_path / script.RUN / "pipeline").mkdir()
    again.clear()
    script.main(["train"])
    assert not any("train.py" in command for command in again)


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_differ_from_the_training_in_their_pictures_alone(name: str) -> None:
    small, pairs = (resolved(load_recipe(str(ROOT / one))) for one in (TRAINING, name))
    assert {key.split(".")[1] for key in differences(small, pairs)} == {"sources", "degradation", "dir"}
