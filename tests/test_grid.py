"""evaluation/grid.py and what stands on it: the metric with and without the low-resolution picture, its spectrum, the guard."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from toys import smooth, toy_job, toy_validation

from sslsr_diffusion.config import RecipeError, parse
from sslsr_diffusion.errors import UserError
from sslsr_diffusion.evaluation.grid import grid, line_heights
from sslsr_diffusion.evaluation.metrics import METRICS
from sslsr_diffusion.evaluation.pairing import pair_files
from sslsr_diffusion.evaluation.report import render_report
from sslsr_diffusion.evaluation.results import ResultStore
from sslsr_diffusion.evaluation.scoring import score
from sslsr_diffusion.evaluation.summary import summarize
from sslsr_diffusion.images import resize_bicubic, to_array, to_tensor
from sslsr_diffusion.runs.recipe import Recipe
from sslsr_diffusion.runs.start import lacking_metrics, validation_metric
from sslsr_diffusion.training.loop import train_job

PHOTO = Path(__file__).parents[1] / "examples/photos/validation/dandelion.jpg"


@pytest.fixture(scope="module")
def photo() -> torch.Tensor:
    """[1, 3, 240, 200]"""
    return to_tensor(np.asarray(Image.open(PHOTO).convert("RGB")))[None, :, 100:340, 100:300]


def raster(picture: torch.Tensor, period: int, sigma: float = 3) -> torch.Tensor:
    tile = torch.randn(1, 1, period, period, generator=torch.Generator().manual_seed(period))
    tile = (tile - tile.mean()) / tile.std() * sigma / 255
    height, width = picture.shape[-2:]
    tiles = tile.repeat(1, 1, -(-height // period), -(-width // period))
    return (picture + tiles[..., :height, :width]).clamp(0, 1)


def by_hand(picture: torch.Tensor) -> float:
    """The same number by numpy, line by line."""
    r, g, b = picture[0].double().numpy()
    y = 16 + 65.481 * r + 128.553 * g + 24.966 * b
    found = []
    for rows in (y, y.T):
        d = np.diff(rows, axis=1)
        n = d.shape[1] // 16 * 16
        hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n) / n)
        powers = np.sort(np.abs(np.fft.rfft(d[:, :n] * hann, axis=1)) ** 2, axis=0)[(len(d) - 1) // 2]
        powers = powers + n * (2 / 12) * np.mean(hann**2)  # the difference of two roundings, 1/12 each
        for k in range(1, 9):
            line = k * n // 16
            around = [abs(line + j) for j in range(-12, 13) if abs(j) > 1]
            around = [place if place <= n // 2 else n - place for place in around]
            found.append(10 * np.log10(powers[line] / np.sort(powers[around])[10]))
    return max(found)


def test_the_number_is_what_the_docstring_says(photo):
    for picture in (photo, raster(photo, 16), raster(photo, 8)[..., 3:200, 5:190]):
        assert grid(picture).item() == pytest.approx(by_hand(picture), abs=1e-6)
    both = grid(torch.cat([photo, raster(photo, 16)]))
    assert both.tolist() == pytest.approx([grid(photo).item(), grid(raster(photo, 16)).item()])


def test_a_raster_stands_out_at_its_own_lines(photo):
    assert grid(photo).item() < 3
    for period in (8, 16):
        found = raster(photo, period)
        assert grid(found).item() > 8
        heights = line_heights(found[0], -1)
        lines = heights[:: (len(heights) - 1) // 8]  # k = 0..8 of 1/16
        assert lines[2::2].max() > 5
        assert (lines[1::2].max() > 4) == (period == 16)


def test_with_the_input_it_is_what_the_model_added(photo):
    lr = resize_bicubic(photo, (60, 50)).clamp(0, 1)
    bicubic = resize_bicubic(lr, (240, 200)).clamp(0, 1)
    assert grid(bicubic, lr).item() == 0
    assert grid(raster(photo, 8), lr, crop_border=4).item() == pytest.approx(
        by_hand(raster(photo, 8)[..., 4:-4, 4:-4]) - by_hand(bicubic[..., 4:-4, 4:-4]), abs=1e-5
    )
    assert validation_metric("grid")(bicubic, photo, lr).item() == 0
    assert validation_metric("psnr")(bicubic, bicubic, lr).item() == float("inf")


def test_too_small_pictures_and_flat_ones():
    with pytest.raises(UserError, match=r"grid needs at least 128 x 128 pixels, got 200 x 120; cut less, or restore larger pictures\."):
        grid(torch.zeros(1, 3, 128, 208), crop_border=4)
    assert grid(torch.full((1, 3, 128, 128), 0.3)).item() == pytest.approx(0, abs=0.5)  # finite: rounding is below everything


@pytest.mark.parametrize("inputs", [0, 1, 2])
def test_the_report_says_what_it_is_compared_with_and_shows_the_spectrum(tmp_path, photo, inputs):
    for name, picture in {"hr": photo, "plain": photo, "odd": raster(photo, 16)}.items():
        for stem in ("a", "b"):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.fromarray(to_array(picture[0])).save(tmp_path / name / f"{stem}.png")
    (tmp_path / "lr").mkdir()
    for stem in ("a", "b")[:inputs]:
        Image.fromarray(to_array(resize_bicubic(photo, (60, 50))[0])).save(tmp_path / "lr" / f"{stem}.png")
    store = ResultStore(tmp_path / "results.jsonl")
    folders = {"<plain>": [tmp_path / "plain"], "odd": [tmp_path / "odd"]}
    pairing = pair_files(folders, tmp_path / "hr", tmp_path / "lr" if inputs else None)
    found = score(pairing.scenes, ["grid"], store)
    store.close()
    lr = resize_bicubic(photo, (60, 50)).clamp(0, 1)
    lr = (lr * 255).round() / 255 if inputs == 2 else None  # one of two: all are measured alone
    saved = (raster(photo, 16) * 255).round() / 255
    assert found.values["grid"]["odd"][1, 0] == pytest.approx(grid(saved, lr).item(), abs=1e-4)
    assert ("minus that of the low-resolution picture" in found.conventions["grid"]) == (inputs == 2)
    assert ("of the picture itself" in found.conventions["grid"]) == (inputs < 2)
    html = render_report(summarize(found, options={}, unavailable={}), found, examples=0)
    assert found.conventions["grid"].replace("'", "&#39;") in html
    assert html.count("<polyline") == 2 * (3 + (inputs > 0))  # both axes of bicubic, two columns and the reference
    assert "&lt;plain&gt;" in html
    odd, plain = (re.findall(rf'name" [^>]*>{name}</text><polyline[^>]*points="([^"]*)"', html)[0] for name in ("odd", "&lt;plain&gt;"))
    heights = [[float(point.split(",")[1]) for point in curve.split()] for curve in (odd, plain)]
    peaks = [np.median(found) - min(found) for found in heights]  # downwards is less
    assert peaks[0] > 2 * peaks[1]


def guarded(tmp_path: Path, values: list[float], refuse: dict[str, float], pipeline: str = "best"):
    """A run that looks four times, at means of a metric `odd` that stand in `values`, with mse falling all the while."""
    state = {"pass": 0}

    def odd(restored: torch.Tensor, hr: torch.Tensor, lr: torch.Tensor) -> torch.Tensor:
        turn, state["pass"] = state["pass"] // 6, state["pass"] + 1  # three pictures and their bicubic ones
        return torch.tensor([values[min(turn, len(values) - 1)]])

    strength = iter(0.5 - 0.01 * k for k in range(100))
    looking = toy_validation(every=5)
    looking = replace(
        looking,
        metrics={**looking.metrics, "odd": odd},
        settings=looking.settings.model_copy(update={"refuse": refuse}),
        higher_is_better={"mse": False, "odd": False},
    )
    job = toy_job(tmp_path / "run", strength=lambda: next(strength), steps=15, dropout=0.0)
    output = job.output.model_copy(update={"pipeline": pipeline})
    return train_job(replace(job, validation=looking, output=output, recipe={"validation": {"best": "mse"}}))


def test_refused_weights_never_become_the_best(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "sslsr_diffusion"):
        result = guarded(tmp_path, [1.0, 1.0, 5.2, 4.0], {"odd": 4})
    rows = [json.loads(line) for line in (tmp_path / "run/history.jsonl").open()]
    errors = {row["step"]: row["validation/mse"] for row in rows if "validation/mse" in row}
    assert errors[15] < errors[10] < errors[5]
    assert result.best == errors[15]  # 4 is allowed
    assert [record.getMessage() for record in caplog.records if "cannot become" in record.getMessage()] == [
        "step 10: these weights cannot become the best: odd is 5.2, validation.refuse allows at most 4"
    ]


def test_where_all_are_refused_the_last_ones_are_said_to_be_the_result(tmp_path, caplog):
    result = guarded(tmp_path, [5.0, 5.0, 6.0, float("nan")], {"odd": 4})
    assert result.best is None
    assert not (tmp_path / "run/best").exists()
    assert "odd is nan, validation.refuse allows at most 4" in caplog.text
    assert "no weights became the best: the result holds the last ones" in caplog.text


def test_higher_is_better_turns_the_limit_round():
    looking = toy_validation(refuse={"psnr": 20.0, "mse": 0.1})
    looking = replace(looking, higher_is_better={"psnr": True, "mse": False})
    assert looking.refusals({"psnr": 20.0, "mse": 0.1}) == []
    assert looking.refusals({"psnr": 19.5, "mse": 0.0}) == ["psnr is 19.5, validation.refuse allows at least 20"]


def test_what_is_refused_must_be_measured():
    values = {"data": {"sources": []}, "losses": [{"kind": "diffusion"}]}
    parse(Recipe, {**values, "validation": {"metrics": ["psnr", "grid"], "refuse": {"grid": 4}}})
    with pytest.raises(RecipeError, match=r"validation\.refuse: 'grid' is not measured; expected one of validation\.metrics: psnr, ssim\."):
        parse(Recipe, {**values, "validation": {"refuse": {"grid": 4}}})


def test_a_guard_that_cannot_be_measured_is_said_before_the_run(monkeypatch):
    lacking = replace(METRICS["grid"], lacks=lambda *, download: "needs a package; pip install it")
    monkeypatch.setitem(METRICS, "grid", lacking)
    values = {
        "data": {"sources": []},
        "losses": [{"kind": "diffusion"}],
        "validation": {"metrics": ["psnr", "grid"], "refuse": {"grid": 4}},
    }
    recipe = parse(Recipe, values)
    assert lacking_metrics(recipe) == {"grid": "grid: needs a package; pip install it; without it no weights are kept as the best"}
    recipe = parse(Recipe, {**values, "validation": {**values["validation"], "best": "grid", "refuse": {}}})
    assert lacking_metrics(recipe)["grid"].endswith("no weights are kept as the best (--set validation.best=psnr chooses by that)")


def test_smooth_pictures_have_no_raster():
    assert grid(smooth(1, size=160)[None]).item() < 2
