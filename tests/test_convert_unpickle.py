"""convert/unpickle.py: Lightning-shaped, malicious and broken checkpoint files."""

from __future__ import annotations

import builtins
import os
import pickle
import sys
import tarfile
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.models.stablesr.convert import read_checkpoint

WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2]).half(), "c": torch.tensor(3, dtype=torch.bfloat16)}


@pytest.fixture
def lightning(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module that exists while the file is written and is gone, or would shout, when it is read."""
    module = types.ModuleType("pytorch_lightning_fake")

    class ModelCheckpoint:
        def __init__(self) -> None:
            self.best, self.scores = 0.5, [1, 2]

    class State(dict):  # type: ignore[type-arg]
        pass

    for cls in (ModelCheckpoint, State):
        cls.__module__, cls.__qualname__ = module.__name__, cls.__name__
        setattr(module, cls.__name__, cls)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


@pytest.mark.parametrize("zipped", [True, False])
def test_a_lightning_file_gives_its_weights_and_names_what_was_not_loaded(
    tmp_path: Path, lightning: Any, monkeypatch: pytest.MonkeyPatch, zipped: bool
) -> None:
    path = tmp_path / "model.ckpt"
    state = lightning.State({"x": 1})
    state.note = "y"
    content = {
        "epoch": 3,
        "global_step": np.int64(7),
        "callbacks": {lightning.ModelCheckpoint: lightning.ModelCheckpoint()},
        "hyper_parameters": state,
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(2)}}}],
        "state_dict": dict(WEIGHTS),
    }
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    monkeypatch.delitem(sys.modules, "pytorch_lightning_fake")
    checkpoint = read_checkpoint(path)
    assert checkpoint.tensors.keys() == WEIGHTS.keys()
    for name, tensor in WEIGHTS.items():
        assert torch.equal(checkpoint.tensors[name], tensor)
        assert checkpoint.tensors[name].dtype == tensor.dtype
    assert {"pytorch_lightning_fake.ModelCheckpoint", "pytorch_lightning_fake.State"} <= set(checkpoint.foreign)


class Runs:
    """An object whose loading would call a function."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> Any:
        return self.function, self.args


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", ["system", "eval", "open", "load_from_bytes", "getattr", "nested"])
def test_no_code_of_a_malicious_file_runs(tmp_path: Path, kind: str, zipped: bool) -> None:
    trap, path = tmp_path / "trap", tmp_path / "evil.ckpt"
    touch = f"import os; os.system('touch {trap}')"
    inner = pickle.dumps(Runs(os.system, f"touch {trap}"))
    evil = {
        "system": lambda: Runs(os.system, f"touch {trap}"),
        "eval": lambda: Runs(builtins.exec, touch),
        "open": lambda: Runs(open, str(trap), "w"),
        "load_from_bytes": lambda: Runs(torch.storage._load_from_bytes, inner),
        "getattr": lambda: Runs(getattr, Runs(__import__, "os"), "system"),
        "nested": lambda: {"a": [Runs(Path(trap).touch)]},
    }[kind]()
    torch.save({"state_dict": dict(WEIGHTS), "callbacks": evil}, path, _use_new_zipfile_serialization=zipped)
    checkpoint = read_checkpoint(path)
    assert not trap.exists()
    assert torch.equal(checkpoint.tensors["a.weight"], WEIGHTS["a.weight"])
    assert checkpoint.foreign


def test_an_evil_entry_among_the_weights_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "evil.ckpt"
    torch.save({"state_dict": {**WEIGHTS, "d": Runs(os.system, f"touch {tmp_path / 'trap'}")}}, path)
    assert set(read_checkpoint(path).tensors) == set(WEIGHTS)
    assert not (tmp_path / "trap").exists()


def test_parameters_shared_and_strided_tensors_survive(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    content = {"p": torch.nn.Parameter(base.clone()), "view": base.t(), "row": base[1], "sparse_free": torch.Size([1])}
    torch.save(content, tmp_path / "w.pth")
    tensors = read_checkpoint(tmp_path / "w.pth").tensors
    assert set(tensors) == {"p", "view", "row"}
    assert torch.equal(tensors["view"], base.t())
    assert torch.equal(tensors["row"], base[1])
    assert not tensors["p"].requires_grad


def test_safetensors_files_are_read(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(WEIGHTS, tmp_path / "w.safetensors")
    assert set(read_checkpoint(tmp_path / "w.safetensors").tensors) == set(WEIGHTS)


def write_broken(path: Path, kind: str) -> None:
    if kind == "scripted":
        torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), path)
    elif kind == "tar":
        with tarfile.open(path, "w") as archive:
            archive.add(__file__)
    elif kind == "cut":
        torch.save(WEIGHTS, path)
        path.write_bytes(path.read_bytes()[:200])
    elif kind == "text":
        path.write_text("<html>not found</html>")
    elif kind == "empty":
        path.touch()
    else:
        torch.save({"epoch": 1}, path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["scripted", "tar", "cut", "text", "empty", "weightless"])
def test_files_of_another_kind_get_one_sentence(tmp_path: Path, kind: str) -> None:
    write_broken(tmp_path / "x.ckpt", kind)
    with pytest.raises(UserError, match=r"checkpoint: x\.ckpt") as caught:
        read_checkpoint(tmp_path / "x.ckpt")
    assert "\n" not in str(caught.value)


def test_missing_and_damaged_safetensors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a file"):
        read_checkpoint(tmp_path / "none.ckpt")
    (tmp_path / "x.safetensors").write_bytes(b"123")
    with pytest.raises(UserError, match="not a readable safetensors file"):
        read_checkpoint(tmp_path / "x.safetensors")
