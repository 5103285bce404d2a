"""Where tiles lie and how they are blended, against the published rules and where those fail."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from goldens import load_golden
from torch.nn import functional as F

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.images import pad_to
from sslsr_diffusion.inference.tile_plan import Room, TilePlan, plan_tiles
from sslsr_diffusion.inference.tiling import Box, bands, blend, joined, rounded_up, tile_boxes, tile_offsets, tile_weights
from sslsr_diffusion.models.size import SizeRequirements


@pytest.mark.parametrize(("width", "height"), [(64, 64), (48, 64)])
def test_tile_weights_golden(width, height):
    want = load_golden("stablesr/tile_weights").tensors[f"out.weights.w{width}h{height}"][0]
    got = tile_weights(height, width, "original")
    assert ((got - want).abs().max() / want.abs().max()).item() < 1e-12


@pytest.mark.parametrize("kind", ["smooth", "gaussian", "middle"])
def test_our_tile_weights_are_symmetric_and_nowhere_zero(kind):
    weights = tile_weights(7, 12, kind, overlap=3)
    assert (weights > 0).all()
    torch.testing.assert_close(weights, weights.flip(0).flip(1), atol=1e-12, rtol=1e-12)


def test_image_splitter_golden():
    golden = load_golden("stablesr/image_splitter")
    size, stride = golden.index["config"]["size"], golden.index["config"]["stride"]
    image = golden.tensors["in.image"].float()
    boxes = tile_boxes(*image.shape[-2:], size, size - stride)
    got = [[b.top, b.top + b.height, b.left, b.left + b.width] for b in boxes]
    assert got == golden.tensors["out.boxes_h0_h1_w0_w1"].tolist()
    visits = iter(sorted(range(len(boxes)), key=lambda n: boxes[n]))  # as published, column by column; ours run row by row

    def change(tiles, _):
        n = next(visits)
        return tiles[0] * (1 + 0.25 * n) + 0.1 * n

    want = golden.tensors["out.gathered"]
    blended = blend(change, [image], boxes, weights="original")
    assert ((blended - want).abs().max() / want.abs().max()).item() < 2e-6


@pytest.mark.parametrize("length", [1, 7, 16, 17, 31, 40, 63, 64, 65])
@pytest.mark.parametrize(("tile", "overlap"), [(16, 0), (16, 8), (16, 15), (24, 5)])
def test_tiles_cover_everything_with_at_least_the_overlap(length, tile, overlap):
    offsets = tile_offsets(length, tile, overlap)
    if length <= tile:
        assert offsets == [0]
        return
    assert offsets[0] == 0
    assert offsets[-1] == length - tile
    gaps = np.diff(offsets)
    assert (gaps > 0).all()
    assert (gaps <= tile - overlap).all()


def test_two_disagreeing_tiles_meet_in_a_ramp_as_long_as_the_overlap():
    boxes = tile_boxes(1, 24, 16, 8)
    values = iter([0.0, 1.0])
    got = blend(lambda tiles, _: torch.full_like(tiles[0], next(values)), [torch.zeros(1, 1, 1, 24)], boxes, overlap=8)[0, 0, 0]
    assert (got[:8] == 0).all()
    assert (got[16:] == 1).all()
    # the steepest step of sin^2 over n samples is pi / (2 n); a jump would be 1
    assert got.diff()[7:16].min() > 0
    assert got.diff().max() < 1.01 * np.pi / 16


@pytest.mark.parametrize(("kind", "ramp"), [("smooth", lambda d: d), ("middle", lambda d: np.clip(2 * d - 0.5, 0, 1))])
def test_a_tiles_ramp_is_read_at_the_middle_of_its_pixels(kind, ramp):
    """So the weights of two neighbours that share the overlap sum to 1 everywhere."""
    side = tile_weights(24, 24, kind, overlap=8)[12]
    want = np.sin(np.pi / 2 * ramp((np.arange(8) + 0.5) / 8)) ** 2
    np.testing.assert_allclose(side[:8].numpy(), want, atol=2e-9)
    np.testing.assert_allclose((side[:8] + side[-8:]).numpy(), 1, atol=2e-9)


def test_the_ramp_grows_with_what_the_tiles_are_enlarged_by():
    values = iter([0.0, 1.0])
    got = blend(lambda tiles, _: torch.full((1, 1, 1, 64), next(values)), [torch.zeros(1, 1, 1, 24)], tile_boxes(1, 24, 16, 8), overlap=8)
    assert got.shape[-1] == 96
    assert got[0, 0, 0].diff()[32:63].min() > 0
    assert got[0, 0, 0].diff().max() < 1.01 * np.pi / 64


def test_a_wrong_border_leaves_no_trace_in_the_middle_kind_and_keeps_its_say_where_it_is_alone():
    """A quarter of the overlap is spoilt on every side of each tile; at the picture's own border there is nobody else to ask."""
    boxes = tile_boxes(40, 56, 24, 8)
    picture = torch.rand(1, 1, 40, 56, generator=torch.Generator().manual_seed(0))

    def spoil(tiles, _):
        tile, wrong = tiles[0].clone(), torch.full_like(tiles[0], 5.0)
        wrong[..., 2:-2, 2:-2] = tile[..., 2:-2, 2:-2]
        return wrong

    got = {kind: blend(spoil, [picture], boxes, overlap=8, weights=kind) for kind in ("smooth", "middle")}
    inner = (slice(2, -2), slice(2, -2))
    torch.testing.assert_close(got["middle"][0, 0][inner], picture[0, 0][inner], atol=1e-6, rtol=0)
    assert (got["smooth"][0, 0][inner] - picture[0, 0][inner]).abs().max() > 0.1
    assert (got["middle"][0, 0, :2] == 5).all()
    torch.testing.assert_close(
        blend(lambda tiles, _: tiles[0], [picture], boxes, overlap=8, weights="middle"), picture, atol=1e-6, rtol=1e-6
    )


