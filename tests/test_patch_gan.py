"""losses/patch_gan.py: the published formulas, who learns from what, and runs that stop and go on."""

from __future__ import annotations

from dataclasses import replace

import forks
import pytest
import torch
from toys import assert_same_checkpoint, smooth, toy_job, toy_losses

from sslsr_diffusion.config import RecipeError, parse
from sslsr_diffusion.losses.patch_gan import PatchGANLoss, PatchGANSettings
from sslsr_diffusion.runs.recipe import Recipe
from sslsr_diffusion.training.checkpoints import read_checkpoint
from sslsr_diffusion.training.loop import train_job
from sslsr_diffusion.types import Outputs

SMALL = {"start_step": 1, "width": 4, "layers": 1, "lr": 1e-2}


def small(**values) -> PatchGANLoss:
    return PatchGANLoss(PatchGANSettings(**{**SMALL, **values}), seed=2)


def outputs(samples: int = 3) -> Outputs:
    hr = torch.stack([smooth(i) for i in range(samples)])
    sr = (hr + 0.3 * torch.stack([smooth(10 + i) for i in range(samples)])).requires_grad_()
    t = torch.tensor([10, 500, 900])[:samples]
    return Outputs(t=t, noise_level=torch.ones(samples), sr=sr, hr=hr, decoded=torch.arange(samples))


def part(given: Outputs, *places: int) -> Outputs:
    keep = list(places)
    return Outputs(
        t=given.t[keep], noise_level=given.noise_level[keep], sr=given.sr[keep], hr=given.hr[keep], decoded=torch.arange(len(keep))
    )


def test_the_published_width_and_depth():
    network = PatchGANLoss(PatchGANSettings()).network
    convolutions = [(tuple(p.weight.shape[:2]), p.stride[0]) for p in network if isinstance(p, torch.nn.Conv2d)]
    assert convolutions == [((64, 3), 2), ((128, 64), 2), ((256, 128), 2), ((512, 256), 1), ((1, 512), 1)]
    assert network(torch.zeros(1, 3, 256, 256)).shape == (1, 1, 30, 30)


def test_both_sides_are_the_hinge_formulas():
    loss, given = small(weight=0.5), outputs()
    value, terms = loss(given)
    with torch.no_grad():
        real, fake = loss.network(given.hr * 2 - 1), loss.network(given.sr * 2 - 1)
    assert value.item() == pytest.approx(-0.5 * fake.mean().item(), rel=1e-4)
    assert terms["patch_gan"].item() == pytest.approx(-fake.mean().item(), rel=1e-4)
    learned = loss.learn(given)["patch_gan/discriminator"]
    assert learned.item() == pytest.approx((0.5 * (torch.relu(1 - real).mean() + torch.relu(1 + fake).mean())).item(), rel=1e-4)


def test_each_side_learns_from_its_own_term_alone():
    loss, given = small(), outputs()
    loss(given)[0].backward()
    assert given.sr.grad.abs().sum() > 0
    assert all(p.grad is None for p in loss.network.parameters())
    given.sr.grad = None
    loss.learn(given)
    assert given.sr.grad is None
    assert all(p.grad is not None for p in loss.network.parameters())


def test_the_discriminator_learns_to_tell():
    loss, given = small(), outputs()
    values = []
    for _ in range(30):
        values.append(loss.learn(given)["patch_gan/discriminator"].item())
        loss.update(sound=True)
    assert values[-1] < 0.5 * values[0]


def test_micro_batches_add_up():
    whole, parts, given = small(), small(), outputs()
    whole.learn(given)
    total = torch.tensor(3.0)
    for places in ((0, 1), (2,)):
        parts.learn(part(given, *places), total)
    for a, b in zip(whole.network.parameters(), parts.network.parameters()):
        assert torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-7)
    split = sum(whole(part(given, *places), total)[0] for places in ((0, 1), (2,)))
    assert split.item() == pytest.approx(whole(given)[0].item(), rel=1e-4)


def test_before_its_step_nothing_happens():
    loss, given = small(start_step=2), outputs()
    before = [p.clone() for p in loss.network.parameters()]
    value, _ = loss(given)
    value.backward()
    assert value == 0
    assert not given.sr.grad.any()
    assert loss.learn(given)["patch_gan/discriminator"] == 0
    loss.update(sound=True)
    assert all(torch.equal(a, b) for a, b in zip(before, loss.network.parameters()))
    assert loss(given)[0] != 0


