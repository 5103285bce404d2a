"""The published networks' numbers (tests/golden/gan)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from goldens import load_golden
from torch import Tensor

from sslsr_diffusion.models.network.known import recognise


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
