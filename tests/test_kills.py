"""The short version of `make chaos`, a disk that is really full, and what several processes do when one of them is killed."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from chaos.kills import FORK, NEWER, torment, toy, warm
from test_two_processes import HERE, LINEAR, environment
from toys import assert_same_checkpoint, toy_job, toy_validation

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.training.checkpoints import latest_checkpoint, read_checkpoint, what_is_wrong
from sslsr_diffusion.training.loop import train_job
from sslsr_diffusion.training.settings import CheckpointSettings


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_with_the_same_bits(tmp_path):
    strikes = [signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGKILL]
    found = list(torment(toy, tmp_path, strikes, seed=2, steps=100))  # more than four lives can do, on a busy machine too
    assert len(found) == len(strikes) + 2


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 700 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(disk)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("no right to mount a small file system here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize("policy", ["continue", "stop"])
def test_a_full_disk_spares_the_earlier_checkpoint(tmp_path, small_disk, policy, caplog):
    """Full from step 12, with room again from step 22: checkpoint-20 is missing, everything else is as if nothing had been."""
    ballast = small_disk / "ballast"

    def crowded(run: Path):
        job = replace(
            toy_job(run, steps=30, log_every=1, gain=9),
            checkpoints=CheckpointSettings(every=10, keep=1, on_failure=policy),
            validation=toy_validation(every=15),
        )
        opened = job.open_data

        def open_data(*place):
            loader = opened(*place)

            class Filling(loader.__class__):
                def __next__(self):
                    step = self.position // self.batch_size
                    if step == 12:
                        fill(ballast)
                    if step == 22:
                        ballast.unlink(missing_ok=True)
                    return super().__next__()

            loader.__class__ = Filling
            return loader

        return replace(job, open_data=open_data)

    train_job(replace(toy_job(tmp_path / "whole", steps=30, log_every=1, gain=9), validation=toy_validation(every=15)))
    run = small_disk / "run"
    with caplog.at_level(logging.WARNING, "sslsr_diffusion"):
        if policy == "stop":
            with pytest.raises(UserError, match=r"checkpoint at step 20 could not be written .*on_failure is stop"):
                train_job(crowded(run))
        else:
            train_job(crowded(run))
    assert "checkpoint at step 20 could not be written" in caplog.text
    assert "history or pictures could not be written" in caplog.text
    assert "the best weights could not be kept" in caplog.text
    if policy == "stop":
        assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-10"]
        assert what_is_wrong(run / "checkpoint-10") is None
        ballast.unlink()
        train_job(replace(crowded(run), open_data=toy_job(run, steps=30).open_data), resume="latest")
    assert_same_checkpoint(run / "checkpoint-30", tmp_path / "whole/checkpoint-30", apart=NEWER)
    assert json.loads((run / "history.jsonl").read_text().splitlines()[-1])["step"] == 30
    assert (run / "pipeline/weights.safetensors").is_file()


def fill(path: Path) -> None:
    """Leave no room at all."""
    try:
        with path.open("wb", buffering=0) as stream:
            while stream.write(bytes(1024)):
                pass
    except OSError:
        return


def member(rank: int, port: int, folder: Path, options: dict, writing) -> None:
    """One of two processes on gloo; `writing` is set while rank 0 is in the middle of a checkpoint."""
    from accelerate.state import AcceleratorState

    from sslsr_diffusion import files

    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in place.items()}, ACCELERATE_USE_CPU="1")
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)
    sync, seen = files.sync, []

    def slowly(path):
        if path.is_file():
            seen.append(path)
        if len(seen) > 9:  # three files of the run folder, five of the first checkpoint: the second one is begun
            writing.set()
            time.sleep(0.2)
        sync(path)

    if writing is not None:
        files.sync = slowly
    try:
        train_job(replace(toy_job(folder, dropout=0, **options), checkpoints=CheckpointSettings(every=2)))
    except UserError as error:
        folder.with_name(f"{folder.name}-{rank}.txt").write_text(str(error))
        os._exit(2)


def company(folder: Path, options: dict, writing=None) -> list:
    import socket

    warm()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    members = [FORK.Process(target=member, args=(rank, port, folder, options, writing)) for rank in (0, 1)]
    for process in members:
        process.start()
    return members


@pytest.mark.parametrize("victim", [0, 1])
def test_one_process_killed_ends_the_other_with_a_sentence_and_one_alone_goes_on(tmp_path, victim):
    """In the middle of the main process's second checkpoint; the one process that goes on equals one that was never two."""
    writing = FORK.Event()
    options = {**LINEAR, "steps": 1000}
    members = company(tmp_path / "run", {**options, "batch_size": 1}, writing)
    assert writing.wait(180)
    members[victim].kill()
    begin = time.monotonic()
    other = members[1 - victim]
    other.join(60)
    assert other.exitcode == 2
    assert time.monotonic() - begin < 60
    said = (tmp_path / f"run-{1 - victim}.txt").read_text()
    assert said.startswith("another process of this run has ended")
    members[victim].join()
    latest = latest_checkpoint(tmp_path / "run")
    assert latest.name in (["checkpoint-2"] if victim == 0 else ["checkpoint-2", "checkpoint-4"])  # the main process finishes its writing
    assert f"--resume latest goes on from {latest.name}" in said
    steps = int(latest.name.partition("-")[2]) + 1
    alone = {**LINEAR, "steps": steps, "batch_size": 2}
    train_job(toy_job(tmp_path / "run", dropout=0, **alone), resume="latest")
    train_job(toy_job(tmp_path / "whole", dropout=0, **alone))
    got, want = (read_checkpoint(tmp_path / name / f"checkpoint-{steps}").tensors["trained"] for name in ("run", "whole"))
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6)  # float32 sums in another order


