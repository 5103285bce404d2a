"""`sslsr check-gpu` rehearsed without a GPU: its runner on steps that crash, hang and die, its own steps at tiny size on the CPU."""

from __future__ import annotations

import inspect
import json
import os
import re
import runpy
import sys
import time
from pathlib import Path

import fake_steps  # found by the steps' processes by way of PYTHONPATH
import pytest
from typer.testing import CliRunner

from sslsr_diffusion.checkup import everything, operator
from sslsr_diffusion.checkup.play import play
from sslsr_diffusion.checkup.runner import RESULT, check, command, table
from sslsr_diffusion.checkup.steps import STEPS, Step
from sslsr_diffusion.cli import app
from sslsr_diffusion.config import read_family, shipped_recipes
from sslsr_diffusion.errors import UserError
from sslsr_diffusion.losses import LOSSES
from sslsr_diffusion.tables import named

SMALL = ("training.crop_size=64", "training.batch_size=2", "task.decode_crop=null")


def fake(name: str, seconds: int = 120, **arguments) -> Step:
    return Step(name, f"it {name}", f"fake_steps:{name}", seconds, arguments, needs=())


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_step_that_crashes_hangs_or_dies_loses_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(fake_steps.__file__).parent))
    result, pid = tmp_path / RESULT, tmp_path / "pid"
    steps = [
        fake("fine", value=3),
        fake("raises"),
        fake("hangs", seconds=4, pid=str(pid)),
        fake("dies"),
        fake("elsewhere"),
        Step("lacking", "", "nowhere:none", 1, needs=("json", "no_such_package", "yaml_of_no_one")),
        fake("fine", seconds=36000, value=4),
        fake("rows_so_far", file=str(result)),
    ]
    said: list[str] = []
    rows = check(steps, tmp_path, 60, {"package": "p", "torch": "2"}, said.append)
    assert [row["step"] for row in rows] == [step.name for step in steps]
    assert [row["outcome"] for row in rows] == ["ok", "failed", "failed", "failed", "not run", "not run", "not run", "ok"]
    assert rows[0]["numbers"] == {"value": 3}
    assert rows[-1]["numbers"] == {"rows": 7}  # the file was whole after each step
    reasons = [row["reason"] for row in rows]
    assert reasons[1] == "ValueError: expected 1, got 2 | 3"
    assert reasons[2] == "not done after 4 s; see 02.log"
    assert reasons[3] == "killed by SIGKILL; see 03.log"
    assert reasons[4] == "needs the moon."
    assert reasons[5] == "needs no_such_package, yaml_of_no_one: pip install no_such_package yaml_of_no_one"
    assert re.fullmatch(r"it may take 36000 s, \d+ s were left; give more --minutes", reasons[6])
    assert "nobody asked for" in (tmp_path / "01.log").read_text()
    assert json.loads(result.read_text()) == {"package": "p", "torch": "2", "steps": rows}
    end = time.monotonic() + 10
    started = int(pid.read_text()) if pid.exists() else 0  # not there where even the start of the process took four seconds
    while alive(started) and time.monotonic() < end:
        time.sleep(0.05)
    assert not alive(started)  # what a step has started ends with it
    lines = table({"package": "p", "torch": "2"}, rows).splitlines()
    assert lines[:3] == ["### p", "", "torch 2"]
    assert lines[7] == f"| raises | failed | {rows[1]['seconds']:.0f} | ValueError: expected 1, got 2 \\| 3 |"
    assert len(lines) == 6 + len(rows)


