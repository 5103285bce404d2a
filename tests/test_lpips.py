"""The loss lpips and its network, with made-up weights: the published formula, gradients, and runs that go without it."""

from __future__ import annotations

import dataclasses
import logging
import sys

import pytest
import torch
from tiny_runs import DRAWN
from toys import smooth

from sslsr_diffusion.config import RecipeError, parse
from sslsr_diffusion.errors import MissingDependency, UserError
from sslsr_diffusion.losses import build_losses
from sslsr_diffusion.losses.lpips import LpipsLoss, LpipsSettings, load_perceptual_distance
from sslsr_diffusion.runs.check import run_checks
from sslsr_diffusion.runs.recipe import Recipe
from sslsr_diffusion.runs.start import build_job
from sslsr_diffusion.types import Outputs
from sslsr_diffusion.weights import WEIGHTS, use_folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setitem(WEIGHTS, "lpips-vgg", tuple(dataclasses.replace(file, sha256="") for file in WEIGHTS["lpips-vgg"]))
    use_folder(tmp_path)
    return tmp_path


@pytest.fixture
def weights(hub):
    """VGG16's convolutions and LPIPS' channel weights, drawn."""
    vgg16 = pytest.importorskip("torchvision.models", reason="the extra lpips is not installed").vgg16
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = vgg16(weights=None).features.state_dict()
    draw = lambda shape: torch.randn(shape, generator=generator) * (2 / max(1, shape[1:].numel())) ** 0.5  # noqa: E731
    features = {f"features.{name}": draw(value.shape) * (value.ndim > 1) for name, value in shapes.items()}
    linear = {f"lin{k}.model.1.weight": torch.rand(1, c, 1, 1, generator=generator) for k, c in enumerate((64, 128, 256, 512, 512))}
    for file, state in zip(WEIGHTS["lpips-vgg"], (features, linear)):
        file.path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, file.path)
    return features, linear


def pictures() -> tuple[torch.Tensor, torch.Tensor]:
    hr = torch.stack([smooth(1, size=40), smooth(2, size=40)])
    return (hr + 0.1 * torch.stack([smooth(3, size=40), 3 * smooth(4, size=40)])), hr  # not clamped, as a decoder's


def test_the_distance_and_its_gradient_are_pyiqas(weights):
    restored, reference = pictures()
    distance = load_perceptual_distance()
    value = distance(restored.requires_grad_(), reference)
    assert value.shape == (2,)
    assert 0 < value[0] < value[1]
    upstream = torch.tensor([1.0, -0.5])
    (gradient,) = torch.autograd.grad(value @ upstream, restored)
    assert not any(parameter.requires_grad for parameter in distance.parameters())
    pytest.importorskip("pyiqa", reason="the extra eval is not installed")
    from pyiqa.archs.lpips_arch import LPIPS
    from torchvision.models import vgg16 as backbone

    features, linear = weights
    with torch.device("meta"), pytest.MonkeyPatch.context() as patch:
        patch.setattr("torchvision.models.vgg16", lambda weights: backbone(weights=None))  # pyiqa asks for the pretrained one
        theirs = LPIPS(pretrained=False, net="vgg").to_empty(device="cpu")
    theirs.load_state_dict(theirs_state(theirs, features, linear))
    want = theirs(restored, reference)[:, 0]
    assert torch.allclose(want, value, rtol=1e-5)
    (published,) = torch.autograd.grad(want @ upstream, restored)
    assert (gradient - published).norm() <= 1e-4 * published.norm()  # float32 through 13 convolutions


def theirs_state(model, features, linear) -> dict[str, torch.Tensor]:
    """pyiqa cuts the features into slices that keep torchvision's numbers."""
    state = {}
    for name, value in model.state_dict().items():
        if name.startswith("net."):
            state[name] = features["features." + name.split(".", 2)[2]]
        elif name.startswith("scaling_layer."):
            published = {"shift": [-0.030, -0.088, -0.188], "scale": [0.458, 0.448, 0.450]}[name.split(".")[1]]
            state[name] = torch.tensor(published).reshape(value.shape)
        else:
            number = name.split(".")[1] if name.startswith("lins.") else name[3]
            state[name] = linear[f"lin{number}.model.1.weight"]
    return state


