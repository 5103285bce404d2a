"""Super-resolution networks: the published ones' numbers, every naming, what is recognised, and one sentence for what is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import spandrel
import torch
from network_cases import OTHERS, TINY, save, smooth, tiny
from safetensors.torch import load_file, save_file

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.models.network.family import Network
from sslsr_diffusion.models.network.known import build, recognise
from sslsr_diffusion.models.network.networks import SuperResolution, drawn, opened
from sslsr_diffusion.models.network.settings import NetworkSettings


@pytest.mark.parametrize("scale", [4, 2, 1])
def test_all_namings_of_rrdb_are_the_same_network(scale):
    network = tiny("RRDBNet", scale=scale, num_grow_ch=32, num_block=2).network
    ours = network.state_dict()
    old = {"conv_up1": "upconv1", "conv_up2": "upconv2", "conv_hr": "HRconv", "conv_body": "trunk_conv", "body": "RRDB_trunk"}
    oldest = {"conv_first": "model.0", "body": "model.1.sub", "conv_body": "model.1.sub.2", "conv_up1": "model.3", "conv_up2": "model.6"}
    oldest |= {"conv_hr": "model.8", "conv_last": "model.10"}
    for names_, inner in ((old, ""), (oldest, ".0")):
        renamed = {}
        for key, value in ours.items():
            first, _, rest = key.partition(".")
            block = first == "body"
            rest = rest.replace("rdb", "RDB")
            rest = f"{rest.rpartition('.')[0]}{inner}.{rest.rpartition('.')[2]}" if block else rest
            renamed[f"{names_.get(first, first)}.{rest}"] = value
        found, known = recognise(renamed, "renamed")
        assert known.arguments == {**network.arguments}
        assert all(torch.equal(found.state_dict()[key], value) for key, value in ours.items())
        by_spandrel = spandrel.ModelLoader().load_from_state_dict(dict(renamed))
        assert (by_spandrel.architecture.id, by_spandrel.scale) == ("ESRGAN", scale)
        torch.testing.assert_close(by_spandrel.model(smooth(8, 12)), found(smooth(8, 12)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", [*TINY, *OTHERS])
def test_every_network_is_saved_and_read_back(tmp_path, name):
    """Bit for bit; with call defaults; sizes that fit nothing, and smaller than any window, are padded."""
    networks = tiny(name)
    networks.save(tmp_path, scale=3.0, detail=0.5)
    family = Network()
    assert family.reads(tmp_path)
    assert family.reads(tmp_path / "network.safetensors")
    again = family.read(tmp_path).eval()
    assert (again.known.architecture, again.known.arguments) == (networks.known.architecture, networks.known.arguments)
    assert dict(again.call_defaults) == {"scale": 3.0, "detail": 0.5}
    assert {k: (v.shape, v.dtype) for k, v in family.read(tmp_path, meta=True).state_dict().items()} == {
        k: (v.shape, v.dtype) for k, v in networks.state_dict().items()
    }
    for size in ((16, 16), (13, 18), (1, 3)):
        if name == "SPAN" and size == (1, 3):
            continue
        with torch.no_grad():
            one, two = networks(smooth(*size)), again(smooth(*size))
        assert one.shape[-2:] == tuple(networks.scale * side for side in size)
        assert torch.equal(one, two)


@pytest.mark.parametrize("name", ["RRDBNet", "SwinIR", *OTHERS])
def test_spandrel_reads_a_result_without_our_code(tmp_path, name):
    networks = tiny(name, **({"extra_window": False} if name == "SwinIR" else {}))
    networks.save(tmp_path, scale=networks.scale)
    found = spandrel.ModelLoader().load_from_file(tmp_path / "network.safetensors")
    assert found.scale == networks.scale
    with torch.no_grad():
        torch.testing.assert_close(found(smooth(24, 16)), networks(smooth(24, 16)).clamp(0, 1), atol=1e-5, rtol=0)
    told = safe_metadata(tmp_path / "network.safetensors")
    assert told["architecture"] == name
    assert json.loads(told["arguments"]) == networks.known.arguments


def safe_metadata(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as stream:
        return stream.metadata()


def test_a_rate_that_no_shape_tells_comes_back_from_the_file_or_the_recipe(tmp_path):
    path = save(tmp_path, "SwinIR", drop_path_rate=0.3, extra_window=False)
    kept = opened(path, base="x").known.arguments
    assert (kept["drop_path_rate"], kept["extra_window"]) == (0.3, False)
    asked = NetworkSettings(arguments={"drop_path_rate": 0, "depths": [2]})
    with pytest.raises(UserError, match=r"holds SwinIR with mlp_ratio 2\.0, got 90000 for it"):
        opened(path, base="x", settings=NetworkSettings(arguments={"mlp_ratio": 90000}))
    assert opened(path, base="x", settings=asked).known.arguments["drop_path_rate"] == 0
    with pytest.raises(UserError, match=r"model x: holds SwinIR with depths \[2\], got \[6, 6\] for it"):
        opened(path, base="x", settings=NetworkSettings(arguments={"depths": [6, 6]}))


def test_spsr_has_a_branch_and_one_shared_layer(tmp_path):
    networks = tiny("SPSRNet")
    assert networks.has_branch
    lr = smooth(8, 8)
    picture, branch = networks(lr, branch=True)
    assert picture.shape == branch.shape == (1, 3, 32, 32)
    assert torch.equal(picture, networks(lr))
    branch.square().mean().backward()
    assert networks.network.conv_w[0].weight.grad is not None
    assert networks.network.model["8"].weight is networks.network.HR_conv0_new[0].weight
    state = networks.network.state_dict()
    save_file({k: v.clone() for k, v in state.items() if not k.startswith("HR_conv0_new")}, tmp_path / "once.safetensors")
    assert torch.equal(opened(tmp_path / "once.safetensors", base="once").eval()(lr), picture)
    shapes = networks.shapes().network
    assert shapes.model["8"].weight is shapes.HR_conv0_new[0].weight


def test_what_a_network_holds_fast_does_not_train_and_batch_norms_keep_their_statistics():
    networks = tiny("RRDBNet")
    assert len(networks.set_trainable("all")) == len(list(networks.parameters()))
    network, known = build("SwiftSRGAN", {"num_channels": 4, "num_blocks": 1})
    normed = SuperResolution(network, known, base="x").train()
    before = {name: buffer.clone() for name, buffer in normed.named_buffers()}
    normed(smooth(8, 8)).mean().backward()
    assert before
    assert all(torch.equal(before[name], buffer) for name, buffer in normed.named_buffers())


def test_the_same_seed_draws_the_same_network():
    settings = NetworkSettings(architecture="RRDBNet", arguments=TINY["RRDBNet"])
    before = torch.random.get_rng_state()
    one, two, other = (drawn(settings, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["network.conv_last.weight"], other["network.conv_last.weight"])
    inner = one["network.body.0.rdb1.conv1.weight"]  # Kaiming-normal times 0.1 over 4 channels
    assert 0.5 < float(inner.std() / (0.1 * (2 / (4 * 9)) ** 0.5)) < 1.5
    assert float(one["network.body.0.rdb1.conv1.bias"].abs().max()) == 0


@pytest.mark.parametrize("name", ["RRDBNet", "SPSRNet", "ELAN", "SwinIR"])
def test_checkpointing_leaves_the_gradient_alone(name):
    gradients = []
    for checkpointing in (False, True):
        networks = tiny(name)
        networks.economize(gradient_checkpointing=checkpointing, channels_last=False)
        cotangent = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        (networks(smooth(16, 16)) * cotangent).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in networks.parameters() if p.grad is not None]))
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-5)


def test_blending_is_a_straight_line_between_two_networks():
    a, b = tiny("SPSRNet"), drawn(NetworkSettings(architecture="SPSRNet", arguments=TINY["SPSRNet"]), seed=5)
    want = {name: 0.8 * one + 0.2 * two for (name, one), two in zip(a.state_dict().items(), b.state_dict().values())}
    a.blend(b, 0.8)
    for name, value in a.state_dict().items():
        torch.testing.assert_close(value, want[name], atol=1e-6, rtol=1e-5)
    with pytest.raises(UserError, match="blend: expected the same network as SPSRNet of random:SPSRNet, got RRDBNet"):
        a.blend(tiny("RRDBNet"), 0.5)
    with pytest.raises(UserError, match="got one whose num_block is 2 instead of 1"):
        tiny("RRDBNet").blend(tiny("RRDBNet", num_block=2), 0.5)


@pytest.mark.parametrize("entry", ["params_ema", "params", "state_dict", None])
def test_where_the_weights_stand_in_a_file(tmp_path, entry):
    rrdb = tiny("RRDBNet").network.state_dict()
    wrapped = {f"module.{name}": value.half() for name, value in rrdb.items()}
    other = {name: torch.zeros_like(value) for name, value in wrapped.items()}
    content = wrapped if entry is None else {"params_ema": wrapped, "params": other} if entry == "params_ema" else {entry: wrapped}
    torch.save(content, tmp_path / "net.pth")
    found = Network().read(tmp_path / "net.pth").network.state_dict()
    assert all(torch.equal(found[name], value.half().float()) for name, value in rrdb.items())


def test_precisions_and_sizes_are_the_networks_own():
    assert tiny("RRDBNet").taken(torch.float16) == torch.float16
    assert tiny("ELAN").taken(torch.float16) == tiny("SwinIR").taken(torch.float16) == torch.bfloat16
    assert [tiny(name).size().multiple_of for name in ("RRDBNet", "ELAN", "SwinIR")] == [4, 32, 32]
    assert tiny("RRDBNet", scale=2).size().multiple_of == 4
    assert tiny("SRResNet").overlap == 4 * 7
    assert [tiny("SwinIR").shared(side) for side in (64, 256, 512, 1024)] == [16, 16, 32, 64]
    assert tiny("SRResNet").shared(1024) == 28


@pytest.mark.parametrize("name", ["RRDBNet", "SPSRNet", "ELAN", "SwinIR"])
@torch.no_grad()
def test_bfloat16_works_within_itself(name):
    """At a size that is not the one of SwinIR's stored masks, too."""
    networks = tiny(name)
    want = networks(smooth(24, 40))
    got = networks.to(torch.bfloat16)(smooth(24, 40).bfloat16())
    assert got.dtype == torch.bfloat16
    assert (got.float() - want).abs().max() < 0.05


def test_every_parameter_has_a_gradient_though_the_branch_is_not_asked_for():
    networks = tiny("SPSRNet").train()
    networks(smooth(8, 8)).mean().backward()
    assert [name for name, parameter in networks.named_parameters() if parameter.grad is None] == []


def test_a_result_in_half_precision_keeps_what_it_says(tmp_path):
    from sslsr_diffusion.runs.task import halve

    path = save(tmp_path)
    before = safe_metadata(path)
    halve(tmp_path)
    assert safe_metadata(path) == before
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float16}
    assert Network().read(tmp_path).network.conv_first.weight.dtype == torch.float32
