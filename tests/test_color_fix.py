"""Colour transfer against the published one (2e-6 of the largest magnitude, the goldens' tolerance), any size, little memory."""

from __future__ import annotations

import pytest
import torch
from goldens import load_golden
from torch import Tensor

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.inference.color_fix import color_fix, low_frequencies


def to_unit(v: Tensor) -> Tensor:
    """Stored pixels (floats in [-1, 1], or bytes) in [0, 1]."""
    return v.float() / 255 if v.dtype == torch.uint8 else v.float() / 2 + 0.5


@pytest.mark.parametrize("kind", ["adain", "wavelet"])
@pytest.mark.parametrize("pair", [0, 1, 2])
def test_color_fix_golden(pair, kind):
    tensors = load_golden("stablesr/color_fix").tensors
    got = color_fix(kind, to_unit(tensors[f"in.pair{pair}.content"]), to_unit(tensors[f"in.pair{pair}.style"])) * 2 - 1
    want = tensors[f"out.pair{pair}.{kind}"]
    assert ((got - want).abs().max() / want.abs().max()).item() < 2e-6


def test_low_frequencies_golden():
    tensors = load_golden("stablesr/color_fix").tensors
    want = tensors["out.pair0.content_low"]
    got = low_frequencies(tensors["in.pair0.content"].float())
    assert ((got - want).abs().max() / want.abs().max()).item() < 2e-6


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (3, 5), (16, 17), (31, 2), (33, 64)])
def test_wavelet_of_any_size_takes_the_style_s_mean_colour(size):
    content = torch.full((2, 3, *size), 0.25)
    style = torch.full((2, 3, *size), 0.75)
    torch.testing.assert_close(color_fix("wavelet", content, style), style)


def test_adain_statistics_are_the_style_s_over_several_blocks_of_rows():
    generator = torch.Generator().manual_seed(0)
    content = torch.rand(2, 3, 700, 40, generator=generator) * 0.3
    style = torch.rand(2, 3, 700, 40, generator=generator) * 0.8 + 0.1
    got = color_fix("adain", content, style)
    torch.testing.assert_close(got.mean((-2, -1)), style.mean((-2, -1)), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.std((-2, -1)), style.std((-2, -1)), atol=1e-4, rtol=1e-3)  # the epsilon in the variance


def test_a_batch_is_its_pictures():
    generator = torch.Generator().manual_seed(1)
    content, style = torch.rand(2, 3, 20, 30, generator=generator), torch.rand(2, 3, 20, 30, generator=generator)
    for kind in ("adain", "wavelet", "none", None):
        both = color_fix(kind, content, style)
        for k in range(2):
            torch.testing.assert_close(both[k : k + 1], color_fix(kind, content[k : k + 1], style[k : k + 1]), atol=1e-6, rtol=1e-6)


def test_none_leaves_the_picture_alone():
    content = torch.rand(1, 3, 5, 5)
    assert color_fix("none", content, torch.zeros(1, 3, 5, 5)) is content


def test_mistakes_are_named():
    with pytest.raises(UserError, match="wavelet, adain, none"):
        color_fix("wavlet", torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4))
    with pytest.raises(UserError, match="same shape"):
        color_fix("adain", torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 5))
