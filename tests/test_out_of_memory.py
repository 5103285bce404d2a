"""Memory runs out in the middle: smaller tiles take over, the same picture comes out, and everybody is told."""

from __future__ import annotations

import contextlib
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from restorers import Nearest, upscale_files
from test_pipeline import make_pipeline, photo, run
from test_runner import picture

from sslsr_diffusion.errors import NotEnoughMemory
from sslsr_diffusion.inference.runner import RunnerOptions
from sslsr_diffusion.training.settings import ValidationSettings
from sslsr_diffusion.training.validation import Validation, validate

GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
HOST = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."
)


@contextlib.contextmanager
def limited(network: torch.nn.Module, pixels: int, error: Exception, samples: int = 99):
    """Calls with more than `pixels` latent pixels, or more samples, fail as an allocator does."""
    sizes = []

    def refuse(module, args):
        sizes.append((args[0].shape[0], args[0].shape[-2] * args[0].shape[-1]))
        if sizes[-1][1] > pixels or sizes[-1][0] > samples:
            raise error

    handle = network.register_forward_pre_hook(refuse)
    try:
        yield sizes
    finally:
        handle.remove()


@pytest.mark.parametrize("error", [GPU, HOST], ids=["gpu", "cpu"])
@pytest.mark.parametrize("tile", ["auto", 128, None])
def test_the_denoiser_gets_smaller_tiles_and_the_picture_is_that_of_such_tiles(error, tile, caplog):
    pipe = make_pipeline()
    with limited(pipe.unet, 24 * 24, error) as sizes, caplog.at_level(logging.WARNING):
        out = pipe(photo(40, 40), num_inference_steps=1, generator=torch.Generator().manual_seed(0), output_type="pt", tile=tile)
        tried = len(sizes)
        again = run(pipe, photo(40, 40, seed=1), num_inference_steps=1, tile=tile)
    found = out.plans[0].tile
    assert found is not None
    assert found <= 96  # 24 latent pixels
    assert out.notes
    assert out.notes[-1].endswith(f"-> {found}")
    assert f"-> {found}" in caplog.text
    assert all(area <= 24 * 24 for _, area in sizes[tried:])  # what was found is kept: nothing fails twice
    assert again.isfinite().all()
    fixed = make_pipeline()(
        photo(40, 40), num_inference_steps=1, generator=torch.Generator().manual_seed(0), output_type="pt", tile=found, vae_tile=None
    )
    torch.testing.assert_close(out.images, fixed.images, atol=2e-4, rtol=0)  # as in test_pipeline: another order of sums


def test_a_wide_overlap_shrinks_with_the_tiles_for_later_pictures_too():
    """96 of 128 pixels; the tiles that memory allows are 96 wide, where such an overlap would be refused."""
    pipe = make_pipeline()
    with limited(pipe.unet, 24 * 24, HOST):
        for seed in range(2):
            out = pipe(photo(40, 40, seed=seed), num_inference_steps=1, output_type="pt", tile_overlap=96)
            assert out.plans[0].tile == 96
            assert 0 < out.plans[0].tile_overlap < 96


def test_several_samples_per_call_become_one_before_tiles_shrink():
    pipe = make_pipeline()
    pictures = torch.stack([photo(seed=k) for k in range(3)])
    with limited(pipe.unet, 10**9, HOST, samples=1):
        out = pipe(pictures, num_inference_steps=1, generator=torch.Generator().manual_seed(0), output_type="pt", tile_batch_size=3)
    assert out.notes == ["out of memory: one sample per network call"]
    assert out.plans[0].tile is None
    alone = make_pipeline()(pictures, num_inference_steps=1, generator=torch.Generator().manual_seed(0), output_type="pt")
    torch.testing.assert_close(out.images, alone.images, atol=2e-4, rtol=0)


def test_the_autoencoder_s_tiles_shrink_without_repeating_the_denoising():
    pipe = make_pipeline()
    steps = []
    with limited(pipe.vae.decoder, 40 * 40, GPU):
        out = pipe(
            photo(64, 64), num_inference_steps=2, output_type="pt", callback_on_step_end=lambda p, index, t, values: steps.append(index)
        )
    assert steps == [0, 1]
    assert (out.plans[0].vae_tile, out.notes) == (128, ["out of memory: vae_tile 256 -> 192", "out of memory: vae_tile 192 -> 128"])


