"""From a name to a restorer: what is found, and one sentence for what is not."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from restorers import ToyFamily, ToyLatents, ToyPixelFamily

import sslsr_diffusion.inference.open as opening
from sslsr_diffusion.errors import UserError
from sslsr_diffusion.hub import HubError
from sslsr_diffusion.inference.direct import DirectRestorer
from sslsr_diffusion.inference.latent import LatentRestorer
from sslsr_diffusion.inference.open import RESTORERS, find_model, open_model, restorer_class
from sslsr_diffusion.models import FAMILIES
from sslsr_diffusion.shipped_model import FOLDER, SMALL


@pytest.fixture(autouse=True)
def families(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "toy", ToyFamily())
    monkeypatch.setitem(FAMILIES, "toy_pixels", ToyPixelFamily())


def saved(folder: Path) -> Path:
    folder.mkdir(parents=True)
    ToyLatents({"_class_name": "FlowMatchEulerDiscreteScheduler"}).save(folder, num_inference_steps=1)
    return folder


def told(*arguments: Any, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        find_model(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_familys_restorer_is_there_and_every_restorer_can_be_used():
    for kind, family in FAMILIES.items():
        assert family.kind == kind
        assert family.restorer in RESTORERS
    for name in RESTORERS:
        family = type("Some", (ToyFamily,), {"restorer": name})()
        cls = restorer_class(family)
        assert callable(cls)
        assert callable(cls.open)
        assert {"options", "check", "save", "__call__"} <= set(dir(cls))


def test_a_run_folder_its_result_and_a_file(tmp_path):
    result = saved(tmp_path / "runs" / "mine" / "pipeline")
    run, direct = find_model(str(tmp_path / "runs" / "mine")), find_model(str(result))
    assert (run.path, run.family.kind, run.fingerprint) == (result, "toy", direct.fingerprint)
    assert run.name == str(tmp_path / "runs" / "mine")
    (tmp_path / "net.toy").write_bytes(b"1")
    file = find_model(str(tmp_path / "net.toy"))
    assert (file.path, file.family.kind) == (tmp_path / "net.toy", "toy_pixels")
    (tmp_path / "net.toy").write_bytes(b"22")
    assert find_model(str(tmp_path / "net.toy")).fingerprint != file.fingerprint
    assert find_model(SMALL).path == FOLDER / SMALL


def test_a_file_and_a_folder_are_opened_as_what_they_are(tmp_path):
    (tmp_path / "net.toy").write_bytes(b"")
    (direct, latent) = (open_model(find_model(str(path)), device="cpu") for path in (tmp_path / "net.toy", saved(tmp_path / "model")))
    assert isinstance(direct, DirectRestorer)
    assert isinstance(latent, LatentRestorer)
    for networks in (direct.networks, latent.networks):
        assert not networks.training
        assert not any(parameter.requires_grad for parameter in networks.parameters())


def test_a_hub_id_is_fetched_at_its_commit(tmp_path, monkeypatch):
    commit, asked = saved(tmp_path / "models--someone--upscaler" / "snapshots" / ("a" * 40)), []

    def fetch(name: str, revision: str | None = None, **options: Any) -> Path:
        asked.append((name, revision, options["patterns"]))
        return commit

    monkeypatch.setattr(opening, "fetch", fetch)
    monkeypatch.chdir(tmp_path)
    found = find_model("someone/upscaler", "main")
    assert (found.path, found.family.kind, found.fingerprint) == (commit, "toy", "someone/upscaler@" + "a" * 40)
    assert asked == [("someone/upscaler", "main", [pattern for family in FAMILIES.values() for pattern in family.files])]
    (commit / "toy.json").unlink()
    assert told("someone/upscaler") == f"model someone/upscaler: that repository holds no model of {', '.join(FAMILIES)}."


def test_what_is_not_there_or_no_model_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "unfinished" / "checkpoint-5").mkdir(parents=True)
    (tmp_path / "photo.png").write_bytes(b"png")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    for name in ("unfinished", "photo.png", "other", "."):
        assert told(name).startswith(f"model {name}: expected a model of {', '.join(FAMILIES)}, such as a folder with a model_index.json")
    assert told("unfinished", "main").startswith("revision main: is for a hub id, and model unfinished lies on this machine")
    assert (
        told("no where")
        == f"model: 'no where' is neither an existing folder nor a valid hub id (owner/name). The shipped model is {SMALL}."
    )
    with pytest.raises(HubError) as caught:
        find_model("someone/upscaler")
    assert caught.value.reason == "unreachable"


def test_damaged_files_and_missing_devices_are_one_sentence(tmp_path):
    folder = saved(tmp_path / "model")
    (folder / "toy.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match=rf"^model {folder}: cannot be loaded \(.*\)\.$") as caught:
        open_model(find_model(str(folder)), device="cpu")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"^device abacus: expected auto, cpu"):
        open_model(find_model(str(folder)), device="abacus")
    with pytest.raises(UserError, match=r"^dtype: expected auto, float32, float16, bfloat16, got 'fp16'"):
        open_model(find_model(str(folder)), device="cpu", dtype="fp16")


def test_a_folder_that_cannot_be_read_is_no_model(tmp_path):
    loop = tmp_path / "loop"
    os.symlink(loop, loop)
    assert "nor a valid hub id" in told(str(loop))
