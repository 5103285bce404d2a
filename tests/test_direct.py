"""Restorers of networks that enlarge pixels in one call: sizes, tiles without seams, memory, options."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from restorers import ToyPixelFamily, ToyPixels
from test_out_of_memory import GPU, HOST, limited
from test_pipeline import photo
from torch import Tensor

from sslsr_diffusion import devices
from sslsr_diffusion.devices import bfloat16_pays
from sslsr_diffusion.errors import NotEnoughMemory, UserError
from sslsr_diffusion.images import resize_bicubic
from sslsr_diffusion.inference import direct
from sslsr_diffusion.inference.back_projection import back_projection
from sslsr_diffusion.inference.color_fix import color_fix
from sslsr_diffusion.inference.direct import DirectRestorer, check_scale
from sslsr_diffusion.inference.options import CallOptions
from sslsr_diffusion.inference.placement import Placement, place
from sslsr_diffusion.inference.restorer import enlarged


def made(restorer: DirectRestorer, image, **call) -> Tensor:
    return restorer(image, **{"output_type": "pt", **call}).images


@pytest.fixture
def restorer() -> DirectRestorer:
    return DirectRestorer(ToyPixels())


@pytest.mark.parametrize("scale", [None, 1, 1.5, 2, 3])
@pytest.mark.parametrize("size", [(16, 16), (17, 23), (1, 3), (5, 40)])
def test_output_is_exactly_round_scale_times_size(restorer, size, scale):
    got = made(restorer, photo(*size), scale=scale)
    assert got.shape == (1, 3, *(max(1, round((scale or 2) * side)) for side in size))
    assert got.isfinite().all()
    assert got.min() >= 0
    assert got.max() <= 1


def test_at_its_own_scale_it_is_the_network_and_at_others_a_resized_one(restorer):
    picture = photo(16, 20)[None]
    with torch.no_grad():
        own = restorer.networks(picture)
    assert (own - enlarged(picture, 2)).abs().max() > 0.05  # the toy does something of its own
    torch.testing.assert_close(made(restorer, picture), own.clamp(0, 1), atol=0, rtol=0)
    torch.testing.assert_close(made(restorer, picture, scale=3), resize_bicubic(own, (48, 60)).clamp(0, 1), atol=0, rtol=0)
    torch.testing.assert_close(made(restorer, picture, scale=1.5), resize_bicubic(own, (24, 30)).clamp(0, 1), atol=0, rtol=0)


def test_every_kind_of_picture_and_output(restorer):
    array = (photo(8, 12).permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    shown = restorer(array).images[0]
    assert shown.size == (24, 16)
    np.testing.assert_array_equal(np.asarray(shown), (restorer(array, output_type="np").images[0] * 255).round().astype(np.uint8))


@pytest.mark.parametrize("overlap", [16, 13], ids=["of whole units", "rounded up to them"])
@pytest.mark.parametrize("size", [(90, 70), (33, 100), (64, 32)])
def test_tiles_leave_no_seam_where_the_network_sees_no_further_than_a_quarter_of_the_overlap(size, overlap):
    restorer = DirectRestorer(ToyPixels())
    restorer.networks.overlap = overlap
    whole = made(restorer, photo(*size), tile=None)
    for tile in (64, 80):
        torch.testing.assert_close(made(restorer, photo(*size), tile=tile), whole, atol=1e-5, rtol=0)


def test_without_an_overlap_there_are_seams(restorer):
    """The check above can fail."""
    whole = made(restorer, photo(90, 70), tile=None)
    assert (made(restorer, photo(90, 70), tile=64, tile_overlap=0) - whole).abs().max() > 1e-3
    restorer.networks.overlap = 0
    assert (made(restorer, photo(90, 70), tile=64) - whole).abs().max() > 1e-3
    torch.testing.assert_close(made(restorer, photo(90, 70), tile=64, tile_overlap=32), whole, atol=1e-5, rtol=0)


def sides(restorer: DirectRestorer, image, **call) -> set[tuple[int, ...]]:
    """What the network saw, but for the shapes that memory is measured with."""
    seen: set[tuple[int, ...]] = set()

    def note(module, args):
        if not args[0].is_meta:
            seen.add(tuple(args[0].shape))

    handle = restorer.networks.register_forward_pre_hook(note)
    try:
        made(restorer, image, **call)
    finally:
        handle.remove()
    return seen


def test_a_memory_budget_chooses_the_tiles_and_says_the_least_that_would_do(restorer):
    big = photo(300, 200)
    assert sides(restorer, big, memory_budget=10**10) == {(1, 3, 300, 200)}
    with pytest.raises(
        NotEnoughMemory, match=r"^memory_budget: 1\.0 MB is too little for this picture; the least is \d+\.\d MB\.$"
    ) as caught:
        made(restorer, big, memory_budget=10**6)
    assert caught.value.least is not None
    assert sides(restorer, big, memory_budget=caught.value.least) == {(1, 3, 64, 64)}
    with pytest.raises(NotEnoughMemory, match=r"too little for tile 512, which would take \d+\.\d MB\.$"):
        made(restorer, big, memory_budget=caught.value.least, tile=512)
    assert sides(restorer, big, memory_budget=caught.value.least, tile=64) == {(1, 3, 32, 32)}


def test_a_picture_whose_own_copies_do_not_fit_gets_no_smaller_tiles_for_that(monkeypatch):
    restorer, big = DirectRestorer(ToyPixels()), photo(300, 200)
    own = restorer._bytes(300, steady=False)
    monkeypatch.setattr("sslsr_diffusion.inference.direct.free_bytes", lambda device: own + 1)
    assert own + 1 > 4 * 3 * 5 * 300 * 200 * 4  # so the copies count, and leave too little for the whole
    assert sides(restorer, big) != {(1, 3, 300, 200)}
    monkeypatch.setattr("sslsr_diffusion.inference.direct._PICTURES", 10**6)
    assert sides(restorer, big) == {(1, 3, 300, 200)}


@pytest.mark.parametrize("error", [GPU, HOST], ids=["gpu", "cpu"])
@pytest.mark.parametrize("tile", ["auto", None, 256])
def test_where_memory_runs_out_smaller_tiles_take_over_and_are_kept(error, tile, caplog):
    restorer = DirectRestorer(ToyPixels())
    whole = made(DirectRestorer(ToyPixels()), photo(150, 100))
    with limited(restorer.networks, 64 * 64, error) as seen, caplog.at_level(logging.WARNING):
        out = restorer(photo(150, 100), output_type="pt", tile=tile)
        tried = len(seen)
        again = restorer(photo(150, 100, seed=1), output_type="pt", tile=tile)
    torch.testing.assert_close(out.images, whole, atol=1e-5, rtol=0)
    assert out.notes
    assert out.notes[-1].endswith("-> 128")
    assert out.notes[-1] in caplog.text
    assert again.notes == []
    assert all(area <= 64 * 64 for _, area in seen[tried:])  # what was found is kept: nothing fails twice
    assert restorer(photo(16, 16)).notes == []


def test_memory_that_is_too_little_for_the_smallest_tile_is_one_sentence(restorer):
    made(restorer, photo(40, 40))  # so that its memory is known: a copy of shapes alone has the hooks, too
    with limited(restorer.networks, 10, HOST), pytest.raises(NotEnoughMemory, match="out of memory even with tiles of 80 pixels") as caught:
        made(restorer, photo(40, 40))
    assert "\n" not in str(caught.value)
    with limited(restorer.networks, 10, ValueError("something else")), pytest.raises(ValueError, match="something else"):
        made(restorer, photo(40, 40))


@pytest.mark.parametrize("side", [512, 1024])
def test_tiles_of_far_sighted_networks_cost_less_than_a_seventh_more(side):
    """Counted in pixels, on a picture of two tiles and a quarter per side."""
    restorer, seen = DirectRestorer(ToyPixels()), []
    restorer.networks.far_sighted = True
    restorer.networks.register_forward_pre_hook(lambda module, args: None if args[0].is_meta else seen.append(args[0].shape[2:].numel()))
    made(restorer, torch.zeros(3, side * 9 // 8, side * 9 // 8), tile=side)
    assert len(seen) == 9
    assert sum(seen) < 1.15 * (side * 9 // 8) ** 2


def test_pictures_of_one_size_and_of_several(restorer):
    pictures = [photo(12, 20, seed=k) for k in range(3)]
    together = made(restorer, torch.stack(pictures))
    for k in range(3):
        torch.testing.assert_close(together[k : k + 1], made(restorer, pictures[k]), atol=0, rtol=0)
    several = made(restorer, [photo(12, 20), photo(9, 7, seed=1)])
    assert [tuple(each.shape) for each in several] == [(3, 24, 40), (3, 18, 14)]
    torch.testing.assert_close(several[1][None], made(restorer, photo(9, 7, seed=1)), atol=0, rtol=0)


def test_it_finishes_like_every_restorer_but_leaves_the_colours_alone_by_default(restorer):
    picture = photo(16, 20)[None]
    plain, bicubic = made(restorer, picture), enlarged(picture, 2)
    torch.testing.assert_close(made(restorer, picture, color_fix=None), plain, atol=0, rtol=0)
    torch.testing.assert_close(made(restorer, picture, detail=0), bicubic, atol=1e-6, rtol=0)
    torch.testing.assert_close(made(restorer, picture, detail=0.25), 0.75 * bicubic + 0.25 * plain, atol=1e-6, rtol=0)
    with torch.no_grad():
        fixed = color_fix("wavelet", restorer.networks(picture), bicubic).clamp(0, 1)
    torch.testing.assert_close(made(restorer, picture, color_fix="wavelet"), fixed, atol=0, rtol=0)
    assert (made(restorer, picture, antiring=1) - plain).abs().max() > 1e-3
    with torch.no_grad():
        projected = back_projection(restorer.networks(picture).clamp(0, 1), picture, 0.5).clamp(0, 1)
    torch.testing.assert_close(made(restorer, picture, back_projection=0.5), projected, atol=0, rtol=0)
    assert (projected - plain).abs().max() > 1e-3


def test_its_options_and_what_it_says_about_those_it_lacks(restorer):
    assert restorer.options == CallOptions.names()
    assert restorer.options == {"antiring", "back_projection", "color_fix", "detail", "memory_budget", "tile", "tile_overlap"}
    off = {"num_inference_steps": 20, "fidelity": 0, "prompt": "", "sampler": None, "guidance_scale": 1.0}
    out = restorer(photo(8, 8), **off)
    assert out.notes == restorer.check(**off)
    assert [note.split()[0] for note in out.notes] == ["num_inference_steps", "fidelity", "prompt", "guidance_scale"]
    for name, value in {"num_inference_step": 3, "fidelity": 0.5, "sampler": "ddim", "vae_tile": 512, "eta": 0.1}.items():
        with pytest.raises(UserError, match=rf"^{name}: this model (has no such option|does not have it, got)"):
            restorer(photo(8, 8), **{name: value})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"tile": 12}, "^tile: expected a multiple of 8 pixels, 'auto' or none, got 12"),
        ({"tile": 16}, "^tile: expected at least 32 pixels, the smallest that these networks take, got 16"),
        ({"tile": 64, "tile_overlap": 64}, "^tile_overlap: expected a multiple of 8 pixels below the tile, got 64"),
        ({"tile_overlap": 4}, "^tile_overlap: expected a multiple of 8"),
        ({"tile_overlap": -8}, "^tile_overlap: expected a multiple of 8"),
        ({"color_fix": "magic"}, "^color_fix"),
        ({"back_projection": 1.1}, "^back_projection: expected 0"),
        ({"antiring": 2}, "^antiring"),
        ({"detail": -1}, "^detail"),
        ({"scale": 0}, "^scale"),
        ({"output_type": "jpg"}, "^output_type"),
    ],
)
def test_impossible_arguments_are_named(call, message):
    restorer = DirectRestorer(ToyPixels(minimum=32))
    with pytest.raises(UserError, match=message):
        made(restorer, **{"image": photo(8, 8), **call})
    if not call.keys() & {"scale", "output_type"}:
        with pytest.raises(UserError, match=message):
            restorer.check(**call)


def test_pictures_are_padded_to_what_the_network_takes():
    assert sides(DirectRestorer(ToyPixels(minimum=50)), photo(3, 30)) == {(1, 3, 28, 32)}
    with pytest.raises(UserError, match="tile: expected a multiple of 18 pixels"):  # of 9 and of twice a low-resolution pixel
        DirectRestorer(ToyPixels(multiple_of=9)).check(tile=20)


def test_what_the_networks_bring_along_goes_behind_what_is_given_and_is_saved(tmp_path):
    networks = ToyPixels()
    networks.own = {"detail": 0.5, "antiring": 0.25, "scale": 3, "num_inference_steps": 7}
    restorer = DirectRestorer(networks, defaults={"antiring": 0.75, "memory_budget": 10**10})
    assert restorer.scale == 3
    assert restorer.defaults == {"color_fix": "none", "detail": 0.5, "antiring": 0.75, "memory_budget": 10**10}
    picture = photo(8, 8)
    torch.testing.assert_close(made(restorer, picture), made(restorer, picture, scale=3, detail=0.5, antiring=0.75), atol=0, rtol=0)
    restorer.save(tmp_path)
    assert networks.saved == {"folder": tmp_path, "scale": 3, "color_fix": "none", "detail": 0.5, "antiring": 0.75}
    assert DirectRestorer(networks, scale=2).scale == 2


def test_half_precision_works_in_itself_and_gives_float32(restorer):
    half = DirectRestorer.open(ToyPixelFamily(), Path("x.toy"), Placement(torch.device("cpu"), torch.bfloat16, memory_budget=10**10))
    assert {parameter.dtype for parameter in half.networks.parameters()} == {torch.bfloat16}
    assert half.defaults["memory_budget"] == 10**10
    got = made(half, photo(20, 20))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, made(restorer, photo(20, 20)), atol=0.02, rtol=0)  # 8 bits of mantissa


@pytest.mark.parametrize(("dtype", "pays", "rounds", "taken"), [
    ("auto", True, 0, torch.bfloat16),
    ("auto", True, 50, torch.float32),  # 50 and a pixel are rounded to quarters
    ("auto", False, 0, torch.float32),
    ("float32", True, 0, torch.float32),
])  # fmt: skip
def test_a_faster_precision_is_taken_where_the_picture_stays(monkeypatch, dtype, pays, rounds, taken):
    class Rounding(ToyPixels):
        def forward(self, lr):
            return super().forward(lr) + rounds - rounds

    class RoundingFamily(ToyPixelFamily):
        def read(self, path, *, meta=False):
            return Rounding()

    monkeypatch.setattr(direct, "bfloat16_pays", lambda: pays)
    placement = place(RoundingFamily(), Path("x.toy"), torch.device("cpu"), dtype)
    opened = DirectRestorer.open(RoundingFamily(), Path("x.toy"), placement)
    assert {parameter.dtype for parameter in opened.networks.parameters()} == {taken}


@pytest.mark.parametrize("pays", [True, False])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_an_automatic_training_precision_is_the_faster_one(pays, device, monkeypatch):
    monkeypatch.setattr(devices, "bfloat16_pays", lambda: pays if device == "cpu" else not pays)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: pays or including_emulation)
    assert devices.training_precision(torch.device(device)) == ("bf16" if pays else "no")


def test_whether_bfloat16_pays_can_be_asked_on_every_processor():
    assert bfloat16_pays() in (True, False)


def test_a_recipes_scale_must_be_the_networks_own():
    check_scale(2, ToyPixels())
    with pytest.raises(UserError, match="scale: these networks enlarge 2 times, got 4; set scale: 2"):
        check_scale(4, ToyPixels())
