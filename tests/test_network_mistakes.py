"""Networks that are not there, files that hold none, arguments that make none: one sentence each, and nothing of a file runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import spandrel
import torch
from network_cases import TINY, save, smooth, tiny
from safetensors.torch import save_file

from sslsr_diffusion.errors import MissingDependency, UserError
from sslsr_diffusion.inference.direct import DirectRestorer
from sslsr_diffusion.models.network import known as table
from sslsr_diffusion.models.network.family import Network
from sslsr_diffusion.models.network.known import OWN, build, names, recognise
from sslsr_diffusion.models.network.networks import SuperResolution, drawn, opened
from sslsr_diffusion.models.network.settings import NetworkSettings


def told(call: Any) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_recipe_that_names_no_network_that_there_is(tmp_path):
    said = told(lambda: build("RRDBNett", {}))
    assert said.startswith("model.architecture: 'RRDBNett' is not known; expected one of RRDBNet, SPSRNet, SRResNet, ELAN, SwinIR, ")
    assert {"HAT", "DAT", "ESRGAN", "RealPLKSR"} <= {*names()}
    assert "unexpected keyword argument 'blocks'" in told(lambda: build("RRDBNet", {"blocks": 1}))
    assert "num_block: expected a whole number of at least 1, got 0" in told(lambda: build("RRDBNet", {"num_block": 0}))
    assert "scale: expected 4, 2 or 1, got 3" in told(lambda: build("RRDBNet", {"scale": 3}))
    assert "c_elan divisible by 3" in told(lambda: build("ELAN", {"c_elan": 10}))
    assert "expected a network for colour pictures" in told(lambda: build("RRDBNet", {"num_in_ch": 1}, meta=True))
    assert "model.arguments: SwinIR cannot be built with these" in told(lambda: build("SwinIR", {"depths": "deep"}))
    assert "a network without model.base needs one" in told(lambda: drawn(NetworkSettings()))
    path = save(tmp_path)
    other = NetworkSettings(architecture="SwinIR")
    assert told(lambda: opened(path, base="net.pth", settings=other)).startswith("model.architecture: net.pth holds RRDBNet, got SwinIR")
    assert opened(path, base="net.pth", settings=NetworkSettings(architecture="ESRGAN")).known.architecture == "RRDBNet"
    assert build("ESRGAN", {"num_filters": 4, "num_blocks": 1})[1].architecture == "RRDBNet"


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch pwned",)


def test_files_that_hold_no_network_for_any_picture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    family = Network()

    def file(tensors: Any, name: str = "net.pth") -> Path:
        torch.save(tensors, tmp_path / name)
        return tmp_path / name

    rrdb = tiny("RRDBNet").network.state_dict()
    cut = {name: value for name, value in rrdb.items() if "rdb2.conv3" not in name}
    assert "RRDBNet lacks 2 of 42 tensors, the first: body.0.rdb2.conv3.weight" in told(lambda: family.read(file(cut)))
    assert "body.0.rdb2.conv3.weight is misshaped" in told(lambda: family.read(file({**rrdb, "body.0.rdb2.conv3.weight": torch.zeros(1)})))
    assert "1 tensors are not of RRDBNet, the first: extra" in told(lambda: family.read(file({**rrdb, "extra": torch.zeros(1)})))
    no_last = {name: value for name, value in rrdb.items() if "conv_last" not in name}
    assert "looks like RRDBNet, but tensors are missing" in told(lambda: family.read(file(no_last)))
    gray = spandrel.architectures.ESRGAN.ESRGAN(in_nc=1, out_nc=1, num_filters=4, num_blocks=1)
    assert "expected a network for colour pictures, 3 channels" in told(lambda: family.read(file(gray.state_dict())))
    video = {"spynet.basic_module.0.weight": torch.zeros(3), "backward_resblocks.main.0.weight": torch.zeros(2)}
    assert "its tensors are of no network that is known here; known are RRDBNet, " in told(lambda: family.read(file(video)))
    swin = {name: value for name, value in tiny("SwinIR").network.state_dict().items() if "mlp.fc2" not in name}
    assert "SwinIR" in told(lambda: family.read(file(swin)))
    assert "holds no named tensors" in told(lambda: family.read(file({"params": Evil()})))
    family.read(file({"params": rrdb, "hook": Evil()}))  # what is beside the weights is not run
    assert not (tmp_path / "pwned").exists()
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors")
    assert "is not a readable safetensors file" in told(lambda: family.read(tmp_path / "broken.safetensors"))
    for metadata in ({"arguments": "[1"}, {"call": '{"scale": "x"}'}, {"call": '{"a": {"b": 1}}'}, {"call": "[" * 9000}):
        save_file(rrdb, tmp_path / "odd.safetensors", metadata=metadata)
        assert told(lambda: family.read(tmp_path / "odd.safetensors")).startswith("model odd.safetensors: expected ")


def test_arguments_that_make_no_picture_or_a_file_that_reads_otherwise():
    assert "SwinIR cannot be built with these (shape" in told(lambda: build("SwinIR", {"window_size": 7, "depths": [2], "num_heads": [2]}))
    odd_ = {**TINY["SwinIR"], "ape": True}
    assert "a file of this SwinIR would not be read as it is: looks like SwinIR, but " in told(lambda: build("SwinIR", odd_))
    grl = {"stripe_shift": False, "depths": [1], "num_heads_window": [1], "num_heads_stripe": [1], "embed_dim": 8, "upscale": 4}
    assert "GRL" in told(lambda: build("GRL", grl))
    hat = {"depths": [1], "num_heads": [2], "embed_dim": 36, "window_size": 7, "upscale": 4, "upsampler": "pixelshuffle"}
    assert "HAT" in told(lambda: build("HAT", hat))
    assert build("SwinIR", {"depths": [1], "num_heads": [2], "embed_dim": 4})[1].arguments["mlp_ratio"] == 2


def test_a_network_that_looks_at_numbers_is_measured_with_numbers():
    network, known = build("SeemoRe", {"embedding_dim": 8, "num_layers": 1, "num_experts": 2})
    restorer = DirectRestorer(SuperResolution(network, known, base="x").eval())
    assert restorer(smooth(20, 20), memory_budget=2 * 10**9, output_type="pt").images.shape[-1] == 20 * known.scale


def test_faces_and_holes_are_refused(monkeypatch):
    """By what spandrel says is their purpose; its own networks for these have hundreds of millions of weights."""
    load = spandrel.architectures.Compact.CompactArch.load

    def as_faces(self: Any, tensors: Any) -> Any:
        found = load(self, tensors)
        monkeypatch.setattr(type(found), "purpose", "FaceSR")
        return found

    tensors = tiny("Compact").network.state_dict()
    monkeypatch.setattr(spandrel.architectures.Compact.CompactArch, "load", as_faces)
    assert "a network for faces; expected one that enlarges any picture" in told(lambda: recognise(tensors, "x"))


def test_without_spandrel_ours_work_and_the_others_say_what_to_install(tmp_path, monkeypatch):
    ours, theirs = save(tmp_path / "a"), save(tmp_path / "b", "Compact")
    monkeypatch.setitem(__import__("sys").modules, "spandrel", None)
    monkeypatch.setitem(__import__("sys").modules, "sslsr_diffusion.models.network.swinir", None)
    assert Network().read(ours).known.architecture == "RRDBNet"
    assert table.names() == [*OWN]
    for call in (lambda: Network().read(theirs), lambda: build("HAT", {})):
        with pytest.raises(MissingDependency, match=r"pip install 'sslsr-diffusion\[networks\]'"):
            call()
