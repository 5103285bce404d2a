"""Pictures too large for memory: strips of tiles give the picture of one piece, others fade into each other, bombs stay bombs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from restorers import Nearest, ToyPixels, upscale_files
from test_images import big_png, smooth

from sslsr_diffusion.errors import NotEnoughMemory
from sslsr_diffusion.images import Image, OpenPicture, read_image, write_image
from sslsr_diffusion.inference.direct import DirectRestorer
from sslsr_diffusion.inference.runner import RunnerOptions
from sslsr_diffusion.inference.strips import upscaled, whole_rows
from sslsr_diffusion.inference.tiling import strips_of_tiles, tile_offsets


@pytest.fixture
def column(tmp_path):
    """A high picture: strips of full width are cheap."""
    path = tmp_path / "in" / "a.png"
    path.parent.mkdir()
    alpha = smooth(1500, 60, 1, seed=2)[..., 0]
    write_image(path, Image(smooth(1500, 60), alpha, density=(300.0, 300.0)))
    return path


def strips(restorer, path, scale, **call):
    def opened():
        return OpenPicture(path)

    return list(upscaled(restorer, opened(), opened, scale, seed=0, call=call))


def joined(parts):
    return np.concatenate([part.rgb for part in parts]), np.concatenate([part.alpha for part in parts])


@pytest.mark.parametrize("height", [383, 1000, 1504])
@pytest.mark.parametrize(("side", "overlap"), [(64, 0), (64, 16), (32, 16), (48, 24)])
@pytest.mark.parametrize("rows", [3, 4, 7])
def test_every_row_is_answered_for_once_by_a_strip_that_has_all_its_tiles(height, side, overlap, rows):
    tops = tile_offsets(height, side, overlap)
    made = strips_of_tiles(tops, side, height, rows)
    assert [strip.first for strip in made] == [0, *(strip.last for strip in made[:-1])]
    assert made[-1].last == height
    for strip in made:
        assert strip.bottom - strip.top <= (rows - 1) * (side - overlap) + side
        of_strip = [strip.top + top for top in tile_offsets(strip.bottom - strip.top, side, overlap)]
        for row in range(strip.first, strip.last):
            assert {top for top in tops if top <= row < top + side} <= set(of_strip)


@pytest.mark.parametrize(("budget", "at_least"), [(73, 6), (78, 3)])
@pytest.mark.parametrize("scale", [2.0, 1.0])
def test_strips_of_a_plain_network_are_the_picture_of_one_piece(column, budget, at_least, scale):
    restorer = DirectRestorer(ToyPixels())
    whole = strips(restorer, column, scale, tile=128)
    parts = strips(restorer, column, scale, tile=128, memory_budget=budget * 10**6)
    assert (len(whole), len(parts) >= at_least) == (1, True)
    for one, many in zip(joined(whole), joined(parts)):
        np.testing.assert_array_equal(one, many)
    by_itself = strips(restorer, column, scale, memory_budget=budget * 10**6)
    assert len(by_itself) > 2
    assert np.abs(joined(by_itself)[0].astype(int) - joined(whole)[0]).max() <= 2  # other tiles, other roundings


def test_a_budget_below_the_least_strips_is_refused(column):
    with pytest.raises(NotEnoughMemory, match=r"^memory_budget: 20\.0 MB is too little"):
        strips(DirectRestorer(ToyPixels()), column, 2.0, memory_budget=20 * 10**6)


class Tight(Nearest):
    """Takes up to 300 rows at once, and darkens by how many it was given: strips differ."""

    def __call__(self, image, **call):
        if image.shape[-2] > 300:
            raise NotEnoughMemory("too large")
        output = super().__call__(image, **call)
        output.images = output.images * (0.5 + image.shape[-2] / 1000)
        return output

    def strips(self, size, **call):
        return None


def test_strips_of_other_restorers_fade_into_each_other(column):
    parts = strips(Tight(), column, 2.0)
    assert len(parts) > 5
    assert "strips of" in parts[0].notes[0]
    rgb, alpha = joined(parts)
    assert rgb.shape == (3000, 120, 3)
    shown = (smooth(1500, 60) / 255).repeat(2, 0).repeat(2, 1)
    share = np.divide(rgb, 255 * shown, out=np.full(rgb.shape, np.nan), where=shown > 0.5)
    brightness = np.nanmean(share, axis=(1, 2))
    assert np.nanmax(np.abs(np.diff(brightness))) < 0.01  # no step from strip to strip
    assert np.nanmax(brightness) - np.nanmin(brightness) > 0.02  # though they differ
    assert np.abs(alpha[::2, ::2].astype(int) - smooth(1500, 60, 1, seed=2)[..., 0]).max() < 12
    with pytest.raises(NotEnoughMemory, match="too large"):
        strips(Tight(), column, np.pi)  # no row of the result begins where one of the input does


def test_scales_that_give_whole_rows():
    assert [whole_rows(scale) for scale in (4.0, 2.5, 1.2, 1 / 3, np.pi)] == [1, 2, 5, 3, None]


def test_the_runner_writes_strips_and_a_limit_says_its_flag(column, tmp_path):
    (column.parent / "bomb.png").write_bytes(big_png(60000, 60000))
    options = RunnerOptions(scale=2, call={"memory_budget": 75 * 10**6, "tile": 128})
    report = upscale_files(DirectRestorer(ToyPixels()), column.parent, tmp_path / "out", options)
    assert report.done == ["a.png"]
    assert report.failed == [("bomb.png", "3600 megapixels are more than the 1000 that are read; --max-megapixels lifts the limit.")]
    made = read_image(tmp_path / "out" / "a.png")
    np.testing.assert_array_equal(made.rgb, joined(strips(DirectRestorer(ToyPixels()), column, 2.0, tile=128))[0])
    np.testing.assert_allclose(made.density, (300, 300), rtol=1e-4)


def test_a_strip_that_is_gray_in_a_picture_with_colours_keeps_its_colours(tmp_path):
    class Tinted(ToyPixels):
        def forward(self, lr):
            return super().forward(lr) * torch.tensor([1, 0.9, 0.8])[:, None, None]

    rgb = smooth(1500, 60, 1)[..., [0, 0, 0]]
    for name, colours in (("gray", False), ("colours", True)):
        rgb[-1, -1] = (255, 0, 0) if colours else rgb[-1, -1]
        write_image(tmp_path / f"{name}.png", Image(rgb))
        parts = strips(DirectRestorer(Tinted()), tmp_path / f"{name}.png", 2.0, tile=128, memory_budget=75 * 10**6)
        assert len(parts) > 2
        assert [part.colourless for part in parts] == [not colours] * len(parts)
