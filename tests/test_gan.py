"""losses/gan.py: the published formulas, who learns from what, and runs that stop and go on."""

from __future__ import annotations

import forks
import pytest
import torch
from toys import assert_same_checkpoint, smooth, toy_job, toy_losses

from sslsr_diffusion.config import RecipeError, parse
from sslsr_diffusion.errors import UserError
from sslsr_diffusion.losses import Means
from sslsr_diffusion.losses.gan import GANLoss, GANSettings
from sslsr_diffusion.losses.local import flat_areas, gradient_map
from sslsr_diffusion.runs.recipe import Recipe
from sslsr_diffusion.training.checkpoints import read_checkpoint
from sslsr_diffusion.training.job import CheckpointWritten
from sslsr_diffusion.training.loop import train_job
from sslsr_diffusion.types import Outputs

PATCH = {"discriminator": "patch", "objective": "hinge", "betas": (0.5, 0.9)}
SMALL = {**PATCH, "width": 4, "layers": 1, "lr": 1e-2}


def small(**values) -> GANLoss:
    return GANLoss(GANSettings(**{**SMALL, **values}), Means(seed=2))


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
    network = GANLoss(GANSettings(discriminator="patch")).network
    convolutions = [(tuple(p.weight.shape[:2]), p.stride[0]) for p in network if isinstance(p, torch.nn.Conv2d)]
    assert convolutions == [((64, 3), 2), ((128, 64), 2), ((256, 128), 2), ((512, 256), 1), ((1, 512), 1)]
    assert network(torch.zeros(1, 3, 256, 256)).shape == (1, 1, 30, 30)


def test_both_sides_are_the_hinge_formulas():
    loss, given = small(weight=0.5), outputs()
    value, terms = loss(given)
    with torch.no_grad():
        real, fake = loss.network(given.hr), loss.network(given.sr)
    assert value.item() == pytest.approx(-0.5 * fake.mean().item(), rel=1e-4)
    assert terms["gan"].item() == pytest.approx(-fake.mean().item(), rel=1e-4)
    learned = loss.learn(given)["gan/discriminator"]
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
        values.append(loss.learn(given)["gan/discriminator"].item())
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
    assert loss.learn(given)["gan/discriminator"] == 0
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


DISCRIMINATORS = {
    "patch": {**SMALL, "start_step": 4},
    "vgg": {"discriminator": "vgg", "objective": "relativistic", "width": 2},  # batch norm: its buffers are state as well
    "unet_sn": {"discriminator": "unet_sn", "objective": "vanilla", "width": 2, "r1_weight": 1.0},  # the power iteration's vectors, too
}


def losses(kind: str) -> list:
    return [*toy_losses(), GANLoss(GANSettings(**DISCRIMINATORS[kind]), Means(seed=2, side=32))]


def stop_after_ten(event) -> None:
    """Ends a run just after its checkpoint-10; a shorter run would have another schedule."""
    if isinstance(event, CheckpointWritten):
        raise KeyboardInterrupt


