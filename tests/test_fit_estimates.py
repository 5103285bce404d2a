"""Estimates on pictures that were degraded by known parameters."""

from __future__ import annotations

import numpy as np
import pytest
import yaml
from PIL import Image
from scripts import load_script
from typer.testing import CliRunner

from sslsr_diffusion.cli import app
from sslsr_diffusion.config import find_recipe, parse, read_raw
from sslsr_diffusion.data.degradation import DegradationSettings
from sslsr_diffusion.data.estimate import (
    Estimate,
    block_dct,
    blocking_quality,
    degradation_section,
    estimate,
    scaled_table,
    table_quality,
)
from sslsr_diffusion.errors import UserError
from sslsr_diffusion.runs.recipe import load_recipe

recovery = load_script("benchmarks/fit_recovery.py")


@pytest.mark.skipif(len(recovery.PHOTOS) < 10, reason="the shipped photographs are not in this distribution")
@pytest.mark.parametrize(("kind", "draws"), [("jpg", 2), ("png", 1)])
def test_recovery_on_photographs_that_tuned_nothing(kind, draws, tmp_path):
    """Sigma 2 to 25, quality 30 to 95, blur 0.2 to 1.5, all drawn (the first rows of benchmarks/results/fit_recovery.csv)."""
    table = [recovery.recover(case, kind, tmp_path) for case in recovery.cases(draws)]
    assert sum(row["sigma_ok"] for row in table) >= 0.8 * len(table), table
    assert sum(row["quality_ok"] for row in table) >= 0.8 * len(table), table
    unmeasured = [row for row in table if not row["measured"]]
    # the bound rests on a likelihood that texture can bend: 7 of the 9 bounds in the file hold
    assert sum(row["sigma"] > row["found_sigma"] for row in unmeasured) <= 1, unmeasured


def _flat(sigma: float, size: int = 256) -> np.ndarray:
    random = np.random.default_rng(0)
    return np.clip(128 + random.normal(0, sigma, (size, size, 3)), 0, 255).round().astype(np.uint8)


@pytest.mark.parametrize(("quality", "sigma", "measured"), [(30, 3, False), (30, 8, True), (75, 1, False), (75, 3, True), (95, 2, True)])
def test_noise_that_compression_has_destroyed_is_bounded_not_invented(quality, sigma, measured, tmp_path):
    """Measurable from about a third of the table's finest step: 17 at quality 30, 5 at 75, 1 at 95."""
    Image.fromarray(_flat(sigma)).save(tmp_path / "f.jpg", quality=quality)
    found = estimate(tmp_path / "f.jpg")
    assert found.noise_measured == measured
    if measured:
        assert found.noise == pytest.approx(sigma, rel=0.1)  # 1024 blocks of nothing but noise
    else:
        assert sigma <= found.noise <= 10


def test_a_photograph_taken_upright_is_measured_in_its_own_blocks(tmp_path):
    """Phones store pictures lying down with a note; turned upright, the blocks would start somewhere else."""
    tall, note = _flat(8)[:, :251], Image.Exif()
    note[0x0112] = 6
    Image.fromarray(tall).save(tmp_path / "plain.jpg", quality=60)
    Image.fromarray(tall).save(tmp_path / "turned.jpg", quality=60, exif=note)
    plain, turned = (estimate(tmp_path / f"{name}.jpg") for name in ("plain", "turned"))
    assert plain.noise == turned.noise == pytest.approx(8, rel=0.1)


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGB"])
def test_jpeg_files_of_every_colour_space(mode, tmp_path):
    Image.fromarray(_flat(8)).convert(mode).save(tmp_path / "x.jpg", quality=60, progressive=True)
    found = estimate(tmp_path / "x.jpg")
    assert found.quality == 60
    assert found.noise_measured


def test_quality_of_tables():
    for quality in (5, 30, 50, 75, 90, 99):
        assert abs(table_quality(scaled_table(quality)) - quality) <= 1


def test_an_uncompressed_picture_shows_no_compression(tmp_path):
    random = np.random.default_rng(0)
    noise = random.normal(128, 12, (128, 128))
    assert blocking_quality(block_dct(noise.round())) is None
    Image.fromarray(_flat(12)).save(tmp_path / "n.png")
    found = estimate(tmp_path / "n.png")
    assert found.quality is None
    assert found.noise_measured
    assert found.noise == pytest.approx(12, rel=0.1)


def test_blur_grows_with_blur(tmp_path):
    import cv2

    pixels = np.zeros((128, 128, 3))
    pixels[:, 40:90] = 200
    seen = []
    for sigma in (0.8, 1.5, 2.5):
        Image.fromarray(cv2.GaussianBlur(pixels, (0, 0), sigma).round().astype(np.uint8)).save(tmp_path / "b.png")
        seen.append(estimate(tmp_path / "b.png").blur)
    assert seen == pytest.approx([0.8, 1.5, 2.5], rel=0.25)


@pytest.mark.parametrize("size", [(1, 1), (7, 9), (8, 8), (40, 3)])
def test_tiny_pictures_give_finite_numbers(size, tmp_path):
    Image.new("RGB", size[::-1], (90, 100, 110)).save(tmp_path / "t.png")
    found = estimate(tmp_path / "t.png")
    assert np.isfinite([found.noise, found.blur]).all()


def test_the_section_is_a_valid_degradation():
    estimates = [Estimate(f"{i}", 2.0 + i, True, 60 + 5 * i if i else None, True, 0.8 + 0.1 * i) for i in range(4)]
    section = degradation_section(estimates, 4)
    settings = parse(DegradationSettings, section)
    assert settings.steps is not None
    assert [step.kind for step in settings.steps] == ["blur", "resize", "noise", "jpeg"]
    assert section["steps"][-1]["prob"] == 0.75
    assert section["steps"][2]["sigma"] == [2.0, 5.0]
    bounded = degradation_section([Estimate("a", 5.0, False, None, False, 1.0)], 4)["steps"][2]
    assert bounded["sigma"] == [0.5, 4.5]  # anywhere below the bound
    with pytest.raises(UserError, match="at least one readable"):
        degradation_section([], 4)


def test_the_command_writes_a_section(tmp_path):
    for quality in (30, 95):
        Image.fromarray(_flat(3)).save(tmp_path / f"{quality}.jpg", quality=quality)
    (tmp_path / "bad.png").write_bytes(b"no")
    output = tmp_path / "fit.yaml"
    result = CliRunner().invoke(app, ["prepare", "fit", "--lr-folder", str(tmp_path), "--output", str(output)])
    assert result.exit_code == 0, result.output
    assert "bad.png" in result.output
    assert "<=" in result.output
    assert "noise of 1 of 2 pictures is not measurable" in result.output
    section = yaml.safe_load(output.read_text())
    parse(DegradationSettings, section["degradation"])
    (tmp_path / "shipped.yaml").write_text(yaml.safe_dump(read_raw(find_recipe("sd_upscaler_ssl"))))
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"extends": "shipped.yaml", "data": section}))
    fitted = load_recipe(str(tmp_path / "mine.yaml")).data.degradation  # laid over one that names a preset
    assert [step.kind for step in fitted.steps] == [step["kind"] for step in section["degradation"]["steps"]]
