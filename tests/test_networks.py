"""Super-resolution networks: the published ones' numbers, every naming, what is recognised, and one sentence for what is not."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import spandrel
import torch
from goldens import load_golden
from safetensors.torch import load_file, save_file
from torch import Tensor

from sslsr_diffusion.errors import MissingDependency, UserError
from sslsr_diffusion.inference.direct import DirectRestorer
from sslsr_diffusion.models.network import known as table
from sslsr_diffusion.models.network.family import Network
from sslsr_diffusion.models.network.known import OWN, build, names, recognise
from sslsr_diffusion.models.network.networks import SuperResolution, drawn, opened
from sslsr_diffusion.models.network.ranker import Ranker, load_ranker
from sslsr_diffusion.models.network.settings import NetworkSettings

TINY: dict[str, dict[str, Any]] = {
    "RRDBNet": {"num_feat": 4, "num_block": 1},
    "SRResNet": {"nf": 4, "nb": 1},
    "SPSRNet": {"nf": 4, "nb": 20, "gc": 2},
    "ELAN": {"m_elan": 2, "c_elan": 12, "window_sizes": [2, 4, 8]},
    "SwinIR": {
        "upscale": 4,
        "img_size": 16,
        "window_size": 8,
        "depths": [2],
        "num_heads": [2],
        "embed_dim": 8,
        "upsampler": "pixelshuffle",
    },
}
OTHERS: dict[str, dict[str, Any]] = {
    "Compact": {"num_in_ch": 3, "num_out_ch": 3, "num_feat": 8, "num_conv": 2, "upscale": 2},
    "SPAN": {"num_in_ch": 3, "num_out_ch": 3, "feature_channels": 8, "upscale": 2},
}


def weights(name: str) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """A golden's constructor arguments, its weights as float32, and all that it holds."""
    golden = load_golden(f"gan/{name}")
    own = {key[2:]: value for key, value in golden.tensors.items() if key.startswith("w.")}
    return golden.index["config"], {k: v.long() if v.dtype == torch.int16 else v.float() for k, v in own.items()}, golden.tensors


def error(got: Tensor, want: Tensor) -> float:
    return float(((got - want).abs().max() / want.abs().max()).detach())


def smooth(height: int, width: int) -> Tensor:
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([0.5 + 0.4 * torch.sin((x * (1 + c) + y * 2) / 7) for c in range(3)])[None]


def tiny(name: str, **changes: Any) -> SuperResolution:
    return drawn(NetworkSettings(architecture=name, arguments={**{**TINY, **OTHERS}[name], **changes})).eval()


def save(folder: Path, name: str = "RRDBNet", **changes: Any) -> Path:
    tiny(name, **changes).save(folder, scale=4)
    return folder / "network.safetensors"


PUBLISHED = {
    "net_rrdb": "RRDBNet",
    "net_rrdb_oldnames": "RRDBNet",
    "net_rrdb_x2": "RRDBNet",
    "net_srresnet": "SRResNet",
    "net_spsr": "SPSRNet",
    "net_elan": "ELAN",
    "net_elan_shared": "ELAN",
    "net_swinir": "SwinIR",
}


@pytest.mark.parametrize("name", PUBLISHED)
@torch.no_grad()
def test_published_networks(name):
    """By their tensors alone, but for ELAN's windows, of which no shape tells."""
    config, tensors, golden = weights(name)
    network, known = recognise(tensors, name, told={"window_sizes": config["window_sizes"]} if "elan" in name else None)
    assert known.architecture == PUBLISHED[name]
    told = {key: value for key, value in known.arguments.items() if key in config}
    assert told == {key: config[key] for key in told}
    assert len(told) >= (0 if name == "net_rrdb_oldnames" else 5)
    network.eval()
    for which in ("0", "1") if "in.x1" in golden else ("0",):
        lr = golden[f"in.x{which}"].float() / 255
        if known.has_branch:
            picture, branch = network(lr, branch=True)
            assert error(branch, golden["out.y0.0"]) < 1e-5
            assert error(network.get_g_nopadding(lr), golden["out.y0.2"]) < 1e-5
            assert error(network(lr), golden["out.y0.1"]) < 1e-5
            assert error(picture, golden["out.y0.1"]) < 1e-5
        else:
            assert error(known.call(network, lr), golden[f"out.y{which}"]) < 1e-5


