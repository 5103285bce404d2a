from __future__ import annotations

from pathlib import Path

import pytest
from evaluation_samples import folders, picture, write

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.evaluation.dataset import find_dataset, scale_of
from sslsr_diffusion.evaluation.scoring import load_rgb


def test_a_folder_with_both_sides_or_two_folders(tmp_path):
    where = folders(tmp_path, 2)
    made = tmp_path / "made"
    for text in (str(tmp_path), f"{where['lr']},{where['hr']}"):
        found = find_dataset(text, scale=4, made=made)
        assert (found.lr, found.hr) == (where["lr"], where["hr"])
        assert scale_of(found) == 4
    assert not made.exists()


def test_photographs_are_cut_and_shrunk(tmp_path):
    write(tmp_path / "photos" / "sub" / "a.jpg", picture(0, 43, 49))
    found = find_dataset(str(tmp_path / "photos"), scale=4, made=tmp_path / "made")
    assert load_rgb(found.hr / "sub" / "a.png").shape[-2:] == (40, 48)
    assert load_rgb(found.lr / "sub" / "a.png").shape[-2:] == (10, 12)
    assert scale_of(found) == 4


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
    with pytest.raises(UserError, match="one of the same stem"):
        scale_of(find_dataset(f"{tmp_path / 'a'},{tmp_path / 'b'}", scale=4, made=tmp_path))


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
