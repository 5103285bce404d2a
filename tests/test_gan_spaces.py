"""losses/gan.py on latents and on the stages of a frozen network, the approximate R1, labels below 1, and turns."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_gan import outputs, part, stop_after_ten
from torch import Tensor, nn
from torch.nn import functional as F
from toys import assert_same_checkpoint, smooth, toy_batch, toy_job, toy_losses, toy_task

from sslsr_diffusion import hub
from sslsr_diffusion.config import RecipeError, parse
from sslsr_diffusion.errors import MissingDependency, UserError
from sslsr_diffusion.losses import Means, build_losses
from sslsr_diffusion.losses.gan import GANLoss, GANSettings
from sslsr_diffusion.losses.objectives import Relativistic, Vanilla
from sslsr_diffusion.runs.memory import step_bytes
from sslsr_diffusion.runs.recipe import Recipe, load_recipe
from sslsr_diffusion.seeding import sample_generator
from sslsr_diffusion.training.checkpoints import read_checkpoint
from sslsr_diffusion.training.loop import train_job
from sslsr_diffusion.training.session import Session
from sslsr_diffusion.training.settings import TrainingSettings
from sslsr_diffusion.types import Outputs

LATENT = {"space": "latent", "discriminator": "patch", "layers": 1, "width": 4, "lr": 1e-2}
STAGES = {"discriminator": "convnext", "width": 4, "lr": 1e-2}


class Trunk(nn.Module):
    """What open_clip's ConvNeXt looks like, of a few numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 4, 4)
        self.stages = nn.Sequential(nn.Conv2d(4, 4, 3, 1, 1), nn.Conv2d(4, 6, 2, 2))
        self.norm = nn.LayerNorm(6)


@pytest.fixture
def open_clip(monkeypatch, tmp_path):
    """A stand-in for the package; the file with the weights that were published for its network, beside a text tower's."""
    known = {"convnext_xxlarge": lambda: SimpleNamespace(trunk=Trunk()), "convnext_like_vit": lambda: SimpleNamespace(trunk=nn.Identity())}

    def create_model(name: str, device: str) -> SimpleNamespace:
        assert device == "meta"
        return SimpleNamespace(visual=known[name]())

    config = {"laion2b_s34b_b82k_augreg_soup": {"hf_hub": "laion/of-the-test/"}}
    module = SimpleNamespace(
        create_model=create_model, list_models=lambda: [*known, "ViT-B-32"], get_pretrained_cfg=lambda name, tag: config.get(tag, {})
    )
    monkeypatch.setitem(sys.modules, "open_clip", module)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        published = {f"visual.trunk.{name}": value for name, value in Trunk().state_dict().items()}
    torch.save({**published, "text_projection": torch.zeros(2, 2)}, tmp_path / "clip.bin")
    return tmp_path / "clip.bin"


def on_stages(file, **values) -> GANLoss:
    return GANLoss.build(GANSettings(**{**STAGES, "convnext": {"file": str(file)}, **values}), Means(seed=2))


def on_latents(**values) -> GANLoss:
    return GANLoss(GANSettings(**{**LATENT, **values}), Means(seed=2, latent=(3, 32)))


def latents() -> Outputs:
    given = outputs()
    z0_hr = torch.stack([2 * smooth(30 + i) - 1 for i in range(3)])
    z0 = (z0_hr + 0.3 * torch.stack([smooth(40 + i) for i in range(3)])).requires_grad_()
    return replace(given, decoded=None, sr=None, hr=None, z0=z0, z0_hr=z0_hr, index=torch.tensor([4, 8, 6]))


def latent_part(given: Outputs, *places: int) -> Outputs:
    keep = list(places)
    fields = {name: getattr(given, name)[keep] for name in ("t", "noise_level", "z0", "z0_hr", "index")}
    return Outputs(**fields)