@pytest.mark.parametrize("kind", DISCRIMINATORS)
def test_a_run_that_stops_goes_on_bit_by_bit(tmp_path, kind):
    sizes = {"accumulate": 2, "batch_size": 2, "schedule": {"kind": "cosine"}}
    train_job(toy_job(tmp_path / "whole", losses=losses(kind), **sizes))
    first = toy_job(tmp_path / "parts", losses=losses(kind), **sizes)
    with pytest.raises(KeyboardInterrupt):
        train_job(first, on_event=stop_after_ten)
    half = read_checkpoint(tmp_path / "parts/checkpoint-10")
    assert half.state["learners"]["gan"]["step"] == 11
    train_job(toy_job(tmp_path / "parts", losses=losses(kind), **sizes), resume="latest")
    assert_same_checkpoint(tmp_path / "whole/checkpoint-20", tmp_path / "parts/checkpoint-20")
    end = read_checkpoint(tmp_path / "parts/checkpoint-20").tensors
    assert not all(torch.equal(value, half.tensors["learner-gan"][name]) for name, value in end["learner-gan"].items())
    assert any("exp_avg" in name for name in end["learner-gan-optimizer"])
    state = {name.rpartition(".")[2] for name in end["learner-gan"]}
    assert {"patch": set(), "vgg": {"running_mean", "running_var"}, "unet_sn": {"weight_u", "weight_v"}}[kind] <= state


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    """Also where one process has samples below the gate and the other has none."""
    shared = {"steps": 3, "max_timestep": 600, "gan": {**SMALL, "start_step": 2, "max_timestep": 600}, "checkpoints": {"every": 3}}
    forks.toy(tmp_path / "one", 1, {**shared, "batch_size": 2})
    forks.toy(tmp_path / "two", 2, {**shared, "batch_size": 1})
    one, two = (read_checkpoint(tmp_path / name / "checkpoint-3").tensors for name in ("one", "two"))
    for stem in ("trained", "learner-gan"):
        for name, value in one[stem].items():
            # the order of float32 sums differs, and Adam's first steps divide it by itself: hundredths of a step of 1e-2
            assert torch.allclose(value, two[stem][name], atol=3e-4), name


def test_the_recipe_knows_where_it_fits():
    losses = [{"kind": "pixel_l1"}, {"kind": "gan", **PATCH}]
    values = {"task": {"kind": "decoder", "part": "fusion"}, "data": {"sources": []}, "losses": losses, "validation": {"limit": 0}}
    assert parse(Recipe, values).losses[1].start_step == 1
    with pytest.raises(RecipeError, match="3 are too many for pictures of 16 pixels"):
        parse(Recipe, {**values, "training": {"crop_size": 16}})
    small = {**values, "model": {"kind": "stablesr", "init": "random", "preset": "tiny"}}  # 4 pixels per latent one
    with pytest.raises(RecipeError, match="3 are too many for pictures of 16 pixels"):  # what is decoded counts, not what is read
        parse(Recipe, {**small, "task": {"kind": "diffusion", "decode_crop": 4}, "training": {"crop_size": 128}})
    wide = parse(Recipe, {**values, "task": {"kind": "diffusion", "decode_crop": 4}, "training": {"crop_size": 128}})
    assert wide.picture_side == 32  # 8 pixels per latent one: what a discriminator is built for
    with pytest.raises(RecipeError, match="3 are too many for pictures of 16 pixels"):
        parse(Recipe, {**values, "task": {"kind": "diffusion", "decode_crop": 16}, "training": {"crop_size": 16}})
    parse(Recipe, {**values, "task": {"kind": "autoencoder"}})  # it gives pictures, so it can have it
    with pytest.raises(RecipeError, match=r"losses\.1\.kind: gan is impossible in task base; possible are diffusion\."):
        parse(Recipe, {**values, "task": {"kind": "base"}})


def test_what_does_not_fit_is_said():
    base = {"task": {"kind": "autoencoder"}, "data": {"sources": []}, "validation": {"limit": 0}}
    for values, side, said in (
        ({"discriminator": "vgg"}, 48, "losses.1.discriminator: vgg needs pictures of at least 64 pixels a side, these have 48."),
        ({}, 44, "losses.1.discriminator: unet_sn needs pictures of a multiple of 8 pixels a side, these have 44."),
        ({"layers": 2}, 64, "losses.1.layers: is of discriminator patch, here it is unet_sn; leave it out."),
        ({"init": "orthogonal", "file": "d.pth"}, 64, "losses.1.init: orthogonal has no effect on weights that come from a file"),
    ):
        losses = [{"kind": "pixel_l1"}, {"kind": "gan", **values}]
        with pytest.raises(RecipeError) as caught:
            parse(Recipe, {**base, "losses": losses, "training": {"crop_size": side}})
        assert said in str(caught.value)


