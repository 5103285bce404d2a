from __future__ import annotations

import asyncio
import importlib.util
import json
import socket
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from evaluation_samples import picture, write
from page_toys import make_run, names, toys_in
from PIL import Image
from typer.testing import CliRunner

from sslsr_diffusion.cli import app
from sslsr_diffusion.cli.infer import CALL
from sslsr_diffusion.errors import MissingDependency, UserError
from sslsr_diffusion.images import read_image
from sslsr_diffusion.inference.runner import RunnerOptions
from sslsr_diffusion.page.bench import Bench
from sslsr_diffusion.page.controls import CONTROLS, call_of, scale_of
from sslsr_diffusion.page.runs import draw_curves, list_runs, look_at, name_of
from sslsr_diffusion.page.server import Guard, serve
from sslsr_diffusion.page.shelf import Shelf

needs_gradio = pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason='needs the extra: pip install -e ".[page]"')


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    with toys_in(tmp_path_factory.mktemp("toys")) as folder:
        yield folder


def test_several_models_and_a_broken_picture(toys, tmp_path):
    said: list[tuple[float, str]] = []
    options = RunnerOptions(2.0, 0, {"detail": 0.5, "prompt": "toys have none"})
    files = [toys / "a.png", toys / "broken.png", toys / "more" / "b.png"]
    made = Bench({"device": "cpu"}).upscale(files, names(toys, "one", "two"), tmp_path, options, progress=lambda *now: said.append(now))
    assert [each.model for each in made] == names(toys, "one", "two")
    for each in made:
        assert {path.name for path in each.results} == {"a.png", "b.png"}
        label = Path(each.model).name
        assert {path.name for path in each.results.values()} == {f"a_{label}.png", f"b_{label}.png"}
        assert all(read_image(path).size == (80, 96) for path in each.results.values())
        assert each.said[0].endswith("2 of 3 done")
        assert "broken.png failed: " in each.said[-1]
    shares = [share for share, _ in said]
    assert shares == sorted(shares)
    assert (shares[0], max(shares)) == (0, pytest.approx(5 / 6))
    assert "picture" in said[-1][1] or "b.png, 3 of 3" in said[-1][1]


def test_a_job_ends_between_two_layers_and_only_by_its_owner(toys, tmp_path):
    bench = Bench({"device": "cpu", "dtype": "float32"})
    ended: list = []
    assert not bench.stop()
    files = [toys / "a.png", toys / "more" / "b.png"]
    job = threading.Thread(
        target=lambda: ended.extend(bench.upscale(files, names(toys, "slow", "one"), tmp_path, RunnerOptions(2.0), owner="me"))
    )
    job.start()
    began = time.monotonic()
    while not bench._owner and time.monotonic() - began < 20:
        time.sleep(0.01)
    assert not bench.stop("another")
    time.sleep(0.5)
    assert job.is_alive()
    assert bench.stop("me")
    job.join(10)
    assert not job.is_alive()
    (made,) = ended  # the model after it was not begun
    assert made.said == (f"{names(toys, 'slow')[0]}: 0 of 2 done, stopped",)
    assert not torch.nn.modules.module._global_forward_pre_hooks
    assert bench.upscale([toys / "a.png"], names(toys, "one"), tmp_path / "again", RunnerOptions(2.0))[0].results


def test_what_cannot_be_done_is_a_sentence(toys, tmp_path):
    bench = Bench({"device": "cpu"})
    for files, models, said in (
        ([], names(toys, "one"), "pictures: expected at least one"),
        ([toys / "a.png"], [], "models: expected at least one"),
        ([toys / "a.png"], [str(toys / "a.png")], "model .*: expected a model of"),
    ):
        with pytest.raises(UserError, match=said):
            bench.upscale(files, models, tmp_path, RunnerOptions(2.0))
    with pytest.raises(UserError, match=r"detail: expected 0 .* got 7"):
        bench.upscale([toys / "a.png"], names(toys, "one"), tmp_path, RunnerOptions(2.0, 0, {"detail": 7.0}))
    assert not bench.stop()


def test_fields_become_a_call():
    assert call_of({"num_inference_steps": " 4 ", "detail": "0.5", "sampler": "", "prompt": "fur", "fidelity": None, "tile": "none"}) == {
        "num_inference_steps": 4,
        "detail": 0.5,
        "prompt": "fur",
        "tile": None,
    }
    with pytest.raises(UserError, match=r"Steps: expected a whole number, or nothing for the model's own, got '1\.5'"):
        call_of({"num_inference_steps": "1.5"})
    with pytest.raises(UserError, match="tile 7x: expected a side"):
        call_of({"tile": "7x"})
    with pytest.raises(UserError, match=r"Scale: expected 0\.01 to 64, such as 4, got 0"):
        scale_of(0)


