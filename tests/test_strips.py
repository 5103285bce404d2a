"""Pictures too large for memory: strips and bands give the picture of one piece, for networks of every kind; bombs stay bombs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from one_step_cases import toy
from restorers import ToyLatents, ToyPixels, upscale_files
from test_images import big_png, smooth
from test_latent import FLOW
from test_out_of_memory import HOST, limited
from test_pipeline import photo, plain, seeded, with_cfw
from torch import Tensor
from torch.nn import functional as F
from x4_models import write_x4

from sslsr_diffusion import open_upscaler
from sslsr_diffusion.errors import NotEnoughMemory
from sslsr_diffusion.images import Image, OpenPicture, read_image, resize_bicubic, write_image
from sslsr_diffusion.inference import bands, latent_work, tiled
from sslsr_diffusion.inference.direct import DirectRestorer
from sslsr_diffusion.inference.latent import LatentRestorer
from sslsr_diffusion.inference.latent_work import LatentWork
from sslsr_diffusion.inference.memory import MemoryModel
from sslsr_diffusion.inference.open import restorer_of
from sslsr_diffusion.inference.options import CallOptions
from sslsr_diffusion.inference.progress import listening
from sslsr_diffusion.inference.resampling import bicubic_taps, linear_taps
from sslsr_diffusion.inference.runner import RunnerOptions
from sslsr_diffusion.inference.shared_norm import SharedGroupNorm
from sslsr_diffusion.inference.strips import upscaled
from sslsr_diffusion.inference.tile_plan import InBands, Room, TilePlan, plan_tiles
from sslsr_diffusion.inference.tiling import Box, strips_of_tiles, tile_offsets
from sslsr_diffusion.models.families import FAMILIES
from sslsr_diffusion.shipped_model import SMALL, local_folder


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
@pytest.mark.parametrize(("scale", "share"), [(2.0, 0.0), (1.0, 0.0), (2.0, 0.5)])
def test_strips_of_a_plain_network_are_the_picture_of_one_piece(column, budget, at_least, scale, share):
    restorer = DirectRestorer(ToyPixels())
    whole = strips(restorer, column, scale, tile=128, back_projection=share)
    parts = strips(restorer, column, scale, tile=128, memory_budget=budget * 10**6, back_projection=share)
    assert (len(whole), len(parts) >= at_least) == (1, True)
    for one, many in zip(joined(whole), joined(parts)):
        np.testing.assert_array_equal(one, many)
    by_itself = strips(restorer, column, scale, memory_budget=budget * 10**6, back_projection=share)
    assert len(by_itself) > 2
    assert np.abs(joined(by_itself)[0].astype(int) - joined(whole)[0]).max() <= 2  # other tiles, other roundings


def test_a_budget_below_the_least_strips_is_refused(column):
    with pytest.raises(NotEnoughMemory, match=r"^memory_budget: 20\.0 MB is too little"):
        strips(DirectRestorer(ToyPixels()), column, 2.0, memory_budget=20 * 10**6)


def opened(kind: str, folder: Path) -> LatentRestorer:
    """Drawn networks of a real family, tiny."""
    if kind in ("stablesr", "cfw"):
        return (with_cfw() if kind == "cfw" else plain()).restorer
    if kind == "x4":
        return open_upscaler(write_x4(folder), device="cpu")
    if kind.startswith("rows"):
        networks = toy("sd", preset="small", lora=None, full=["conv_in"], x0="process" if kind == "rows-adain" else "residual").eval()
        networks.text_sequence = networks.denoiser.no_text().sequence
        return restorer_of(networks, FAMILIES["one_step"], scale=4)
    return restorer_of(toy("sd").eval(), FAMILIES["one_step"], scale=4)


BESIDE = bands.rows_beside(CallOptions(), 4)
SIZES = {
    "stablesr": (43, 20, 2.5),
    "cfw": (24, 16, 4),
    "one-step": (23, 20, 4),
    "x4": (30, 20, 3),
    "rows-adain": (38, 40, 4),
    "rows-wavelet": (40, 33, 3.5),
}  # h, w, scale
CALLS: dict[str, dict[str, Any]] = {
    "stablesr": {"num_inference_steps": 1, "color_fix": "wavelet", "antiring": 0.5, "detail": 0.8},
    "cfw": {"num_inference_steps": 1, "color_fix": "adain", "fidelity": 1.0, "tile_batch_size": 3},
    "one-step": {"color_fix": "adain", "back_projection": 0.5, "antiring": 1.0},
    "x4": {"num_inference_steps": 2, "color_fix": "wavelet"},
    "rows-adain": {"color_fix": "adain", "tile_overlap": 32},
    "rows-wavelet": {"color_fix": "wavelet", "back_projection": 0.7, "tile_batch_size": 2},
}


def test_rows_that_back_projection_sees_are_counted():
    """Five low-resolution ones to each side; of a picture that is not enlarged as many of its own."""
    projected = CallOptions(back_projection=0.4)
    assert [bands.rows_beside(projected, scale) - BESIDE for scale in (4, 2.5, 0.5)] == [40, 26, 10]


def in_bands(restorer: LatentRestorer, picture: Tensor, call: dict[str, Any]) -> Tensor:
    parts = list(restorer.bands(picture, generator=seeded(), **call).images)
    assert len(parts) > 1
    assert [part.shape[-2] for part in parts[:-1]] == [bands._ROWS] * (len(parts) - 1)
    return torch.cat(parts, dim=-2)


def of_the_left(rows: bands.Rows, box: Box) -> Tensor:
    return rows(box.top, box.top + box.height)[0, ..., : box.width]


class OwnStatistics(SharedGroupNorm):
    any = False


@pytest.mark.parametrize("kind", SIZES)
def test_bands_of_a_latent_model_are_the_picture_of_one_piece(kind, tmp_path, monkeypatch):
    """Rounding apart: the enlarged picture's and the statistics' sums have another order, and a random network makes it more."""
    monkeypatch.setattr(bands, "_ROWS", 40)
    restorer, (height, width, scale) = opened(kind, tmp_path), SIZES[kind]
    picture, call = photo(height, width), {"scale": scale, "tile": 64, "vae_tile": 64, "tile_overlap": 16, **CALLS[kind]}
    whole = restorer(picture, generator=seeded(), output_type="pt", **call)
    assert (whole.plans[0].tile, whole.plans[0].vae_tile) == (64, 64)
    torch.testing.assert_close(in_bands(restorer, picture, call), whole.images[0], atol=1e-4, rtol=0)
    # what would go wrong is seen: colours that do not know the rows beside a band, or the whole; statistics of each tile's own; latents
    # of another place
    wrong = ("REACH", 4) if CALLS[kind]["color_fix"] == "wavelet" else ("adain_change", lambda own, wanted: lambda part: part)
    by_rows = kind.startswith("rows")
    of_tiles = (bands.Rows, "part", of_the_left) if by_rows else (tiled, "SharedGroupNorm", OwnStatistics)
    for where, name, value in ((bands, *wrong), of_tiles):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, value)
            assert (in_bands(restorer, picture, call) - whole.images[0]).abs().max() > 2e-3


@pytest.mark.parametrize(("call", "latents"), [({}, "rows"), ({"callback_on_step_end": lambda *_: None}, "whole")])
def test_one_call_on_an_autoencoder_without_statistics_holds_no_whole_latents(call, latents, tmp_path, monkeypatch):
    restorer, planned, whole, heard = opened("rows-wavelet", tmp_path), [], [], []
    of_work = LatentWork._latents
    monkeypatch.setattr(latent_work, "plan_tiles", lambda *size, **how: planned.append(how["beside"].latents) or plan_tiles(*size, **how))
    monkeypatch.setattr(LatentWork, "_latents", lambda *given: whole.append(1) or of_work(*given))
    with listening(lambda share, _: heard.append(share)):
        list(restorer.bands(photo(40, 33), scale=4, generator=seeded(), tile=64, vae_tile=64, tile_overlap=16, **call).images)
    assert (planned, len(whole)) == ([latents], latents == "whole")
    assert heard == sorted(heard)


def test_latents_that_are_never_whole_get_smaller_tiles_where_memory_runs_out(tmp_path):
    restorer, picture = opened("rows-wavelet", tmp_path), photo(40, 33)
    with limited(restorer.networks.denoiser, 8 * 8, HOST):
        out = restorer.bands(picture, scale=4, generator=seeded(), tile=64, vae_tile=128, tile_overlap=16)
        made = torch.cat(list(out.images), dim=-2)
    assert out.notes == ["out of memory: tile 64 -> 32"]
    fixed = opened("rows-wavelet", tmp_path)(picture, scale=4, generator=seeded(), tile=32, vae_tile=128, tile_overlap=8, output_type="pt")
    torch.testing.assert_close(made, fixed.images[0], atol=1e-4, rtol=0)


def test_a_photograph_of_12_megapixels_fits_4_gb_with_the_shipped_model():
    networks = FAMILIES["one_step"].read(local_folder(SMALL), meta=True)
    memory, rows = (
        MemoryModel(networks, torch.device("cpu")),
        bands.rows_beside(CallOptions(detail=0.9, back_projection=0.5), 4),
    )  # as it is called

    def plan(latents: str, budget: int) -> TilePlan:
        beside = InBands(rows, 18 * 3000 * 4000, latents)
        how = {"tile": "auto", "vae_tile": "auto", "overlap": None, "room": Room(budget, strict=True), "beside": beside}
        return plan_tiles(12000, 16000, size=networks.size(), vae_scale=networks.codec.scale, memory=lambda: memory, **how)

    with pytest.raises(NotEnoughMemory, match=r"^memory_budget: 8\.0 GB is too little .* the least is 1\d\.\d GB\.$"):
        plan("whole", 8 * 10**9)
    made = plan("rows", 4 * 10**9)
    assert made.tile == 256  # twice the training side, the most
    seen = made.tile + made.vae_tile
    copies = 4 * (18 * (made.vae_tile + rows) * made.width + 8 * 32 * seen * made.width // 16)
    assert memory.picture_bytes(made.height, made.width, 1, made.vae_tile + rows, seen) == copies
    with pytest.raises(NotEnoughMemory, match="the least is") as refused:
        plan("rows", 10**9)
    assert 1.3e9 < refused.value.least <= 1.4e9  # as docs/formats.md says
    least = plan("rows", refused.value.least)
    assert (least.tile, least.vae_tile) == (32, 128)
    with pytest.raises(NotEnoughMemory):
        plan("rows", refused.value.least - 1)


def test_bands_reach_the_runner_with_alpha_and_gray_and_a_budget_below_the_least_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(bands, "_ROWS", 64)
    restorer, path = LatentRestorer(ToyLatents(FLOW), scale=2, defaults={"num_inference_steps": 2}), tmp_path / "a.png"
    gray, alpha = smooth(300, 40, 1), smooth(300, 40, 1, seed=2)[..., 0]
    alpha[80:130] = 0  # hidden pixels take the nearest seen colour, also from beyond the band
    write_image(path, Image(gray[..., [0, 0, 0]], alpha, gray=True, density=(300.0, 300.0)))
    call = {"tile": 64, "vae_tile": 64}
    (whole,) = strips(restorer, path, 2.5, **call)
    monkeypatch.setattr("sslsr_diffusion.inference.strips._BYTES", 10**6)  # so that it is too large for one piece
    parts = strips(restorer, path, 2.5, **call, memory_budget=76 * 10**6)
    assert len(parts) == 12
    assert all(part.gray and part.density == whole.density for part in parts)
    for one, many in zip((whole.rgb, whole.alpha), joined(parts)):
        assert np.abs(one.astype(int) - many).max() <= 1  # a half that is rounded
        assert (one != many).mean() < 1e-3
    with pytest.raises(NotEnoughMemory, match=r"^memory_budget: 66\.0 MB is too little"):
        strips(restorer, path, 2.5, memory_budget=66 * 10**6)


def test_resampled_parts_are_those_of_the_whole_picture():
    sizes = [
        ((30, 40), (120, 160)),
        ((31, 40), (100, 97)),
        ((31, 40), (20, 97)),
        ((50, 60), (17, 20)),
        ((5, 7), (5, 21)),
        ((900, 4), (3207, 9)),
    ]
    for size, wanted in sizes:
        picture = smooth(*size).astype(np.float32) / 255
        picture = torch.from_numpy(picture).permute(2, 0, 1)[None]
        rows, columns = bicubic_taps(size, wanted)
        top, bottom = wanted[0] // 3, wanted[0] // 3 + 4
        first, last = rows.at(top, bottom).span
        got = rows.at(top, bottom).of(columns.of(picture[..., first:last, :], -1), -2, first)
        torch.testing.assert_close(got, resize_bicubic(picture, wanted)[..., top:bottom, :], atol=4e-6, rtol=0)
        linear = linear_taps(size[0], wanted[0]).of(linear_taps(size[1], wanted[1]).of(picture, -1), -2)
        torch.testing.assert_close(linear, F.interpolate(picture, size=wanted, mode="bilinear"), atol=2e-6, rtol=0)


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
