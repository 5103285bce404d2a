"""Anti-ringing: against a plain loop over pixels, and what it must leave alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sslsr_diffusion.inference.antiring import RADIUS, antiring


def drawn(seed: int, height: int, width: int, scale: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(2, 3, height, width, generator=generator)
    return torch.rand(2, 3, scale * height, scale * width, generator=generator) * 1.6 - 0.3, low


@given(st.integers(0, 999), st.integers(1, 12), st.integers(1, 12), st.floats(0, 1))
def test_without_enlargement_it_is_the_loop_of_the_definition(seed: int, height: int, width: int, strength: float) -> None:
    restored, low = drawn(seed, height, width, 1)
    expected = restored.clone()
    for y in range(height):
        for x in range(width):
            around = low[..., max(y - RADIUS, 0) : y + RADIUS + 1, max(x - RADIUS, 0) : x + RADIUS + 1].flatten(2)
            inside = restored[..., y, x].maximum(around.amin(-1)).minimum(around.amax(-1))
            expected[..., y, x] += strength * (inside - restored[..., y, x])
    torch.testing.assert_close(antiring(restored.clone(), low, strength), expected)


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_what_stays_in_the_range_around_is_left_alone_and_a_seam_is_cut_by_the_strength(strength: float) -> None:
    low = torch.full((1, 3, 8, 16), 0.2)
    low[..., 8:] = 0.8
    restored = low.repeat_interleave(4, -1).repeat_interleave(4, -2)  # a hard edge is sharper than any enlargement of low, and no seam
    torch.testing.assert_close(antiring(restored.clone(), low, strength), restored)
    seamed = restored.clone()
    seamed[..., 32:34] = 1.0
    cut = antiring(seamed.clone(), low, strength)
    torch.testing.assert_close(cut[..., 32:34], torch.full_like(cut[..., 32:34], 1.0 - 0.2 * strength))
    torch.testing.assert_close(cut[..., 34:], restored[..., 34:])


def test_it_works_in_place_on_any_size() -> None:
    restored, low = torch.rand(1, 3, 37, 50), torch.rand(1, 3, 15, 20)
    before = restored.clone()
    assert antiring(restored, low, 0).equal(before)
    assert antiring(restored, low, 0.5).data_ptr() == restored.data_ptr()
    assert not torch.equal(restored, before)
