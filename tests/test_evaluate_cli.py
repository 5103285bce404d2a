from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_samples import folders, noisy, picture, write
from PIL import Image
from restorers import Nearest, ToyPixelFamily
from typer.testing import CliRunner

import sslsr_diffusion.inference.open as models
from sslsr_diffusion.cli import app
from sslsr_diffusion.errors import UserError
from sslsr_diffusion.evaluation.metrics import METRICS
from sslsr_diffusion.models import FAMILIES

BENCHMARK = os.environ.get("SSLSR_BENCHMARK_DIR")


@pytest.fixture
def call(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))  # no weights here, whatever lies in the home folder

    def run(*args: object):
        result = CliRunner().invoke(app, ["evaluate", "--offline", *map(str, args)], catch_exceptions=True)
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def test_two_columns_and_what_an_offline_user_sees(tmp_path, call):
    where = folders(tmp_path, 3, ours=3, other=9)
    result = call("--restored", f"A={where['ours']}", "--restored", where["other"], "--reference", where["hr"], "--crop-border", 4)
    assert result.exit_code == 0
    assert re.search(r"PSNR \(dB\) ↑ +\d+\.\d+\*", result.stdout)
    assert re.search(r"^not computed: .*LPIPS, DISTS, .* \(report\.html says why\)$", result.stderr, re.MULTILINE)
    why = summary(tmp_path / "evaluation")["unavailable"]
    assert why["lpips"].startswith("weights are missing and no download was tried (offline); download https://")
    assert f"to {tmp_path / 'hub' / 'pyiqa' / 'musiq_koniq_ckpt-e95806b9.pth'}" in why["musiq"]
    found = summary(tmp_path / "evaluation")
    assert found["columns"] == ["A", "other"]
    assert found["metrics"]["psnr"]["best"] == ["A"]
    assert "border 4" in found["metrics"]["ssg_l1"]["convention"]
    assert set(found["unavailable"]) >= {"lpips", "dists", "fid", "clipiqa", "musiq"}
    assert (tmp_path / "evaluation" / "report.html").stat().st_size > 10_000
    names = (tmp_path / "evaluation" / "metrics.csv").read_text().splitlines()[0]
    assert names.replace(",features", "") == "image,model,seed,psnr,ssim,niqe,ssg_l1,ssg_kl,grid"  # features where its extra is there


def test_strict_refuses_before_anything_is_computed(tmp_path, call):
    where = folders(tmp_path, 1, ours=3)
    with pytest.raises(UserError, match="--strict: LPIPS weights are missing"):
        call("--restored", where["ours"], "--reference", where["hr"], "--strict")
    assert not (tmp_path / "evaluation").exists()
    assert call("--restored", where["ours"], "--reference", where["hr"], "--strict", "--metrics", "psnr").exit_code == 0


def test_strict_refuses_missing_images_after_the_rest_is_written(tmp_path, call):
    where = folders(tmp_path, 2, ours=3)
    (where["ours"] / "scene0.png").unlink()
    with pytest.raises(UserError, match=r"--strict: 1 remark.* ours has no file for 1 of the images: scene0"):
        call("--restored", where["ours"], "--reference", where["hr"], "--strict", "--metrics", "psnr")
    assert summary(tmp_path / "evaluation")["images"] == 1


def test_without_a_reference_only_metrics_that_need_none(tmp_path, call):
    write(tmp_path / "ours" / "a.png", np.tile(picture(0, 96, 96), (1, 2, 1)))
    result = call("--restored", tmp_path / "ours")
    assert result.exit_code == 0
    found = summary(tmp_path / "evaluation")
    assert list(found["metrics"]) == ["niqe", "grid"]
    assert "give --reference DIR" in found["unavailable"]["psnr"]