def test_unknown_weights_are_refused():
    with pytest.raises(UserError, match="smooth, gaussian, original"):
        tile_weights(4, 4, "cosine")


def test_one_short_side_gets_tiles_of_its_own_length():
    boxes = tile_boxes(9, 40, 16, 4)
    assert {(b.height, b.width, b.top) for b in boxes} == {(9, 16, 0)}
    assert [b.left for b in boxes] == [0, 12, 24]


@pytest.mark.parametrize("overlap", [-1, 16, 20])
def test_impossible_overlap_is_refused(overlap):
    with pytest.raises(UserError, match="tile_overlap"):
        tile_offsets(40, 16, overlap)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize("size", [(10, 10), (10, 45), (45, 10), (37, 41)])
def test_blending_unchanged_tiles_gives_the_picture_back(size, batch_size):
    pictures = torch.rand(3, 2, *size)
    got = blend(lambda tiles, _: tiles[0], [pictures], tile_boxes(*size, 16, 6), batch_size=batch_size, overlap=6)
    torch.testing.assert_close(got, pictures, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_bands_are_the_blended_picture_row_of_tiles_by_row_of_tiles(batch_size):
    pictures, asked = torch.rand(2, 3, 40, 20), []
    boxes = tile_boxes(40, 20, 16, 6)

    class Second:
        def part(self, box):
            asked.append(box)
            return box.of(pictures[1])

    def run(tiles, samples):
        assert samples in ([0] * len(tiles[0]), [1] * len(tiles[0]))
        return F.interpolate(tiles[0] * torch.linspace(0, 1, 16), scale_factor=2)

    want = blend(run, [pictures[1:]], boxes, batch_size=batch_size, overlap=6)
    parts = list(bands(run, [Second()], boxes, samples=[0], batch_size=batch_size, overlap=6))
    assert asked == sorted(boxes)
    assert [part.shape[-2] // 2 for part in parts] == [10, 10, 4, 16]  # the rows above the next row of tiles, which begin at 0, 10, 20, 24
    assert torch.equal(torch.cat(parts, dim=-2), want)
    assert torch.equal(joined(bands(run, [pictures], boxes, samples=[1], overlap=6), boxes), blend(run, [pictures[1:]], boxes, overlap=6))


def test_inputs_and_result_may_have_scales_of_their_own():
    coarse, fine = torch.rand(2, 1, 20, 24), torch.rand(2, 3, 40, 48)

    def run(tiles, samples):
        assert len(samples) == len(tiles[0]) == len(tiles[1])
        return torch.cat([tiles[0], tiles[1][..., ::2, ::2]], dim=1).repeat_interleave(4, -1).repeat_interleave(4, -2)

    got = blend(run, [coarse, fine], tile_boxes(20, 24, 8, 4), zooms=[1, 2], batch_size=2)
    want = run([coarse, fine], [0, 1])
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)


def test_box_is_a_view():
    image = torch.zeros(1, 6, 6)
    Box(1, 2, 3, 2).of(image).add_(1)
    assert image.sum() == 6
    assert Box(1, 2, 3, 2).scaled(2) == Box(2, 4, 6, 4)


@pytest.mark.parametrize(("size", "wanted"), [((1, 1), (5, 9)), ((2, 3), (8, 40)), ((5, 4), (5, 4)), ((7, 16), (64, 64))])
def test_padding_folds_as_often_as_needed(size, wanted):
    image = torch.rand(2, 3, *size)
    got = pad_to(image, *wanted)
    # numpy's reflect folds repeatedly
    width = [(0, 0), (0, 0), (0, wanted[0] - size[0]), (0, wanted[1] - size[1])]
    np.testing.assert_array_equal(got.numpy(), np.pad(image.numpy(), width, mode="reflect"))


def test_rounded_up():
    assert [rounded_up(n, 8) for n in (1, 8, 9)] == [8, 8, 16]
    assert rounded_up(3, 8, least=17) == 24


def planned(side: int, size: SizeRequirements, *, room: int, tile: int | str | None = "auto", copies: int = 0) -> TilePlan:
    """For a picture of side x side where a network call takes as many bytes as it sees latent pixels."""
    memory = SimpleNamespace(picture_bytes=lambda *_: copies, denoise_bytes=lambda h, w, *_, **__: h * w, codec_bytes=lambda *_, **__: 0)
    options = {"vae_scale": 8, "room": Room(room), "overlap": None, "vae_tile": None}
    return plan_tiles(side, side, size=size, memory=lambda: memory, tile=tile, **options)


def test_no_tile_is_smaller_than_what_the_networks_take():
    size = SizeRequirements(multiple_of=16, minimum=200, trained=256)
    plan = planned(1024, size, room=0)  # nothing fits: the smallest
    assert plan.tile == 208
    assert plan.smaller("tile") is None
    assert planned(1024, SizeRequirements(multiple_of=16, trained=256), room=0).tile == 64
    large = planned(1024, size, room=10**9)
    assert large.tile == 512
    tried = [large.tile]
    while (following := large.smaller("tile")) is not None:
        large = following
        tried.append(large.tile)
    assert tried == [512, 384, 256, 208]
    assert planned(1024, size, room=0, tile=208).tile == 208
    with pytest.raises(UserError, match=r"^tile: expected at least 208 pixels, the smallest that these networks take, got 192\.$"):
        planned(1024, size, room=0, tile=192)


def test_no_tile_is_larger_than_what_the_networks_take():
    size = SizeRequirements(multiple_of=16, maximum=392)
    assert [size.nearest(side) for side in (17, 380, 500)] == [16, 384, 384]
    assert planned(1024, size, room=0, tile=384).tile == 384
    with pytest.raises(UserError, match=r"^tile: expected at most 384 pixels, the largest that these networks take, got 400\.$"):
        planned(1024, size, room=0, tile=400)
    with pytest.raises(UserError, match=r"^tile: expected at most 384 pixels, .*, got none for a side of 1024\.$"):
        planned(1024, size, room=0, tile=None)
    assert planned(384, size, room=10**9, tile=None).tile is None
    assert planned(1024, size, room=10**9).tile == 384  # "auto": without the maximum it is the whole picture


def test_a_picture_whose_own_copies_do_not_fit_gets_no_smaller_tiles_for_that(caplog):
    size, room = SizeRequirements(multiple_of=16, trained=256), 40 * 40
    assert planned(1024, size, room=room).tile == 256  # 32 x 32 latent pixels; 384 would take 48 x 48
    assert planned(1024, size, room=room, copies=room - 600).tile == 192  # what is left decides
    assert planned(1024, size, room=room, copies=10 * room).tile == 256
    assert "the picture's own copies need about" in caplog.text


def test_a_picture_of_the_smallest_side_is_one_tile_though_the_training_size_is_far_below_it():
    assert planned(10, SizeRequirements(multiple_of=16, minimum=640, trained=64), room=0).tile is None