def test_on_latents_it_sees_latents_as_they_are():
    loss, given = on_latents(weight=0.5), latents()
    assert loss.reads == {"z0", "z0_hr"}
    value, terms = loss(given)
    network = nn.Sequential(*loss.network)  # without the way to [-1, 1] that pictures have
    with torch.no_grad():
        real, fake = network(given.z0_hr), network(given.z0)
    assert terms["gan"].item() == pytest.approx(F.softplus(-fake).mean().item(), rel=1e-4)
    assert value.item() == pytest.approx(0.5 * terms["gan"].item(), rel=1e-5)
    value.backward()
    assert given.z0.grad.abs().sum() > 0
    learned = loss.learn(given)["gan/discriminator"]
    assert learned.item() == pytest.approx((F.softplus(-real).mean() + F.softplus(fake).mean()).item(), rel=1e-4)
    gated = on_latents(max_timestep=100)
    assert gated.count(given) == 1
    assert gated(given)[0].item() == pytest.approx(on_latents()(latent_part(given, 0))[0].item(), rel=1e-4)
    with pytest.raises(ValueError, match=r"Outputs\.z0 and Outputs\.z0_hr"):
        loss(replace(given, z0=None))


@pytest.mark.parametrize("space", ["latent", "stages"])
def test_the_gradient_of_the_prediction_in_float64(space, open_clip):
    loss, given, field = (on_latents(), latents(), "z0") if space == "latent" else (on_stages(open_clip), outputs(), "sr")
    loss.network.eval()
    loss(given)[0].backward()
    got = getattr(given, field).grad
    double = getattr(given, field).detach().double().requires_grad_()
    said = loss.network.double()(double)
    said = [said] if isinstance(said, Tensor) else said
    (0.1 * sum(F.softplus(-level).mean() for level in said)).backward()
    assert (got - double.grad).norm() <= 1e-4 * double.grad.norm()


@pytest.mark.parametrize("r1", [{}, {"r1_weight": 3.0}, {"r1_weight": 3.0, "r1_noise": 0.005}], ids=["plain", "slope", "noise"])
@pytest.mark.parametrize("space", ["latent", "stages"])
def test_micro_batches_add_up(space, r1, open_clip):
    if space == "latent":
        (whole, parts), given, cut = (on_latents(**r1) for _ in range(2)), latents(), latent_part
    else:
        (whole, parts), given = (on_stages(open_clip, **r1) for _ in range(2)), replace(outputs(), index=torch.tensor([4, 8, 6]))

        def cut(given: Outputs, *places: int) -> Outputs:
            return replace(part(given, *places), index=given.index[list(places)])

    for loss in (whole, parts):
        loss.network.eval()  # spectral norm takes a step of its power iteration with every call
    total, value = torch.tensor(3.0), whole(given)[0].item()
    whole.learn(given)
    split = 0.0
    for places in ((0, 1), (2,)):
        split += parts(cut(given, *places), total)[0].item()
        parts.learn(cut(given, *places), total)
    assert split == pytest.approx(value, rel=1e-4)
    for a, b in zip(whole.trained, parts.trained):
        assert (a.grad - b.grad).norm() <= 1e-4 * a.grad.norm() + 1e-8


def test_the_approximate_penalty_is_the_change_under_the_samples_own_noise():
    given = latents()
    plain, punished = on_latents(), on_latents(r1_weight=10.0, r1_noise=0.005)
    assert plain.learn(given) == punished.learn(given)  # the raw term is the objective's own
    noise = [2 * torch.rand(3, 32, 32, generator=sample_generator(2, i, "gan", "r1")) - 1 for i in (4, 8, 6)]
    network = on_latents().network.double()
    moved, still = (network(side.double()) for side in (given.z0_hr + 0.005 * torch.stack(noise), given.z0_hr))
    (10.0 * (moved - still).square().mean()).backward()
    for a, b, c in zip(plain.network.parameters(), punished.network.parameters(), network.parameters()):
        own = torch.zeros_like(a) if c.grad is None else c.grad.float()
        assert (b.grad - a.grad - own).norm() <= 2e-3 * own.norm() + 1e-6 * a.grad.norm()  # a difference of differences in float32


