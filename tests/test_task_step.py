"""One step's data flow: any split of a batch gives the same sum, windows and gates select what they say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from toys import SIZE, smooth, toy_batch, toy_losses, toy_networks

from sslsr_diffusion.tasks.diffusion import DiffusionTask
from sslsr_diffusion.tasks.pixels import MARGIN, choose_pixels, draw_windows
from sslsr_diffusion.tasks.task import apply_losses
from sslsr_diffusion.types import Given


def step(task, batch, losses, counts=None):
    draws = task.draw(batch, losses)
    return apply_losses(task.run(task.module, batch, draws), losses, counts)


def counts_of(task, batches, losses):
    return {loss.name: sum(loss.count(task.draw(batch, losses).given) for batch in batches) for loss in losses}


def gradient(module):
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.requires_grad])


@pytest.mark.parametrize("max_timestep", [None, 500])
@pytest.mark.parametrize("decode_crop", [None, 4])
@pytest.mark.parametrize("parts", [[[0, 1, 2, 3]], [[0], [1], [2], [3]], [[0, 1, 2], [3]]])
def test_any_split_of_a_batch_gives_the_same_loss_and_gradient(parts, decode_crop, max_timestep):
    task = DiffusionTask(toy_networks(dropout=0), seed=1, decode_crop=decode_crop)
    losses = toy_losses(max_timestep=max_timestep)
    whole = step(task, toy_batch([0, 1, 2, 3]), losses)
    whole.loss.backward()
    want = gradient(task.module)
    task.module.zero_grad()
    batches = [toy_batch(part) for part in parts]
    counts = counts_of(task, batches, losses)
    results = [step(task, batch, losses, counts) for batch in batches]
    sum(r.loss for r in results).backward()
    torch.testing.assert_close(sum(r.loss for r in results), whole.loss, rtol=1e-6, atol=0)
    for name, value in whole.raw.items():
        torch.testing.assert_close(sum(r.raw[name] for r in results), value, rtol=1e-5, atol=1e-9)
    # float32 sums in another order: 1e-6 of the norm
    assert (gradient(task.module) - want).norm() <= 2e-6 * want.norm()


def test_draws_depend_on_seed_and_index_alone():
    task, losses = DiffusionTask(toy_networks(), seed=1), toy_losses()
    together = task.draw(toy_batch([4, 9]), losses)
    torch.rand(5)
    alone = task.draw(toy_batch([9]), losses)
    assert together.given.t[1] == alone.given.t[0]
    for purpose, value in alone.noise.items():
        assert torch.equal(together.noise[purpose][1:], value)
    other = DiffusionTask(toy_networks(), seed=2).draw(toy_batch([9]), losses)
    assert not torch.equal(other.noise["noise"], alone.noise["noise"])


def test_gated_samples_are_not_decoded():
    task, losses = DiffusionTask(toy_networks(), seed=1), toy_losses(max_timestep=500)
    batch = toy_batch(list(range(8)))
    draws = task.draw(batch, losses)
    clean = (draws.given.t <= 500).nonzero()[:, 0]
    assert 0 < len(clean) < 8
    assert torch.equal(draws.given.decoded, clean)
    outputs = task.run(task.module, batch, draws)
    assert outputs.sr.shape == (len(clean), 3, SIZE, SIZE)
    assert torch.equal(outputs.hr, batch.hr[clean])


def test_a_batch_without_any_clean_sample_gives_zero_with_a_graph():
    task, losses = DiffusionTask(toy_networks(), seed=1), toy_losses(max_timestep=0)
    result = step(task, toy_batch([0, 1]), losses)
    result.loss.backward()
    assert result.raw["pixel_l1"] == result.raw["self_similarity/l1"] == 0
    assert torch.isfinite(gradient(task.module)).all()


def test_a_perfect_prediction_has_no_pixel_or_self_similarity_loss_in_the_same_range():
    """The published code compares [-1, 1] with [0, 1]: a perfect picture then has a loss. Ours must not."""
    losses = toy_losses()
    hr = torch.stack([smooth(1), smooth(2)])
    mask = torch.ones(2, 1, SIZE, SIZE, dtype=torch.bool)
    given = Given(t=torch.zeros(2, dtype=torch.int64), noise_level=torch.ones(2), decoded=torch.arange(2), hr=hr, mask=mask)
    from sslsr_diffusion.types import Outputs

    outputs = Outputs(**vars(given), pred=torch.zeros(2, 1), target=torch.zeros(2, 1), sr=hr.clone())
    assert apply_losses(outputs, losses).loss == 0
    losses[2].settings = losses[2].settings.model_copy(update={"published_range": True})
    assert apply_losses(outputs, losses).loss > 1e-4


def test_windows_lie_inside_and_interior_equals_the_full_crop():
    windows = draw_windows(list(range(50)), (16, 12), 6, seed=0)
    full = torch.randn(50, 3, 16, 12, generator=torch.Generator().manual_seed(0))
    patch = windows.cut_latents(full)
    assert patch.shape[-2:] == (6 + 2 * MARGIN, 12)  # the second side is smaller than window and margins
    assert torch.equal(windows.cut_interior(patch, 1), windows.cut_pixels(full, 1))
    assert len({tuple(s) for s in windows.start.tolist()}) > 20
    inside = windows.start - windows.patch_start
    at_border = (windows.start == 0) | (windows.start + torch.tensor([6, 6]) == torch.tensor([16, 12]))
    assert ((inside >= MARGIN) | (windows.patch_start == 0))[~at_border].all()


def test_window_mask_is_the_strided_mask_of_the_full_crop():
    losses = toy_losses()[2:]
    batch = toy_batch(list(range(6)), density=1.0)
    given = Given(t=torch.zeros(6, dtype=torch.int64), noise_level=torch.ones(6))
    windowed, windows = choose_pixels(given, batch, losses, scale=4, decode_crop=3, seed=0)
    whole, _ = choose_pixels(given, batch, losses, scale=4, decode_crop=None, seed=0)
    assert torch.equal(losses[0]._mask(windowed), windows.cut_pixels(losses[0]._mask(whole), 4))
    assert (windowed.origin % 2 == 0).all()


def test_interior_of_a_decoded_window_equals_the_full_decode():
    """The toy decoder looks 0 latent pixels far, so the window must agree exactly with the full picture."""
    losses = toy_losses()
    batch = toy_batch([0, 1, 2])
    full = DiffusionTask(toy_networks(dropout=0), seed=1)
    window = DiffusionTask(toy_networks(dropout=0), seed=1, decode_crop=4)
    draws = window.draw(batch, losses)
    got = window.run(window.module, batch, draws).sr
    want = draws.windows.cut_pixels(full.run(full.module, batch, full.draw(batch, losses)).sr, 4)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def test_without_pixel_losses_nothing_is_decoded():
    task, losses = DiffusionTask(toy_networks(), seed=1), toy_losses()[:1]
    batch = toy_batch([0])
    assert task.run(task.module, batch, task.draw(batch, losses)).sr is None


def test_lr_is_upsampled_and_clamped():
    task, losses = DiffusionTask(toy_networks(), seed=1), toy_losses()[:1]
    seen = {}
    original = task.networks.codec.encode
    task.networks.codec.encode = lambda pixels, noise: seen.setdefault(len(seen), pixels) is None or original(pixels, noise)
    batch = toy_batch([0])
    batch = replace(batch, lr=F.interpolate(torch.tensor([[[[0.0, 1.0], [1.0, 0.0]]]]).expand(1, 3, 2, 2), size=(8, 8), mode="nearest"))
    task.run(task.module, batch, task.draw(batch, losses))
    assert seen[1].shape == batch.hr.shape
    assert seen[1].min() == 0
    assert seen[1].max() == 1


def test_the_origin_of_a_window_is_where_its_pixels_lie():
    """Of the window itself, not of the larger patch that is decoded: it anchors the stride pattern of the mask."""
    task, batch = DiffusionTask(toy_networks(), seed=1, decode_crop=3), toy_batch(list(range(6)))
    draws = task.draw(batch, toy_losses())
    assert draws.windows is not None
    assert not torch.equal(draws.windows.start, draws.windows.patch_start)
    given, side = draws.given, 3 * 4
    for row, (top, left) in enumerate(given.origin.tolist()):
        whole = batch.hr[given.decoded[row]]
        assert torch.equal(given.hr[row], whole[:, top : top + side, left : left + side])
