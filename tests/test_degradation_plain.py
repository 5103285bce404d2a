"""The fast operations against the plain ones that benchmarks/degradation.py measures them with."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from goldens import load_golden
from scripts import load_script

from sslsr_diffusion.data import operations
from sslsr_diffusion.data.degradation import Degradation, DegradationSettings

plain = load_script("benchmarks/degradation.py")
GOLDEN = load_golden("ssl/degradation")


@pytest.mark.parametrize("item", [i for i in GOLDEN.index["jpeg"] if not isinstance(i["quality"], list)], ids=lambda i: i["out"])
def test_the_plain_jpeg_is_right_too(item):
    out = plain.plain_jpeg(GOLDEN.tensors[item["image"]], torch.Generator(), item["quality"])
    assert (out - GOLDEN.tensors[item["out"]]).abs().max() < 2e-6  # the goldens' tolerance


@pytest.mark.parametrize("preset", ["stablesr_ssl", "real_esrgan", "mild", "bicubic"])
def test_operation_by_operation(preset):
    degradation = Degradation(DegradationSettings(preset=preset), 4)
    small = torch.rand(1, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    for seed in range(8):
        image = F.interpolate(small, (128, 128), mode="bicubic").clamp(0, 1)
        for op in degradation.draw(128, 128, torch.Generator().manual_seed(seed)):
            fast = operations.OPERATIONS[op.name](image, torch.Generator().manual_seed(1), **op.values)
            if op.name in plain.PLAIN:
                slow = plain.PLAIN[op.name](image, torch.Generator().manual_seed(1), **op.values)
                difference = (fast - slow).abs()
                if op.name in ("gaussian", "poisson"):  # other random fields of the same strength
                    assert (fast - image).std().item() == pytest.approx((slow - image).std().item(), rel=0.1, abs=1e-4)
                elif op.name == "jpeg":  # a coefficient on a rounding tie may go either way
                    assert (difference < 1e-4).float().mean() > 0.98
                else:
                    assert difference.max() < 3e-5
            image = fast