def test_the_discriminator_may_learn_before_it_counts():
    loss, given = small(start_step=3, learn_step=2), outputs()
    learned, counted = [], []
    for _ in range(3):
        counted.append(bool(loss(given)[0] != 0))
        learned.append(bool(loss.learn(given)["gan/discriminator"] != 0))
        loss.update(sound=True)
    assert learned == [False, True, True]
    assert counted == [False, False, True]


def test_the_rate_follows_the_run_or_stays():
    for schedule, want in (("run", 0.25e-2), ("constant", 1e-2)):
        loss, given = small(lr_schedule=schedule), outputs()
        loss.learn(given)
        loss.update(sound=True, pace=0.25)
        assert loss.optimizer.param_groups[0]["lr"] == pytest.approx(want)


def test_flat_areas_and_gradients_are_what_it_sees():
    given, seen = outputs(2), []
    flat = flat_areas(given.hr)
    loss = small(mask="flat", sees="gradient")
    loss.network.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    loss(given)
    loss.learn(given)
    assert torch.equal(seen[1], gradient_map(given.hr) * ~flat)
    assert torch.equal(seen[0], gradient_map(given.sr) * ~flat)
    assert torch.equal(seen[2], seen[0])
    assert flat.any()
    assert not flat.all()


def test_the_r1_penalty_is_the_slope_at_the_truth():
    given = outputs()
    plain, punished = small(), small(r1_weight=10.0)
    first, second = plain.learn(given), punished.learn(given)
    assert first == second  # the raw term is the objective's own
    hr = given.hr.clone().requires_grad_()
    network = small().network
    (slope,) = torch.autograd.grad(network(hr).sum(), hr, create_graph=True)
    (10.0 / 2 * slope.square().sum(dim=(1, 2, 3)).mean()).backward()
    for a, b, c in zip(plain.network.parameters(), punished.network.parameters(), network.parameters()):
        own = torch.zeros_like(a) if c.grad is None else c.grad
        assert torch.allclose(b.grad - a.grad, own, rtol=1e-3, atol=1e-6)


def test_it_may_start_from_a_file(tmp_path):
    settings = {"discriminator": "vgg", "width": 2}
    drawn = GANLoss(GANSettings(**settings), Means(seed=1, side=64)).network.state_dict()
    torch.save({"params": {f"module.{name}": value for name, value in drawn.items()}}, tmp_path / "d.pth")
    asked = GANSettings(**settings, file=str(tmp_path / "d.pth"))
    read = GANLoss.build(asked, Means(seed=2, side=64)).network.state_dict()
    assert all(torch.equal(value, drawn[name]) for name, value in read.items())
    assert "tensors in" in GANLoss.check(asked)
    with pytest.raises(UserError, match=r"losses: gan\.file: .*d\.pth: linear1\.weight has shape \[100, 64\], expected \[100, 256\]\."):
        GANLoss.build(asked, Means(side=128))
    with pytest.raises(UserError, match=r"gan\.file: .* belongs to another network: 28 tensors are missing in it"):
        GANLoss.build(GANSettings(width=2, file=str(tmp_path / "d.pth")), Means())
    with pytest.raises(UserError, match=r"gan\.file: nowhere\.pth is not a file"):
        GANLoss.check(GANSettings(file="nowhere.pth"))
    (tmp_path / "broken.pth").write_bytes(b"no pickle")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    for name in ("broken.pth", "broken.safetensors"):
        with pytest.raises(UserError, match=r"gan\.file: broken\..*(cannot be read|is not a readable)") as caught:
            GANLoss.check(GANSettings(file=str(tmp_path / name)))
        assert "\n" not in str(caught.value)


def test_bsrgans_start():
    network = GANLoss(GANSettings(width=4, init="orthogonal")).network
    rows = network.conv1.weight_orig.flatten(1)
    assert torch.allclose(rows @ rows.T, 0.04 * torch.eye(len(rows)), atol=1e-5)
    assert not network.conv9.bias.any()
