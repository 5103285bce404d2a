"""infer.py as its user meets it: exit codes, sentences, bad neighbours, and how fast --help answers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
from restorers import Nearest
from typer.testing import CliRunner

from sslsr_diffusion.cli.infer import infer
from sslsr_diffusion.errors import UserError
from sslsr_diffusion.images import Image, read_image, write_image
from sslsr_diffusion.shipped_model import SMALL

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def calls(monkeypatch):
    """In the model's place a restorer that enlarges by nearest neighbour; where it was opened, and what it was called with."""
    restorer = Nearest(num_inference_steps=4, detail=1.0, back_projection=0.25, antiring=0.5)

    def load(found, **where):
        restorer.calls.append(where)
        return restorer

    monkeypatch.setattr("sslsr_diffusion.inference.open.open_model", load)
    return restorer.calls


@pytest.fixture
def desk(tmp_path, monkeypatch, calls):
    """A working folder with one finished run and some pictures."""
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "runs" / "mine" / "pipeline"
    model.mkdir(parents=True)
    (model / "model_index.json").write_text(json.dumps({"_class_name": "StableSRPipeline"}))
    for name in ("a.png", "sub/b.jpg"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        write_image(tmp_path / "in" / name, Image(np.random.default_rng(0).integers(0, 256, (20, 16, 3), dtype=np.uint8)))
    return tmp_path


def run(*arguments):
    app = typer.Typer()
    app.command()(infer)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_newest_run_is_taken_and_said(desk, calls):
    own = ("--steps", 3, "--detail", 0.5, "--antiring", 0.2)
    result = run("--input", "in", "--tile", 256, "--color-fix", "adain", "--scale", 2, "--seed", 9, *own)
    assert result.exit_code == 0, result.output
    assert "model: runs/mine/pipeline (the newest finished run" in result.output
    assert "steps 3, detail 0.5, back_projection 0.25, antiring 0.2" in result.output
    assert "2 done; results in results" in result.output
    assert "steps 4, detail 1.0, back_projection 0.25, antiring 0.5" in run("--input", "in", "--output", "as it comes").output
    del calls[2:]
    assert read_image(desk / "results" / "sub" / "b.jpg").size == (40, 32)
    assert calls[0] == {"device": "auto", "dtype": "auto", "compile": False}
    assert calls[1]["num_inference_steps"] == 3
    assert calls[1]["tile"] == 256
    assert calls[1]["color_fix"] == "adain"
    assert (calls[1]["detail"], calls[1]["antiring"]) == (0.5, 0.2)
    assert calls[1]["generator"].initial_seed() == 9


def test_a_limit_on_pixels_and_kinds_that_are_not_read_are_told_at_the_end(desk, calls):
    write_image(desk / "in" / "large.png", Image(np.zeros((1001, 1000, 3), np.uint8)))
    for name in ("IMG_1.HEIC", "b.psd"):
        (desk / "in" / name).write_bytes(b"8BPS" if name.endswith("psd") else b"\0\0\0\x18ftypheic")
    result = run("--input", "in", "--max-megapixels", 1)
    assert result.exit_code == 1
    assert "2 done, 3 failed" in result.output
    assert "failed: large.png: 1.001 megapixels are more than the 1 that are read; --max-megapixels lifts" in result.output
    assert "failed: IMG_1.HEIC: heic pictures are not read; save it as PNG" in result.output
    assert "failed: b.psd: psd pictures are not read" in result.output


def test_a_memory_budget_reaches_the_loader_and_every_picture_but_not_the_record(desk, calls):
    assert run("--input", "in", "--memory-budget", "500MB", "--compile").exit_code == 0
    assert calls[0] == {"device": "auto", "dtype": "auto", "compile": True, "memory_budget": 500 * 10**6, "tile": "auto"}
    assert [call["memory_budget"] for call in calls[1:]] == [500 * 10**6] * 2
    assert "0 done, 2 skipped" in run("--input", "in", "--memory-budget", "2GiB").output


def test_the_second_time_not_even_the_model_is_loaded(desk, calls):
    assert run("--input", "in").exit_code == 0
    calls.clear()
    result = run("--input", "in")
    assert result.exit_code == 0
    assert "0 done, 2 skipped" in result.output
    assert calls == []
    assert "2 done" in run("--input", "in", "--overwrite").output
    assert "2 done" in run("--input", "in", "--steps", 7).output
    assert "2 done" in run("--input", "in", "--steps", 7, "--detail", 0.8).output


def test_bad_files_are_lines_at_the_end_and_exit_code_one(desk):
    good = (desk / "in" / "sub" / "b.jpg").read_bytes()
    (desk / "in" / "cut.jpg").write_bytes(good[: len(good) * 3 // 4])
    (desk / "in" / os.fsdecode(b"caf\xe9\n.png")).write_bytes(b"")
    result = run("--input", "in", "--format", "png")
    assert result.exit_code == 1
    assert "2 done, 2 failed" in result.output
    assert result.output.splitlines()[-2:] == ["failed: caf\\xe9\\n.png: the file is empty.", "failed: cut.jpg: the file is cut off."]
    assert (desk / "results" / "sub" / "b.png").is_file()


def test_name_collisions_and_losses_are_listed(desk):
    rgb = read_image(desk / "in" / "a.png").rgb
    write_image(desk / "in" / "a.tif", Image(rgb, np.full(rgb.shape[:2], 9, np.uint8)))
    result = run("--input", "in", "--format", "jpg")
    assert result.exit_code == 0
    assert "renamed: a.tif -> a.tif.jpg" in result.output
    assert "note: a.tif: alpha flattened on white" in result.output


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--input", "nowhere"], "found nothing"),
        (["--input", "in", "--model", "someone/other"], "is no folder here .*cannot be reached"),
        (["--input", "in", "--model", "runs/other"], "^--model: 'runs/other' is neither an existing folder nor a valid hub id"),
        (["--input", "in", "--model", "in"], r"^--model in: expected a model of .*such as a folder with a model_index\.json"),
        (["--input", "in", "--tile", "big"], "expected a side in output pixels"),
        (["--input", "in", "--device", "foo"], "^--device foo: expected auto, cpu, cuda, cuda:1 or mps"),
        (["--input", "in", "--memory-budget", "much"], "^--memory-budget much: expected a size such as 8GB"),
        (["--input", "in", "--output", "in"], "folder of the input pictures"),
        (["--input", "in", "--output", "in/a.png"], "cannot be written"),
        (["--input", "in", "--output", "new.png"], r"^--output new\.png: expected a folder, got a name that files have"),
        ([], "^expected --input with a picture, a folder or a pattern"),
        (["in", "--size", "4k"], "^--size 4k: expected width and height in pixels such as 3840x2160"),
        (["in", "--size", "0x10"], "^--size 0x10: expected"),
        (["in", "--scale", "2", "--longest-side", "9"], "^--scale and --longest-side say the same in two ways"),
    ],
)
def test_mistakes_of_the_user_are_one_sentence(desk, arguments, sentence):
    result = run(*arguments)
    assert isinstance(result.exception, UserError)
    assert "\n" not in str(result.exception)
    assert re.search(sentence, str(result.exception)), str(result.exception)


def test_several_inputs_and_what_the_shell_makes_of_a_pattern(desk):
    for number in range(3):
        write_image(desk / f"p{number}.png", Image(np.zeros((8, 8, 3), np.uint8)))
    assert "3 done" in run("--input", "p0.png", "p1.png", "p2.png", "--output", "one").output
    assert "3 done" in run("--input", "p0.png", "--input", "in", "--output", "two").output
    assert "2 done" in run("in", "--output", "three").output


@pytest.mark.parametrize(
    ("target", "wanted"), [(["--longest-side", 50], (50, 40)), (["--size", "60x50"], (50, 40)), (["--size", "30x70"], (38, 30))]
)
def test_a_target_size_in_the_place_of_a_scale(desk, target, wanted):
    """Pictures are 20 x 16 pixels (H, W); the aspect stays."""
    assert "2 done" in run("in", *target).output
    assert read_image(desk / "results" / "a.png").size == wanted
    assert "2 skipped" in run("in", *target).output
    assert "2 done" in run("in", "--longest-side", 20).output


def test_without_a_finished_run_the_shipped_model_is_taken_and_said(desk):
    (desk / "runs" / "mine" / "pipeline" / "model_index.json").unlink()
    result = run("--input", "in")
    assert result.exit_code == 0, result.output
    assert f"model: {SMALL} (the small model that comes with sslsr-diffusion; there is no finished run in runs/; --model" in result.output
    assert "2 done; results in results" in result.output


def test_wrong_values_are_refused_by_the_parser(desk):
    for arguments in (["--color-fix", "magic"], ["--format", "gif"], ["--scale", "0"], ["--steps", "0"], ["--seed", "-1"]):
        assert run("--input", "in", *arguments).exit_code == 2


def test_interrupted_in_the_middle(desk, monkeypatch):
    class Interrupted(Nearest):
        def enlarge(self, pictures, scale, generator):
            raise KeyboardInterrupt

    monkeypatch.setattr("sslsr_diffusion.inference.open.open_model", lambda found, **_: Interrupted())
    result = run("--input", "in")
    assert result.exit_code == 130
    assert "goes on from here" in result.output


def test_interrupted_while_the_model_is_found_or_loaded(desk, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    for name in ("open_model", "find_model"):
        monkeypatch.setattr(f"sslsr_diffusion.inference.open.{name}", interrupted)
        result = run("--input", "in")
        assert result.exit_code == 130, name
        assert result.output.endswith("interrupted; the same command goes on from here\n"), name


def test_interrupted_after_a_failure_still_says_how_to_go_on(desk, monkeypatch):
    class Interrupted(Nearest):
        def enlarge(self, pictures, scale, generator):
            raise KeyboardInterrupt

    (desk / "in" / "0.png").write_bytes(b"")
    monkeypatch.setattr("sslsr_diffusion.inference.open.open_model", lambda found, **_: Interrupted())
    result = run("--input", "in")
    assert result.exit_code == 130
    assert "failed: 0.png: the file is empty." in result.output
    assert "goes on from here" in result.output


def test_the_help_is_made_of_the_tables():
    from sslsr_diffusion.inference.choices import COLOR_FIXES, FORMATS, SAMPLERS

    shown = "".join(run("--help").output.split())
    assert f"[{'|'.join(COLOR_FIXES)}]" in shown
    assert f"[{'|'.join(FORMATS)}]" in shown
    assert all(name in shown for name in SAMPLERS)


def test_help_is_quick_and_imports_nothing_heavy():
    """0.3 s of processor time on an idle machine; the bound leaves room for a busy one."""
    spent = []
    for _ in range(3):
        before = os.times()
        shown = subprocess.run([sys.executable, str(ROOT / "infer.py"), "--help"], capture_output=True, text=True, check=True)
        after = os.times()
        spent.append(after.children_user + after.children_system - before.children_user - before.children_system)
    for option in ["--input", "--model", "--output", "--scale", "--steps", "--seed", "--tile", "--color-fix", "--format", "--overwrite"]:
        assert option in shown.stdout
    assert min(spent) < 1.0, spent
    code = (
        "import sys, sslsr_diffusion.cli; print([m for m in ('torch', 'numpy', 'diffusers', 'PIL', 'cv2', 'pydantic') if m in sys.modules])"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert "torch" not in loaded
    assert "diffusers" not in loaded


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' schedulers under numpy 2
def test_the_shipped_pictures_through_a_real_pipeline(tmp_path, monkeypatch):
    """Random weights: sizes, formats and metadata count here, not the look. Every kind of file that examples/lr holds."""
    from sslsr_diffusion import StableSRPipeline
    from sslsr_diffusion.models.stablesr.build import build_networks
    from sslsr_diffusion.models.stablesr.settings import StableSRSettings

    parts = build_networks(StableSRSettings(init="random", preset="tiny"), train="all").components()
    StableSRPipeline(**parts).save_pretrained(tmp_path / "runs" / "toy" / "pipeline")
    monkeypatch.chdir(tmp_path)
    pictures = ROOT / "examples" / "lr"
    done = run("--input", pictures, "--steps", 1, "--tile", "none", "--scale", 1.5, "--device", "cpu")
    assert done.exit_code == 0, done.output
    assert "newest finished run" in done.output
    for source in (path for path in pictures.rglob("*") if path.is_file()):
        before, after = read_image(source), read_image(tmp_path / "results" / source.relative_to(pictures))
        assert after.size == (round(1.5 * before.size[0]), round(1.5 * before.size[1]))
        assert (after.format, after.bits, after.gray, after.icc_profile) == (before.format, before.bits, before.gray, before.icc_profile)
        assert (after.alpha is None, after.exif is None) == (before.alpha is None, before.exif is None)
