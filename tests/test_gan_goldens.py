"""The losses and judging networks of the published GAN methods against values that the published code gave (tests/golden/gan/README.md)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from goldens import load_golden
from torch import Tensor, nn

from sslsr_diffusion.imresize import matlab_bicubic
from sslsr_diffusion.losses import Means
from sslsr_diffusion.losses.back_projection import BackProjectionLoss, BackProjectionSettings
from sslsr_diffusion.losses.backbones import VGG
from sslsr_diffusion.losses.best_buddy import BestBuddyLoss, BestBuddySettings, best_buddies
from sslsr_diffusion.losses.discriminators import Ranker, UNetDiscriminator, VGGDiscriminator
from sslsr_diffusion.losses.gan import GANLoss, GANSettings
from sslsr_diffusion.losses.gradient import GradientLoss, GradientSettings
from sslsr_diffusion.losses.ldl import LDLLoss, LDLSettings, artefact_map
from sslsr_diffusion.losses.local import flat_areas, gradient_map
from sslsr_diffusion.losses.objectives import OBJECTIVES
from sslsr_diffusion.losses.perceptual import PerceptualLoss, PerceptualSettings
from sslsr_diffusion.losses.rank import RankLoss, RankSettings
from sslsr_diffusion.types import Outputs

NETWORKS = 2e-4  # scores, gradients and buffers of judging networks; all else is compared to 1e-5


def pattern(seed: int, shape: list[int]) -> Tensor:
    """The test image that the goldens' README defines, in [0, 1]."""
    b, c, y, x = np.meshgrid(*[np.arange(n, dtype=np.int64) for n in shape], indexing="ij")
    channels, height, width = shape[1:]
    k = seed * 7 + b * 5 + c * 3
    v = 128 + (abs((x * (2 + k % 3) + y * (1 + k % 2)) % 48 - 24) * 5 - 60) + (abs((x - 2 * y + k) % 22 - 11) * 4 - 22)
    n = ((((b * channels + c) * height + y) * width + x) * 1103515245 + seed * 12345 + 6789) % 2**31
    n = (n * 1103515245 + 12345) % 2**31
    v = v + (n >> 20) % 25 - 12
    v = np.where((x // 24 + y // 20 + seed) % 3 == 0, 90 + 20 * c + (n >> 22) % 3, v)
    return torch.from_numpy(np.clip(v, 0, 255).astype(np.uint8)).float() / 255


def image(values: Tensor) -> Tensor:
    return values.float() / 255 if values.dtype == torch.uint8 else values.float()


def weights(item: str) -> dict[str, Tensor]:
    named = {key[2:]: value for key, value in load_golden(f"gan/{item}").tensors.items() if key.startswith("w.")}
    return {name: value.float() if value.is_floating_point() else value.long() for name, value in named.items()}


def outputs(sr: Tensor, hr: Tensor, **more: Tensor) -> Outputs:
    count = len(sr)
    return Outputs(t=torch.zeros(count), noise_level=torch.ones(count), decoded=torch.arange(count), sr=sr, hr=hr, **more)


def assert_near(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    """max |got - want| / max |want|"""
    assert (got.detach() - want.float()).abs().max() <= tolerance * want.abs().max(), float((got - want).abs().max() / want.abs().max())


def strided(gradient: Tensor, stride: int) -> Tensor:
    return gradient[..., ::stride, ::stride]


JUDGES: dict[str, Callable[[dict], nn.Module]] = {
    "d_vgg128": lambda config: VGGDiscriminator(config["num_feat"], 128),
    "d_vgg192": lambda config: VGGDiscriminator(config["nf"], 192),
    "d_vgg256": lambda config: VGGDiscriminator(config["num_feat"], 256),
    "d_vgg296": lambda config: VGGDiscriminator(config["nf"], 296),
    "d_unet": lambda config: UNetDiscriminator(config["num_feat"]),
    "d_unet_noskip": lambda config: UNetDiscriminator(config["num_feat"], skip=False),
    "d_unet_kair": lambda config: UNetDiscriminator(config["ndf"]),
    "ranker": lambda config: Ranker(config["nf"]),
}


@pytest.mark.parametrize("item", JUDGES)
def test_judging_networks(item):
    index, tensors = load_golden(f"gan/{item}")
    config = index["config"]
    network = JUDGES[item](config)
    network.load_state_dict(weights(item))
    x = pattern(config["input"]["pattern_seed"], config["input"]["shape"])
    assert_near(network.eval()(x), tensors["out.eval"], NETWORKS)
    x.requires_grad_()
    out = network.train()(x)
    assert_near(out, tensors["out.train"], NETWORKS)
    (gradient,) = torch.autograd.grad(out.square().sum(), x)
    assert_near(strided(gradient, config["grad_stride"]), tensors["out.grad_x"], NETWORKS)
    assert gradient.norm().item() == pytest.approx(tensors["out.grad_norm"].item(), rel=NETWORKS)
    after = {key.removeprefix("out.after."): value for key, value in tensors.items() if key.startswith("out.after.")}
    assert after
    for name, value in after.items():
        assert_near(network.state_dict()[name], value, NETWORKS)


class Logits(nn.Module):
    """A discriminator that says what the golden says of a picture that stands for it."""

    def forward(self, logits: Tensor) -> Tensor:
        return logits


@pytest.mark.parametrize("shape", ["vec", "map"])
@pytest.mark.parametrize(("objective", "golden"), [("relativistic", "ragan"), ("vanilla", "gan"), ("lsgan", "lsgan")])
def test_objectives(shape, objective, golden):
    index, tensors = load_golden("gan/loss_gan")
    real, fake = (tensors[f"in.{shape}.{side}"].float().requires_grad_() for side in ("real", "fake"))
    weight = index["config"]["lsgan_weight" if objective == "lsgan" else "generator_weight"]
    value = weight * OBJECTIVES[objective].generator(Logits(), real, fake)
    (gradient,) = torch.autograd.grad(value, fake)
    assert_near(value[None], tensors[f"out.{shape}.{golden}_g.value"])
    assert_near(gradient, tensors[f"out.{shape}.{golden}_g.grad_fake"])
    halves = []
    for half in OBJECTIVES[objective].discriminator(Logits(), real, fake):
        half.backward()
        halves.append(half.detach())
    assert_near(torch.stack(halves), tensors[f"out.{shape}.{golden}_d.value_real_fake"])
    assert_near(real.grad, tensors[f"out.{shape}.{golden}_d.grad_real"])
    assert_near(fake.grad, tensors[f"out.{shape}.{golden}_d.grad_fake"])


@pytest.mark.parametrize("case", ["", "ema_is_sr."])
def test_ldl(case):
    tensors = load_golden("gan/loss_ldl").tensors
    hr, sr, ema = (image(tensors[f"in.{name}"]) for name in ("gt", "sr", "ema"))
    ema = sr.clone() if case else ema
    sr.requires_grad_()
    value, _ = LDLLoss(LDLSettings())(outputs(sr, hr, sr_ema=ema))
    (gradient,) = torch.autograd.grad(value, sr)
    assert_near(artefact_map(sr, hr, ema), tensors[f"out.{case}map"])
    assert_near(value[None], tensors[f"out.{case}value"])
    assert_near(gradient, tensors[f"out.{case}grad"])


def test_ldl_of_a_perfect_picture_is_nothing():
    hr = pattern(1, [2, 3, 16, 16])
    sr = hr.clone().requires_grad_()
    value, _ = LDLLoss(LDLSettings())(outputs(sr, hr, sr_ema=hr))
    value.backward()
    assert value == 0
    assert not sr.grad.any()


def test_best_buddies():
    tensors = load_golden("gan/loss_bestbuddy").tensors
    sr, hr = image(tensors["in.sr"]).requires_grad_(), image(tensors["in.gt"])
    found, want = best_buddies(sr.detach(), hr), tensors["out.buddies"]
    assert ((found - want).abs().amax(dim=-1) > 1e-5).float().mean() <= 0.01  # ties
    value, _ = BestBuddyLoss(BestBuddySettings())(outputs(sr, hr))
    (gradient,) = torch.autograd.grad(value, sr)
    assert_near(value[None], tensors["out.value"])
    assert ((gradient - tensors["out.grad"]).abs() > 1e-5 * tensors["out.grad"].abs().max()).float().mean() <= 0.01


def test_back_projection():
    tensors = load_golden("gan/loss_backprojection").tensors
    sr, lr = image(tensors["in.sr"]).requires_grad_(), image(tensors["in.lq"])
    value, _ = BackProjectionLoss(BackProjectionSettings())(outputs(sr, sr.detach(), lr=lr))
    (gradient,) = torch.autograd.grad(value, sr)
    assert_near(matlab_bicubic(sr, 1 / 4), tensors["out.down"])
    assert_near(value[None], tensors["out.value"])
    assert_near(gradient, tensors["out.grad"])


@pytest.mark.parametrize("scale", [2, 3])
def test_back_projection_by_other_scales(scale):
    picture = pattern(4, [1, 3, 24, 36])
    lr = matlab_bicubic(picture, 1 / scale)
    assert lr.shape == (1, 3, 24 // scale, 36 // scale)
    for shift in (0.0, 0.1):
        value, _ = BackProjectionLoss(BackProjectionSettings())(outputs(picture, picture, lr=lr + shift))
        assert value.item() == pytest.approx(shift, abs=1e-6)


def test_flat_areas():
    tensors = load_golden("gan/flat_mask").tensors
    found = flat_areas(image(tensors["in.x"]))
    want = tensors["out.mask"].bool()
    assert 0.05 < want.float().mean() < 0.95
    assert (found != want).float().mean() <= 0.01  # at the threshold


def test_gradient_map():
    index, tensors = load_golden("gan/gradient_map")
    target = index["config"]["target"]
    sr, hr = image(tensors["in.x"]).requires_grad_(), pattern(target["pattern_seed"], target["shape"])
    value, _ = GradientLoss(GradientSettings())(outputs(sr, hr))
    (gradient,) = torch.autograd.grad(value, sr)
    assert_near(gradient_map(sr), tensors["out.map"])
    assert_near(value[None], tensors["out.mse_value"])
    assert_near(gradient, tensors["out.mse_grad"])


def test_rank():
    index, tensors = load_golden("gan/loss_rank")
    x = pattern(index["config"]["x"]["pattern_seed"], index["config"]["x"]["shape"])
    ranker = Ranker(3)
    ranker.load_state_dict(weights("ranker"))
    loss = RankLoss(RankSettings(file="given"), ranker)
    assert not ranker.training
    ranker.train()  # as the golden was made
    sr = x.clone().requires_grad_()
    value, _ = loss(outputs(sr, x), torch.tensor(99.0))  # a sum: the count does not matter
    (gradient,) = torch.autograd.grad(value, sr)
    assert_near(value[None], tensors["out.value"], NETWORKS)
    assert_near(strided(gradient, index["config"]["grad_stride"]), tensors["out.grad"], NETWORKS)
    assert gradient.norm().item() == pytest.approx(tensors["out.grad_norm"].item(), rel=NETWORKS)
    cut, _ = RankLoss(RankSettings(file="given", reference=True), ranker)(outputs(sr, x))
    assert not cut.requires_grad
    assert_near(cut[None], tensors["out.value"], NETWORKS)


PERCEPTUAL = {
    "esrgan": {"conv5_4": 1.0},
    "bebygan": {"conv3_4": 0.125, "conv4_4": 0.25, "conv5_4": 0.5},
    "ldl": {"conv1_2": 0.1, "conv2_2": 0.1, "conv3_4": 1.0, "conv4_4": 1.0, "conv5_4": 1.0},
}


@pytest.mark.parametrize("method", PERCEPTUAL)
def test_perceptual(method):
    index, tensors = load_golden("gan/perceptual")
    sr, hr = (pattern(index["config"][side]["pattern_seed"], index["config"][side]["shape"]) for side in ("x", "y"))
    network = VGG(index["config"]["widths"])
    network.load_state_dict(weights("perceptual"))
    network.requires_grad_(False).eval()
    sr.requires_grad_()
    value, _ = PerceptualLoss(PerceptualSettings(layers=PERCEPTUAL[method]), network)(outputs(sr, hr))
    (gradient,) = torch.autograd.grad(value, sr)
    assert_near(value[None], tensors[f"out.{method}.value"])
    assert_near(gradient, tensors[f"out.{method}.grad"])
    if method == "ldl":
        assert_near(value[None], tensors["out.kair.value"])
    else:
        assert_near(network(sr, ("conv5_4",))[0], tensors["out.conv5_4"])
        assert torch.equal(network(sr, ("relu5_4",))[0], network(sr, ("conv5_4",))[0].relu())


def test_orders_of_the_discriminators_calls():
    """As published: y, s in the generator's step, then s, y, s; without a relative mean s, then y, s."""
    hr, sr = pattern(1, [2, 3, 16, 16]), pattern(2, [2, 3, 16, 16])
    for objective, want in (("relativistic", "yssys"), ("vanilla", "sys"), ("lsgan", "sys")):
        loss = GANLoss(GANSettings(objective=objective, width=2), Means(side=16))
        seen: list[str] = []
        loss.network.register_forward_pre_hook(lambda _, args, seen=seen: seen.append("y" if torch.equal(args[0], hr) else "s"))
        loss(outputs(sr, hr))
        loss.learn(outputs(sr, hr))
        assert "".join(seen) == want
