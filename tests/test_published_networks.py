"""The published networks' numbers (tests/golden/gan), and RankSRGAN's ranker."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from goldens import load_golden
from network_cases import save
from safetensors.torch import save_file
from torch import Tensor

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.models.network.known import recognise
from sslsr_diffusion.models.network.ranker import Ranker, load_ranker


def weights(name: str) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """A golden's constructor arguments, its weights as float32, and all that it holds."""
    golden = load_golden(f"gan/{name}")
    own = {key[2:]: value for key, value in golden.tensors.items() if key.startswith("w.")}
    return golden.index["config"], {k: v.long() if v.dtype == torch.int16 else v.float() for k, v in own.items()}, golden.tensors


def error(got: Tensor, want: Tensor) -> float:
    return float(((got - want).abs().max() / want.abs().max()).detach())


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
