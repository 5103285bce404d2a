"""The JPEG model against the published results, and its behaviour at the ends of the quality scale."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from goldens import load_golden

from sslsr_diffusion.data.jpeg import jpeg_codec, jpeg_model

GOLDEN = load_golden("ssl/degradation")


def _smooth(*shape: int) -> torch.Tensor:
    small = torch.rand(1, 3, 6, 7, generator=torch.Generator().manual_seed(0))
    return F.interpolate(small, shape, mode="bicubic", align_corners=False).clamp(0, 1)


@pytest.mark.parametrize("item", GOLDEN.index["jpeg"], ids=lambda item: item["out"])
def test_jpeg(item):
    image, wanted = GOLDEN.tensors[item["image"]], GOLDEN.tensors[item["out"]]
    quality = item["quality"]
    if isinstance(quality, list):
        image, quality = image.repeat(len(quality), 1, 1, 1), torch.tensor(quality)
    assert (jpeg_model(image, quality) - wanted).abs().max() < 2e-6  # the goldens' tolerance


def test_quality_100_is_finite_and_loses_only_chroma_resolution():
    image = _smooth(64, 80)
    out = jpeg_model(image, 100.0)
    assert torch.isfinite(out).all()
    assert (out - image).abs().mean() < 0.03
    grey = image.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    assert (jpeg_model(grey, 100.0) - grey).abs().max() < 1e-3  # no chroma, so nothing is averaged
    assert torch.isfinite(jpeg_model(image, torch.tensor([100.0]))).all()


@pytest.mark.parametrize("size", [(1, 1), (7, 33), (16, 16), (17, 31)])
def test_any_size(size):
    out = jpeg_model(_smooth(*size), 50.0)
    assert out.shape == (1, 3, *size)
    assert 0 <= out.min() <= out.max() <= 1


def test_lower_quality_loses_more():
    image = _smooth(64, 64) + 0.05 * torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    image = image.clamp(0, 1)
    for compress in (jpeg_model, jpeg_codec):
        errors = [(compress(image, q) - image).abs().mean().item() for q in (10, 50, 95)]
        assert errors == sorted(errors, reverse=True)


def test_the_argument_is_not_changed():
    image, quality = _smooth(24, 24), torch.tensor([40.0])
    before = image.clone()
    jpeg_model(image, quality)
    assert torch.equal(image, before)
    assert quality.item() == 40.0


def test_the_real_codec_gives_8_bit_levels_at_the_same_size():
    out = jpeg_codec(_smooth(19, 23), 80)
    assert out.shape == (1, 3, 19, 23)
    assert torch.allclose((out * 255).round(), out * 255, atol=1e-4)


@pytest.mark.cuda
def test_cuda_equals_cpu():
    image = _smooth(48, 64)
    # a coefficient on a rounding tie may go either way: nearly all pixels agree
    assert ((jpeg_model(image.cuda(), 60.0).cpu() - jpeg_model(image, 60.0)).abs() < 1e-4).float().mean() > 0.99
