"""losses/vsd.py on a prior of a few numbers: the formulas, who learns what, micro-batches, and a run that stops and goes on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from one_step_cases import toy, toy_text
from test_gan import stop_after_ten
from torch import Tensor, nn
from toys import assert_same_checkpoint, smooth, toy_batch, toy_job, toy_losses

from sslsr_diffusion.losses import Means, build_losses
from sslsr_diffusion.losses.gan import GANSettings
from sslsr_diffusion.losses.pixel import PixelL2Settings
from sslsr_diffusion.losses.vsd import VSDLoss, VSDSettings
from sslsr_diffusion.models.condition import Condition, Text
from sslsr_diffusion.models.lora import LoRASettings
from sslsr_diffusion.models.one_step.prior import base_prior
from sslsr_diffusion.models.process import DDPM
from sslsr_diffusion.seeding import sample_generator
from sslsr_diffusion.tasks.one_step import OneStepTask
from sslsr_diffusion.training.checkpoints import read_checkpoint
from sslsr_diffusion.training.loop import train_job
from sslsr_diffusion.training.session import Session
from sslsr_diffusion.training.settings import TrainingSettings
from sslsr_diffusion.types import Outputs


class ToyPrior(nn.Module):
    """A frozen convolution that is told a text, and a rank-one matrix beside it."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.base = nn.Conv2d(3, 3, 3, padding=1).requires_grad_(False)
            self.base.register_buffer("places", torch.arange(9.0))  # as SD3's positions, or the scales of nf4
            self.texts = nn.Parameter(torch.randn(2, 3, 1, 1), requires_grad=False)  # the prompt's and the negative one's
            self.down, self.up = nn.Conv2d(3, 1, 1, bias=False), nn.Conv2d(1, 3, 1, bias=False)
        nn.init.zeros_(self.up.weight)
        self.process = DDPM(torch.linspace(0.999, 0.05, 1000), {"prediction_type": "epsilon"})

    @property
    def network(self) -> nn.Module:
        return self

    def predict(self, zt: Tensor, t: Tensor, *, guidance: float, learned: bool) -> Tensor:
        said = [self.base(zt) * (t / 1000)[:, None, None, None] + text for text in self.texts]
        pred = said[1] + guidance * (said[0] - said[1])
        return pred + self.up(self.down(zt)) if learned else pred


def vsd(seed: int = 5, **values) -> VSDLoss:
    return VSDLoss(VSDSettings(**{"lr": 1e-2, **values}), ToyPrior(seed), Means(seed=7))


def outputs(*indices: int) -> Outputs:
    z0 = torch.stack([smooth(i, size=8) - 0.5 for i in indices]).requires_grad_()
    t = torch.zeros(len(indices), dtype=torch.int64)
    return Outputs(t=t, noise_level=t.float(), index=torch.tensor(indices), z0=z0)


def by_hand(loss: VSDLoss, given: Outputs) -> tuple[list[Tensor], list[Tensor]]:
    """Per sample the published gradient of z, and the score network's error, in float64."""
    prior = loss.prior.double()
    gradients, errors = [], []
    for place, index in enumerate(given.index.tolist()):
        z = given.z0.detach()[place : place + 1].double()
        for purpose, low, high in (("teacher", 20, 979), ("score", 0, 999)):
            generator = sample_generator(7, index, "vsd", purpose)
            t = torch.randint(low, high + 1, (), generator=generator)[None]
            noise = torch.randn(z.shape[1:], generator=generator)[None].double()
            signal, spread = (table[t].double() for table in (prior.process.signal, prior.process.spread))
            zt = signal * z + spread * noise
            if purpose == "score":
                errors.append((prior.predict(zt, t, guidance=1.0, learned=True) - noise).square().mean())
                continue
            base, score = ((zt - spread * prior.predict(zt, t, guidance=g, learned=w)) / signal for g, w in ((7.5, False), (1.0, True)))
            gradients.append((score - base) / (z - base).abs().mean())
    prior.float()
    return gradients, errors


def taught(loss: VSDLoss) -> VSDLoss:
    with torch.no_grad():
        loss.prior.up.weight.add_(0.1)  # the score network parts from the base
    return loss


def test_the_gradient_is_the_published_one():
    loss, given = taught(vsd(weight=3.0)), outputs(1, 2, 9)
    value, terms = loss(given)
    value.backward()
    want = torch.cat(by_hand(loss, given)[0])
    numbers = given.z0.numel()
    got = given.z0.grad
    assert (got - 3 * 2 * want / numbers).norm() <= 1e-5 * got.norm()  # float32 against float64
    assert terms["vsd"].item() == pytest.approx(want.square().mean().item(), rel=1e-4)
    assert value.item() == pytest.approx(3 * terms["vsd"].item(), rel=1e-6)
    assert all(parameter.grad is None for parameter in loss.network.parameters())