def test_a_label_below_one_and_levels():
    logits = [torch.linspace(-2, 2, 6, dtype=torch.float64).reshape(2, 3), torch.linspace(-1, 3, 4, dtype=torch.float64).reshape(2, 2)]

    def network(side: Tensor) -> list[Tensor]:
        return [level + side for level in logits]

    real, fake = torch.tensor(0.5, dtype=torch.float64), torch.tensor(-0.25, dtype=torch.float64)
    first, _ = Vanilla(0.8).discriminator(network, real, fake)
    want = sum(F.binary_cross_entropy_with_logits(level + real, torch.full_like(level, 0.8)) for level in logits)
    assert first.item() == pytest.approx(want.item(), rel=1e-9)
    value = Relativistic().generator(network, real, fake)
    alone = sum(Relativistic().generator(lambda side, level=level: level + side, real, fake) for level in logits)
    assert value.item() == pytest.approx(alone.item(), rel=1e-12)  # each level against its own means
    assert GANLoss(GANSettings(**{**LATENT, "real_label": 0.8}), Means(latent=(3, 8))).objective.real_label == 0.8


def test_heads_learn_and_what_they_stand_on_does_not(open_clip, tmp_path):
    loss, given = on_stages(open_clip, weight=0.5, objective="relativistic"), outputs()
    frozen = torch.load(open_clip, weights_only=True)
    assert torch.equal(loss.network.stem.weight, frozen["visual.trunk.stem.weight"])
    assert [logits.shape[1:] for logits in loss.network(given.hr)] == [(1, 8, 8), (1, 4, 4)]
    names = {name.split(".")[0] for name, parameter in loss.network.named_parameters() if parameter.requires_grad}
    assert names == {"heads"}
    value, _ = loss(given)
    value.backward()
    assert given.sr.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in loss.network.parameters())
    values = []
    for _ in range(30):
        values.append(loss.learn(given)["gan/discriminator"].item())
        loss.update(sound=True)
    assert values[-1] < 0.8 * values[0]
    assert torch.equal(loss.network.stem.weight, frozen["visual.trunk.stem.weight"])
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    seen = []
    loss.network.stem.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    loss.network(mean.expand(1, 3, 32, 32))
    assert seen[0].abs().max() < 1e-6


def test_runs_stop_and_go_on_and_keep_the_heads_alone(open_clip, tmp_path):
    def losses() -> list:
        return [*toy_losses()[:2], on_stages(open_clip), GANLoss(GANSettings(**LATENT, name="latent"), Means(seed=2, latent=(3, 8)))]

    sizes = {"accumulate": 2, "turns": "alternate"}
    train_job(toy_job(tmp_path / "whole", losses=losses(), **sizes))
    with pytest.raises(KeyboardInterrupt):
        train_job(toy_job(tmp_path / "parts", losses=losses(), **sizes), on_event=stop_after_ten)
    train_job(toy_job(tmp_path / "parts", losses=losses(), **sizes), resume="latest")
    assert_same_checkpoint(tmp_path / "whole/checkpoint-20", tmp_path / "parts/checkpoint-20")
    ten, twenty = (read_checkpoint(tmp_path / f"whole/checkpoint-{step}").tensors for step in (10, 20))
    assert {name.split(".")[0] for name in twenty["learner-gan"]} == {"heads"}
    assert not all(torch.equal(value, ten["learner-latent"][name]) for name, value in twenty["learner-latent"].items())


