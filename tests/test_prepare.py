"""The preparation jobs and their commands: layout, exactness, resuming, and nothing lost without a word."""

from __future__ import annotations

import io
import os
import signal
import tarfile
from pathlib import Path

import numpy as np
import pytest
from data_samples import picture
from goldens import load_golden
from PIL import Image
from scipy.io import loadmat
from typer.testing import CliRunner

from sslsr_diffusion.cli import app
from sslsr_diffusion.data.preparation import crop_places
from sslsr_diffusion.errors import UserError

RUN = CliRunner()


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    (folder / "below").mkdir(parents=True)
    Image.fromarray(picture((70, 101), 1)).save(folder / "a.png")
    Image.fromarray(picture((64, 64), 2)).save(folder / "below" / "b.png")
    Image.fromarray(picture((20, 90), 3)).save(folder / "small.png")
    (folder / "cut.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut off")
    return folder


def run(*words: object, code: int = 0) -> str:
    result = RUN.invoke(app, ["prepare", *map(str, words)])
    assert result.exit_code == code, (result.output, result.exception)
    assert not isinstance(result.exception, UserError), result.exception
    return result.output


@pytest.mark.parametrize(("n", "wanted"), [(64, [0]), (65, [0, 1]), (96, [0, 32]), (100, [0, 32, 36])])
def test_crop_places_end_flush_with_the_border(n, wanted):
    assert crop_places(n, 64, 64, 32) == [(y, 0) for y in wanted]
    assert crop_places(64, n, 64, 32) == [(0, x) for x in wanted]


def test_crops(photos, tmp_path):
    output = run("crops", "--input", photos, "--output", tmp_path / "out", "--size", 64, "--step", 32, "--processes", 2, code=1)
    assert "small.png: 90x20 pixels are less than the crop of 64" in output
    assert "cut.jpg" in output
    assert "2 of 4 pictures done, 7 new files" in output
    names = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.png"))
    assert names == [*(f"a_s{i:03d}.png" for i in range(1, 7)), "below/b_s001.png"]
    last = np.asarray(Image.open(tmp_path / "out" / "a_s006.png"))
    assert np.array_equal(last, picture((70, 101), 1)[6:70, 37:101])
    assert "0 new files" in run(
        "crops", "--input", photos, "--output", tmp_path / "out", "--size", 64, "--step", 32, "--processes", 1, code=1
    )


def test_pictures_of_one_name_are_not_lost_without_a_word(photos, tmp_path):
    Image.fromarray(picture((80, 80), 4)).save(photos / "a.jpg")
    output = run("masks", "--input", photos, "--output", tmp_path / "out", "--processes", 1, code=1)
    assert "a.png: its results would be named as those of a.jpg; rename it." in output
    assert "3 of 5 pictures done" in output


def test_a_pattern_over_several_folders_keeps_the_folders(tmp_path):
    for scene in ("one", "two"):
        (tmp_path / scene).mkdir()
        Image.fromarray(picture((64, 64), 1)).save(tmp_path / scene / "0001.png")
    run("crops", "--input", tmp_path / "*" / "0001.png", "--output", tmp_path / "out", "--size", 64, "--processes", 1)
    assert sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.png")) == [
        "one/0001_s001.png",
        "two/0001_s001.png",
    ]


def test_multiscale(photos, tmp_path):
    run("multiscale", "--input", photos, "--output", tmp_path / "out", "--shortest-edge", 50, "--processes", 1, code=1)
    sizes = {str(p.relative_to(tmp_path / "out")): Image.open(p).size for p in (tmp_path / "out").rglob("*.png")}
    assert sizes == {
        "a.png": (101, 70),
        "aT0.png": (75, 52),  # 0.6 * 70 = 42 is below 50
        "aS.png": (72, 50),
        "below/b.png": (64, 64),
        "below/bS.png": (50, 50),
        "smallS.png": (225, 50),  # enlarged, as published
    }


