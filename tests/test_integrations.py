"""docs/integrations.md and examples/integrations/: the lines for other trainers, run as they stand there beside a stand-in of each step."""

from __future__ import annotations

import re
import runpy
import sys
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from toys import smooth

from sslsr_diffusion import SelfSimilarityLoss
from sslsr_diffusion.models.codec import Codec
from sslsr_diffusion.models.stablesr.build import build_networks
from sslsr_diffusion.models.stablesr.settings import StableSRSettings

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples/integrations"
PAGE = (ROOT / "docs/integrations.md").read_text()
BLOCKS = re.findall(r"^```python\n# ([^\n]*)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
LINES = dict(BLOCKS)
OPTIONS = dict(re.findall(r"^```(?:yml|toml)\n# ([^\n]*)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
BEGIN = {"l1_weight": 100, "kl_weight": 100, "mask_stride": 3, "prefilter_sigma": 1.8}  # what the page says of weights


def pictures(side: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    """Prediction and truth [2, 3, side, side] in [0, 1], smooth, with edges."""
    gt = torch.stack([smooth(k, size=side) for k in (1, 2)]) * 0.8 + 0.1
    gt[..., side // 2 :] = 0.9 - gt[..., side // 2 :] / 2
    return (gt + 0.1 * torch.stack([smooth(k, size=side) for k in (3, 4)]) - 0.05), gt


def wanted(sr: torch.Tensor, gt: torch.Tensor) -> torch.Tensor:
    return SelfSimilarityLoss(**BEGIN, backend="torch")(sr, gt)


def half(picture: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """In the trainer's own range and precision."""
    return (2 * picture - 1).to(dtype)


def rounded(picture: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What is left of [0, 1] behind that, computed as the page says."""
    return ((half(picture, dtype) + 1) / 2).float()


def test_every_block_is_run_here():
    told = {"HYPIR, StrSR": 2, "OSEDiff, PiSA-SR": 2, "latent trainers": 2, "BasicSR": 2}
    assert {name: sum(head.startswith(f"{name}: ") for head in LINES) for name in told} == told
    assert len(LINES) == sum(told.values()) == len(BLOCKS)
    assert OPTIONS.keys() == {"traiNNer-redux", "neosr", "BasicSR"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("host", ["HYPIR, StrSR", "OSEDiff, PiSA-SR"])
def test_trainers_with_pictures_in_minus_one_to_one(host, dtype):
    sr, gt = pictures()
    pred = half(sr, dtype).to(memory_format=torch.channels_last).requires_grad_()
    this = SimpleNamespace(batch_inputs=SimpleNamespace(gt=half(gt, torch.float32)))
    names: dict[str, Any] = {"self": this, "x": pred, "loss_G": torch.tensor(2.0)}
    names |= {"x_tgt_pred": pred, "x_tgt": this.batch_inputs.gt, "loss": torch.tensor(2.0)}
    for head, code in BLOCKS:
        if head.startswith(host):
            exec(code, names)
    own = names["loss_ssl"]
    assert own.dtype == torch.float32
    assert own.item() == pytest.approx(wanted(rounded(sr, dtype), gt).item(), rel=1e-4)  # another backend, float32
    total = names["loss_G" if "HYPIR" in host else "loss"]
    assert total.item() == pytest.approx(2 + own.item())
    (gradient,) = torch.autograd.grad(total, pred)
    (right,) = torch.autograd.grad(wanted(((pred + 1) / 2).float(), gt), pred)
    assert right.any()
    assert (gradient.float() - right.float()).norm() <= 0.02 * right.float().norm()  # both rounded in the trainer's precision


@pytest.fixture(scope="module")
def base() -> Any:
    """A tiny Stable Diffusion of this package: the stand-in's vae and its scheduler."""
    return build_networks(StableSRSettings(init="random", preset="tiny"))


def latent_step(base: Any, dtype: torch.dtype, timesteps: list[int], **options: Any) -> tuple[Any, torch.Tensor]:
    """What diffusers' training scripts do in a step, up to their own loss, and then the page's lines; the loss, and the prediction."""
    from diffusers import DDPMScheduler

    _, gt = pictures(64)
    vae = base.codec.vae.to(dtype)
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **options)
    generator = torch.Generator().manual_seed(0)
    pixels = half(gt, dtype)
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.sample(generator) * vae.config.scaling_factor
    noise, t = torch.randn(latents.shape, generator=generator).to(dtype), torch.tensor(timesteps)
    noisy = scheduler.add_noise(latents, noise, t)
    right = noise if scheduler.config.prediction_type == "epsilon" else scheduler.get_velocity(latents, noise, t)
    pred = (right + 0.2 * torch.randn(latents.shape, generator=generator).to(dtype)).requires_grad_()
    names = {"vae": vae, "noise_scheduler": scheduler, "model_pred": pred, "noisy_latents": noisy, "timesteps": t, "loss": 0.0}
    names["batch"] = {"pixel_values": pixels}
    sys.modules["latent_ssl"] = SimpleNamespace(**runpy.run_path(str(EXAMPLES / "latent_ssl.py")))
    try:
        exec(LINES["latent trainers: before the loop"].replace("window=32", "window=64"), names)
        exec(LINES["latent trainers: the step"], names)
    finally:
        del sys.modules["latent_ssl"]
    names["clean"] = scheduler.step(pred[:1].detach().float(), timesteps[0], noisy[:1].float()).pred_original_sample
    names["gt"] = gt
    return names, pred


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_latent_trainer(base, kind, dtype):
    """The first sample is nearly clean, the second nearly noise, and left out: the loss is that of the first, by diffusers' own z_0."""
    names, pred = latent_step(base, dtype, [100, 900], prediction_type=kind, clip_sample=False)
    (gradient,) = torch.autograd.grad(names["loss"], pred)
    decoded = Codec(base.codec.vae.to(dtype)).decode(names["clean"])
    base.codec.vae.float()
    gt = names["batch"]["pixel_values"][:1].float() / 2 + 0.5
    assert names["loss"].item() == pytest.approx(wanted(decoded, gt).item(), rel=1e-4 if dtype == torch.float32 else 0.03)
    assert gradient[0].abs().max() > 0
    assert not gradient[1].any()


def test_a_latent_trainer_with_noise_alone_has_a_loss_of_zero_with_a_graph(base):
    names, pred = latent_step(base, torch.float32, [900, 990], clip_sample=False)
    assert names["loss"] == 0
    assert not torch.autograd.grad(names["loss"], pred)[0].any()


def test_a_window_is_the_same_part_of_both(base):
    """With the truth's own latents every window's loss is what its autoencoding costs; a shifted one would cost far more."""
    latent_ssl = runpy.run_path(str(EXAMPLES / "latent_ssl.py"))["LatentSSL"]
    from diffusers import DDPMScheduler

    seen = []

    class Codec_:
        scale = base.codec.scale

        def decode(self, z):
            return nn.functional.interpolate(z[:, :3], scale_factor=self.scale)

    ssl = latent_ssl(base.codec.vae, DDPMScheduler(prediction_type="sample"), window=4)
    ssl.codec, ssl.loss = Codec_(), lambda sr, gt: seen.append((sr, gt)) or sr.sum()
    z = torch.rand(1, 4, 9, 7, generator=torch.Generator().manual_seed(0))
    pixels = nn.functional.interpolate(z[:, :3], scale_factor=base.codec.scale) * 2 - 1
    for _ in range(4):
        ssl(z, z, torch.tensor([0]), pixels)
    assert all(sr.shape[-2:] == (4 * base.codec.scale,) * 2 for sr, _ in seen)
    assert all(torch.allclose(sr, gt, atol=1e-6) for sr, gt in seen)
    assert len({sr.sum().item() for sr, _ in seen}) > 1


class Registry(dict):
    """BasicSR's: classes by their name, and a second one of a name is refused."""

    def register(self) -> Any:
        def add(cls: type) -> type:
            assert cls.__name__ not in self
            self[cls.__name__] = cls
            return cls

        return add


@pytest.fixture(params=["basicsr", "traiNNer", "neosr"])
def registry(request, monkeypatch) -> Registry:
    """The host's registry with the file imported, its line changed as the page and the file say."""
    found = Registry()
    for name in (request.param, f"{request.param}.utils", f"{request.param}.utils.registry"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[f"{request.param}.utils.registry"].LOSS_REGISTRY = found  # type: ignore[attr-defined]
    code = (EXAMPLES / "self_similarity_loss.py").read_text()
    line = next(line for line in code.splitlines() if "LOSS_REGISTRY" in line)
    assert f"{request.param}.utils.registry" in line
    exec(code.replace("from basicsr.utils.registry", f"from {request.param}.utils.registry"), {"__name__": "losses.self_similarity_loss"})
    return found


def build_loss(registry: Registry, options: dict[str, Any]) -> Any:
    """As all three build a loss of their options."""
    return registry[options["type"]](**{key: value for key, value in options.items() if key != "type"})


@pytest.mark.parametrize("amp", [None, torch.bfloat16, torch.float16])
def test_a_registered_loss(registry, amp):
    """A step of traiNNer-redux and neosr: network and loss under autocast, the loss scaled; of BasicSR: without."""
    _, gt = pictures()
    torch.manual_seed(0)
    network = nn.Conv2d(3, 3, 3, padding=1).to(memory_format=torch.channels_last)
    with torch.no_grad():  # nearly the picture itself
        network.weight.mul_(0.05)
        network.weight[range(3), range(3), 1, 1] += 1
    loss = build_loss(registry, {"type": "SSLLoss", "loss_weight": 0.25}).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=amp or torch.bfloat16, enabled=amp is not None):
        output = network(gt.to(memory_format=torch.channels_last))
        value = loss(output, gt)
    (1024 * value).backward()
    assert output.dtype == (amp or torch.float32)
    assert value.item() == pytest.approx(0.25 * wanted(output.detach().float(), gt).item(), rel=1e-4)
    assert value.dtype == torch.float32
    assert network.weight.grad.isfinite().all()
    assert network.weight.grad.abs().max() > 0


def test_autocast_does_not_round_the_loss(registry):
    sr, gt = pictures()
    loss = build_loss(registry, {"type": "SSLLoss", "prefilter_sigma": 1.0, "backend": "torch"})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss(sr, gt)
    assert inside.item() == loss(sr, gt).item() > 0


def test_the_lines_of_basicsr(registry):
    sr, gt = pictures()
    this = SimpleNamespace(device=torch.device("cpu"), output=sr, gt=gt)
    names: dict[str, Any] = {"self": this, "build_loss": lambda options: build_loss(registry, options), "loss_dict": {}, "l_total": 1.0}
    names["train_opt"] = yaml.safe_load(OPTIONS["BasicSR"])["train"]
    names["train_opt"]["ssl_opt"]["loss_weight"] *= 2
    for head, code in BLOCKS:
        if head.startswith("BasicSR"):
            exec(code, names)
    assert names["l_total"].item() == pytest.approx(1 + 2 * wanted(sr, gt).item(), rel=1e-4)
    assert names["loss_dict"].keys() == {"l_ssl"}


@pytest.mark.parametrize("host", ["traiNNer-redux", "neosr"])
def test_the_options_of_the_page_build_the_loss(registry, host):
    sr, gt = pictures()
    if host == "neosr":
        options = tomllib.loads(OPTIONS[host])["train"]["gw_opt"]
    else:
        options = next(each for each in yaml.safe_load(OPTIONS[host])["losses"] if each["type"] == "SSLLoss")
    assert build_loss(registry, options)(sr, gt).item() == pytest.approx(wanted(sr, gt).item(), rel=1e-4)


def test_a_lightning_module(monkeypatch):
    """On a stand-in of Lightning's class, which this package does not install."""

    class LightningModule(nn.Module):
        def log_dict(self, terms):
            self.logged = terms

    stand_in = ModuleType("lightning")
    stand_in.LightningModule = LightningModule  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lightning", stand_in)
    module = runpy.run_path(str(EXAMPLES / "lightning_upscaler.py"))["Upscaler"](
        nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.PixelShuffle(2))
    )
    _, hr = pictures()
    value = module.training_step((nn.functional.interpolate(hr, scale_factor=0.5), hr), 0)
    value.backward()
    assert value.item() == pytest.approx(module.logged["l1"].item() + module.logged["ssl"].item())
    assert len(module.configure_optimizers().param_groups[0]["params"]) == 2
    assert all(parameter.grad.abs().max() > 0 for parameter in module.parameters())
