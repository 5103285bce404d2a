from __future__ import annotations

import base64
import json
import re
import subprocess
from itertools import pairwise

import numpy as np
import pytest
import torch
from browser import NODE, chromium, needs_browser, needs_node, tab
from evaluation_samples import as_tensor, folders, noisy, picture, write
from PIL import Image
from typer.testing import CliRunner

from sslsr_diffusion import SelfSimilarityLoss, laplacian_edge_mask, self_similarity_graph
from sslsr_diffusion.cli import app
from sslsr_diffusion.errors import UserError
from sslsr_diffusion.evaluation.fidelity import ssg_terms
from sslsr_diffusion.images import resize_bicubic
from sslsr_diffusion.page import explorer
from sslsr_diffusion.page.explorer import Measured, explore
from sslsr_diffusion.page.views import ASSETS

TRUTH = picture(3)
RESULT = noisy(np.asarray(Image.fromarray(TRUTH).resize((24, 20)).resize((48, 40), Image.Resampling.BICUBIC)), 3)
NUMBERS = {"psnr": Measured(21.5, "as told")}  # measured by others: the metrics need not run in every test


def data_of(page: str) -> dict:
    return json.loads(re.search(r'getElementById\("view"\), (.*)\);\nfillFrame\(\);\n</script>', page)[1])


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object):
        result = CliRunner().invoke(app, ["explore", *map(str, arguments)], catch_exceptions=True)
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return call


def pixel_mask(x: int, y: int) -> torch.Tensor:
    mask = torch.zeros(1, 1, *TRUTH.shape[:2], dtype=torch.bool)
    mask[..., y, x] = True
    return mask


PIXELS = [(20, 15), (0, 0), (47, 39), (3, 38)]  # inside, and where the border is reflected
SETTINGS = [(25, 9, 0.004), (15, 5, 0.02), (9, 9, 0.001), (1, 1, 0.004)]


@needs_node
def test_rows_in_javascript_are_those_of_the_operator(tmp_path):
    rgba = np.dstack([TRUTH, np.full(TRUTH.shape[:2], 255, np.uint8)]), np.dstack([RESULT, np.full(TRUTH.shape[:2], 255, np.uint8)])
    asked = [{"x": x, "y": y, "search": k, "window": w, "sigma": s} for x, y in PIXELS for k, w, s in SETTINGS]
    told = {"width": 48, "height": 40, "pictures": [array.ravel().tolist() for array in rgba], "asked": asked}
    script = (
        (ASSETS / "graph.js").read_text()
        + """
    const told = JSON.parse(require("fs").readFileSync(0));
    const [truth, result] = told.pictures.map((data) => ({ width: told.width, height: told.height, data }));
    console.log(JSON.stringify(told.asked.map(({ x, y, ...how }) => {
      const rows = [graphRow(truth, x, y, how), graphRow(result, x, y, how)];
      return { rows: rows.map((row) => [...row]), terms: rowTerms(rows[1], rows[0]) };
    })));
    """
    )
    done = subprocess.run([NODE, "-e", script], input=json.dumps(told), capture_output=True, text=True, check=True)
    for how, got in zip(asked, json.loads(done.stdout), strict=True):
        x, y, k, w, s = how.values()
        rows = [
            self_similarity_graph(as_tensor(array), pixel_mask(x, y), search_size=k, window_size=w, sigma=s)[0] for array in (TRUTH, RESULT)
        ]
        for one, row in zip(got["rows"], rows, strict=True):
            np.testing.assert_allclose(one, row, atol=1e-5, rtol=1e-4, err_msg=str(how))
        loss = SelfSimilarityLoss(k, w, s, backend="reference")
        _, terms = loss(as_tensor(RESULT), as_tensor(TRUTH), pixel_mask(x, y), return_terms=True)
        for name in ("l1", "kl"):
            assert got["terms"][name] == pytest.approx(float(terms[name]), rel=1e-4, abs=1e-7), how


