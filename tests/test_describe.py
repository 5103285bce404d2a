"""What is told of a model from its files is what its restorer says once its weights are read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from network_cases import tiny
from one_step_cases import save_base, toy_settings, with_loras
from tiny_runs import save_upscaler
from x4_models import write_x4

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.inference.one_step import OneStepRestorer
from sslsr_diffusion.inference.open import describe_model, find_model, open_model
from sslsr_diffusion.models.one_step.build import build_networks
from sslsr_diffusion.shipped_model import FOLDER, SMALL


def stablesr(folder: Path) -> Path:
    """With a text encoder and a prompt of its own."""
    save_upscaler(folder)
    other = write_x4(folder.with_name("x4"))
    index = json.loads((folder / "model_index.json").read_text())
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(other / part, folder / part)
        index[part] = json.loads((other / "model_index.json").read_text())[part]
    (folder / "model_index.json").write_text(json.dumps({**index, "default_prompt": "fur", "default_num_inference_steps": 3}))
    return folder


def x4(folder: Path) -> Path:
    write_x4(folder)
    (folder / "call_defaults.json").write_text(json.dumps({"noise_level": 30, "detail": 0.5}))
    return folder


def network(folder: Path) -> Path:
    tiny("RRDBNet").save(folder, scale=3, detail=0.7)
    return folder


def pickled(folder: Path) -> Path:
    folder.mkdir()
    torch.save(tiny("RRDBNet").network.state_dict(), folder / "net.pth")
    return folder / "net.pth"


def lora(folder: Path) -> Path:
    networks = with_loras("sd3", save_base("sd3", folder.with_name("base")))
    OneStepRestorer(networks, scale=4, defaults={"detail": 0.75}).save(folder)
    return folder


def whole(folder: Path) -> Path:
    OneStepRestorer(build_networks(toy_settings("sd", lora=None), train="whole"), scale=2).save(folder)
    return folder


@pytest.mark.parametrize("make", [stablesr, x4, network, pickled, lora, whole])
def test_a_model_is_described_as_it_is_opened(make: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = find_model(str(make(tmp_path / "model")))
    opened = open_model(found, device="cpu", dtype="float32")
    monkeypatch.setattr("sslsr_diffusion.models.network.files.read_checkpoint", None)
    if make is not network:  # whose file has the call in its head
        for path in (*tmp_path.rglob("*.safetensors"), *tmp_path.rglob("*.pth")):
            path.write_bytes(b"weights that nobody can read")
    described = describe_model(found)
    assert described.options == opened.options
    assert dict(described.defaults) == {name: value for name, value in opened.defaults.items() if name != "memory_budget"}


def test_damaged_files_are_a_sentence(tmp_path: Path) -> None:
    shutil.copytree(FOLDER / SMALL, tmp_path / "model")
    (tmp_path / "model" / "unet" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"cannot be loaded \(unet/config.json of .* cannot be read as JSON"):
        describe_model(find_model(str(tmp_path / "model")))
    (tmp_path / "net.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match=r"net.safetensors: cannot be loaded \("):
        describe_model(find_model(str(tmp_path / "net.safetensors")))
