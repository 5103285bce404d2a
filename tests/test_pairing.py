from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from evaluation_samples import folders, picture, write
from PIL import Image

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.evaluation.pairing import pair_files
from sslsr_diffusion.partners import partners


def test_pairs_by_stem_whatever_the_extension_and_subfolder(tmp_path):
    write(tmp_path / "hr" / "street" / "a.v2.png", picture(0))
    write(tmp_path / "ours" / "street" / "a.v2.bmp", picture(0))
    pairing = pair_files({"ours": [tmp_path / "ours"]}, tmp_path / "hr")
    assert [(scene.name, scene.reference.name, scene.restored["ours"][0].name) for scene in pairing.scenes] == [
        ("street/a.v2", "a.v2.png", "a.v2.bmp")
    ]
    assert pairing.problems == ()


def test_suffix_is_taken_off_the_restored_stem(tmp_path):
    write(tmp_path / "hr" / "a.png", picture(0))
    write(tmp_path / "ours" / "a_out.png", picture(0))
    write(tmp_path / "ours" / "grid.png", picture(0))  # not named like a result: passed over
    pairing = pair_files({"ours": [tmp_path / "ours"]}, tmp_path / "hr", suffix="_out")
    assert [scene.name for scene in pairing.scenes] == ["a"]
    with pytest.raises(UserError, match=r"no image is in every folder: ours has a_out, grid; the reference has a\. .*--suffix"):
        pair_files({"ours": [tmp_path / "ours"]}, tmp_path / "hr")


@pytest.mark.parametrize(
    ("truth", "low"),
    [
        ("0001", "0001x4"),
        ("0001", "0001x4m"),
        ("below/Canon_001_HR", "below/Canon_001_LR4"),
        ("97_x1", "97_x4"),
        ("img_001_SRF_4_HR", "img_001_SRF_4_LR"),
        ("baby_HR_x4", "baby_LRBI_x4"),
        ("baby_gt", "baby"),
        ("baby", "babyx4"),
        ("0001_HR", "0001x4"),
        ("baby_HRx4", "baby_LRx4"),
    ],
)
def test_names_of_the_usual_sets_belong_together(tmp_path, truth, low):
    assert partners([truth, "other"], [low, "another"]) == {truth: low}
    write(tmp_path / "hr" / f"{truth}.png", picture(0))
    write(tmp_path / "hr" / "other.png", picture(0))
    write(tmp_path / "ours" / f"{low}.png", picture(0))
    write(tmp_path / "lr" / f"{low}.png", picture(0, 10, 12))
    scene = pair_files({"ours": [tmp_path / "ours"]}, tmp_path / "hr", tmp_path / "lr").scenes[0]
    assert (scene.name, scene.restored["ours"][0].stem, scene.lr.stem) == (truth, Path(low).name, Path(low).name)


def test_a_name_that_several_could_belong_to_has_no_partner():
    assert partners(["a", "b"], ["a", "ax4", "b_lr", "bx4"]) == {"a": "a"}  # of the same name comes first
    assert partners(["fox1", "fox2"], ["fox1", "fox2"]) == {"fox1": "fox1", "fox2": "fox2"}
    assert partners(["photo1024x768"], ["photo1024"]) == {}


def test_numbers_of_an_own_naming_are_no_sizes():
    assert partners(["fox2"], ["fox3"]) == {}
    assert partners(["box1", "box2"], ["box1x4", "box2x4"]) == {"box1": "box1x4", "box2": "box2x4"}
    assert partners(["box1x4", "box2x4"], ["box2", "box1"]) == {"box1x4": "box1", "box2x4": "box2"}
    assert partners(["plate_low", "plate_high"], ["plate_lowx4", "plate_highx4"]) == {
        "plate_low": "plate_lowx4",
        "plate_high": "plate_highx4",
    }


def test_missing_files_are_listed_and_only_common_images_kept(tmp_path):
    where = folders(tmp_path, count=4, ours=3, other=5)
    (where["ours"] / "scene1.png").unlink()
    (where["hr"] / "scene3.png").unlink()
    pairing = pair_files({"ours": [where["ours"]], "other": [where["other"]]}, where["hr"])
    assert [scene.name for scene in pairing.scenes] == ["scene0", "scene2"]
    assert pairing.problems == ("ours has no file for 1 of the images: scene1", "the reference has no file for 1 of the images: scene3")


def test_every_seed_of_a_column_must_have_the_image(tmp_path):
    where = folders(tmp_path, count=2, first=3, second=3)
    (where["second"] / "scene0.png").unlink()
    pairing = pair_files({"ours": [where["first"], where["second"]]}, where["hr"], where["lr"])
    assert [scene.name for scene in pairing.scenes] == ["scene1"]
    assert [path.parent.name for path in pairing.scenes[0].restored["ours"]] == ["first", "second"]
    assert pairing.scenes[0].lr == where["lr"] / "scene1.png"


@pytest.mark.parametrize(("height", "width"), [(40, 47), (39, 48)])
def test_sizes_that_differ_are_an_error_that_names_both(tmp_path, height, width):
    write(tmp_path / "hr" / "a.png", picture(0, 40, 48))
    write(tmp_path / "ours" / "a.png", picture(0, height, width))
    with pytest.raises(UserError, match=rf"ours.a\.png is {width} x {height}, .*hr.a\.png is 48 x 40"):
        pair_files({"ours": [tmp_path / "ours"]}, tmp_path / "hr")


def test_a_turned_photograph_has_the_size_it_is_shown_in(tmp_path):
    write(tmp_path / "ours" / "a.png", picture(0, 48, 40))
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "hr").mkdir()
    Image.fromarray(picture(0, 40, 48)).save(tmp_path / "hr" / "a.jpg", exif=exif)
    assert len(pair_files({"ours": [tmp_path / "ours"]}, tmp_path / "hr").scenes) == 1


def test_one_file_against_one_file_needs_no_common_name(tmp_path):
    restored, reference = write(tmp_path / "out.png", picture(0)), write(tmp_path / "truth.png", picture(0))
    scene = pair_files({"ours": [restored]}, reference).scenes[0]
    assert (scene.name, scene.restored["ours"], scene.reference) == ("truth", (restored,), reference)


def test_two_files_of_one_stem_are_an_error(tmp_path):
    write(tmp_path / "ours" / "a.png", picture(0))
    write(tmp_path / "ours" / "a.bmp", picture(0))
    with pytest.raises(UserError, match=r"a\.bmp and .*a\.png have the same stem"):
        pair_files({"ours": [tmp_path / "ours"]})


def test_an_unreadable_header_is_left_to_the_reader(tmp_path):
    write(tmp_path / "hr" / "a.png", np.zeros((8, 8, 3), np.uint8))
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "a.png").write_bytes(b"not a picture")
    assert len(pair_files({"ours": [tmp_path / "ours"]}, tmp_path / "hr").scenes) == 1
