"""The folder runner with a restorer that enlarges by nearest neighbour."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from PIL import ImageCms
from restorers import Nearest, upscale_files

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.images import Image, read_image, write_image
from sslsr_diffusion.inference.open import default_model, find_model
from sslsr_diffusion.inference.options import CallOptions
from sslsr_diffusion.inference.record import RECORD_NAME, Record
from sslsr_diffusion.inference.restorer import settled
from sslsr_diffusion.inference.runner import RunnerOptions, find_work
from sslsr_diffusion.shipped_model import SMALL

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


class FakePipe(Nearest):
    """As every restorer is called; refuses what is smaller than 2 pixels."""

    def __call__(self, image, *, scale=None, generator=None, output_type="pil", **call):
        assert output_type == "pt"
        assert image.dtype == torch.float32
        assert isinstance(generator, torch.Generator)
        if min(image.shape[1:]) < 2:
            raise ValueError("image: expected at least 2 x 2 pixels")
        return super().__call__(image, scale=scale, generator=generator, output_type=output_type, **call)


class Answers(Nearest):
    """Gives the same whatever it is asked."""

    def __init__(self, images):
        super().__init__()
        self.images = images

    def enlarge(self, pictures, scale, generator):
        return self.images


def picture(path: Path, height=17, width=21, seed=0, **extra):
    path.parent.mkdir(parents=True, exist_ok=True)
    rgb = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    write_image(path, replace(Image(rgb), **extra))
    return path


def run(inputs, output, pipe=None, **options):
    return upscale_files(pipe or FakePipe(), inputs, output, RunnerOptions(**{"scale": 2, **options}))


def tree(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))


def test_a_good_folder_comes_out_whole(tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    picture(source / "a.png")
    picture(source / "sub" / "b.JPEG", seed=1)
    picture(source / "sub" / "deeper" / "c.webp")
    deep = np.arange(17 * 21 * 3, dtype=np.uint16).reshape(17, 21, 3) * 61
    picture(source / "d.tif", rgb=deep, alpha=deep[..., 0].copy(), icc_profile=SRGB)
    Pillow.fromarray(read_image(source / "a.png").rgb).quantize(16).save(source / "e.gif")
    picture(source / "f.png", gray=True, rgb=np.repeat(read_image(source / "a.png").rgb[..., :1], 3, axis=2))
    seen = []
    report = upscale_files(FakePipe(), source, out, RunnerOptions(scale=2), progress=lambda *state: seen.append(state))
    assert (len(report.done), report.failed, report.skipped, report.renamed, report.notes) == (6, [], [], [], [])
    assert tree(out) == ["a.png", "d.tif", "e.png", "f.png", "sub/b.JPEG", "sub/deeper/c.webp"]
    assert (seen[0], seen[-1]) == ((0, 6, "a.png"), (6, 6, ""))
    for name in tree(out):
        assert read_image(out / name).size == (34, 42)
    tiff = read_image(out / "d.tif")
    assert (tiff.bits, tiff.icc_profile, tiff.alpha.dtype) == (16, SRGB, np.uint16)
    seen = deep[..., 0].repeat(2, 0).repeat(2, 1) > 0
    np.testing.assert_array_equal(tiff.rgb[seen], deep.repeat(2, 0).repeat(2, 1)[seen])
    assert read_image(out / "f.png").gray
    assert read_image(out / "sub" / "b.JPEG").format == "JPEG"


@pytest.mark.parametrize("scale", [1, 1.5, 2.7, 4])
@pytest.mark.parametrize("size", [(16, 16), (17, 33), (2, 5)])
def test_output_has_exactly_round_scale_times_size(tmp_path, size, scale):
    picture(tmp_path / "in" / "a.png", *size, alpha=np.full(size, 200, np.uint8))
    run(tmp_path / "in", tmp_path / "out", scale=scale)
    image = read_image(tmp_path / "out" / "a.png")
    assert image.size == (round(scale * size[0]), round(scale * size[1]))
    assert image.alpha.shape == image.size


def test_exif_is_kept_upright_with_the_new_size(tmp_path):
    exif = Pillow.Exif()
    exif[0x0112], exif[0x010F] = 6, "Camera"
    exif[0x8769] = {0xA002: 21, 0xA003: 17}
    (tmp_path / "in").mkdir()
    Pillow.new("RGB", (21, 17), "red").save(tmp_path / "in" / "a.jpg", exif=exif)
    run(tmp_path / "in", tmp_path / "out")
    with Pillow.open(tmp_path / "out" / "a.jpg") as file:
        assert file.size == (34, 42)  # turned by a quarter, twice as large
        there = file.getexif()
    assert (there[0x0112], there[0x010F]) == (1, "Camera")
    assert (there.get_ifd(0x8769)[0xA002], there.get_ifd(0x8769)[0xA003]) == (34, 42)


def test_format_without_alpha_flattens_on_white_and_says_so(tmp_path):
    picture(tmp_path / "in" / "a.png", alpha=np.zeros((17, 21), np.uint8))
    report = run(tmp_path / "in", tmp_path / "out", format="JPEG")
    assert report.notes == [("a.png", "alpha flattened on white")]
    assert read_image(tmp_path / "out" / "a.jpg").rgb.min() == 255


def test_bad_neighbours_are_named_and_the_good_are_done(tmp_path):
    source = tmp_path / "in"
    for name in ("a.png", "z.png"):
        picture(source / name)
    good = picture(source / "m.jpg").read_bytes()
    (source / "cut.jpg").write_bytes(good[: len(good) // 2])
    (source / "empty.png").write_bytes(b"")
    (source / "text.png").write_bytes(b"hello")
    picture(source / "tiny.png", 1, 1)
    (source / os.fsdecode(b"caf\xe9.png")).write_bytes((source / "a.png").read_bytes())
    (source / "new\nline.png").write_bytes((source / "a.png").read_bytes())
    (source / "-rf.png").write_bytes((source / "a.png").read_bytes())
    report = run(source, tmp_path / "out")
    assert sorted(report.done) == ["-rf.png", "a.png", "caf\\xe9.png", "m.jpg", "new\\nline.png", "z.png"]
    reasons = dict(report.failed)
    assert sorted(reasons) == ["cut.jpg", "empty.png", "text.png", "tiny.png"]
    assert reasons["cut.jpg"] == "the file is cut off."
    assert reasons["empty.png"] == "the file is empty."
    assert "at least 2 x 2" in reasons["tiny.png"]
    assert b"caf\xe9.png" in os.listdir(os.fsencode(tmp_path / "out"))
    assert not [p for p in os.listdir(tmp_path / "out") if p.startswith(".tmp-")]


def test_second_of_two_names_keeps_its_extension(tmp_path):
    for name in ("a.jpg", "a.png", "a.webp", "a.png.png"):
        picture(tmp_path / "in" / name, seed=len(name))
    report = run(tmp_path / "in", tmp_path / "out", format="PNG")
    assert tree(tmp_path / "out") == ["a.jpg.png", "a.png", "a.png.png", "a.webp.png"]
    assert report.renamed == [("a.jpg", "a.jpg.png"), ("a.webp", "a.webp.png")]
    assert len(report.done) == 4
    assert run(tmp_path / "in", tmp_path / "out", format="PNG").done == []


def test_a_picture_that_comes_later_leaves_its_neighbours_names_alone(tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    picture(source / "x.png")
    picture(source / "y.webp", seed=1)
    run(source, out, format="PNG")
    picture(tmp_path / "new.png", seed=2).rename(source / "x.bmp")  # named like one kind, stored as another: its own name is free
    picture(source / "y.jpg", seed=3)
    report = run(source, out, format="PNG")
    assert report.failed == []
    assert (report.done, report.skipped) == (["x.bmp", "y.jpg"], ["x.png", "y.webp"])
    assert report.renamed == [("x.bmp", "x.bmp.png"), ("y.jpg", "y.jpg.png")]
    assert run(source, out, format="PNG").done == []


def test_results_of_other_settings_are_replaced_and_counted(tmp_path):
    picture(tmp_path / "in" / "a.png")
    assert run(tmp_path / "in", tmp_path / "out").replaced == []
    picture(tmp_path / "in" / "b.png", seed=1)
    report = run(tmp_path / "in", tmp_path / "out", seed=3)
    assert (report.done, report.replaced) == (["a.png", "b.png"], ["a.png"])


def test_wrong_extension_is_written_as_what_it_is(tmp_path):
    png = picture(tmp_path / "x.png").read_bytes()
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(png)
    run(tmp_path / "in", tmp_path / "out")
    assert tree(tmp_path / "out") == ["a.png"]


def test_what_is_done_is_skipped_until_input_settings_or_model_change(tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    picture(source / "a.png")
    picture(source / "b.png", seed=1)
    assert len(run(source, out).done) == 2
    pipe = FakePipe()
    again = run(source, out, pipe)
    assert (again.done, again.skipped, pipe.calls) == ([], ["a.png", "b.png"], [])
    os.utime(source / "a.png")  # touched, the same bytes
    assert run(source, out).skipped == ["a.png", "b.png"]
    picture(source / "a.png", seed=2)
    assert run(source, out).done == ["a.png"]
    (out / "b.png").unlink()
    assert run(source, out).done == ["b.png"]
    for left in (0, 20):  # by a full disk, a copy that was cut off, ...
        os.truncate(out / "b.png", left)
        assert run(source, out).done == ["b.png"]
    for change in ({"seed": 1}, {"call": {"num_inference_steps": 3}}, {"model": "other"}, {"scale": 3}):
        assert len(run(source, out, **change).done) == 2, change
    assert len(run(source, out, overwrite=True).done) == 2


def test_an_interrupted_picture_is_done_again(tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    picture(source / "a.png")
    run(source, out)
    Record(out).begin("a.png", source / "a.png")  # killed between the two lines of a second run
    with (out / RECORD_NAME).open("a") as file:
        file.write('{"output": "a.p')  # and in the middle of a third
    assert run(source, out).done == ["a.png"]
    assert run(source, out).skipped == ["a.png"]
    for line in (out / RECORD_NAME).read_text().split("\n")[:2]:
        assert not line or "a.png" in json.loads(line)["output"]


def test_files_of_others_are_not_replaced(tmp_path):
    picture(tmp_path / "in" / "a.png")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.png").write_bytes(b"mine")
    report = run(tmp_path / "in", tmp_path / "out")
    assert "--overwrite" in report.failed[0][1]
    assert (tmp_path / "out" / "a.png").read_bytes() == b"mine"
    assert run(tmp_path / "in", tmp_path / "out", overwrite=True).done == ["a.png"]


def test_results_of_another_folder_are_not_replaced_either(tmp_path):
    picture(tmp_path / "x" / "a.png")
    picture(tmp_path / "y" / "a.png", seed=1)
    run(tmp_path / "x", tmp_path / "out")
    first = (tmp_path / "out" / "a.png").read_bytes()
    assert "another picture" in run(tmp_path / "y", tmp_path / "out").failed[0][1]
    assert (tmp_path / "out" / "a.png").read_bytes() == first
    (tmp_path / "x").rename(tmp_path / "z")  # the same bytes from another place
    assert run(tmp_path / "z", tmp_path / "out").skipped == ["a.png"]
    assert run(tmp_path / "y", tmp_path / "out", overwrite=True).done == ["a.png"]


def test_output_inside_the_input_is_never_read_again(tmp_path):
    source = tmp_path / "in"
    picture(source / "a.png")
    for name in ("results", "other", "results"):
        report = run(source, source / name)
        assert set(report.done + report.skipped) == {"a.png"}
    pattern = run(str(source / "**" / "*.png"), source / "results")
    assert pattern.skipped == ["a.png"]


def test_nothing_is_written_outside_the_output_or_over_an_input(tmp_path):
    source, out, elsewhere = tmp_path / "out" / "in", tmp_path / "out", tmp_path / "elsewhere"
    elsewhere.mkdir()
    picture(source / "sub" / "a.png")
    picture(source / "in" / "b.png")
    picture(source / "b.png", seed=5)
    out.joinpath("sub").symlink_to(elsewhere)
    before = (source / "b.png").read_bytes()
    report = run(source, out)
    assert report.done == ["b.png"]
    assert "leads out" in dict(report.failed)["sub/a.png"]
    assert "replace an input" in dict(report.failed)["in/b.png"]
    assert os.listdir(elsewhere) == []
    assert (source / "b.png").read_bytes() == before
    for inputs in (source, source / "b.png", str(source / "*.png")):
        with pytest.raises(UserError, match="folder of the input"):
            run(inputs, source)
    link = out / "c.png"
    link.symlink_to(elsewhere / "c.png")  # a link in the place of a result is replaced, not followed
    picture(source / "c.png")
    assert run(source, out, overwrite=True).done[-1:] == ["c.png"]
    assert os.listdir(elsewhere) == []


def test_nothing_to_do_and_nowhere_to_write(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no pictures"):
        run(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(UserError, match="found nothing"):
        run(tmp_path / "none", tmp_path / "out")
    picture(tmp_path / "in" / "a.png")
    (tmp_path / "file").write_text("in the way")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="cannot be written"):
            run(tmp_path / "in", output)


def test_read_only_output(tmp_path):
    """A read-only mount in a mount namespace of its own: mode bits do not stop root."""
    picture(tmp_path / "in" / "a.png")
    (tmp_path / "out").mkdir()
    code = (
        "import sys; from sslsr_diffusion.inference.runner import *\n"
        f"try: find_work({str(tmp_path / 'in')!r}, {str(tmp_path / 'out')!r}, RunnerOptions())\n"
        "except UserError as error: print(error)"
    )
    shell = f'mount --bind -o ro {tmp_path}/out {tmp_path}/out && mount -o remount,ro,bind {tmp_path}/out && exec "$0" -c "$1"'
    made = subprocess.run(["unshare", "-rm", "sh", "-c", shell, sys.executable, code], capture_output=True, text=True)
    if "cannot be written" not in made.stdout and ("unshare" in made.stderr or "mount" in made.stderr):
        pytest.skip(f"no mount namespaces here: {made.stderr.strip()[:100]}")
    assert "cannot be written (Read-only file system)" in made.stdout, made.stderr


def test_several_inputs_and_a_single_file(tmp_path):
    one, two = picture(tmp_path / "x" / "a.png"), picture(tmp_path / "y" / "a.png", seed=1)
    assert run(one, tmp_path / "out").done == ["a.png"]
    report = run([one, two], tmp_path / "both")
    assert report.renamed == [("a.png", "a.png.png")]
    assert tree(tmp_path / "both") == ["a.png", "a.png.png"]


def test_a_wrong_size_from_the_pipeline_is_a_failure(tmp_path):
    picture(tmp_path / "in" / "a.png")
    report = run(tmp_path / "in", tmp_path / "out", Answers(torch.zeros(1, 3, 5, 5)))
    assert "expected 42 x 34" in report.failed[0][1]
    nan = run(tmp_path / "in", tmp_path / "out", Answers(torch.full((1, 3, 34, 42), torch.nan)))
    assert "NaN" in nan.failed[0][1]
    assert tree(tmp_path / "out") == []


def test_no_pixels_are_read_for_the_plan(tmp_path, monkeypatch):
    picture(tmp_path / "in" / "a.png")
    monkeypatch.setattr("sslsr_diffusion.inference.runner.OpenPicture", None)
    assert [item.name for item in find_work(tmp_path / "in", tmp_path / "out", RunnerOptions()).todo] == ["a.png"]


def test_what_the_restorer_lacks_is_settled_once_and_before_the_first_picture(tmp_path):
    class Plain(FakePipe):
        options = FakePipe.options - {"fidelity", "num_inference_steps"}

        def check(self, **call):
            return settled(CallOptions, call, self.options, {})[1]

    for name in ("a.png", "b.png"):
        picture(tmp_path / "in" / name)
    pipe = Plain()
    with pytest.raises(UserError, match=r"^fidelity: this model does not have it, got 0\.5"):
        run(tmp_path / "in", tmp_path / "out", pipe, call={"fidelity": 0.5})
    assert (pipe.calls, tree(tmp_path / "out")) == ([], [])
    off = {"fidelity": 0, "num_inference_steps": 5, "detail": 1.0}
    report = run(tmp_path / "in", tmp_path / "out", pipe, call=off)
    assert [name for name, _ in report.notes] == ["", ""]
    assert [call.keys() - {"generator", "output_type"} for call in pipe.calls] == [{"detail"}] * 2
    assert run(tmp_path / "in", tmp_path / "out", pipe, call=off).skipped == ["a.png", "b.png"]


def hostile(folder: Path, good: dict[str, bytes], count: int) -> int:
    """Generated bad inputs: cut, flipped, padded, empty, misnamed, of other kinds, under names that hurt."""
    rng = np.random.default_rng(0)
    names = [
        b"x..png",
        b"-rf",
        b"new\nline",
        b"caf\xe9",
        b"tab\t",
        b"quote'\"",
        b"$(x)",
        b"%s%n",
        b"a" * 240,
        b"\x1b[31m",
        "\u202egnp".encode(),
        b"~",
    ]
    kinds = list(good.items())
    for number in range(count):
        suffix, data = kinds[number % len(kinds)]
        broken = bytearray(data[: rng.integers(len(data))] if number % 3 == 0 else data)
        if number % 3 == 1:
            for at in rng.integers(0, len(broken), 40):
                broken[at] = rng.integers(256)
        elif number % 3 == 2:
            broken = bytearray(rng.bytes(int(rng.integers(0, 400))) if number % 2 else data[:20] + rng.bytes(300))
        name = names[number % len(names)][:230] + b"%d" % number + suffix.encode()
        (folder / os.fsdecode(name)).write_bytes(bytes(broken))
    (folder / "loop").symlink_to(folder)
    (folder / "outside.png").symlink_to("/etc/passwd")
    os.mkfifo(folder / "pipe.png")
    return count + 1


def test_two_hundred_hostile_pictures_lose_no_good_neighbour(tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    good = {}
    for suffix in (".png", ".jpg", ".webp", ".tif"):
        good[suffix] = picture(source / f"good{suffix}", 40, 30).read_bytes()
    number = hostile(source, good, 200)
    before = {path: path.read_bytes() for path in source.iterdir() if path.is_file()}
    report = run(source, out)
    assert {f"good{suffix}" for suffix in good} <= set(report.done)
    assert len(report.done) + len(report.failed) == number + 4
    assert len(report.failed) > 100
    for name, reason in report.failed:
        assert name.isprintable()
        assert reason.isprintable()
    assert {path: path.read_bytes() for path in before} == before
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]
    assert not [name for name in os.listdir(out) if name.startswith(".tmp-")]
    again = run(source, out)
    assert again.done == []
    assert sorted(again.failed) == sorted(report.failed)


def make_run(runs: Path, name: str, when: int, kind="StableSRPipeline") -> Path:
    folder = runs / name / "pipeline"
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    os.utime(folder / "model_index.json", (when, when))
    return folder


def test_the_newest_finished_upscaler_is_the_model(tmp_path):
    assert default_model(tmp_path) == (SMALL, f"the small model that comes with sslsr-diffusion; there is no finished run in {tmp_path}/")
    assert find_model(SMALL).path.name == SMALL
    make_run(tmp_path, "b", 100)
    newest = make_run(tmp_path, "a", 200)
    make_run(tmp_path, "autoencoder", 300, kind="AutoencoderKL")
    (tmp_path / "unfinished").mkdir()
    (make_run(tmp_path, "damaged", 400) / "model_index.json").write_text("{")
    assert default_model(tmp_path) == (str(newest), "the newest finished run")
    found = find_model(str(newest.parent))
    assert found.path == newest
    (newest / "weights.safetensors").write_bytes(b"x")
    assert find_model(str(newest)).fingerprint != found.fingerprint
    with pytest.raises(UserError, match="nor a valid hub id"):
        find_model(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"expected a model of .*such as a folder with a model_index\.json"):
        find_model(str(tmp_path / "unfinished"))


def test_an_input_that_is_replaced_while_it_is_upscaled_is_done_again(tmp_path):
    source = picture(tmp_path / "in" / "a.png")

    class Slow(FakePipe):
        def __call__(self, image, **given):
            picture(source, seed=7)  # by somebody else, meanwhile
            return super().__call__(image, **given)

    assert run(tmp_path / "in", tmp_path / "out", pipe=Slow()).done == ["a.png"]
    assert run(tmp_path / "in", tmp_path / "out").done == ["a.png"]
    assert run(tmp_path / "in", tmp_path / "out").skipped == ["a.png"]


def test_an_input_of_an_impossible_name_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(UserError, match=r"--input .*: cannot be read"):
        run(tmp_path / ("x" * 300), tmp_path / "out")
