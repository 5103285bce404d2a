"""Two processes on gloo see the samples and compute the gradients of one process with the whole batch."""

from __future__ import annotations

import os
from pathlib import Path

import forks
import pytest
import torch

from sslsr_diffusion.training.checkpoints import read_checkpoint

HERE = Path(__file__).parent
SHARDED = ["stablesr", "sd_lora", "flux2_lora", "whole", "sd3_bfloat16", "flux2_bfloat16", "zimage_bfloat16"]  # of sharded_run.py
# eps 1 makes AdamW's first steps proportional to the gradient: the weights compare the gradients
LINEAR = {"steps": 3, "optimizer": {"lr": 0.5, "eps": 1.0, "weight_decay": 0.0}, "max_grad_norm": None}


def environment() -> dict[str, str]:
    return {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE}:{HERE.parent}"}


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    """With gates, masks of very different sizes, accumulation and windows at once; 1e-6 of the norm is float32's sum in another order."""
    options = {**LINEAR, "steps": 1, "max_timestep": 800, "decode_crop": 4}
    forks.toy(tmp_path / "one", 1, {**options, "batch_size": 4})
    done = forks.toy(tmp_path / "two", 2, {**options, "batch_size": 1, "accumulate": 2})
    one, two = (read_checkpoint(tmp_path / name / "checkpoint-1") for name in ("one", "two"))
    for name, value in one.tensors["trained"].items():
        assert (two.tensors["trained"][name] - value).norm() <= 1e-6 * value.norm(), name
    assert one.state["progress"]["samples"] == two.state["progress"]["samples"] == 4
    assert two.state["progress"]["mean_loss"] == pytest.approx(one.state["progress"]["mean_loss"], rel=1e-5)
    stdout, stderr = "".join(one.stdout for one in done), "".join(one.stderr for one in done)
    assert "gloo" not in stdout  # no thread of the connection outlives the run: at the interpreter's end it might abort
    assert stdout.count("threads:") == 2
    assert stderr.count("1/1") >= 1
    assert stderr.count("train:   0%") == 1  # one progress bar
    assert len(list((tmp_path / "two").glob("checkpoint-*"))) == 1
    assert len((tmp_path / "two/log.txt").read_text().split("started at step 0")) == 2  # one log
    assert {name.split("/")[0] for name in two.tensors["rng"]} == {"0", "1"}


@pytest.mark.slow
def test_all_processes_stop_by_patience_at_the_same_step(tmp_path):
    """Five pictures over two processes, as good at every look: the second look after the first ends the run, and a resume ends at once."""
    options = {**LINEAR, "steps": 9, "validation": {"every": 2, "count": 5, "patience": 2}}
    forks.toy(tmp_path / "one", 1, {**options, "batch_size": 4})
    for resumed in ([], ["--resume"]):
        forks.toy(tmp_path / "two", 2, {**options, "batch_size": 2}, *resumed)
    states = [read_checkpoint(tmp_path / name / "checkpoint-4").state["progress"] for name in ("one", "two")]
    assert [len(list((tmp_path / name).glob("checkpoint-*"))) for name in ("one", "two")] == [1, 1]
    assert [state["looks"] for state in states] == [states[0]["looks"]] * 2
    assert (states[0]["looks"]["newest"], states[0]["looks"]["since"]) == (4, 2)


@pytest.mark.slow
def test_resume_on_another_number_of_processes(tmp_path):
    """Two steps on two processes and one more on one: the global sample index goes on where it was."""
    options = {**LINEAR, "batch_size": 2}
    forks.toy(tmp_path / "whole", 1, {**options, "batch_size": 4})
    forks.toy(tmp_path / "parts", 2, {**options, "steps": 2})
    forks.toy(tmp_path / "parts", 1, {**options, "batch_size": 4}, "--resume")
    one, two = (read_checkpoint(tmp_path / name / "checkpoint-3") for name in ("whole", "parts"))
    for name, value in one.tensors["trained"].items():
        torch.testing.assert_close(two.tensors["trained"][name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("case", SHARDED)
def test_sharded_state_goes_out_whole_and_comes_back(case, tmp_path):
    """accelerate ignores its FSDP plugin on the CPU, so its function that divides a module is called directly, on gloo."""
    assert any("equal" in one.stdout for one in forks.script(2, tmp_path, "sharded_run.py", case))