@pytest.mark.parametrize("item", load_golden("ssl/mask").index, ids=lambda item: item["name"])
def test_mask_files_are_those_of_the_published_script(item, tmp_path):
    golden = load_golden("ssl/mask").tensors
    Image.fromarray(golden[f"{item['name']}.image"].numpy()).save(tmp_path / "x.png")
    run("masks", "--input", tmp_path / "x.png", "--output", tmp_path / "out", "--processes", 1)
    mask = loadmat(tmp_path / "out" / "mat" / "x.mat")["mat"]
    assert np.array_equal(mask, golden[f"{item['name']}.mask"].numpy())
    assert mask.dtype == item["mat_dtype"]
    png = Image.open(tmp_path / "out" / "png" / "x.png")
    assert png.mode == "L"
    assert np.array_equal(np.asarray(png), mask * 255)


def test_low_resolution_sets_repeat_themselves(photos, tmp_path):
    for output, processes in (("one", 1), ("two", 2)):
        run("lr", "--input", photos, "--output", tmp_path / output, "--preset", "mild", "--seed", 3, "--processes", processes, code=1)
    run("lr", "--input", photos, "--output", tmp_path / "other", "--preset", "mild", "--seed", 4, "--processes", 1, code=1)
    one, two, other = (np.asarray(Image.open(tmp_path / name / "lr" / "a.png")) for name in ("one", "two", "other"))
    assert np.array_equal(one, two)
    assert not np.array_equal(one, other)
    assert one.shape == (17, 25, 3)
    assert np.asarray(Image.open(tmp_path / "one" / "hr" / "a.png")).shape == (68, 100, 3)


def test_results_of_other_settings_are_not_taken_for_the_wanted_ones(photos, tmp_path):
    words = ["prepare", "lr", "--input", str(photos), "--output", str(tmp_path / "set"), "--preset", "mild", "--processes", "1", "--seed"]
    assert "6 new files" in run(*words[1:], 3, code=1)
    assert "0 new files" in run(*words[1:], 3, code=1)
    with pytest.raises(UserError, match="holds results of other settings"):
        raise RUN.invoke(app, [*words, "4"]).exception


