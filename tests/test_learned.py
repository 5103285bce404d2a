"""The learned metrics with made-up weights: that files are found, images handed over rightly, results kept apart; not their values."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from evaluation_samples import as_tensor, noisy, picture
from scipy.linalg import sqrtm

from sslsr_diffusion.errors import MissingDependency, UserError
from sslsr_diffusion.evaluation import learned
from sslsr_diffusion.evaluation.metrics import METRICS, convention, unavailable
from sslsr_diffusion.weights import WEIGHTS, use_folder


def made_up(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Random filters that keep the scale; of matrices (no score here depends on them) only one number is stored."""
    if len(shape) == 4:
        filters = torch.randn(shape, generator=generator) / shape[1:].numel() ** 0.5
        return filters.abs() if shape[0] == 1 else filters  # LPIPS weighs channels with positive numbers
    return torch.ones(shape) if len(shape) == 1 else torch.full((1,), 0.01).expand(shape)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    pytest.importorskip("pyiqa", reason="the extra eval is not installed")
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    use_folder(tmp_path)
    for name, files in WEIGHTS.items():
        monkeypatch.setitem(WEIGHTS, name, tuple(dataclasses.replace(f, sha256="") for f in files))
    learned._model.cache_clear()
    yield tmp_path
    learned._model.cache_clear()


def store(file, build, keep=lambda key: True) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pyiqa's way of calling torchvision
        shapes = build().state_dict()
    state = {k: made_up(v.shape, generator) if v.is_floating_point() else torch.zeros_like(v, device="cpu") for k, v in shapes.items()}
    file.path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({k: v for k, v in state.items() if keep(k)}, file.path)


@pytest.fixture
def lpips(hub):
    from pyiqa.archs.lpips_arch import LPIPS
    from torchvision.models import alexnet

    backbone, linear = WEIGHTS["lpips"]
    store(backbone, lambda: alexnet(weights=None))
    store(linear, lambda: LPIPS(pretrained=False, pnet_rand=True), keep=lambda key: key.startswith("lin"))


def test_lpips_reads_its_files_and_compares_with_the_reference(lpips, capsys):
    assert unavailable("lpips") is None
    reference = torch.cat([as_tensor(picture(i, 72, 80)) for i in range(2)])
    restored = torch.cat([as_tensor(noisy(picture(i, 72, 80), 20 * (i + 1))) for i in range(2)])
    fn = METRICS["lpips"].fn
    scores = fn(restored, reference)
    assert scores.shape == (2,)
    assert 0 < scores[0] < scores[1]
    assert fn(reference, reference).tolist() == [0, 0]
    assert scores[1] == fn(restored[1:], reference[1:])[0]
    beyond = restored + 2 * (restored == 1)  # a decoder's overshoot counts as white
    torch.testing.assert_close(fn(beyond, reference), scores, rtol=0, atol=0)
    inner = (..., slice(4, -4), slice(4, -4))
    assert fn(restored, reference, crop_border=4)[0] == fn(restored[inner], reference[inner])[0]
    assert capsys.readouterr().out == ""  # pyiqa prints; we do not
    text = convention("lpips", crop_border=4, y_channel=False)
    assert "border 4" in text
    assert text.count("sha256") == 2
    with pytest.raises(UserError, match="compares with a reference"):
        fn(restored)


def test_features_of_fid_come_from_the_named_file(hub):
    from pyiqa.archs import inception

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception, "load_pretrained_network", lambda *args: None)
        store(WEIGHTS["fid"][0], inception.fid_inception_v3)
    features = METRICS["fid"].fn(torch.cat([as_tensor(picture(i)) for i in range(2)]))
    assert features.shape == (2, 2048)
    assert torch.isfinite(features).all()


def test_frechet_distance_equals_the_matrix_square_root_where_that_exists():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, (50, 6)), rng.normal(0.3, 1.5, (40, 6)) @ rng.normal(0, 1, (6, 6))
    sa, sb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    want = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(sa + sb) - 2 * np.trace(sqrtm(sa @ sb).real)
    assert learned.frechet_distance(a, b) == pytest.approx(want, rel=1e-10)


def test_frechet_distance_is_exact_with_fewer_images_than_features():
    a = np.random.default_rng(0).normal(0, 1, (5, 300))
    assert learned.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert learned.frechet_distance(a, a + 2) == pytest.approx(300 * 4, rel=1e-12)
    with pytest.raises(UserError, match="at least 2 images, got 1 and 5"):
        learned.frechet_distance(a[:1], a)


def test_missing_weights_are_a_users_error_with_the_files(hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"musiq: weights are missing .*musiq_koniq_ckpt-e95806b9\.pth \(104 MB\) to .*pyiqa"):
        METRICS["musiq"].fn(torch.rand(1, 3, 64, 64))


def test_without_the_extra_the_install_line_is_given(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    learned._model.cache_clear()
    assert 'pip install "sslsr-diffusion[eval]"' in unavailable("lpips")
    with pytest.raises(MissingDependency, match="needs pyiqa"):
        METRICS["lpips"].fn(torch.rand(1, 3, 64, 64), torch.rand(1, 3, 64, 64))


def test_clip_imports_without_pkg_resources(tmp_path):
    pytest.importorskip("pyiqa", reason="the extra eval is not installed")
    (tmp_path / "pkg_resources.py").write_text("raise ImportError('gone since setuptools 81')")  # found before any other
    code = (
        "import sys; from sslsr_diffusion.evaluation.learned import _import_clip; _import_clip(); import clip;"
        "assert 'pkg_resources' not in sys.modules; print(clip.tokenize(['Good image']).shape)"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "torch.Size([1, 77])", done.stderr


def test_clipiqa_scores_between_zero_and_one(hub, monkeypatch):
    learned._import_clip()
    from pyiqa.archs import clip_model, clipiqa_arch

    torch.manual_seed(0)
    small = clip_model.CLIP(64, 224, (1, 1, 1, 1), 8, None, 77, 49408, 64, 2, 1).eval()
    monkeypatch.setattr(clipiqa_arch, "load", lambda name, device: small)  # the published file is an archive of a scripted model
    path = WEIGHTS["clipiqa"][0].path
    path.parent.mkdir()
    path.write_bytes(b"")
    scores = METRICS["clipiqa"].fn(as_tensor(picture(0, 72, 80)), crop_border=4)
    assert scores.shape == (1,)
    assert 0 <= scores.item() <= 1