@needs_node
def test_similar_places_are_apart():
    row = self_similarity_graph(as_tensor(TRUTH), pixel_mask(20, 15))[0].tolist()
    script = (ASSETS / "graph.js").read_text() + f"console.log(JSON.stringify(mostSimilar({row}, 25, 5, 4)))"
    found = json.loads(subprocess.run([NODE, "-e", script], capture_output=True, text=True, check=True).stdout)
    assert len(found) == 5
    places = [(0, 0), *((place["dx"], place["dy"]) for place in found)]
    assert all(max(abs(a - c), abs(b - d)) >= 4 for i, (a, b) in enumerate(places) for c, d in places[:i])
    assert all(one["weight"] >= other["weight"] > 0 for one, other in pairwise(found))
    assert all(place["weight"] == row[(place["dy"] + 12) * 25 + place["dx"] + 12] for place in found)


def test_what_the_page_holds():
    low = resize_bicubic(as_tensor(TRUTH), (10, 12)).clamp(0, 1)
    made = explore(as_tensor(RESULT), as_tensor(TRUTH), low, title="<a> & b", name="truth", numbers=NUMBERS)
    data = data_of(made.page)
    mask = laplacian_edge_mask(as_tensor(TRUTH))[0, 0].numpy()
    assert [shown["name"] for shown in data["pictures"]] == ["LR bicubic", "truth", "truth"]
    assert data["pictures"][-1]["sum"] == TRUTH.sum()
    bits = np.unpackbits(np.frombuffer(base64.b64decode(data["mask"]), np.uint8))[: mask.size]
    assert (bits.reshape(mask.shape) == mask).all()
    l1, kl = (np.frombuffer(base64.b64decode(data[name]), "<f4") for name in ("l1", "kl"))
    assert len(l1) == mask.sum() > 20
    terms = ssg_terms(as_tensor(RESULT), as_tensor(TRUTH))
    assert (l1.mean(), kl.mean()) == pytest.approx((terms["ssg_l1"].item(), terms["ssg_kl"].item()), rel=1e-4)
    assert data["numbers"] == [{"label": "PSNR (dB) ↑", "text": "21.500", "about": "as told"}]
    assert "&lt;a&gt; &amp; b" in made.page
    assert "default-src 'none'" in made.page
    assert not re.search(r"https?://", made.page)


def test_a_raster_stands_out_of_the_spectrum():
    truth = as_tensor(np.tile(picture(4, 64, 64), (2, 2, 1)))
    raster = truth.clone()
    raster[..., ::8] = (raster[..., ::8] + 0.1).clamp(0, 1)
    page = data_of(explore(raster, truth, title="raster", numbers=NUMBERS).page)
    assert page["spectrum"].count("<polyline") == 4  # two pictures, two axes
    assert data_of(explore(as_tensor(RESULT), as_tensor(TRUTH), title="small", numbers=NUMBERS).page)["spectrum"] is None


def test_rows_are_computed_in_parts(monkeypatch):
    given = (as_tensor(RESULT), as_tensor(TRUTH), laplacian_edge_mask(as_tensor(TRUTH)))
    whole = explorer.row_terms(*given)
    monkeypatch.setattr(explorer, "_ROWS", 7)
    for part, term in zip(explorer.row_terms(*given), whole, strict=True):
        np.testing.assert_allclose(part, term, rtol=1e-5)


def test_numbers_are_those_of_evaluate(tmp_path, run):
    where = folders(tmp_path, 1, ours=5)
    done = run("--sr", where["ours"] / "scene0.png", "--gt", where["hr"] / "scene0.png", "--lr", where["lr"] / "scene0.png")
    assert re.fullmatch(r"explorer.html \(\d\.\d MB\): open it in a browser\n", done.output)
    shown = {line["label"][:-2]: line["text"] for line in data_of((tmp_path / "explorer.html").read_text())["numbers"]}
    scored = CliRunner().invoke(
        app,
        ["evaluate", "--offline", "--restored", str(where["ours"]), "--reference", str(where["hr"]), "--metrics", "psnr,ssim,niqe,ssg_l1"],
    )
    assert scored.exit_code == 0
    for line in re.findall(r"^(PSNR \(dB\)|SSIM|NIQE|SSG L1) [↑↓] +(\S+)", scored.stdout, re.MULTILINE):
        assert shown[line[0]] == line[1]


