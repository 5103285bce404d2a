"""examples/collect_photographs.py: the table, and one made-up Debian package from download folder to crops; no network."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scripts import ROOT, load_script

from sslsr_diffusion.errors import UserError

EXAMPLES = ROOT / "examples"
collecting = load_script("examples/collect_photographs.py")


def test_table_names_everything_once_with_author_and_licence() -> None:
    rows = collecting.PHOTOGRAPHS
    assert len({row.name for row in rows}) == len({(row.package, row.file) for row in rows}) == len(rows)
    assert all(row.author and row.licence and row.divide in (1, 2) for row in rows)
    assert {row.package for row in rows} <= {collecting.SKIMAGE, *collecting.FOLDERS}


def test_a_tenth_is_validation_with_the_shipped_validation_pictures_and_none_that_the_demo_trains_on() -> None:
    held_out = {row.name for row in collecting.PHOTOGRAPHS if row.validation}
    assert len(held_out) >= len(collecting.PHOTOGRAPHS) / 10
    shipped = EXAMPLES / "photos"
    assert {path.stem for path in (shipped / "validation").iterdir()} <= held_out
    sources = (EXAMPLES / "SOURCES.md").read_text(encoding="utf-8")
    demo_files = {line.split("`")[3] for line in sources.splitlines() if line.startswith("| `photos/train/")}
    assert len(demo_files) == len(list((shipped / "train").iterdir()))
    assert demo_files.isdisjoint(row.file for row in collecting.PHOTOGRAPHS if row.validation)


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb builds the made-up package")
def test_a_package_becomes_pictures_sources_and_crops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made, cache, output = tmp_path / "made", tmp_path / "cache", tmp_path / "photos"
    pictures = made / collecting.FOLDERS["lxqt-themes"]
    pictures.mkdir(parents=True)
    (made / "DEBIAN").mkdir()
    (made / "DEBIAN" / "control").write_text(
        "Package: lxqt-themes\nVersion: 1\nArchitecture: all\nMaintainer: Nobody <nobody@example.org>\nDescription: made up\n"
    )
    draw = np.random.default_rng(0)
    first, second = (Image.fromarray(draw.integers(0, 256, (12, 16, 3), dtype=np.uint8)) for _ in range(2))
    first.resize((256, 192)).save(pictures / "held.png")
    first.resize((128, 96)).save(pictures / "again.png")
    half_flat = np.full((192, 256, 3), 90, np.uint8)
    half_flat[:, :128] = np.asarray(second.resize((128, 192)))
    Image.fromarray(half_flat).save(pictures / "half.png")
    cache.mkdir()
    subprocess.run(["dpkg-deb", "--build", str(made), str(cache / "lxqt-themes_1_all.deb")], check=True, capture_output=True)

    def row(name: str, divide: int = 1, validation: bool = False) -> object:
        return collecting.Photograph(name, "lxqt-themes", f"{name}.png", "An Author", "CC0 1.0", divide, validation)

    written = collecting.collect([row("again"), row("half"), row("held", 2, True)], output, cache)
    assert [one.name for one in written] == ["held", "half"]  # the smaller copy of the held-out picture is not trained on
    assert "again is the same picture as held" in capsys.readouterr().out
    assert Image.open(output / "validation" / "held.png").size == (128, 96)
    assert np.array_equal(np.asarray(Image.open(output / "train" / "half.png")), half_flat)
    assert "| `validation/held.png` (128x96) | An Author | CC0 1.0 | lxqt-themes | `held.png` | 2 |" in (output / "SOURCES.md").read_text()

    count = collecting.make_crops(output, 64)
    crops = sorted((output / "crops" / "train").iterdir())
    names = {path.stem for path in crops}
    assert count == len(crops)
    assert {Image.open(path).size for path in crops} == {(64, 64)}
    assert {"half_s001", "halfT2_s001", "halfS_s001"} <= names
    assert "half_s004" not in names  # its right quarter is one colour
    assert not any(name.startswith("held") for name in names)


def test_pages_of_text_are_drawn_the_same_each_time(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name / "train").mkdir(parents=True)
        collecting.draw_pages(tmp_path / name, 3)
    pages = [np.asarray(Image.open(tmp_path / "first" / "train" / f"page-{number}.png").convert("L")) for number in (1, 2, 3)]
    assert np.array_equal(pages[1], np.asarray(Image.open(tmp_path / "second" / "train" / "page-2.png").convert("L")))
    light, dark = np.median(pages[0]), np.median(pages[2])
    assert dark < 110 < 200 <= light  # a third is light on dark
    assert all(((page < 110).mean() > 0.03) and ((page > 190).mean() > 0.03) for page in pages)  # ink and paper on each


def test_a_collection_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    output = tmp_path / "photos"
    output.mkdir()  # an empty folder is as good as none

    def stopped_half_way() -> None:
        with collecting.appearing_whole(output) as folder:
            (folder / "half.png").touch()
            raise UserError("no network")

    with pytest.raises(UserError, match="no network"):
        stopped_half_way()
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]
    assert not list(output.iterdir())
    with collecting.appearing_whole(output) as folder:
        (folder / "all.png").touch()
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["photos", "photos/all.png"]
    with pytest.raises(UserError, match="photos: expected a new or empty folder"), collecting.appearing_whole(output):
        pass
    with pytest.raises(UserError, match="png: expected a new or empty folder"), collecting.appearing_whole(output / "all.png"):
        pass
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match="link: expected a new or empty folder, got a link to nothing"):
        collecting.appearing_whole(tmp_path / "link").__enter__()


def test_an_empty_folder_is_filled_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there, link = tmp_path / "there", tmp_path / "link"
    there.mkdir()
    link.symlink_to(there)
    with collecting.appearing_whole(link) as folder:
        assert there.resolve() in folder.resolve().parents  # the same disk, and the folder around it may be closed
        (folder / "crops").mkdir()
        (folder / "SOURCES.md").touch()
    assert sorted(path.name for path in there.iterdir()) == ["SOURCES.md", "crops"]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with collecting.appearing_whole(Path()) as folder:
        (folder / "SOURCES.md").touch()
    assert (tmp_path / "here" / "SOURCES.md").is_file()


def test_without_apt_get_one_sentence_says_what_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collecting.shutil, "which", lambda name: "/usr/bin/dpkg-deb" if name == "dpkg-deb" else None)
    with pytest.raises(UserError, match=r"lxqt-themes: downloading needs apt-get .* or put lxqt-themes_\*\.deb into"):
        collecting.unpacked("lxqt-themes", tmp_path)