def test_two_labels_of_one_name_are_not_mixed_up(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a", "aS", "b"):
        Image.fromarray(picture((64, 80), 1)).save(tmp_path / "in" / f"{name}.png")
    output = run("multiscale", tmp_path / "in", "--output", tmp_path / "out", "--shortest-edge", 50, "--processes", 1, code=1)
    assert "aS.png: its results would be named as those of a.png; rename it." in output
    assert "2 of 3 pictures done" in output
    assert {path.name for path in (tmp_path / "out").rglob("*.png")} == {"a.png", "aS.png", "b.png", "bS.png"}
    run("crops", tmp_path / "in", "--output", tmp_path / "crops", "--size", 50, "--processes", 1)  # crops have numbers, no clash


def test_a_process_that_is_killed_is_told_in_one_sentence(photos, tmp_path):
    from sslsr_diffusion.data.preparation import run_jobs

    with pytest.raises(UserError, match=r"one of 2 processes was ended from outside, .* smaller --processes goes on"):
        list(run_jobs(_killed, sorted(photos.glob("*.png")), photos, 2))


def _killed(path: Path, name: Path) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


def test_check(photos):
    (photos / "copy.png").write_bytes((photos / "a.png").read_bytes())
    for words in ([photos], ["--input", photos]):
        output = run("check", *words, "--crop-size", 64, "--processes", len(words), code=1)
        assert "5 pictures, 4 usable, 1 not" in output
        assert "formats: 4 x PNG 8 bit" in output
        assert "not usable: " in output
        assert "cut.jpg" in output
        assert "small.png (90x20)" in output
        assert "same pixels twice: " in output
        assert "mask density" in output
        assert "crops of 64 with half overlap: about 13" in output
    (photos / "cut.jpg").unlink()
    run("check", photos, "--processes", 1)
    (photos / "below" / "away.png").symlink_to(photos / "moved.png")
    assert "away.png: a link to nothing." in run("check", photos, "--processes", 1, code=1)


@pytest.fixture
def everything(tmp_path) -> Path:
    """One readable and one damaged picture in every kind of source, and a recipe that reads them all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    good, bad = io.BytesIO(), b"\x89PNG cut"
    Image.fromarray(picture((64, 80), 1)).save(good, "PNG")
    Image.fromarray(picture((16, 20), 1)).save(tmp_path / "small.png")
    for side in ("hr", "lr"):
        (tmp_path / "pairs" / side).mkdir(parents=True)
        for name in ("fits", "odd", "broken", *([side] if side == "hr" else [])):
            small = (tmp_path / "small.png").read_bytes()
            (tmp_path / "pairs" / side / f"{name}.png").write_bytes(small if side == "lr" and name != "odd" else good.getvalue())
    (tmp_path / "pairs" / "hr" / "broken.png").write_bytes(bad)
    (tmp_path / "list.txt").write_text("small.png\nmissing.png\n")
    (tmp_path / "rows").mkdir()
    pq.write_table(pa.table({"image": [good.getvalue(), bad], "x": [1, 2]}), tmp_path / "rows" / "r.parquet")
    (tmp_path / "rows" / "junk.parquet").write_bytes(b"junk")
    (tmp_path / "hub").mkdir()
    pq.write_table(
        pa.table({"image": [{"bytes": b, "path": f"{n}.png"} for n, b in (("ok", good.getvalue()), ("no", bad))]}),
        tmp_path / "hub" / "h.parquet",
    )
    (tmp_path / "tar").mkdir()
    with tarfile.open(tmp_path / "tar" / "s.tar", "w") as tar:
        for name, data in (("ok.png", good.getvalue()), ("no.png", bad)):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return tmp_path


@pytest.mark.parametrize(
    ("words", "kind", "count", "problems"),
    [
        (["list.txt"], "files", (2, 1), ["missing.png: cannot be read (No such file or directory)"]),
        (["small.png"], "folder", (1, 1), []),
        (["*.png"], "folder", (1, 1), []),
        (["pairs"], "pairs", (4, 1), ["odd.png: the sizes of the pair do not fit", "broken.png: ", "no partner of that name in lr/"]),
        (["rows"], "parquet", (3, 1), ["rows[1]: ", "junk.parquet: left out, no whole parquet file"]),
        (["hub", "--kind", "hub"], "hub", (2, 1), ["hub[1] no.png: "]),
        (["tar"], "webdataset", (2, 1), ["s.tar/no.png: "]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) and value else None,
)  # fmt: skip
def test_check_reads_every_kind_of_source(everything, words, kind, count, problems, monkeypatch):
    monkeypatch.chdir(everything)
    output = run("check", *words, "--processes", 1, code=1 if problems else 0)
    assert f"{kind} {words[0]}: {count[0]}\n" in output
    assert f"{count[0]} pictures, {count[1]} usable, {count[0] - count[1]} not" in output
    for problem in problems:
        assert problem in output
    assert output.count("not usable: ") == len(problems)


def test_check_reads_what_a_recipe_reads(everything, monkeypatch):
    """Streams, the recipe's own masks, training and validation together: what is in both is told."""
    monkeypatch.chdir(everything)
    (everything / "masks").mkdir()
    np.save(everything / "masks" / "ok.npy", np.ones((64, 80)))
    streams = "{kind: parquet, path: hub, streaming: true}, {kind: webdataset, path: tar, streaming: true, column: png}"
    words = ["--set", f"data.sources=[{streams}, {{kind: pairs, path: pairs}}]"]
    words += ["--set", "data.validation=[{kind: webdataset, path: tar}]"]
    words += ["--set", "data.mask={kind: files, folder: masks}", "--set", "data.degradation.pool_size=0"]
    output = run("check", "--config", "sd_upscaler_ssl", *words, "--processes", 2, code=1)
    assert "10 pictures, 3 usable, 7 not" in output  # two rows, two members, four pairs, two members
    assert "no mask named fits" in output
    assert "mask density (least, median, most): 100.0%, 100.0%, 100.0%" in output
    assert output.count("same pixels twice: ") == 2
    assert "smaller than the crop of 512" in output


def test_check_of_nothing_or_of_too_much(tmp_path):
    for words, message in (
        ([tmp_path], "expected pictures, found none"),
        ([], "expected one folder, picture or pattern, as the argument or as --input, got none"),
        ([tmp_path, "--input", tmp_path], "got both"),
        ([tmp_path, "--config", "sd_upscaler_ssl"], "either --config or an input"),
        ([tmp_path, "--kind", "foldr"], "did you mean folder"),
        (["--config", "sd_upscaler_ssl", "--set", "data.sources=[]", "--set", "data.validation=[]"], "the recipe names none"),
    ):
        result = RUN.invoke(app, ["prepare", "check", *map(str, words)])
        assert isinstance(result.exception, UserError), result.output
        assert message in str(result.exception)


def test_a_place_that_cannot_be_written_is_told(photos):
    result = RUN.invoke(app, ["prepare", "fit", "--lr-folder", str(photos), "--output", str(photos)])
    assert isinstance(result.exception, UserError)
    assert "cannot be written (Is a directory)" in str(result.exception)


def test_pairs_are_made_to_fit(tmp_path):
    """A rest is cut, an enlarged partner is shrunk, what is not the same picture is named."""
    whole = picture((83, 97), 1)
    small = Image.fromarray(whole[:80, :96]).resize((24, 20), Image.Resampling.BOX)
    for name, high, low in (
        ("0001", whole, whole[:80:4, :96:4]),
        ("realsr_HR", whole[:80, :96], np.asarray(small.resize((96, 80), Image.Resampling.BICUBIC))),
        ("more", whole[:80], whole[::4, ::4]),
        ("half", whole, whole[::2, ::2]),
        ("alone", whole, None),
    ):
        for side, pixels in (("hr", high), ("lr", low)):
            if pixels is not None:
                (tmp_path / "in" / side).mkdir(parents=True, exist_ok=True)
                label = {"0001": "0001x4", "realsr_HR": "realsr_LR4"}.get(name, name) if side == "lr" else name
                Image.fromarray(pixels).save(tmp_path / "in" / side / f"{label}.png")
    output = run("pairs", tmp_path / "in", "--output", tmp_path / "out", "--processes", 1, code=1)
    assert "half.png: the sizes of the pair do not fit --scale 4: 97x83 and 49x42 pixels" in output
    assert "alone.png: no partner of that name" in output
    assert "3 of 5 pictures done, 6 new files" in output
    made = {path.relative_to(tmp_path / "out").as_posix(): np.asarray(Image.open(path)) for path in (tmp_path / "out").rglob("*.png")}
    assert np.array_equal(made["hr/0001.png"], whole[:80, :96])
    assert np.array_equal(made["lr/0001.png"], whole[:80:4, :96:4])
    assert made["lr/more.png"].shape == (20, 24, 3)
    assert made["hr/realsr_HR.png"].shape == (80, 96, 3)
    shrunk = made["lr/realsr_HR.png"].astype(float)
    assert shrunk.shape == (20, 24, 3)
    assert np.abs(shrunk - np.asarray(small)).mean() < 4  # of 255: two bicubic filters are not quite each other's inverse
    assert "3 usable" in run("check", tmp_path / "out", "--kind", "pairs", "--crop-size", 64, "--processes", 1)


def test_an_emptied_result_is_made_again(photos, tmp_path):
    words = ("crops", photos / "below", "--output", tmp_path / "out", "--size", 64, "--processes", 1)
    run(*words)
    (tmp_path / "out" / "b_s001.png").write_bytes(b"")
    assert "1 new files" in run(*words)
