"""What is told of a model from its files is what its restorer says once its weights are read."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from hub_server import HubServer
from network_cases import tiny
from one_step_cases import save_base, toy_settings, with_loras
from tiny_runs import save_upscaler
from x4_models import write_x4

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.hub import HubError
from sslsr_diffusion.inference.direct import FALLBACK, DirectRestorer
from sslsr_diffusion.inference.one_step import OneStepRestorer
from sslsr_diffusion.inference.open import describe_model, find_model, glance, open_model
from sslsr_diffusion.inference.restorer import Described
from sslsr_diffusion.models.network.settings import FILE
from sslsr_diffusion.models.one_step.build import build_networks, read_networks
from sslsr_diffusion.shipped_model import FOLDER, SMALL

COMMIT = "1a" * 20


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


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer() as server:
        server.alone(monkeypatch, tmp_path / "cache")
        yield server


def put(hub: HubServer, name: str, folder: Path) -> list[str]:
    """The files of a folder as a repository; their names."""
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    hub.put(name, COMMIT, files)
    return [*files]


def fetched(hub: HubServer, name: str) -> set[str]:
    """Files of which anything was asked."""
    asked = (re.fullmatch(rf"GET /{name}/resolve/{COMMIT}/(.+)", line) for line in hub.log)
    return {match[1] for match in asked if match}


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


@pytest.mark.parametrize("make", [stablesr, x4, lora])
def test_of_a_hub_id_the_weights_wait_until_it_is_opened(
    make: Callable[[Path], Path], hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = put(hub, "someone/model", make(tmp_path / "model"))
    want = describe_model(find_model(str(tmp_path / "model")))
    with glance("someone/model") as found:
        assert describe_model(found) == want
    assert found.fingerprint == f"someone/model@{COMMIT}"
    assert "one_step.json" in fetched(hub, "someone/model") or "model_index.json" in fetched(hub, "someone/model")
    assert not any(name.endswith(".safetensors") for name in fetched(hub, "someone/model"))
    assert find_model("someone/model") == found
    weights = {name for name in names if name.endswith(".safetensors")}
    assert weights <= fetched(hub, "someone/model")
    hub.log.clear()
    with glance("someone/model") as again:  # all of it is here
        assert again == found
    assert not fetched(hub, "someone/model")


def test_of_a_networks_file_on_the_hub_the_head_is_read(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = (network(tmp_path / "model") / FILE).read_bytes()
    padded = data + bytes(300_000)  # what the head says of the tensors is not read
    hub.put("someone/net", COMMIT, {FILE: padded, "old/net.safetensors": padded, "net.pth": b"weights", "README.md": b"# A model"})
    want = describe_model(find_model(str(tmp_path / "model")))
    assert want.defaults["detail"] == 0.7
    for name in ("someone/net", "someone/net#old/net.safetensors"):
        with glance(name) as found:
            assert (describe_model(found), found.fingerprint) == (want, f"{name}@{COMMIT}")
        assert not found.path.exists()
    with glance("someone/net#net.pth") as found:
        assert describe_model(found) == Described(want.options, FALLBACK)
    assert fetched(hub, "someone/net") == {FILE, "old/net.safetensors"}
    assert not [*(tmp_path / "cache").rglob("*.safetensors"), *(tmp_path / "cache").rglob("*.pth")]
    hub.put("someone/net", "2b" * 20, {FILE: b"no tensors"})
    for name, said in (
        ("someone/net", f"model someone/net: expected a safetensors file, got {FILE}, whose head cannot be read"),
        ("someone/net#other.pth", r"model someone/net#other\.pth: that repository holds no file other\.pth"),
        ("someone/nothing", "model: someone/nothing is no folder here, and the hub has no such repository"),
    ):
        with pytest.raises(UserError, match=said), glance(name):
            pass


def test_a_hub_that_is_away_leaves_what_was_fetched_whole(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    put(hub, "someone/net", network(tmp_path / "model"))
    here = find_model("someone/net")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with glance("someone/net") as found:
        assert found == here
    with pytest.raises(HubError, match="someone/other is no folder here, and the hub cannot be reached"), glance("someone/other"):
        pass


def test_a_lora_is_described_without_its_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its base lies on the hub, and nobody chose a preset: no networks are built, above all not the preset's."""
    found = find_model(str(lora(tmp_path / "model")))
    want = describe_model(found)
    assert "lora_scale" in want.options
    told = json.loads((found.path / "one_step.json").read_text())
    del told["model"]["preset"]
    told["model"]["base"] = "someone/base"
    (found.path / "one_step.json").write_text(json.dumps(told))
    asked: list[Sequence[str]] = []

    def fetch(name: str, revision: str | None = None, *, patterns: Sequence[str], **_: object) -> Path:
        asked.append(patterns)
        return tmp_path / "base"

    monkeypatch.setattr("sslsr_diffusion.hub.fetch", fetch)
    monkeypatch.setattr("sslsr_diffusion.models.one_step.build._from_preset", None)
    assert describe_model(find_model(str(found.path))) == want
    assert not asked
    shapes = read_networks(found.path, meta=True)  # as a memory budget asks for them: by the base's configs alone
    assert shapes.denoiser.network_class == "SD3Transformer2DModel"
    assert [[pattern for pattern in patterns if not pattern.endswith(".json")] for patterns in asked] == [[]]


@pytest.mark.skipif(os.name == "nt", reason="files have no such modes there")
@pytest.mark.parametrize("make", [save_upscaler, whole, lambda folder: DirectRestorer(tiny("RRDBNet")).save(folder)])
def test_what_is_saved_can_be_read_by_others(make: Callable[[Path], object], tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        make(tmp_path / "model")
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "model").rglob("*") if path.is_file()]
    assert any(path.suffix == ".safetensors" for path in files)
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o644}


def test_damaged_files_are_a_sentence(tmp_path: Path) -> None:
    shutil.copytree(FOLDER / SMALL, tmp_path / "model")
    (tmp_path / "model" / "unet" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"cannot be loaded \(unet/config.json of .* cannot be read as JSON"):
        describe_model(find_model(str(tmp_path / "model")))
    (tmp_path / "net.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match=r"net.safetensors: cannot be loaded \("):
        describe_model(find_model(str(tmp_path / "net.safetensors")))