def test_the_same_name_again_is_another_seed(tmp_path, call):
    where = folders(tmp_path, 2, first=3, second=3)
    for i in range(2):
        write(where["second"] / f"scene{i}.png", noisy(picture(i), 3, seed=10 + i))
    call("--restored", f"ours={where['first']}", "--restored", f"ours={where['second']}", "--reference", where["hr"], "--metrics", "psnr")
    found = summary(tmp_path / "evaluation")
    assert found["columns"] == ["ours"]
    assert found["spread"]["ours"]["seeds"] == 2
    assert found["spread"]["ours"]["pixel_std"] > 1


class Noisy(Nearest):
    """Enlarges, with noise from the seed."""

    def enlarge(self, pictures, scale, generator):
        out = super().enlarge(pictures, scale, generator)
        return (out + 0.02 * torch.randn(out.shape, generator=generator)).clamp(0, 1)


def found_as(fingerprint: str, name: str) -> models.FoundModel:
    return models.FoundModel(name, Path(name), FAMILIES["stablesr"], fingerprint)


def test_a_model_upscales_first_and_is_not_asked_twice(tmp_path, call, monkeypatch):
    where = folders(tmp_path / "set", 2, ours=3)
    loads = []
    monkeypatch.setattr(models, "find_model", lambda path: found_as("fingerprint", path))
    monkeypatch.setattr(models, "open_model", lambda *args, **options: loads.append(1) or Noisy())
    arguments = ("--model", "m=some/model", "--seeds", 2, "--dataset", tmp_path / "set", "--restored", where["ours"], "--metrics", "psnr")
    assert call(*arguments).exit_code == 0
    found = summary(tmp_path / "evaluation")
    assert found["columns"] == ["ours", "m"]
    assert found["spread"]["m"]["seeds"] == 2
    assert found["spread"]["m"]["pixel_std"] > 1
    assert sorted(p.name for p in (tmp_path / "evaluation" / "images" / "m" / "seed1").glob("*.png")) == ["scene0.png", "scene1.png"]
    assert "LR bicubic" in (tmp_path / "evaluation" / "report.html").read_text()
    assert call(*arguments).exit_code == 0
    assert len(loads) == 1


def test_interrupted_while_the_model_loads(tmp_path, call, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    folders(tmp_path / "set", 1)
    monkeypatch.setattr(models, "find_model", lambda path: found_as("fingerprint", path))
    monkeypatch.setattr(models, "open_model", interrupted)
    result = call("--model", "m=some/model", "--dataset", tmp_path / "set", "--metrics", "psnr")
    assert result.exit_code == 130
    assert result.stderr.endswith("interrupted; the same command goes on from here\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "expected --restored DIR"),
        (("--model", "x"), "--model needs --dataset"),
        (("--restored", "x", "--dataset", "y", "--reference", "z"), "give either --dataset or --reference"),
        (("--restored", "x", "--dataset", "y", "--lr", "z"), "give either --dataset or --lr"),
        (("--restored", "x", "--seeds", 3), "--seeds and --steps are for --model"),
        (("--restored", "x", "--device", "gpu"), "--device gpu: expected auto, cpu, cuda, cuda:1 or mps"),
        (("--restored", "a/out", "--restored", "b/out", "--metrics", "niqe"), "a column named 'out' is there already. Write NAME=b/out"),
        (("--restored", "x", "--metrics", "pnsr"), "'pnsr' is not known; expected some of psnr, ssim"),
        (("--restored", "x", "--metrics", "psnr"), r"no metric can be computed: PSNR \(dB\) compares with a reference"),
        (("--restored", "x", "--metrics", "niqe"), "found nothing there"),
    ],
)
def test_mistakes_are_told(arguments, message, call):
    with pytest.raises(UserError, match=message):
        call(*arguments)


def test_no_value_at_all_is_an_error(tmp_path, call):
    """Each image is smaller than what is cut from its sides: the report is written, and says why; the exit code is not 0."""
    where = folders(tmp_path, 1, ours=3)
    with pytest.raises(UserError, match="no metric has a value for any image"):
        call("--restored", where["ours"], "--reference", where["hr"], "--metrics", "psnr", "--crop-border", 999)