@pytest.mark.parametrize(("turns", "want"), [("together", [(True, True)] * 4), ("alternate", [(True, False), (False, True)] * 2)])
def test_turns(turns, want, tmp_path):
    """Odd steps move the networks, even ones the discriminator; together moves both."""
    loss, task = GANLoss(GANSettings(**LATENT), Means(seed=2, latent=(3, 8))), toy_task()
    settings = TrainingSettings.model_validate({"steps": 4, "turns": turns, "crop_size": 32})
    session = Session(task, [*toy_losses()[:2], loss], settings, seed=3, trackers=(), run=tmp_path)
    sides = [list(task.module.trained.parameters()), loss.trained]
    for step, (networks, learner) in enumerate(want, 1):
        before = [[parameter.detach().clone() for parameter in side] for side in sides]
        report = session.step([toy_batch([step]), toy_batch([10 + step])])
        moved = [not all(map(torch.equal, old, now)) for old, now in zip(before, sides)]
        assert moved == [networks, learner]
        assert ("train/grad_norm" in report.values()) == networks
        assert ("loss/gan/discriminator" in report.values()) == learner
        assert {"loss/diffusion", "loss/gan", "loss/total"} <= report.values().keys()
        assert loss.step == step + 1
    session.close()


def test_a_task_gives_latents_and_decodes_nothing_for_them():
    task, loss = toy_task(0.0), on_latents()
    batch = toy_batch([3, 5])
    draws = task.draw(batch, [loss])
    made = task.run(task.module, batch, draws)
    assert made.sr is None
    assert made.index.tolist() == [3, 5]
    process = task.networks.process
    zt = process.add_noise(made.z0_hr, draws.noise["noise"], made.t)
    assert torch.allclose(made.z0, process.clean_and_noise(made.pred, zt, made.t)[0], atol=1e-5)
    assert torch.equal(made.z0_hr, task.networks.codec.encode(batch.hr, draws.noise["posterior_hr"]))
    loss(made)[0].backward()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in task.module.parameters())


def test_the_estimate_counts_it(open_clip):
    """On latents, and on a frozen network, of which only the heads have optimizer states."""
    size = ["training.crop_size=64", "data.sources=[]", "validation.limit=0"]
    plain = "{kind: diffusion}, {kind: pixel_l1}"
    both = f"{plain}, {{kind: gan, space: latent, name: latent, discriminator: patch, layers: 1}}, {{kind: gan, discriminator: convnext}}"
    recipes = [load_recipe("tiny", [*size, f"losses=[{entries}]"]) for entries in (plain, both)]
    before, after = map(step_bytes, recipes)
    networks = [loss.network for loss in build_losses(recipes[1].losses[2:], Means(shapes=True, latent=(8, 16)))]
    learned, every = (sum(p.numel() for net in networks for p in net.parameters() if p.requires_grad or whole) for whole in (False, True))
    assert 0 < learned < every
    assert after["optimizer"] - before["optimizer"] == 8 * learned
    assert after["weights"] - before["weights"] == 4 * every
    assert after["activations and gradients"] > before["activations and gradients"]


BASE = {"data": {"sources": []}, "validation": {"limit": 0}, "training": {"crop_size": 64}}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"layers": 2}, "layers: is of discriminator patch, here it is unet_sn; leave it out."),
        ({"convnext": {}}, "convnext: is of discriminator convnext, here it is unet_sn; leave it out."),
        ({"real_label": 0.8, "objective": "hinge"}, "real_label: is of objective vanilla, here it is hinge; leave it out."),
        ({"r1_noise": 0.005}, "r1_noise: has no effect where r1_weight is 0; set that, too, or leave it out."),
        ({"discriminator": "convnext", "file": "x"}, "file: the heads of convnext are always drawn; leave it out"),
        (
            {"space": "latent", "sees": "gradient"},
            "sees: gradient is of pictures, and the discriminator sees latents;",
        ),
        ({"space": "latent", "discriminator": "convnext"}, "discriminator: convnext is of pictures, and the discriminator sees latents;"),
        ({"space": "latent", "discriminator": "patch"}, "layers: 3 are too many for latents of 8 pixels a side."),
    ],
)
def test_what_does_not_fit_is_said(values, said):
    with pytest.raises(RecipeError) as caught:
        parse(Recipe, {**BASE, "losses": [{"kind": "diffusion"}, {"kind": "gan", **values}]})
    assert f"losses.1.{said}" in str(caught.value)


