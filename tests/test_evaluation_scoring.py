from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from evaluation_samples import as_tensor, folders, noisy, picture, write
from PIL import Image

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.evaluation import scoring
from sslsr_diffusion.evaluation.metrics import METRICS, Metric
from sslsr_diffusion.evaluation.pairing import pair_files
from sslsr_diffusion.evaluation.results import ResultStore
from sslsr_diffusion.evaluation.scoring import load_rgb, score
from sslsr_diffusion.images import Image as Picture
from sslsr_diffusion.images import write_image


@pytest.fixture
def where(tmp_path):
    return folders(tmp_path, 3, ours=4, other=8)


def run(where, tmp_path, metrics=("psnr", "ssim"), **options):
    store = ResultStore(tmp_path / "results.jsonl")
    try:
        return score(pair_files({"ours": [where["ours"]], "other": [where["other"]]}, where["hr"]).scenes, metrics, store, **options)
    finally:
        store.close()


def test_values_are_those_of_the_metric_functions(where, tmp_path):
    scores = run(where, tmp_path, crop_border=4, y_channel=True)
    for i in range(3):
        restored, reference = as_tensor(noisy(picture(i), 8, seed=i)), as_tensor(picture(i))
        for name in ("psnr", "ssim"):
            want = METRICS[name].fn(restored, reference, crop_border=4, y_channel=True).item()
            assert scores.values[name]["other"][i, 0] == want
    assert "border 4" in scores.conventions["psnr"]
    assert "Y of YCbCr" in scores.conventions["psnr"]


def test_an_interrupted_run_goes_on_where_it_was(where, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setitem(METRICS, "psnr", counting(METRICS["psnr"], calls))

    def stop(name):
        if name == "scene1":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(where, tmp_path, ["psnr"], progress=stop)
    assert len(calls) == 4
    again = run(where, tmp_path, ["psnr"])
    assert len(calls) == 6
    calls.clear()
    run(where, tmp_path, ["psnr"], crop_border=4)  # another convention: other numbers
    assert len(calls) == 6
    write(where["ours"] / "scene0.png", noisy(picture(0), 20))  # another content
    changed = run(where, tmp_path, ["psnr"])
    assert len(calls) == 7
    assert changed.values["psnr"]["ours"][0] < again.values["psnr"]["ours"][0]


def counting(metric: Metric, calls: list) -> Metric:
    def fn(*args, **options):
        calls.append(1)
        return metric.fn(*args, **options)

    return Metric(fn, metric.higher_is_better, metric.needs_reference, metric.label, metric.digits, metric.convention)


def test_sister_metrics_are_computed_in_one_pass(where, tmp_path, monkeypatch):
    calls = []

    def both(*args, **options):
        calls.append(1)
        return {"ssg_l1": torch.tensor([1.0]), "ssg_kl": torch.tensor([2.0])}

    for name in ("ssg_l1", "ssg_kl"):
        m = METRICS[name]
        monkeypatch.setitem(METRICS, name, Metric(m.fn, m.higher_is_better, m.needs_reference, m.label, m.digits, m.convention, joint=both))
    scores = run(where, tmp_path, ["ssg_l1", "ssg_kl"])
    assert len(calls) == 6
    assert (scores.values["ssg_l1"]["ours"] == 1).all()
    assert (scores.values["ssg_kl"]["other"] == 2).all()


def test_an_unreadable_image_is_left_out_and_named(where, tmp_path):
    (where["other"] / "scene1.png").write_bytes(b"broken")
    scores = run(where, tmp_path, ["psnr"])
    assert [scene.name for scene in scores.scenes] == ["scene0", "scene2"]
    assert scores.values["psnr"]["ours"].shape == (2, 1)
    assert len(scores.problems) == 1
    assert "scene1 is left out" in scores.problems[0]


def test_a_metric_without_a_value_for_an_image_is_nan_and_said(where, tmp_path):
    scores = run(where, tmp_path, ["psnr", "niqe"])  # 48 x 40 has no block of 96 x 96
    assert np.isnan(scores.values["niqe"]["ours"]).all()
    assert "NIQE has no value for" in scores.problems[0]
    assert "two blocks" in scores.problems[0]


def test_spread_over_seeds(tmp_path):
    where = folders(tmp_path, 2, a=0, b=0, c=0)
    for shade, name in ((100, "a"), (110, "b"), (120, "c")):
        for i in range(2):
            write(where[name] / f"scene{i}.png", np.full((40, 48, 3), shade, np.uint8))
    store = ResultStore(tmp_path / "results.jsonl")
    scores = score(pair_files({"ours": [where["a"], where["b"], where["c"]]}, where["hr"]).scenes, ["psnr"], store)
    store.close()
    assert scores.values["psnr"]["ours"].shape == (2, 3)
    # float32 pixels: 10 / 255 is not exact
    assert scores.pixel_std["ours"].tolist() == pytest.approx([10, 10], rel=1e-5)


def test_sixteen_bits_and_transparency(tmp_path):
    deep = (np.arange(40 * 48 * 3).reshape(40, 48, 3) * 11).astype(np.uint16)
    write_image(tmp_path / "deep.png", Picture(deep))
    assert load_rgb(tmp_path / "deep.png")[0, 1, 2, 3].item() == pytest.approx(deep[2, 3, 1] / 65535, abs=1e-7)
    rgba = np.dstack([np.full((4, 4, 3), 100, np.uint8), np.array([[0, 51, 255, 255]] * 4, np.uint8)])
    Image.fromarray(rgba).save(tmp_path / "clear.png")
    seen = load_rgb(tmp_path / "clear.png")[0, 0, 0] * 255
    assert seen.tolist() == pytest.approx([255, 224, 100, 100], abs=1e-4)  # on white


def test_features_of_a_whole_set_are_kept_and_compared(where, tmp_path, monkeypatch):
    calls = []

    def features(images):
        calls.append(1)
        return images.mean(dim=(2, 3))

    m = METRICS["fid"]
    monkeypatch.setitem(METRICS, "fid", Metric(features, False, True, m.label, m.digits, m.convention, whole_set=m.whole_set))
    scores = run(where, tmp_path, ["fid"])
    assert len(calls) == 9  # three references once, not once per column
    assert scores.whole_set["fid"]["ours"].shape == (1,)
    assert 0 <= scores.whole_set["fid"]["ours"][0] < scores.whole_set["fid"]["other"][0]
    run(where, tmp_path, ["fid"])
    assert len(calls) == 9


def test_nothing_readable_is_an_error(where, tmp_path):
    for path in where["ours"].iterdir():
        path.write_bytes(b"broken")
    with pytest.raises(UserError, match="no image could be scored"):
        run(where, tmp_path)


def test_results_are_plain_json_lines(where, tmp_path):
    run(where, tmp_path, ["psnr"])
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    assert set(rows[0]) == {"restored", "reference", "metric", "convention", "value", "seconds"}
    assert scoring.__version__ in rows[0]["convention"]