def test_a_flat_picture_has_a_finite_gradient(weights):
    flat = torch.full((1, 3, 32, 32), 0.5, requires_grad=True)
    load_perceptual_distance()(flat, smooth(1)[None]).sum().backward()
    assert torch.isfinite(flat.grad).all()


def squares(restored, reference):
    assert len(restored)
    return (restored - reference).square().flatten(1).mean(dim=1)


def test_the_loss_is_a_mean_over_the_samples_that_pass_the_gate():
    sr, hr = torch.stack([torch.full((3, 8, 8), 1.0), torch.full((3, 8, 8), 3.0)]).requires_grad_(), torch.zeros(2, 3, 8, 8)
    outputs = Outputs(t=torch.tensor([10, 900]), noise_level=torch.tensor([50.0, 0.1]).rsqrt(), sr=sr, hr=hr, decoded=torch.arange(2))
    value, terms = LpipsLoss(LpipsSettings(weight=2), distance=squares)(outputs)
    assert (value.item(), terms["lpips"].item()) == (10.0, 5.0)
    assert LpipsLoss(LpipsSettings(max_timestep=500), distance=squares)(outputs)[0] == 1
    half = LpipsLoss(LpipsSettings(), distance=squares)(outputs, torch.tensor(4.0))[0]  # of a batch of 4
    assert half == 2.5
    nothing = LpipsLoss(LpipsSettings(max_timestep=5), distance=squares)(outputs)[0]
    nothing.backward()
    assert nothing == 0
    assert not sr.grad.any()


def recipe(*losses: dict) -> Recipe:
    values = {"task": {"kind": "autoencoder"}, "model": DRAWN, "data": {"sources": []}, "validation": {"limit": 0}}
    return parse(Recipe, {**values, "losses": list(losses)})


def test_a_run_goes_without_an_optional_term_and_says_so_once(hub, caplog):
    wanted = recipe({"kind": "pixel_l1"}, {"kind": "lpips", "optional": True})
    with caplog.at_level(logging.WARNING):
        job = build_job(wanted)
    assert [loss.name for loss in job.losses] == ["pixel_l1"]
    said = [record.getMessage() for record in caplog.records if "lpips" in record.getMessage()]
    assert len(said) == 1
    assert "without the optional loss: losses: lpips weights are missing" in said[0]
    assert "vgg16-397923af.pth" in said[0]
    assert [check.verdict for check in run_checks(wanted) if check.what == "losses"] == ["ok"]
    published = wanted.model_dump(mode="json") | {"task": {"kind": "diffusion"}, "output": {"hub_id": "user/mine"}}
    card = build_job(parse(Recipe, published), publisher=object()).card({}, [])["README.md"].decode()
    assert "with the pixel l1 loss" in card
    assert "lpips" not in card
    with pytest.raises(RecipeError, match="lpips is the only loss"):
        recipe({"kind": "lpips", "optional": True})


def test_without_weights_or_torchvision_the_sentence_says_what_to_do(hub, monkeypatch):
    wanted = recipe({"kind": "pixel_l1"}, {"kind": "lpips"})
    with pytest.raises(UserError, match=r"losses: lpips weights are missing .*vgg16-397923af\.pth \(528 MB\).*LPIPS_v0\.1_vgg") as caught:
        build_job(wanted)
    assert "\n" not in str(caught.value)
    assert [check.verdict for check in run_checks(wanted) if check.what == "losses"] == ["missing"]
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(MissingDependency, match=r'pip install "sslsr-diffusion\[lpips\]"'):
        build_job(wanted)


def test_training_uses_it_where_it_is_there(weights):
    losses = build_losses(recipe({"kind": "lpips"}).losses)
    sr, hr = pictures()
    value, _ = losses[0](Outputs(t=torch.zeros(2), noise_level=torch.ones(2), sr=sr, hr=hr, decoded=torch.arange(2)))
    assert torch.isfinite(value)
    assert value > 0