def test_tasks_without_latents_and_turns_without_learners_are_said():
    with pytest.raises(RecipeError, match=r"losses\.1: as it is set, gan reads z0, which task autoencoder does not give"):
        parse(Recipe, {**BASE, "task": {"kind": "autoencoder"}, "losses": [{"kind": "pixel_l1"}, {"kind": "gan", "space": "latent"}]})
    with pytest.raises(RecipeError, match=r"training\.turns: alternate needs a loss that learns, gan or vsd"):
        parse(Recipe, {**BASE, "training": {"crop_size": 64, "turns": "alternate"}, "losses": [{"kind": "diffusion"}]})


def test_what_convnext_lacks_is_one_sentence(open_clip, monkeypatch):
    for convnext, said in (
        ({"name": "convnext_huge"}, r"expected one of open_clip's convnext_xxlarge, convnext_like_vit; got 'convnext_huge'\."),
        ({"name": "convnext_like_vit"}, r"expected a network with stages, as convnext_xxlarge is; got 'convnext_like_vit'\."),
    ):
        with pytest.raises(UserError, match=rf"^losses: gan\.convnext\.name: {said}"):
            GANLoss.build(GANSettings(**STAGES, convnext=convnext), Means(shapes=True))
    odd = {"convnext": {"pretrained": "openai"}}
    with pytest.raises(UserError, match=r"^gan\.convnext\.pretrained: open_clip knows no 'openai' of convnext_xxlarge on the hub"):
        GANLoss.check(GANSettings(**STAGES, **odd))
    assert GANLoss.check(GANSettings(**STAGES, convnext={"file": str(open_clip)})) == f"gan: 9 tensors in {open_clip}"
    torch.save({"visual.trunk.stem.weight": torch.zeros(4, 3, 4, 4)}, open_clip)
    with pytest.raises(UserError, match=r"^losses: gan\.convnext\.file: .* belongs to another network: 7 tensors are missing in it"):
        on_stages(open_clip)
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(MissingDependency, match=r'gan\.convnext: convnext needs open_clip, .*; pip install "sslsr-diffusion\[open-clip'):
        GANLoss.check(GANSettings(**STAGES))
    assert build_losses([GANSettings(**STAGES)], Means(shapes=True)) == []


def test_weights_of_the_hub_are_one_file_of_those_that_it_has(open_clip, monkeypatch, tmp_path):
    settings, asked = GANSettings(**STAGES), []
    name = "open_clip_pytorch_model.bin"

    def fetch(repository: str, *, patterns: list[str], field: str) -> Path:
        asked.append((repository, patterns))
        (tmp_path / name).write_bytes(open_clip.read_bytes())
        return tmp_path

    monkeypatch.setattr(hub, "cached", lambda *args, **options: tmp_path)
    monkeypatch.setattr(hub, "look_up", lambda *args, **options: hub.Found("0123456789abcdef", (name, "README.md")))
    monkeypatch.setattr(hub, "fetch", fetch)
    said = "gan: laion/of-the-test on the hub, commit 0123456789ab; open_clip_pytorch_model.bin is downloaded when training starts"
    assert GANLoss.check(settings) == said
    assert asked == []
    built = GANLoss.build(settings, Means(seed=2))
    assert asked == [("laion/of-the-test", [name])]
    assert torch.equal(built.network.stem.weight, on_stages(open_clip).network.stem.weight)
    assert GANLoss.check(settings) == f"gan: {tmp_path / name}"
    (tmp_path / name).unlink()
    monkeypatch.setattr(hub, "look_up", lambda *args, **options: hub.Found("0123456789abcdef", ("README.md",)))
    with pytest.raises(UserError, match=r"^gan\.convnext: laion/of-the-test on the hub holds none of open_clip_model\.safe"):
        GANLoss.check(settings)
