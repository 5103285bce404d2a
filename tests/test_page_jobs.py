"""What a page's job keeps when a part of it cannot be had; test_page.py has the page itself."""

from __future__ import annotations

import struct
import zlib

import pytest
import torch
from evaluation_samples import picture, write
from restorers import ToyPixelFamily

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.images import read_image
from sslsr_diffusion.inference.runner import RunnerOptions
from sslsr_diffusion.models import FAMILIES
from sslsr_diffusion.page import bench as module
from sslsr_diffusion.page.bench import Bench, label_of
from sslsr_diffusion.page.shelf import Shelf


@pytest.fixture
def models(tmp_path, monkeypatch):
    """Two quick models."""
    monkeypatch.setitem(FAMILIES, "toy_pixels", ToyPixelFamily())
    for name in ("one", "two"):
        (tmp_path / f"{name}.toy").write_bytes(name.encode())
    return [str(tmp_path / f"{name}.toy") for name in ("one", "two")]


def test_of_two_uploads_of_one_name_the_broken_one_has_no_result(models, tmp_path):
    good = write(tmp_path / "first" / "a.png", picture(1))
    broken = write(tmp_path / "second" / "a.png", picture(2))
    broken.write_bytes(broken.read_bytes()[:60])
    for order in ([good, broken], [broken, good]):
        (made,) = Bench({"device": "cpu"}).upscale(order, models[:1], Shelf(tmp_path).new(), RunnerOptions(2.0))
        assert list(made.results) == [good]
        assert read_image(made.results[good]).size == (80, 96)
        assert made.said[0].endswith("1 of 2 done")


def test_stop_while_a_model_is_opened_keeps_what_the_one_before_made(models, tmp_path, monkeypatch):
    bench, open_model = Bench({"device": "cpu"}), module.open_model

    def opening(found, **where):
        if "two" in str(found.path):
            assert bench.stop("me")
            torch.nn.Identity()(torch.zeros(1))  # as a trial of its speed would
            raise AssertionError("the job went on")
        return open_model(found, **where)

    monkeypatch.setattr(module, "open_model", opening)
    source = write(tmp_path / "a.png", picture(1))
    made = bench.upscale([source], models, Shelf(tmp_path).new(), RunnerOptions(2.0), owner="me")
    assert [list(each.results) for each in made] == [[source], []]
    assert made[1].said == (f"{models[1]}: stopped while it was opened",)
    assert not bench.stop()


def test_a_model_that_cannot_be_opened_does_not_stop_the_others(models, tmp_path):
    source = write(tmp_path / "a.png", picture(1))
    broken, one = Bench({"device": "cpu"}).upscale([source], [str(source), models[0]], Shelf(tmp_path).new(), RunnerOptions(2.0))
    assert not broken.results
    assert "expected a model of" in broken.said[0]
    assert one.results[source].name == "a_one.toy.png"


def test_options_are_told_without_weights_and_leave_the_open_model_alone(models, tmp_path, monkeypatch):
    bench = Bench({"device": "cpu"})
    _, opened = bench.open(models[0])
    monkeypatch.setattr(module, "open_model", None)
    described = bench.describe(f" {models[1]} ")
    assert (described.options, dict(described.defaults)) == (opened.options, {"color_fix": "none"})
    assert bench.describe(models[1]) is described
    assert bench.open(models[0])[1] is opened
    with pytest.raises(UserError, match="expected a model of"):
        bench.describe(str(write(tmp_path / "a.png", picture(1))))


def test_a_job_is_withdrawn_while_it_waits(models, tmp_path):
    bench, source = Bench({"device": "cpu"}), write(tmp_path / "a.png", picture(1))

    def turn(owner):
        return bench.upscale([source], models[:1], Shelf(tmp_path).new(), RunnerOptions(2.0), owner=owner)

    assert not bench.withdraw("me")  # nothing waits
    bench.wait("me")
    assert not bench.withdraw("another")
    assert not bench.stop("me")
    assert bench.withdraw("me")
    assert turn("another")[0].results
    assert turn("me") == []
    bench.wait("me")
    bench.withdraw("me")
    bench.wait("me")  # wanted after all
    assert turn("me")[0].results
    assert not bench.withdraw("me")


def test_a_result_of_many_pixels_is_told_before_it_is_made(models, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_PIXELS", 80 * 96 - 1)
    said: list[str] = []
    files = [write(tmp_path / "a.png", picture(1)), write(tmp_path / "b.png", picture(1)[:, :-2])]
    bench = Bench({"device": "cpu"})
    bench.upscale(files, models[:1], Shelf(tmp_path).new(), RunnerOptions(2.0), progress=lambda share, text: said.append(text))
    large = "a.png, 1 of 2; its result has 0 megapixels, which takes long and is not shown, only given to download"
    assert f"{models[0]}: {large}" in said
    assert f"{models[0]}: b.png, 2 of 2" in said


def test_a_job_tells_of_tiles_within_a_picture(models, tmp_path):
    said: list[tuple[float, str]] = []
    source = write(tmp_path / "a.png", picture(1))
    bench, options = Bench({"device": "cpu"}), RunnerOptions(2.0, 0, {"tile": 32})
    bench.upscale([source], models[:1], Shelf(tmp_path).new(), options, progress=lambda *now: said.append(now))
    tiles = [(share, text) for share, text in said if text.startswith(f"{models[0]}: picture 1 of 1, tile ")]
    assert len(tiles) > 4
    assert [share for share, _ in tiles] == pytest.approx([number / len(tiles) for number in range(len(tiles))])
    assert tiles[1][1].endswith(f"tile 2 of {len(tiles)}")


def test_a_model_in_the_name_of_a_file():
    names = ("runs/mine/pipeline", "runs/mine", "nets/RealESRGAN_x4.pth", "someone/net#a/b.safetensors", " small-v4", "odd:näme", "/")
    assert [label_of(name) for name in names] == ["mine", "mine", "RealESRGAN_x4", "b", "small-v4", "odd-n-me", "model"]


def test_a_result_too_large_to_be_shown_is_a_sentence(tmp_path):
    source = write(tmp_path / "low.png", picture(1))
    large = tmp_path / "<large>.png"  # its head says 196 megapixels
    head = b"IHDR" + struct.pack(">IIBBBBB", 14000, 14000, 8, 2, 0, 0, 0)
    data = write(tmp_path / "small.png", picture(1)).read_bytes()
    large.write_bytes(data[:12] + head + struct.pack(">I", zlib.crc32(head)) + data[33:])
    shown = Shelf(tmp_path).compared(source, {"model": large})
    assert "only downloaded: &lt;large&gt;.png: 196 megapixels are more than the 179 that are read" in shown
    assert "<iframe" in Shelf(tmp_path).compared(source, {"model": source})