def test_the_page_has_a_field_for_every_option_of_infer():
    assert set(CONTROLS) == {*CALL, "tile"}


def test_a_run_is_seen_while_it_is_written(tmp_path):
    assert list_runs(tmp_path / "runs") == []
    make_run(tmp_path / "runs" / "mine")
    (tmp_path / "runs" / "empty").mkdir()
    (tmp_path / "runs" / "empty" / "recipe.yaml").write_text("seed: 4\n")
    assert set(list_runs(tmp_path / "runs")) == {"mine", "empty"}
    seen = look_at(tmp_path / "runs" / "mine")
    assert seen.about.startswith("step 3, written ")
    assert "loss/pixel_l1 0.3333, validation/psnr 23" in seen.about
    assert (len(seen.grids), seen.recipe) == (3, "seed: 3\n")
    assert [name_of(grid) for grid in seen.grids] == ["step 1", "step 2", "step 3"]
    history = tmp_path / "runs" / "mine" / "history.jsonl"
    history.write_text(json.dumps({"step": 0, "validation/psnr": 19.5, "validation_pictures": [19.5]}) + "\n" + history.read_text())
    write(tmp_path / "runs" / "mine" / "pictures" / "step-000000.png", picture(0))
    seen = look_at(tmp_path / "runs" / "mine")
    assert "validation/psnr 23 (19.5 before training)" in seen.about
    assert name_of(seen.grids[0]) == "step 0: before training"
    curves = draw_curves(tmp_path / "runs" / "mine", tmp_path)
    assert curves is not None
    assert Image.open(curves).size[0] > 500
    assert look_at(tmp_path / "runs" / "empty").about == "nothing is written down yet"
    assert draw_curves(tmp_path / "runs" / "empty", tmp_path) is None
    write(tmp_path / "runs" / "mine" / "pictures" / "step-000009.png", picture(0))
    assert look_at(tmp_path / "runs" / "mine").state != seen.state


def test_a_comparison_shows_what_a_browser_can(tmp_path):
    low = write(tmp_path / "low.png", picture(1)[::2, ::2])
    Image.fromarray(picture(1)).convert("RGBA").save(tmp_path / "result.tif")
    shelf = Shelf(tmp_path)
    address = shelf.comparison(low, {"</script>": tmp_path / "result.tif"})
    folder = shelf.views / address.split("/")[2]
    assert {path.name for path in folder.iterdir()} == {"index.html", "0.png", "1.png"}
    assert (np.asarray(Image.open(folder / "1.png")) == picture(1)).all()
    assert (folder / "index.html").read_text().count("</script>") == 1


def answered(headers: dict[str, str]) -> tuple[int, dict]:
    """Status and headers that the guard lets through."""
    sent: list[dict] = []

    async def inner(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message):
        sent.append(message)

    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    asyncio.run(Guard(inner)({"type": "http", "headers": raw}, None, send))
    return sent[0]["status"], dict(sent[0]["headers"])


def test_pages_of_other_sites_are_refused():
    status, headers = answered({"host": "127.0.0.1:7860", "origin": "http://127.0.0.1:7860"})
    assert status == 200
    assert b"default-src 'self'" in headers[b"content-security-policy"]
    assert b"; frame-ancestors 'self'; form-action 'self'; base-uri 'self'" in headers[b"content-security-policy"]
    assert answered({"host": "localhost:7860"})[0] == 200
    for foreign in ({"host": "evil.example:7860"}, {"host": "evil.example"}, {"host": "127.0.0.1.evil.example:1"}):
        assert answered(foreign)[0] == 403
    for origin in ("http://evil.example", "https://evil.example:7860", "null"):
        assert answered({"host": "127.0.0.1:7860", "origin": origin})[0] == 403


def test_a_missing_gradio_and_a_missing_model_are_sentences(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(MissingDependency, match=r'pip install "sslsr-diffusion\[page\]"'):
        serve([], port=0, runs=tmp_path, where={})
    monkeypatch.setitem(sys.modules, "gradio", SimpleNamespace(__version__="6.1.9"))
    with pytest.raises(MissingDependency, match=r"gradio 6\.2 or newer, got 6\.1\.9"):
        serve([], port=0, runs=tmp_path, where={})
    with pytest.raises(UserError, match=r"^--model: nowhere/x is no folder here"):
        raise CliRunner().invoke(app, ["page", "--model", "nowhere/x"]).exception


@needs_gradio
def test_a_port_in_use_is_a_sentence(tmp_path):
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(UserError, match=r"^port \d+: cannot be had \(Address already in use\); choose"),
    ):
        serve([], port=taken.getsockname()[1], runs=tmp_path, where={})