def test_memory_that_is_too_little_for_the_smallest_tile_is_one_sentence():
    pipe = make_pipeline()
    with limited(pipe.unet, 10, HOST), pytest.raises(NotEnoughMemory, match="out of memory even with tile 16, the smallest") as caught:
        run(pipe, photo(40, 40), num_inference_steps=1)
    assert "\n" not in str(caught.value)


def test_errors_of_another_kind_are_not_taken_for_it():
    pipe = make_pipeline()
    with limited(pipe.unet, 10, ValueError("something else")) as sizes, pytest.raises(ValueError, match="something else"):
        run(pipe, photo(40, 40), num_inference_steps=1)
    assert len(sizes) == 1


def test_a_folder_goes_on_and_its_report_says_so(tmp_path):
    for name, side in (("a.png", 40), ("b.png", 12), ("c.png", 40)):
        picture(tmp_path / "in" / name, side, side)
    pipe = make_pipeline()
    with limited(pipe.unet, 24 * 24, HOST) as sizes:
        report = upscale_files(pipe, tmp_path / "in", tmp_path / "out", RunnerOptions(scale=4, call={"num_inference_steps": 1}))
    assert (report.done, report.failed) == (["a.png", "b.png", "c.png"], [])
    assert [name for name, _ in report.notes] == ["a.png"]
    assert "out of memory: tile" in report.notes[0][1]
    failures = [n for n, (_, area) in enumerate(sizes) if area > 24 * 24]
    assert failures == list(range(len(failures)))  # all of them before the first success: c.png did not try again


def test_a_picture_that_is_too_large_for_any_tile_loses_no_neighbour(tmp_path):
    for name, side in (("a.png", 40), ("b.png", 12)):
        picture(tmp_path / "in" / name, side, side)

    class Pipe(Nearest):
        """Fails as the host's allocator does, where nothing can be tiled: a whole picture's own copies."""

        def enlarge(self, pictures, scale, generator):
            if pictures.shape[-1] > 20:
                raise HOST
            return super().enlarge(pictures, scale, generator)

    report = upscale_files(Pipe(), tmp_path / "in", tmp_path / "out", RunnerOptions(scale=4))
    assert report.done == ["b.png"]
    assert report.failed == [("a.png", "out of memory; lower the scale, close other programs, or use another device")]


def test_validation_leaves_a_picture_out_and_goes_on(caplog):
    pairs = [SimpleNamespace(name=f"{k}.png", lr=photo(8, 8, seed=k), hr=photo(32, 32, seed=k)) for k in range(3)]

    def restore(lr, hr, seed):
        if torch.equal(lr[0], pairs[1].lr):
            raise NotEnoughMemory("out of memory even with tile 16, the smallest")
        return hr

    metrics = {"error": lambda a, b, lr: (a - b).abs().mean((1, 2, 3))}
    settings, task = ValidationSettings(metrics=("error",), best="error"), SimpleNamespace(restore=restore, label="prediction")
    with caplog.at_level(logging.WARNING):
        result = validate(Validation(pairs, metrics, settings), task)
    assert result is not None
    assert result.values == {"error": 0.0}
    assert len(result.rows) == 2
    assert "1.png is left out: out of memory even with tile 16" in caplog.text
    assert validate(Validation(pairs[1:2], metrics, settings), task) is None


def test_the_autoencoder_of_a_run_is_validated_in_tiles_when_memory_is_short():
    from sslsr_diffusion.inference.tiled import Reconstruct
    from sslsr_diffusion.models.codec import Codec

    codec = Codec(make_pipeline().vae)
    reconstruct = Reconstruct(codec)
    hr = photo(90, 150)[None]
    whole = reconstruct(hr, 0)
    assert whole.shape == hr.shape
    with limited(codec.vae.encoder, 128 * 128, HOST):
        tiled = Reconstruct(codec)(hr, 0)
    assert tiled.shape == hr.shape
    np.testing.assert_allclose(tiled.numpy(), whole.numpy(), atol=0.1)  # the middle of a tile sees that tile alone