def pattern(seed: int, *shape: int) -> Tensor:
    """The goldens' formula for inputs that are not stored."""
    b, c, y, x = torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij")
    k = seed * 7 + b * 5 + c * 3
    value = 128 + (((x * (2 + k % 3) + y * (1 + k % 2)) % 48 - 24).abs() * 5 - 60) + (((x - 2 * y + k) % 22 - 11).abs() * 4 - 22)
    noise = ((((b * shape[1] + c) * shape[2] + y) * shape[3] + x) * 1103515245 + seed * 12345 + 6789) % 2**31
    noise = (noise * 1103515245 + 12345) % 2**31
    value = value + (noise >> 20) % 25 - 12
    flat = (x // 24 + y // 20 + seed) % 3 == 0
    return torch.where(flat, 90 + 20 * c + (noise >> 22) % 3, value).clamp(0, 255).float() / 255


def test_published_ranker(tmp_path):
    _, tensors, golden = weights("ranker")
    save_file(tensors, tmp_path / "ranker.safetensors")
    torch.save({"params": tensors}, tmp_path / "ranker.pth")
    ranker, again = load_ranker(tmp_path / "ranker.safetensors"), load_ranker(tmp_path / "ranker.pth")
    lr = pattern(72, 3, 3, 96, 96).requires_grad_(True)
    assert not ranker.training
    assert error(ranker(lr), golden["out.eval"]) < 2e-4
    assert torch.equal(ranker(lr), again(lr))
    made = ranker.train()(lr)
    assert error(made, golden["out.train"]) < 2e-4
    gradient = torch.autograd.grad(made.square().sum(), lr)[0]
    assert error(gradient[..., ::8, ::8], golden["out.grad_x"]) < 2e-4
    assert error(gradient.norm()[None].double(), golden["out.grad_norm"]) < 2e-4
    for name, value in golden.items():
        if name.startswith("out.after."):
            assert error(ranker.state_dict()[name.removeprefix("out.after.")], value) < 2e-4, name
    assert load_ranker(tmp_path / "ranker.pth", meta=True)(lr.detach().to("meta")).shape == (3, 1)


def test_what_is_no_ranker_is_one_sentence(tmp_path):
    path = save(tmp_path / "net")
    with pytest.raises(UserError, match=r"expected a Ranker_VGG12_296 .* got body\.0\.rdb1"):
        load_ranker(path)
    tensors = Ranker(nf=2).state_dict()
    del tensors["conv3_1.weight"]
    save_file(tensors, tmp_path / "cut.safetensors")
    with pytest.raises(UserError, match=r"conv3_1\.weight is missing, unknown or misshaped"):
        load_ranker(tmp_path / "cut.safetensors")
    with pytest.raises(UserError, match="at least 32 pixels"):
        Ranker(nf=2)(torch.zeros(1, 3, 31, 40))


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


@pytest.mark.parametrize("entry", ["params_ema", "params", "state_dict", None])
def test_where_the_weights_stand_in_a_file(tmp_path, entry):
    rrdb = tiny("RRDBNet").network.state_dict()
    wrapped = {f"module.{name}": value.half() for name, value in rrdb.items()}
    other = {name: torch.zeros_like(value) for name, value in wrapped.items()}
    content = wrapped if entry is None else {"params_ema": wrapped, "params": other} if entry == "params_ema" else {entry: wrapped}
    torch.save(content, tmp_path / "net.pth")
    found = Network().read(tmp_path / "net.pth").network.state_dict()
    assert all(torch.equal(found[name], value.half().float()) for name, value in rrdb.items())


def test_without_spandrel_ours_work_and_the_others_say_what_to_install(tmp_path, monkeypatch):
    ours, theirs = save(tmp_path / "a"), save(tmp_path / "b", "Compact")
    monkeypatch.setitem(__import__("sys").modules, "spandrel", None)
    monkeypatch.setitem(__import__("sys").modules, "sslsr_diffusion.models.network.swinir", None)
    assert Network().read(ours).known.architecture == "RRDBNet"
    assert table.names() == [*OWN]
    for call in (lambda: Network().read(theirs), lambda: build("HAT", {})):
        with pytest.raises(MissingDependency, match=r"pip install 'sslsr-diffusion\[networks\]'"):
            call()


def test_precisions_and_sizes_are_the_networks_own():
    assert tiny("RRDBNet").taken(torch.float16) == torch.float16
    assert tiny("ELAN").taken(torch.float16) == tiny("SwinIR").taken(torch.float16) == torch.bfloat16
    assert [tiny(name).size().multiple_of for name in ("RRDBNet", "ELAN", "SwinIR")] == [4, 32, 32]
    assert tiny("RRDBNet", scale=2).size().multiple_of == 4
    assert tiny("SRResNet").overlap == 4 * 7
    assert tiny("SwinIR").overlap == 64


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
