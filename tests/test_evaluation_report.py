from __future__ import annotations

import csv
import io
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from evaluation_samples import folders

from sslsr_diffusion.evaluation.gallery import cards, pick
from sslsr_diffusion.evaluation.pairing import pair_files
from sslsr_diffusion.evaluation.report import distribution, render_report
from sslsr_diffusion.evaluation.results import ResultStore
from sslsr_diffusion.evaluation.scoring import Scores, score
from sslsr_diffusion.evaluation.statistics import Mean
from sslsr_diffusion.evaluation.summary import markdown_table, summarize, text_table, to_csv, to_json

LACKING = {"lpips": "weights are missing"}


@pytest.fixture(scope="module")
def scores(tmp_path_factory) -> Scores:
    root = tmp_path_factory.mktemp("scores")
    where = folders(root, 5, ours=3, again=3.5, other=9)
    store = ResultStore(root / "results.jsonl")
    pairing = pair_files({"other": [where["other"]], "ours": [where["ours"], where["again"]]}, where["hr"], where["lr"])
    found = score(pairing.scenes, ["psnr", "ssim"], store)
    store.close()
    return found


@pytest.fixture(scope="module")
def summary(scores):
    return summarize(scores, options={"crop_border": 0}, unavailable=LACKING, problems=["one <remark>"])


def test_summary_has_means_best_columns_differences_and_spread(summary, scores):
    psnr = summary.metrics["psnr"]
    assert psnr.best == ["ours"]
    assert psnr.columns["ours"].mean == pytest.approx(scores.values["psnr"]["ours"].mean())
    assert psnr.columns["ours"].low < psnr.columns["ours"].mean < psnr.columns["ours"].high
    change = summary.differences["ours"]["psnr"]
    assert change.mean == pytest.approx(psnr.columns["ours"].mean - psnr.columns["other"].mean)
    assert (change.better, change.count) == (5, 5)
    spread = summary.spread["ours"]
    assert spread.seeds == 2
    assert spread.metrics["psnr"] == pytest.approx(scores.values["psnr"]["ours"].std(axis=1, ddof=1).mean())
    assert "other" not in summary.spread


def test_json_is_strict(summary):
    text = to_json(replace(summary, options={"a": math.nan, "b": [math.inf]}))
    data = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert (data["options"]["a"], data["options"]["b"]) == (None, ["inf"])
    assert data["unavailable"] == LACKING


def test_csv_has_a_line_per_image_model_and_seed(scores):
    rows = list(csv.DictReader(io.StringIO(to_csv(scores))))
    assert len(rows) == 5 * 3
    assert [(r["image"], r["model"], r["seed"]) for r in rows[:3]] == [
        ("scene0", "other", "0"),
        ("scene0", "ours", "0"),
        ("scene0", "ours", "1"),
    ]
    assert float(rows[2]["psnr"]) == scores.values["psnr"]["ours"][0, 1]


def test_tables_mark_the_best(summary):
    text = text_table(summary)
    assert re.search(r"PSNR \(dB\) ↑ +\d+\.\d{3}  \[.*\] +\d+\.\d{3}\* \[", text)
    assert "5 of 5" in text
    assert "ours, 2 seeds" in text
    models = {column: {name: metric.columns[column].mean for name, metric in summary.metrics.items()} for column in summary.columns}
    lines = markdown_table(models).splitlines()
    assert lines[0] == "| model | PSNR (dB) ↑ | SSIM ↑ |"
    assert re.fullmatch(r"\| ours \| \*\*\d+\.\d{3}\*\* \| \*\*0\.\d{4}\*\* \|", lines[3])


def test_picks_are_the_extremes_and_none_twice(scores):
    mean = np.mean([scores.values["psnr"][c].mean(axis=1) for c in scores.columns], axis=0)
    picks = pick(scores, 2)["psnr"]
    assert [p.kind for p in picks] == ["worst", "worst", "best", "best"]
    assert [int(p.anchor.removeprefix("image-")) for p in picks] == [*np.argsort(mean)[:2], *np.argsort(-mean)[:2]]
    many = pick(scores, 20)["psnr"]
    assert len({p.anchor for p in many}) == len(many) == 5
    assert pick(scores, 0)["psnr"] == []


def test_cards_show_the_same_window_of_every_column(scores):
    card = cards(scores, pick(scores, 1))[0]
    assert [zoom.title for zoom in card.zooms] == ["LR bicubic", "other", "ours", "reference"]
    assert card.window == 40
    assert all(zoom.crop.startswith("data:image/webp;base64,") and zoom.mask.startswith("data:image/png") for zoom in card.zooms)
    assert len({zoom.crop for zoom in card.zooms}) == 4


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.tags: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in {"meta", "img", "br", "line", "circle", "rect", "path"}:
            self.open.append(tag)
        for name, value in attrs:
            if name in {"src", "href"}:
                self.links.append(value)
            if name == "id":
                self.ids.add(value)

    def handle_endtag(self, tag):
        if self.open and tag == self.open[-1]:
            self.open.pop()


def test_report_is_self_contained_and_well_formed(summary, scores):
    html = render_report(summary, scores)
    page = Page()
    page.feed(html)
    assert page.open == []
    assert "script" not in page.tags
    assert not re.search(r"url\(|@import|https?://", re.sub(r'"data:[^"]*"', "", html))
    assert all(link.startswith("data:image/") or link.removeprefix("#") in page.ids for link in page.links)
    assert html.count('class="best"') == 2
    assert html.count("<svg") == 2
    assert "one &lt;remark&gt;" in html
    assert 'name="viewport"' in html


def test_names_cannot_break_the_page(tmp_path):
    where = folders(tmp_path, 2, ours=3)
    (where["ours"] / "scene0.png").rename(where["ours"] / "a&<b>'.png")
    (where["hr"] / "scene0.png").rename(where["hr"] / "a&<b>'.png")
    store = ResultStore(tmp_path / "results.jsonl")
    found = score(pair_files({"<script>&": [where["ours"]]}, where["hr"]).scenes, ["psnr"], store)
    store.close()
    html = render_report(summarize(found, options={}, unavailable={}), found)
    assert "<script>" not in html
    assert "<b>" not in html


def test_chart_leaves_out_what_is_not_finite_and_survives_one_value():
    mean = Mean(1.0, math.nan, math.nan, 1)
    svg = distribution({"a": np.array([1.0, math.inf, math.nan])}, ["x", "y", "z"], {"a": mean}, 3)
    assert svg.count("<circle") == 1
    assert "nan" not in svg
    assert "inf" not in svg
    assert distribution({"a": np.array([math.nan])}, ["x"], {"a": mean}, 3) == ""


def test_chart_of_many_images_draws_only_the_extremes():
    values = np.linspace(0, 1, 1000)
    svg = distribution({"a": values}, [str(i) for i in range(1000)], {"a": Mean(0.5, 0.4, 0.6, 1000)}, 3)
    assert svg.count("<circle") == 300


def test_the_template_and_the_parameters_lie_in_the_package():
    import sslsr_diffusion.evaluation as package

    names = {path.name for path in Path(package.__file__).parent.iterdir()}
    assert {"report.html.j2", "niqe_modelparameters.mat", "NOTICE-niqe.txt"} <= names
