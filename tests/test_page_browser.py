"""The page in a real browser: upload, upscale, compare, stop, look at a run, explore."""

from __future__ import annotations

import importlib.util
import socket
import threading

import pytest
from browser import chromium, needs_browser, tab
from page_toys import make_run, names, toys_in
from tiny_runs import save_upscaler

from sslsr_diffusion.images import read_image
from sslsr_diffusion.page import explorer
from sslsr_diffusion.page.bench import Bench
from sslsr_diffusion.page.shelf import Shelf

needs_gradio = pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason='needs the extra: pip install -e ".[page]"')


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    with toys_in(tmp_path_factory.mktemp("toys")) as folder:
        save_upscaler(folder / "sampled")  # a model with options that the others lack
        yield folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run in a folder of runs."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    make_run(folder)
    return folder


@pytest.fixture(scope="module")
def address(toys, run, tmp_path_factory):
    """The page served in a thread."""
    import uvicorn

    from sslsr_diffusion.page.server import application, check_gradio

    check_gradio()
    root = tmp_path_factory.mktemp("shelf")
    bench = Bench({"device": "cpu", "dtype": "float32"})  # a trial of bfloat16 would take the slow toy twice
    site = application(bench, Shelf(root), names(toys, "one", "two", "slow"), run.parent)
    server = uvicorn.Server(uvicorn.Config(site, log_level="warning", lifespan="on", timeout_graceful_shutdown=1))
    listening = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(explorer, "measured", lambda *pair: {})  # test_explorer.py measures
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
    bench.stop()
    server.should_exit = True
    thread.join(20)
    listening.close()


@pytest.fixture(scope="module")
def browser():
    with chromium() as opened:
        yield opened


def choose(page, *models):
    """Exactly these models."""
    field = page.get_by_label("Models").first
    while page.locator(".token-remove, button[title=Remove]").count():
        page.locator(".token-remove, button[title=Remove]").first.click()
    for model in models:
        field.fill(model)
        field.press("Enter")
    field.press("Escape")


@needs_gradio
@needs_browser
def test_upscale_compare_and_download(toys, address, browser):
    with tab(browser, viewport={"width": 1400, "height": 1000}) as (page, wrong):
        page.goto(address)
        page.get_by_label("Detail").wait_for()  # the toy's options are there
        assert not page.get_by_label("Sampler").is_visible()  # which it does not have
        page.get_by_role("button", name="Upscale").click()
        page.get_by_text("pictures: expected at least one, got none").wait_for()
        page.locator("input[type=file]").first.set_input_files([toys / "a.png", toys / "more" / "b.png", toys / "broken.png"])
        page.locator("a[download=broken\\.png]").wait_for()
        page.get_by_label("Scale").fill("2")
        page.get_by_role("button", name="Upscale").click()
        page.get_by_text("2 of 3 done").wait_for()
        assert "broken.png failed: " in page.locator("#said").inner_text()
        view = page.frame_locator("#comparison iframe")
        view.get_by_text("bicubic").wait_for()
        view.get_by_label("slider", exact=True).check()
        stage = view.locator(".stage canvas")
        before = stage.screenshot()
        stage.press("1")
        view.get_by_label("slider between the pictures").fill("100")
        assert view.locator(".level").inner_text() == "100 %"
        assert stage.screenshot() != before
        with page.expect_download() as got:
            page.locator("a[download=a\\.png]").last.click()
        assert read_image(got.value.path().read_bytes()).size == (80, 96)
        assert wrong == []


@needs_gradio
@needs_browser
def test_a_job_is_stopped_and_others_wait_for_it(toys, address, browser):
    with tab(browser) as (first, _), tab(browser) as (second, _):
        second.goto(address)
        second.get_by_label("Detail").wait_for()
        choose(second, str(toys / "sampled"))
        second.get_by_label("Sampler").wait_for()  # its libraries are imported
        for page, model in ((first, "slow"), (second, "one")):
            page.goto(address)
            page.get_by_label("Detail").wait_for()
            page.locator("input[type=file]").first.set_input_files(toys / "a.png")
            page.locator("a[download=a\\.png]").wait_for()
            page.get_by_label("Scale").fill("2")
            choose(page, *names(toys, model))
        first.get_by_role("button", name="Upscale").click()
        first.get_by_text("a.png, 1 of 1").wait_for()
        choose(second, str(toys / "sampled"))
        second.get_by_label("Sampler").wait_for()  # an option of another model shows while the job runs
        assert "a.png, 1 of 1" in first.locator("#said").inner_text()
        choose(second, *names(toys, "one"))
        second.get_by_label("Sampler").wait_for(state="hidden")
        second.get_by_role("button", name="Upscale").click()
        second.get_by_text("queue:").wait_for()
        second.get_by_role("button", name="Stop").click()
        second.get_by_text("Your job is withdrawn: it ends when its turn comes").wait_for()
        assert "a.png, 1 of 1" in first.locator("#said").inner_text()
        first.get_by_role("button", name="Stop").click()
        first.get_by_text("0 of 1 done, stopped").wait_for()
        second.get_by_text("Withdrawn before it began").wait_for()
        second.get_by_role("button", name="Stop").click()
        second.get_by_text("No job of yours is running").wait_for()
        second.get_by_role("button", name="Upscale").click()
        second.get_by_text("1 of 1 done").wait_for()
        first.get_by_role("button", name="Upscale").click()
        first.get_by_text("a.png, 1 of 1").wait_for()
        first.close()  # in the middle
        second.get_by_role("button", name="Upscale").click()
        second.wait_for_timeout(500)
        second.get_by_text("1 of 1 done").wait_for()


WHOLE = """(() => {  // one thing to scroll: a frame that is as high as what it shows
    const frame = document.querySelector("#explorer iframe"), shown = frame.contentDocument.documentElement;
    const wide = Math.abs(frame.clientWidth - shown.scrollWidth) <= 1;
    return wide && frame.clientHeight === shown.scrollHeight && frame.clientHeight - frame.contentDocument.body.offsetHeight <= 1;
})()"""


@needs_gradio
@needs_browser
def test_runs_and_the_explorer_in_their_tabs(address, run, browser):
    with tab(browser, viewport={"width": 390, "height": 844}) as (page, wrong):
        page.goto(address)
        page.get_by_role("tab", name="Runs").click()
        page.get_by_text("step 3, written").wait_for()
        page.get_by_text("Validation, step 3").wait_for()
        page.wait_for_function("[...document.images].filter((image) => image.naturalWidth > 40).length === 2")  # curves and grid
        page.get_by_label("Validation").first.fill("1")
        page.get_by_text("Validation, step 1").wait_for()
        with (run / "history.jsonl").open("a") as history:
            history.write('\n{"step": 5, "loss/pixel_l1": 0.2}\n')
        page.get_by_text("step 5, written").wait_for()
        assert page.locator("#grid").inner_text() == "Validation, step 1"  # which was chosen
        page.get_by_role("tab", name="Explore").click()
        page.get_by_role("button", name="Explore").click()
        page.get_by_text("result: expected a picture, got none").wait_for()
        page.get_by_role("button", name="Show an example").click()
        view = page.frame_locator("#explorer iframe")
        view.locator(".worst button").first.wait_for()
        assert "Pixel" in view.locator(".status").inner_text()
        for width in (390, 1300):
            page.set_viewport_size({"width": width, "height": 844})
            page.wait_for_function(WHOLE)
            assert page.evaluate("document.documentElement.scrollWidth") == width
        assert wrong == []