def test_all_processes_skip_a_step_that_went_wrong_on_one_and_the_log_has_its_names(tmp_path):
    """Samples 4 and 5 belong to step 3; only the second process sees the bad one."""
    options = {**LINEAR, "steps": 6, "batch_size": 1}
    for process in company(tmp_path / "two", {**options, "poison": range(5, 6)}):
        process.join(180)
        assert process.exitcode == 0
    train_job(toy_job(tmp_path / "one", dropout=0, **{**options, "batch_size": 2}, poison=range(4, 5)))
    two, one = (read_checkpoint(tmp_path / name / "checkpoint-6") for name in ("two", "one"))
    assert two.state["progress"]["skipped"] == one.state["progress"]["skipped"] == 1
    for name, value in one.tensors["trained"].items():
        torch.testing.assert_close(two.tensors["trained"][name], value, rtol=1e-5, atol=1e-6)  # float32 sums in another order
    log = (tmp_path / "two/log.txt").read_text()
    assert "step 3 skipped" in log
    assert "4.png, 5.png" in log


@pytest.mark.slow
def test_two_machines_equal_one_and_end_together(tmp_path):
    """Two launchers that meet on loopback: the same weights as two processes, bit for bit; one worker killed ends both."""
    import socket

    options = {**LINEAR, "batch_size": 1, "checkpoints": {"every": 3, "keep": 10**6}}
    with socket.create_server(("127.0.0.1", 0)) as free:
        meeting = f"127.0.0.1:{free.getsockname()[1]}"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d"]
    command = [*launcher, f"--rdzv_endpoint={meeting}", "--rdzv_id=run", str(HERE / "toy_run.py"), str(tmp_path / "run")]
    machines = []
    for number in (1, 2):
        with (tmp_path / f"{number}.txt").open("w") as stream:
            arguments = [*command, json.dumps({**options, "steps": 100000})]
            machines.append(subprocess.Popen(arguments, env=environment(), stdout=stream, stderr=stream))
    try:
        end = time.monotonic() + 120
        while what_is_wrong(tmp_path / "run/checkpoint-3") is not None:
            assert all(machine.poll() is None for machine in machines), (tmp_path / "1.txt").read_text()[-2000:]
            assert time.monotonic() < end
            time.sleep(0.1)
        (worker,) = Path(f"/proc/{machines[1].pid}/task/{machines[1].pid}/children").read_text().split()
        os.kill(int(worker), signal.SIGKILL)
        begin = time.monotonic()
        assert all(machine.wait(60) for machine in machines)  # both say that it failed
        assert time.monotonic() - begin < 60
    finally:
        for machine in machines:
            machine.kill()
    assert "another process of this run has ended or cannot be reached" in (tmp_path / "1.txt").read_text()
    for process in company(tmp_path / "pair", {**LINEAR, "batch_size": 1, "steps": 3}):
        process.join(180)
    two, one = (read_checkpoint(tmp_path / name / "checkpoint-3").tensors["trained"] for name in ("run", "pair"))
    assert all(torch.equal(two[name], value) for name, value in one.items())