def test_the_example_is_there_and_small(run, tmp_path, monkeypatch):
    monkeypatch.setattr(explorer, "measured", lambda *pair: NUMBERS)
    assert "an example" in run("-o", "new/page.html").output
    page = (tmp_path / "new" / "page.html").read_text()
    assert len(data_of(page)["pictures"]) == 3
    assert len(page) < 2e6


def test_odd_pictures_and_mistakes(tmp_path, run, monkeypatch):
    monkeypatch.setattr(explorer, "measured", lambda *pair: NUMBERS)
    truth, small = write(tmp_path / "truth.png", TRUTH), write(tmp_path / "small.png", TRUTH[::2, ::2])
    other, tiny, flat = (write(tmp_path / f"{n}.png", a) for n, a in (("o", TRUTH[:20]), ("t", TRUTH[:9]), ("f", np.full_like(TRUTH, 90))))
    alpha = tmp_path / "alpha.png"
    Image.fromarray(TRUTH).convert("RGBA").save(alpha)
    gray = write(tmp_path / "gray.png", TRUTH[..., 0])
    cv2 = pytest.importorskip("cv2")
    cv2.imwrite(str(tmp_path / "deep.png"), TRUTH.astype(np.uint16) * 256 + 100)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    for arguments, said in {
        (): None,
        ("--sr", small, "--gt", truth): r"^--sr: expected the size of the truth, 48 x 40, got 24 x 20; resize it 2 times \(--align, ",
        ("--sr", other, "--gt", truth): r"^--sr: .* of another shape",
        ("--sr", truth, "--gt", truth, "--lr", other): r"^--lr: expected the shape of the truth 48 x 40, got 48 x 20",
        ("--sr", tiny, "--gt", tiny): r"^--gt: expected sides of at least 13 pixels, got 48 x 9",
        ("--sr", truth): r"^expected --sr RESULT and --gt TRUTH, got no --gt",
        ("--sr", tmp_path / "none.png", "--gt", truth): r"none.png: cannot be read",
        ("--sr", tmp_path / "broken.png", "--gt", truth): r"broken.png: ",
        ("--sr", truth, "--gt", truth, "-o", truth / "x.html"): r"^--output .*: cannot be written",
    }.items():
        if said is not None:
            with pytest.raises(UserError, match=said):
                run(*arguments)
    assert "resized 2 times" in run("--sr", small, "--gt", truth, "--align").output
    assert "no edge pixel" in run("--sr", flat, "--gt", flat).output
    assert "more than 8 bits" in run("--sr", tmp_path / "deep.png", "--gt", truth).output
    for plain in (alpha, gray):
        assert "note" not in run("--sr", plain, "--gt", truth).output


def test_a_larger_picture_shows_its_worst_part(monkeypatch):
    monkeypatch.setattr(explorer, "SIDE", 32)
    truth = as_tensor(picture(5, 40, 64))
    result = truth.clone()
    result[..., 20:, 50:] += 0.2
    made = explore(result.clamp(0, 1), truth, title="large", numbers=NUMBERS)
    data = data_of(made.page)
    assert (data["width"], data["height"]) == (32, 32)
    assert "shown are the 32 x 32 with the largest error, from 32, 8" in made.notes[0]


