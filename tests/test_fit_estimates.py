"""Estimates on pictures that were degraded by known parameters."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from sslsr_diffusion.cli import app
from sslsr_diffusion.config import parse
from sslsr_diffusion.data.degradation import DegradationSettings
from sslsr_diffusion.data.estimate import Estimate, block_dct, blocking_quality, estimate, scaled_table, table_quality
from sslsr_diffusion.data.fit import LUMA_SHARE, degradation_section
from sslsr_diffusion.errors import UserError

PHOTOS = sorted((Path(__file__).parents[1] / "examples" / "photos").rglob("*.jpg"))[:10]
# Noise of 6 and more: less disappears in the quantisation of ordinary qualities and in the texture of photographs
SIGMAS, QUALITIES, BLURS = (6, 10, 15, 20, 8), (65, 85, 50, 75, 92), (0.6, 1.0, 1.4)


def _degraded(number: int) -> tuple[bytes, int, int]:
    import cv2

    sigma, quality = SIGMAS[number % 5], QUALITIES[(number * 2) % 5]
    picture = Image.open(PHOTOS[number]).convert("RGB")
    picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.LANCZOS)
    pixels = cv2.GaussianBlur(np.asarray(picture).astype(float), (0, 0), BLURS[number % 3])
    pixels += np.random.default_rng(number).normal(0, sigma, pixels.shape)
    buffer = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).round().astype(np.uint8)).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue(), sigma, quality


@pytest.mark.skipif(len(PHOTOS) < 10, reason="the shipped photographs are not in this distribution")
@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_recovery_on_ten_photographs(kind, tmp_path):
    table = []
    for number in range(10):
        data, sigma, quality = _degraded(number)
        path = tmp_path / f"{number}.{kind}"
        if kind == "jpg":
            path.write_bytes(data)
        else:  # the tables are gone, the blocks are not
            Image.open(io.BytesIO(data)).convert("RGB").save(path)
        found = estimate(path)
        table.append((PHOTOS[number].name, sigma, round(found.noise / LUMA_SHARE, 1), quality, found.quality))
        assert found.from_tables == (kind == "jpg")
    print(*table, sep="\n")
    assert sum(abs(seen / sigma - 1) <= 0.25 for _, sigma, seen, _, _ in table) >= 8, table
    assert sum(seen is not None and abs(seen - quality) <= 10 for *_, quality, seen in table) >= 8, table


def test_quality_of_tables():
    for quality in (5, 30, 50, 75, 90, 99):
        assert abs(table_quality(scaled_table(quality)) - quality) <= 1


def test_an_uncompressed_picture_shows_no_compression(tmp_path):
    random = np.random.default_rng(0)
    noise = random.normal(128, 12, (128, 128))
    assert blocking_quality(block_dct(noise.round())) is None
    Image.fromarray(np.clip(noise, 0, 255).astype(np.uint8)).save(tmp_path / "n.png")
    found = estimate(tmp_path / "n.png")
    assert found.quality is None
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
    estimates = [Estimate(f"{i}", 2.0 + i, 60 + 5 * i if i else None, True, 0.8 + 0.1 * i) for i in range(4)]
    section = degradation_section(estimates, 4)
    settings = parse(DegradationSettings, section)
    assert settings.steps is not None
    assert [step.kind for step in settings.steps] == ["blur", "resize", "noise", "jpeg"]
    assert section["steps"][-1]["prob"] == 0.75
    with pytest.raises(UserError, match="at least one readable"):
        degradation_section([], 4)


def test_the_command_writes_a_section(tmp_path):
    for number in range(2):
        (tmp_path / f"{number}.jpg").write_bytes(_degraded(number)[0])
    (tmp_path / "bad.png").write_bytes(b"no")
    output = tmp_path / "fit.yaml"
    result = CliRunner().invoke(app, ["prepare", "fit", "--lr-folder", str(tmp_path), "--output", str(output)])
    assert result.exit_code == 0, result.output
    assert "bad.png" in result.output
    parse(DegradationSettings, yaml.safe_load(output.read_text())["degradation"])