def test_without_a_gpu_it_says_what_it_would_do(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(everything, "no_gpu", lambda: "no GPU here.")
    done = CliRunner().invoke(app, ["check-gpu", "--minutes", "3", "--output", str(tmp_path / "out")])
    assert done.exit_code == 2, done.output
    for step in STEPS:
        assert f"{step.name} (at most {step.seconds} s)" in done.output
        assert step.run in done.output
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(sys, "argv", ["checkup", "--minutes", "0"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_module("sslsr_diffusion.checkup", run_name="__main__")
    assert "--minutes: expected a positive number, got 0" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="expected a folder, got a file"):
        everything.check_gpu(1, tmp_path / "file", print)


def test_with_a_gpu_the_report_is_written(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", str(Path(fake_steps.__file__).parent))
    monkeypatch.setattr(everything, "no_gpu", lambda: None)
    for steps, code in (((fake("fine", value=1), fake("elsewhere")), 0), ((fake("raises"),), 1)):
        monkeypatch.setattr(everything, "STEPS", steps)
        said: list[str] = []
        assert everything.check_gpu(10, tmp_path / "out", said.append) == code
        report = (tmp_path / "out" / "check_gpu.md").read_text()
        assert report in said[-1]
        assert f"| {steps[0].name} |" in report


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_steps_name_what_exists(step):
    inspect.signature(named(step.run)).bind(**step.arguments)
    if "recipe" in step.arguments:
        kept = {key: step.arguments[key] for key in ("overrides", "without") if key in step.arguments}
        recipe = named("sslsr_diffusion.checkup.training:random_recipe")(step.arguments["recipe"], **{"overrides": (), **kept})
        assert recipe.training.accumulate == 1
        assert "self_similarity" in [loss.kind for loss in recipe.losses]
        assert [loss.called for loss in recipe.losses if LOSSES[loss.kind].check(loss)] == []  # nor of their networks
        assert all(name in step.about for name in kept.get("without", ()))
        assert recipe.family.source(recipe.model) is None  # nothing to download
    shown = command(step)
    assert json.loads(shown[-1]) == json.loads(json.dumps(dict(step.arguments)))
    assert all(os.path.exists(word) for word in step.launcher if word.endswith(".yaml"))


def test_every_main_recipe_has_a_step():
    """Those that have presets; of gan/, one."""
    main = {name for name, path in shipped_recipes().items() if read_family(path)[0][1].get("presets")}
    tried = {step.arguments["recipe"] for step in STEPS if step.run.endswith(":full_step")}
    assert tried <= main
    assert {name for name in main - tried if not name.startswith("gan/")} == set()
    assert [name for name in tried if name.startswith("gan/")] == ["gan/swinir_ssl"]


def test_a_step_without_a_loss_that_is_not_there_is_a_mistake():
    from sslsr_diffusion.checkup.training import random_recipe

    with pytest.raises(ValueError, match=r"^without: expected losses of tiny_x4 \(.*self_similarity.*\), got lpips\.$"):
        random_recipe("tiny_x4", SMALL, ["lpips"])


def test_agreement_is_measured(monkeypatch):
    names = ("one channel", "search of three")
    found = operator.agreement("torch", "cpu", names)
    assert 0 < found["gradient"] < 3e-5
    right = operator.reference_loss
    monkeypatch.setattr(operator, "reference_loss", lambda *given: [0.999 * tensor for tensor in right(*given)])
    with pytest.raises(AssertionError, match=r"loss of the case 'one channel': expected an error of at most 2e-05, got 0\.001"):
        operator.agreement("torch", "cpu", names)


def test_speed_is_measured_for_each_density():
    found = operator.speed("cpu", 24, (0.1, 1.0), repeats=1)
    assert {"ours 10% ms", "torch 10% ms", "ours 100% ms", "torch 100% ms"} <= found.keys()


def test_own_tests_are_counted(tmp_path):
    (tmp_path / "test_two.py").write_text("def test_a(): pass\ndef test_b(): assert 0\n")
    (tmp_path / "test_one.py").write_text("def test_a(): pass\n")
    where = "sslsr_diffusion.checkup.own_tests:own_tests"
    steps = [Step(name, "", where, 120, {"file": str(tmp_path / name)}, needs=()) for name in ("test_two.py", "test_one.py", "none.py")]
    two, one, none = check(steps, tmp_path / "out", 60, {}, lambda text: None)
    assert two["reason"] == "AssertionError: 1 failed (test_b), 1 passed."
    assert one["numbers"] == {"passed": 1}
    assert none["outcome"] == "not run"


def test_steps_of_a_small_recipe_and_one_picture(monkeypatch):
    from sslsr_diffusion.checkup import training

    found = training.small_steps("tiny_x4", SMALL, count=2)
    assert found["loss"] == pytest.approx(found["on the CPU"], rel=1e-6)
    assert found["updated"] == "2 of 2"
    assert training.restore("tiny_x4", SMALL, side=16)["size"] == "64x64"
    assert 0 < training.full_step("tiny_x4", SMALL)["estimated GiB"] < 1
    monkeypatch.setattr(training, "device_bytes", lambda device: 1 << 20)
    too_much = play(training.full_step, {"recipe": "tiny_x4", "overrides": SMALL})
    assert too_much["outcome"] == "not run"
    assert re.fullmatch(r"estimated 0\.\d GiB, this device has 0\.0 GiB\.", too_much["reason"])


def test_another_first_loss_is_noticed(monkeypatch):
    from sslsr_diffusion.checkup import training

    monkeypatch.setattr(training, "_loss_on_cpu", lambda recipe: 2.0)
    with pytest.raises(AssertionError, match="first loss: expected 2 as on the CPU in float32, got"):
        training.small_steps("tiny_x4", SMALL, count=1)