def test_the_report_links_to_pages_of_its_worst_and_best(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    where = folders(tmp_path, 3, ours=4, other=8)
    arguments = ["evaluate", "--offline", "--metrics", "psnr", "--restored", where["ours"], "--restored", where["other"]]
    with pytest.raises(UserError, match="--explore shows graphs beside those of the truth"):
        raise CliRunner().invoke(app, [*map(str, arguments), "--explore", "1"]).exception
    done = CliRunner().invoke(app, [*map(str, arguments), "--reference", str(where["hr"]), "--crop-border", "2", "--explore", "1"])
    assert done.exit_code == 0, done.output
    report = (tmp_path / "evaluation" / "report.html").read_text()
    links = re.findall(r'<a href="(explore/[^"]+)">graphs</a>', report)
    assert len(links) == 4  # the worst and the best of three, in two columns
    assert {path.name for path in (tmp_path / "evaluation" / "explore").iterdir()} == {link.split("/")[1] for link in links}
    data = data_of((tmp_path / "evaluation" / links[1]).read_text())
    assert data["pictures"][0]["name"] == "other"
    assert "border 2" in data["numbers"][0]["about"]


@needs_browser
def test_in_a_browser(tmp_path):
    truth = as_tensor(TRUTH)
    low = resize_bicubic(truth, (10, 12)).clamp(0, 1)
    (tmp_path / "page.html").write_text(explore(as_tensor(RESULT), truth, low, title="pair", numbers=NUMBERS).page)
    with chromium() as browser, tab(browser, viewport={"width": 1300, "height": 900}) as (page, wrong):
        page.goto(f"file://{tmp_path}/page.html")
        page.wait_for_selector(".worst li")
        assert page.evaluate("opened.then((explorer) => explorer.pictures.every((picture) => picture.intact))")
        stage = page.locator(".stage canvas")
        box = stage.bounding_box()
        stage.click(position={"x": box["width"] * 5 / 6 + 4, "y": box["height"] / 2 + 3})  # beside the middle of the third picture
        assert "Pixel 24, 20 (" in page.locator(".status").inner_text()
        stage.press("ArrowRight")
        stage.press("Shift+ArrowUp")
        assert "Pixel 25, 10 (" in page.locator(".status").inner_text()
        rows, terms = page.evaluate("opened.then((e) => [e.graph.slice(-2).map((row) => [...row]), e.current])")
        wanted = [self_similarity_graph(as_tensor(array), pixel_mask(25, 10))[0] for array in (RESULT, TRUTH)]
        np.testing.assert_allclose(rows, torch.stack(wanted), atol=1e-5, rtol=1e-4)
        assert terms["l1"] == pytest.approx(float((wanted[0] - wanted[1]).abs().mean()), rel=1e-4)
        page.locator("input[name=sigma]").fill("0.02")
        softer = self_similarity_graph(truth, pixel_mask(25, 10), sigma=0.02)[0]
        np.testing.assert_allclose(page.evaluate("opened.then((e) => [...e.graph[2]])"), softer, atol=1e-5, rtol=1e-4)
        page.locator("input[name=window]").fill("8")
        assert page.locator(".refused").inner_text() == "window size: expected an odd number from 1 to the search size, got 8."
        counted = "The loss looks at {} edge pixels".format
        mask = laplacian_edge_mask(truth)[0, 0]
        assert counted(int(mask.sum())) in page.locator("main").inner_text()
        page.locator("input[name=stride]").fill("3")
        y, x = torch.arange(40)[:, None], torch.arange(48)
        assert counted(int((mask & (y % 3 == x % 3)).sum())) in page.locator("main").inner_text()
        page.locator(".worst button").last.click()
        assert f"Pixel {page.locator('.worst button').last.inner_text()} (an edge pixel)" in page.locator(".status").inner_text()
        page.get_by_label("slider", exact=True).check()
        before = stage.screenshot()
        page.get_by_label("map of the loss").check()
        page.get_by_label("slider between the pictures").fill("200")
        page.wait_for_function("opened.then((e) => e.viewer.split === 0.2)")
        assert stage.screenshot() != before
        assert wrong == []
