"""A checkpoint folder is whole or not there."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import stat
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sslsr_diffusion import files
from sslsr_diffusion.errors import UserError
from sslsr_diffusion.files import atomic_file, atomic_folder, atomic_write, remove_leftovers, restore_folder
from sslsr_diffusion.training import checkpoints
from sslsr_diffusion.training.checkpoints import (
    find_checkpoint,
    latest_checkpoint,
    prune_checkpoints,
    read_checkpoint,
    what_is_wrong,
    write_checkpoint,
)

TENSORS = {"trained": {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3)}, "rng": {"0/torch": torch.arange(5, dtype=torch.uint8)}}


def test_round_trip(tmp_path):
    write_checkpoint(tmp_path / "checkpoint-3", TENSORS, {"step": 3, "nan": float("nan"), "name": "ä"})
    tensors, state = read_checkpoint(tmp_path / "checkpoint-3")
    assert torch.equal(tensors["trained"]["a"], TENSORS["trained"]["a"])
    assert tensors["rng"]["0/torch"].dtype == torch.uint8
    assert state["step"] == 3
    assert state["nan"] != state["nan"]
    assert state["name"] == "ä"
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-3"]
    assert {p.suffix for p in (tmp_path / "checkpoint-3").iterdir()} == {".safetensors", ".json"}  # nothing that could be a pickle


def damage_truncate(folder: Path) -> None:
    path = folder / "trained.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def damage_flip(folder: Path) -> None:
    path = folder / "trained.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def damage_remove(folder: Path) -> None:
    (folder / "state.json").unlink()


def damage_no_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def damage_empty_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_bytes(b"")


def damage_list_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("[]")


def damage_escaping_manifest(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["../checkpoint-1/state.json"] = manifest["files"]["state.json"]
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("damage", [v for k, v in globals().items() if k.startswith("damage_")])
def test_damage_is_noticed_and_passed_over(tmp_path, damage):
    for step in (1, 2):
        write_checkpoint(tmp_path / f"checkpoint-{step}", TENSORS, {"step": step})
    damage(tmp_path / "checkpoint-2")
    assert what_is_wrong(tmp_path / "checkpoint-2")
    with pytest.raises(UserError, match="checkpoint-2"):
        read_checkpoint(tmp_path / "checkpoint-2")
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-1"


def test_newest_by_number_not_by_name(tmp_path):
    for step in (9, 10, 100):
        write_checkpoint(tmp_path / f"checkpoint-{step}", TENSORS, {})
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-100"
    prune_checkpoints(tmp_path, keep=2, step=100)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-100"]


def test_later_ones_never_push_out_what_was_just_written(tmp_path):
    """The newest is damaged, so the run went back to an earlier one and was stopped before it had got as far again."""
    for step in (10, 20, 30):
        write_checkpoint(tmp_path / f"checkpoint-{step}", TENSORS, {})
    (tmp_path / "checkpoint-30" / "state.json").write_text("x")
    write_checkpoint(tmp_path / "checkpoint-24", TENSORS, {})
    prune_checkpoints(tmp_path, keep=1, step=24)
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-24"
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-24"]


def test_find_checkpoint_takes_latest_a_folder_or_a_run(tmp_path):
    write_checkpoint(tmp_path / "checkpoint-5", TENSORS, {})
    assert find_checkpoint("latest", tmp_path) == tmp_path / "checkpoint-5"
    assert find_checkpoint(str(tmp_path / "checkpoint-5"), Path("nowhere")) == tmp_path / "checkpoint-5"
    assert find_checkpoint(str(tmp_path), Path("nowhere")) == tmp_path / "checkpoint-5"
    with pytest.raises(UserError, match="no whole checkpoint"):
        find_checkpoint("latest", tmp_path / "other")


def test_a_name_that_is_no_folder_is_looked_up_on_the_hub(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(checkpoints, "resolve_checkpoint_from_hub", lambda name: asked.append(name) or tmp_path / "checkpoint-7")
    assert find_checkpoint("user/name", tmp_path) == tmp_path / "checkpoint-7"
    assert asked == ["user/name"]


def test_a_full_disk_leaves_the_earlier_checkpoint_alone(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "checkpoint-1", TENSORS, {"step": 1})

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "sync", full)
    with pytest.raises(OSError, match="No space"):
        write_checkpoint(tmp_path / "checkpoint-2", TENSORS, {})
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]
    assert what_is_wrong(tmp_path / "checkpoint-1") is None


def test_writing_over_a_checkpoint_of_the_same_name(tmp_path):
    for value in (1, 2):
        write_checkpoint(tmp_path / "checkpoint-1", TENSORS, {"value": value})
    assert read_checkpoint(tmp_path / "checkpoint-1").state == {"value": 2}


def test_atomic_write_keeps_the_old_file_on_failure(tmp_path, monkeypatch):
    atomic_write(tmp_path / "a.json", b"old")
    monkeypatch.setattr(files, "sync", lambda path: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        atomic_write(tmp_path / "a.json", b"new")
    assert (tmp_path / "a.json").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif(os.name == "nt", reason="files have no such modes there")
@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_files_have_the_mode_that_the_umask_gives(tmp_path, mask):
    """safetensors renames a private temporary file: without our help, nobody but its owner could read it."""
    before = os.umask(mask)
    try:
        write_checkpoint(tmp_path / "checkpoint-1", TENSORS, {})
        with atomic_file(tmp_path / "a.safetensors") as new:
            save_file(TENSORS["trained"], new)
        with atomic_folder(tmp_path / "pipeline") as new:
            (new / "unet").mkdir()
            save_file(TENSORS["trained"], new / "unet" / "a.safetensors")
    finally:
        os.umask(before)
    modes = {str(path.relative_to(tmp_path)): stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*") if path.is_file()}
    names = [f"checkpoint-1/{name}" for name in ("trained.safetensors", "rng.safetensors", "state.json", "manifest.json")]
    assert modes == dict.fromkeys([*names, "a.safetensors", "pipeline/unet/a.safetensors"], 0o666 & ~mask)


def _write_forever(folder: Path) -> None:
    step = 0
    big = {"trained": {"a": torch.zeros(300_000)}}
    while True:
        step += 1
        write_checkpoint(folder / f"checkpoint-{step}", big, {"step": step})
        prune_checkpoints(folder, keep=2, step=step)


def test_kill_minus_nine_during_writes_never_leaves_a_bad_one(tmp_path):
    """Killed at 8 moments of continuous writing and pruning: whatever is picked afterwards is whole."""
    context = multiprocessing.get_context("fork")
    for turn in range(8):
        folder = tmp_path / str(turn)
        writer = context.Process(target=_write_forever, args=(folder,))
        writer.start()
        deadline = time.monotonic() + 20
        while not (folder.is_dir() and latest_checkpoint(folder)) and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.003 * turn)
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        found = latest_checkpoint(folder)
        assert found is not None
        assert read_checkpoint(found).state["step"] == int(found.name.split("-")[1])


@pytest.mark.skipif(sys.platform == "win32", reason="no file size limits there")
def test_safetensors_without_room_is_an_error_of_the_disk(tmp_path):
    """A file size limit stands for the full disk: the writer's own kind of error must not get past the policy for OSError."""
    import resource

    tensors = {"trained": {"a": torch.zeros(200_000)}}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            write_checkpoint(tmp_path / "checkpoint-1", tensors, {})
        with pytest.raises(OSError, match="too large"), atomic_folder(tmp_path / "pipeline") as folder:
            save_file(tensors["trained"], folder / "a.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "checkpoint-1").exists()
    assert not (tmp_path / "pipeline").exists()


@pytest.mark.parametrize("moment", ["filling", "between the renames"])
def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch, moment):
    """Stopped while the new one is filled: the old one stands. Stopped between the renames: it gets its name back, or is written anew."""
    folder = tmp_path / "result"
    with atomic_folder(folder) as new:
        (new / "part").mkdir()
        (new / "part" / "a").write_text("old")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt), atomic_folder(folder) as new:  # noqa: PT012
        (new / "a").write_text("new")
        if moment == "filling":
            raise KeyboardInterrupt
        rename = Path.rename

        def stopped(self, target):
            if self == new:
                raise KeyboardInterrupt
            return rename(self, target)

        patch.setattr(Path, "rename", stopped)
    assert folder.is_dir() is (moment == "filling")
    restore_folder(folder)
    assert (folder / "part" / "a").read_text() == "old"
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["result"]
    with atomic_folder(folder) as new:
        (new / "a").write_text("newer")
    assert [path.name for path in folder.iterdir()] == ["a"]
