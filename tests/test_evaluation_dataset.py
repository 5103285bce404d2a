from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from evaluation_samples import folders, picture, write
from PIL import Image

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.evaluation.dataset import common_scale, find_dataset
from sslsr_diffusion.evaluation.scoring import load_rgb


def test_a_folder_with_both_sides_or_two_folders(tmp_path):
    where = folders(tmp_path, 2)
    made = tmp_path / "made"
    for text in (str(tmp_path), f"{where['lr']},{where['hr']}"):
        found = find_dataset(text, scale=4, made=made)
        assert (found.lr, found.hr) == (where["lr"], where["hr"])
        assert found.scale == 4
    assert not made.exists()


def test_photographs_are_cut_and_shrunk(tmp_path):
    write(tmp_path / "photos" / "sub" / "a.jpg", picture(0, 43, 49))
    found = find_dataset(str(tmp_path / "photos"), scale=4, made=tmp_path / "made")
    assert load_rgb(found.hr / "sub" / "a.png").shape[-2:] == (40, 48)
    assert load_rgb(found.lr / "sub" / "a.png").shape[-2:] == (10, 12)
    assert found.scale == 4


def test_bad_photographs_are_left_out_by_name(tmp_path):
    write(tmp_path / "photos" / "good.png", picture(0))
    write(tmp_path / "photos" / "good.tif", picture(1))
    write(tmp_path / "photos" / "small.png", picture(2, 3, 3))
    (tmp_path / "photos" / "cut.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more")
    found = find_dataset(str(tmp_path / "photos"), scale=4, made=tmp_path / "made")
    assert [path.name for path in sorted(found.hr.iterdir())] == ["good.png"]
    assert sorted(Path(line.split(": ")[0]).name for line in found.left_out) == ["cut.jpg", "good.tif", "small.png"]
    (tmp_path / "photos" / "good.png").unlink()
    (tmp_path / "photos" / "good.tif").unlink()
    with pytest.raises(UserError, match=r"no photograph of .* could be used"):
        find_dataset(str(tmp_path / "photos"), scale=4, made=tmp_path / "other")


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(UserError, match="is not a folder; expected a folder with lr/ and hr/"):
        find_dataset(str(tmp_path / "no"), scale=4, made=tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no pictures"):
        find_dataset(str(tmp_path / "empty"), scale=4, made=tmp_path)
    write(tmp_path / "a" / "x.png", picture(0))
    write(tmp_path / "b" / "y.png", picture(0))
    with pytest.raises(UserError, match="is named like one of"):
        find_dataset(f"{tmp_path / 'a'},{tmp_path / 'b'}", scale=4, made=tmp_path)


def test_other_photographs_leave_nothing_of_the_first_ones(tmp_path):
    for name, number in (("one", 3), ("two", 1)):
        for i in range(number):
            write(tmp_path / name / f"{name}{i}.png", picture(i))
    made = tmp_path / "made"
    find_dataset(str(tmp_path / "one"), scale=4, made=made)
    found = find_dataset(str(tmp_path / "two"), scale=4, made=made)
    assert [path.name for folder in (found.lr, found.hr) for path in folder.iterdir()] == ["two0.png"] * 2
    with pytest.raises(UserError, match="is where this command stores what it makes"):
        find_dataset(str(made / "hr"), scale=4, made=made)
    assert (made / "hr" / "two0.png").is_file()


def test_a_ground_truth_that_is_no_multiple_is_cut_to_what_its_input_shows(tmp_path):
    for name, side in (("a", (43, 49)), ("b", (40, 48))):
        truth = picture(0, *side)
        write(tmp_path / "hr" / f"{name}.png", truth)
        write(tmp_path / "lr" / f"{name}x4.png", truth[:40:4, :48:4])
    found = find_dataset(str(tmp_path), scale=2, made=tmp_path / "made")
    assert found.scale == 4  # and not 49 / 12
    assert np.array_equal(np.asarray(Image.open(found.hr / "a.png")), picture(0, 43, 49)[:40, :48])
    assert (found.hr / "b.png").read_bytes() == (tmp_path / "hr" / "b.png").read_bytes()
    assert "1 of 2 ground truths: cut to 4 times the input" in found.left_out[0]


@pytest.mark.parametrize(("lr", "hr"), [("lr", "made/hr/mine"), ("made/hr/mine", "hr"), ("lr", "made/hr")])
def test_folders_where_results_are_stored_are_left_alone(tmp_path, lr, hr):
    write(tmp_path / lr / "a.png", picture(0)[:40:4, :48:4])
    truth = write(tmp_path / hr / "a.png", picture(0, 43, 49))  # would be cut
    with pytest.raises(UserError, match=r"made.hr.* is where this command stores what it makes; choose another --output"):
        find_dataset(f"{tmp_path / lr},{tmp_path / hr}", scale=4, made=tmp_path / "made")
    assert truth.is_file()
    assert (tmp_path / lr / "a.png").is_file()


@pytest.mark.parametrize(
    ("sizes", "wanted"),
    [
        ([((120, 80), (481, 321))], 4),
        ([((120, 80), (300, 200)), ((10, 12), (25, 30))], 2.5),
        ([((64, 64), (64, 64))], 1),
        ([((1, 40), (5, 163)), ((30, 30), (121, 122))], 4),  # one pair alone would allow 3 to 5
    ],
)
def test_one_scale_holds_for_every_pair(sizes, wanted):
    assert common_scale({str(i): pair for i, pair in enumerate(sizes)}) == wanted


def test_pairs_of_two_scales_are_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=r"a is 120 x 80 and 480 x 320, c is 60 x 60 and 120 x 120; `sslsr prepare pairs`"):
        common_scale({"a": ((120, 80), (480, 320)), "b": ((9, 9), (36, 36)), "c": ((60, 60), (120, 120))})