def test_the_score_network_learns_the_bases_objective_and_nothing_else_moves():
    loss, given = taught(vsd()), outputs(1, 2, 9)
    raw = loss.learn(given)["vsd/score"]
    errors = by_hand(loss, given)[1]
    assert raw.item() == pytest.approx(sum(errors).item() / 3, rel=1e-4)
    assert given.z0.grad is None
    grown = {name for name, parameter in loss.network.named_parameters() if parameter.grad is not None}
    assert grown == {"down.weight", "up.weight"}
    before = {name: value.clone() for name, value in loss.network.state_dict().items()}
    values = []
    for _ in range(30):
        loss.update(sound=True)
        values.append(loss.learn(given)["vsd/score"].item())
    assert values[-1] < values[0]
    moved = {name for name, value in loss.network.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"down.weight", "up.weight"}


def test_micro_batches_add_up():
    whole, parts, given = taught(vsd()), taught(vsd()), outputs(1, 2, 9)
    value, _ = whole(given)
    whole.learn(given)
    total, split = torch.tensor(3.0), 0.0
    for indices in ((1, 2), (9,)):
        piece = outputs(*indices)
        split += parts(piece, total)[0].item()
        parts.learn(piece, total)
    assert split == pytest.approx(value.item(), rel=1e-5)
    for a, b in zip(whole.trained, parts.trained):
        assert (a.grad - b.grad).norm() <= 1e-5 * a.grad.norm()


def test_where_score_and_unguided_base_agree_there_is_nothing_to_learn():
    loss, given = vsd(guidance=1.0), outputs(1, 2)
    value, _ = loss(given)
    value.backward()
    assert value == 0
    assert not given.z0.grad.any()
    with pytest.raises(ValueError, match=r"the vsd loss needs Outputs\.z0"):
        loss(replace(given, z0=None))


def test_a_run_that_stops_goes_on_bit_by_bit_and_keeps_no_frozen_weights(tmp_path):
    train_job(toy_job(tmp_path / "whole", losses=[*toy_losses()[:2], vsd()], turns="alternate"))
    with pytest.raises(KeyboardInterrupt):
        train_job(toy_job(tmp_path / "parts", losses=[*toy_losses()[:2], vsd()], turns="alternate"), on_event=stop_after_ten)
    train_job(toy_job(tmp_path / "parts", losses=[*toy_losses()[:2], vsd()], turns="alternate"), resume="latest")
    assert_same_checkpoint(tmp_path / "whole/checkpoint-20", tmp_path / "parts/checkpoint-20")
    kept = read_checkpoint(tmp_path / "whole/checkpoint-20").tensors
    assert {"down.weight", "up.weight"} <= kept["learner-vsd"].keys()
    assert not {"base.weight", "base.places", "texts"} & kept["learner-vsd"].keys()
    assert kept["learner-vsd"]["up.weight"].any()


def test_guidance_leads_away_from_the_negative_text():
    networks, text = toy("sd"), toy_text("sd")
    negative = Text(text.sequence.flip(1)[:, :4])  # of another length
    prior = base_prior(networks.denoiser, networks.process, (text, negative), LoRASettings(rank=2), seed=3)
    zt, t = torch.randn(1, networks.codec.latent_channels, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([400])
    with torch.no_grad():
        towards, away = (prior.network(zt, t, Condition(text=each)) for each in (text, negative))
        said = prior.predict(zt, t, guidance=7.5, learned=False)
        assert torch.equal(prior.predict(zt, t, guidance=1.0, learned=False), towards)
    assert torch.allclose(said, away + 7.5 * (towards - away), atol=1e-5)
    assert (said - towards).norm() > 0.01 * towards.norm()


def test_a_one_step_model_learns_by_it(tmp_path):
    """Beside a GAN on its latents, on the real step; the truth is encoded for the GAN alone."""
    networks = toy("sd")
    task = OneStepTask(networks, seed=3)
    entries = [PixelL2Settings(), VSDSettings(lr=1e-2), GANSettings(space="latent", discriminator="patch", layers=1, width=4)]
    losses = build_losses(entries, Means(seed=3, latent=(networks.codec.latent_channels, 8), prior=networks.prior))
    settings = TrainingSettings.model_validate({"steps": 2, "crop_size": 32})
    session = Session(task, losses, settings, seed=3, trackers=(), run=tmp_path)
    assert "posterior_hr" not in task.draw(toy_batch([1]), losses[:2]).noise
    sides = [list(session.parameters.values()), losses[1].trained, losses[2].trained]
    before = [[parameter.detach().clone() for parameter in side] for side in sides]
    frozen = [parameter.detach().clone() for parameter in losses[1].network.parameters() if not parameter.requires_grad]
    for step in range(2):
        report = session.step([toy_batch([step, 5 + step])])
        assert report.updated
    assert {"loss/vsd", "loss/vsd/score", "loss/gan", "loss/gan/discriminator"} <= report.values().keys()
    for side, old in zip(sides, before):
        assert not all(map(torch.equal, old, side))
    now = [parameter for parameter in losses[1].network.parameters() if not parameter.requires_grad]
    assert all(map(torch.equal, frozen, now))
    session.close()