def test_gates_and_bad_steps():
    given = outputs()
    assert small(max_timestep=100).count(given) == 1
    loss = small(max_timestep=100)
    assert loss(given)[0].item() == pytest.approx(small()(part(given, 0))[0].item(), rel=1e-4)
    before = [p.clone() for p in loss.network.parameters()]
    loss.learn(given)
    loss.update(sound=False)
    assert all(torch.equal(a, b) for a, b in zip(before, loss.network.parameters()))
    assert all(p.grad is None for p in loss.network.parameters())


def losses() -> list:
    return [*toy_losses(max_timestep=600), small(start_step=4)]


def test_a_run_that_stops_goes_on_bit_by_bit(tmp_path):
    train_job(toy_job(tmp_path / "whole", losses=losses(), accumulate=2, batch_size=1))
    first = toy_job(tmp_path / "parts", losses=losses(), accumulate=2, batch_size=1)
    train_job(replace(first, training=first.training.model_copy(update={"steps": 10})))
    half = read_checkpoint(tmp_path / "parts/checkpoint-10")
    assert half.state["learners"]["patch_gan"]["step"] == 11
    train_job(toy_job(tmp_path / "parts", losses=losses(), accumulate=2, batch_size=1), resume="latest")
    assert_same_checkpoint(tmp_path / "whole/checkpoint-20", tmp_path / "parts/checkpoint-20")
    end = read_checkpoint(tmp_path / "parts/checkpoint-20").tensors
    assert not all(torch.equal(value, half.tensors["learner-patch_gan"][name]) for name, value in end["learner-patch_gan"].items())
    assert any("exp_avg" in name for name in end["learner-patch_gan-optimizer"])


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    """Also where one process has samples below the gate and the other has none."""
    shared = {"steps": 3, "max_timestep": 600, "patch_gan": {**SMALL, "start_step": 2, "max_timestep": 600}, "checkpoints": {"every": 3}}
    forks.toy(tmp_path / "one", 1, {**shared, "batch_size": 2})
    forks.toy(tmp_path / "two", 2, {**shared, "batch_size": 1})
    one, two = (read_checkpoint(tmp_path / name / "checkpoint-3").tensors for name in ("one", "two"))
    for stem in ("trained", "learner-patch_gan"):
        for name, value in one[stem].items():
            # the order of float32 sums differs, and Adam's first steps divide it by itself: hundredths of a step of 1e-2
            assert torch.allclose(value, two[stem][name], atol=3e-4), name


def test_the_recipe_knows_where_it_fits():
    losses = [{"kind": "pixel_l1"}, {"kind": "patch_gan"}]
    values = {"task": {"kind": "decoder", "part": "fusion"}, "data": {"sources": []}, "losses": losses, "validation": {"limit": 0}}
    assert parse(Recipe, values).losses[1].start_step == 501
    with pytest.raises(RecipeError, match="3 are too many for pictures of 16 pixels"):
        parse(Recipe, {**values, "training": {"crop_size": 16}})
    small = {**values, "model": {"kind": "stablesr", "init": "random", "preset": "small"}}
    with pytest.raises(RecipeError, match="3 are too many for pictures of 16 pixels"):  # what is decoded counts, not what is read
        parse(Recipe, {**small, "task": {"kind": "diffusion", "decode_crop": 4}, "training": {"crop_size": 128}})
    parse(Recipe, {**values, "task": {"kind": "diffusion", "decode_crop": 4}, "training": {"crop_size": 128}})  # 8 pixels per latent one
    with pytest.raises(RecipeError, match="3 are too many for pictures of 16 pixels"):
        parse(Recipe, {**values, "task": {"kind": "diffusion", "decode_crop": 16}, "training": {"crop_size": 16}})
    parse(Recipe, {**values, "task": {"kind": "autoencoder"}})  # it gives pictures, so it can have it
    with pytest.raises(RecipeError, match=r"losses\.1\.kind: patch_gan is impossible in task base; possible are diffusion\."):
        parse(Recipe, {**values, "task": {"kind": "base"}})