def test_list_metrics_names_each_with_its_convention(call):
    result = call("--list-metrics")
    assert result.exit_code == 0
    assert [line.split(":")[0] for line in result.stdout.splitlines() if not line.startswith(" ")] == list(METRICS)
    assert result.stdout.count("    ready") >= 6


def test_help_is_quick_to_import():
    code = "import sys; import sslsr_diffusion.cli.evaluate; print([m for m in ('torch', 'numpy', 'pyiqa') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.skipif(not BENCHMARK, reason="SSLSR_BENCHMARK_DIR is not set")
def test_the_published_numbers_of_the_benchmark(tmp_path, call):
    folder = Path(BENCHMARK)
    call("--restored", folder / "published", "--reference", folder / "hr", "--y-channel", "--metrics", "psnr,ssim,niqe")
    rows = (tmp_path / "evaluation" / "metrics.csv").read_text().splitlines()
    ours = {name: dict(zip(rows[0].split(",")[3:], map(float, values))) for name, _, _, *values in (row.split(",") for row in rows[1:])}
    published = json.loads((folder / "published_metrics.json").read_text())
    assert len(ours) == len(published) == 12
    for row in published:
        got = ours[Path(row["file"]).stem]
        assert got["psnr"] == pytest.approx(row["psnr_y"], abs=1e-3)
        assert got["ssim"] == pytest.approx(row["ssim_y"], abs=1e-4)
        assert got["niqe"] == pytest.approx(row["niqe"], abs=5e-3)


def test_a_model_is_never_scored_by_pictures_of_another_dataset_or_model(tmp_path, call, monkeypatch):
    """The same names and sizes in the same output folder: pictures are made anew, and one that cannot be made is missing, not old."""
    one, two = folders(tmp_path / "one", 2), folders(tmp_path / "two", 2)
    for folder in (two["lr"], two["hr"]):
        for path in sorted(folder.iterdir()):
            write(path, 255 - np.asarray(Image.open(path)))
    prints = iter("aab")
    pipes = [Noisy()]
    monkeypatch.setattr(models, "find_model", lambda path: found_as(next(prints), path))
    monkeypatch.setattr(models, "open_model", lambda *args, **options: pipes[0])
    results = []
    for where in (one, two):
        pairs = f"{where['lr']},{where['hr']}"
        assert call("--model", "m=some/model", "--dataset", pairs, "--metrics", "psnr").exit_code == 0
        results.append(summary(tmp_path / "evaluation")["metrics"]["psnr"]["columns"]["m"]["mean"])
    assert results[1] == pytest.approx(results[0], abs=1.0)  # of old pictures it would be some 10 dB

    class Broken(Noisy):
        def enlarge(self, pictures, scale, generator):
            if len(self.calls) > 1:
                raise RuntimeError("this picture is too much")
            return super().enlarge(pictures, scale, generator)

    pipes[0] = Broken()
    said = call("--model", "m=some/model", "--dataset", f"{two['lr']},{two['hr']}", "--metrics", "psnr").output
    assert summary(tmp_path / "evaluation")["images"] == 1
    assert "failed: scene1.png: this picture is too much" in said
    for text in (said, (tmp_path / "evaluation" / "report.html").read_text()):
        assert "without intervals, which need 5 images" in text


def test_a_model_that_refuses_or_ignores_the_steps_says_so_by_their_flag(tmp_path, call, monkeypatch):
    folders(tmp_path / "set", 1)
    (tmp_path / "net.toy").write_bytes(b"")
    monkeypatch.setitem(FAMILIES, "toy_pixels", ToyPixelFamily())
    arguments = ("--dataset", tmp_path / "set", "--metrics", "psnr", "--device", "cpu")
    said = call("--model", "net.toy", "--steps", 3, "--seeds", 2, *arguments)
    assert said.output.count("note: --steps 3 has no effect: this model makes a picture in one step") == 1
    with pytest.raises(UserError, match=r"^--model: nowhere/x is no folder here"):
        call("--model", "nowhere/x", *arguments)
