"""Back projection: what it does to pictures whose answer is known, and bands against the whole picture."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sslsr_diffusion.images import resize_bicubic
from sslsr_diffusion.inference.back_projection import REACH, BandProjection, back_projection


def waves(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """[1, 3, H, W] in [0.1, 0.9], smooth and with a hard edge."""
    phase = torch.rand(3, 1, 1, generator=torch.Generator().manual_seed(seed)) * 6
    y, x = torch.arange(height)[:, None] / 7, torch.arange(width) / 5
    return (0.5 + 0.2 * torch.sin(y + x + phase) + 0.2 * torch.sign(x - width / 11))[None]


def lacking(restored: torch.Tensor, low: torch.Tensor) -> float:
    return float((low - resize_bicubic(restored, (low.shape[-2], low.shape[-1]))).square().mean())


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_a_flat_error_is_taken_back_by_the_share(share: float) -> None:
    made = back_projection(torch.full((2, 3, 24, 36), 0.5), torch.full((2, 3, 6, 9), 0.7), share)
    torch.testing.assert_close(made, torch.full_like(made, 0.5 + 0.2 * share))


def test_what_fits_its_input_already_is_left_alone_and_what_does_not_fits_better() -> None:
    restored = waves(48, 60)
    low = resize_bicubic(restored, (12, 15))
    torch.testing.assert_close(back_projection(restored.clone(), low, 1.0), restored, atol=1e-6, rtol=0)
    blurred = resize_bicubic(resize_bicubic(restored, (6, 8)), (48, 60))
    once = back_projection(blurred.clone(), low, 1.0)
    assert lacking(once, low) < 0.1 * lacking(blurred, low)
    assert (once - restored).square().mean() < 0.5 * (blurred - restored).square().mean()
    half = back_projection(blurred.clone(), low, 0.5)
    torch.testing.assert_close(half, (blurred + once) / 2)
    assert back_projection(blurred, low, 0.5).data_ptr() == blurred.data_ptr()  # in place


@given(
    st.integers(0, 99),
    st.integers(1, 14),
    st.integers(1, 14),
    st.sampled_from([0.3, 0.5, 1.0, 2.0, 2.5, 3.7, 4.0, 8.0]),
    st.integers(1, 40),
)
def test_bands_are_the_picture_of_one_piece(seed: int, height: int, width: int, scale: float, rows: int) -> None:
    low, size = waves(height, width, seed), (max(1, round(scale * height)), max(1, round(scale * width)))
    restored = waves(*size, seed=seed + 1)
    whole, projected = back_projection(restored.clone(), low, 0.6), BandProjection(low, size, 0.6)
    for top in range(0, size[0], rows):
        bottom = min(top + rows, size[0])
        first, last = projected.seen(top, bottom)
        reach = REACH * max(scale, 1) + 1
        assert top - reach <= first <= top < bottom <= last <= bottom + reach
        band = projected(restored[..., first:last, :], first, top, bottom)
        torch.testing.assert_close(band, whole[..., top:bottom, :], atol=2e-6, rtol=0)


def test_without_a_share_a_band_sees_nothing_but_itself() -> None:
    restored, projected = waves(40, 32), BandProjection(waves(10, 8), (40, 32), 0.0)
    assert projected.seen(8, 16) == (8, 16)
    assert torch.equal(projected(restored[..., 8:16, :], 8, 8, 16), restored[..., 8:16, :])
