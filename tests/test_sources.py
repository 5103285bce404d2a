"""Every kind of source gives the same pictures; pairs; streams resume exactly and are divided among processes."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from data_samples import open_small, picture, same, settings, take
from PIL import Image

from sslsr_diffusion.data.sample_order import Stream
from sslsr_diffusion.data.settings import ParquetSource
from sslsr_diffusion.data.sources import Columns, Item, open_source, row_item
from sslsr_diffusion.errors import UserError


def _png(seed: int, size: tuple[int, int] = (72, 80)) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture(size, seed)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """Four parquet files of five rows; rows 3 and 11 are damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    base = tmp_path_factory.mktemp("parquet")
    cells = [{"bytes": b"broken" if i in (3, 11) else _png(i), "path": f"r{i}.png"} for i in range(20)]
    for shard in range(4):
        pq.write_table(pa.table({"image": cells[5 * shard : 5 * shard + 5], "caption": ["x"] * 5}), base / f"s{shard}.parquet")
    return base


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_file_list(tmp_path):
    for name in ("a.png", "b c.png"):
        (tmp_path / name).write_bytes(_png(1))
    (tmp_path / "list.txt").write_text("# mine\na.png\n\nb c.png\nmissing.png\n")
    data = settings({"kind": "files", "path": str(tmp_path / "list.txt")})
    loader = open_small(data)
    assert {Path(n).name for b in take(loader, 4) for n in b.names} == {"a.png", "b c.png"}
    assert "missing.png" in "\n".join(loader.problems())
    (tmp_path / "windows.txt").write_text("a.png\r\nb c.png\r\n", encoding="utf-8-sig")
    assert len(open_source(settings({"kind": "files", "path": str(tmp_path / "windows.txt")}).sources[0])) == 2
    assert not open_small(settings({"kind": "files", "path": str(tmp_path / "windows.txt")})).problems()
    with pytest.raises(UserError, match="cannot be read"):
        open_small(settings({"kind": "files", "path": str(tmp_path / "none.txt")}))


def test_a_name_that_is_not_utf8(tmp_path):
    with open(os.path.join(os.fsencode(tmp_path), b"caf\xe9.png"), "wb") as file:
        file.write(_png(1))
    loader = open_small(settings({"kind": "folder", "path": str(tmp_path)}, workers=1))
    assert all("xe9" in name for name in next(loader).names)
    loader.close()


def test_parquet_in_memory_and_workers(shards):
    data = settings({"kind": "parquet", "path": str(shards)}, workers=1)
    loader = open_small(data, batch_size=5)
    batches = take(loader, 4)
    assert (
        same(batches, take(open_small(settings({"kind": "parquet", "path": str(shards / "*.parquet")}), batch_size=5), 4)) is False
    )  # names differ
    assert len({name for batch in batches for name in batch.names}) == 18
    assert any("r3.png" in text for text in loader.problems())
    loader.close()


def test_a_missing_column_is_named(shards):
    with pytest.raises(UserError, match=r"expected a column 'img', found image, caption"):
        open_source(ParquetSource(path=str(shards), column="img"))
    with pytest.raises(UserError, match="expected a column 'img'"):
        Stream(ParquetSource(path=str(shards), column="img", streaming=True), 0)
    with pytest.raises(UserError, match=r"expected \.parquet files"):
        open_source(ParquetSource(path=str(shards / "none")))


def test_hub_id_that_cannot_be_reached():
    with pytest.raises(UserError, match="hub source 'no/such-data': cannot be loaded"):
        open_small(settings({"kind": "hub", "path": "no/such-data"}))


def test_local_folder_through_datasets(shards):
    loader = open_small(settings({"kind": "hub", "path": str(shards)}))
    assert next(loader).hr.shape == (2, 3, 64, 64)


def _stream(shards: Path, **more) -> dict:
    return {"kind": "parquet", "path": str(shards), "streaming": True, "shuffle_window": 4, **more}


def test_stream_gives_every_row_once_per_epoch_and_shuffles(shards):
    stream = Stream(ParquetSource(**_stream(shards)), seed=0)
    names = [item.name.split()[-1] for item in itertools.islice(stream, 40)]
    first, second = names[:20], names[20:]
    assert sorted(first) == sorted(second) == sorted(f"r{i}.png" for i in range(20))
    assert first != second
    assert first != sorted(first)


@pytest.mark.parametrize("used", [0, 1, 3, 4, 5, 17, 20, 23])
def test_stream_resumes_exactly(shards, used):
    stream = Stream(ParquetSource(**_stream(shards)), seed=0)
    for _ in range(used):
        next(stream)
    state = json.loads(json.dumps(stream.state_dict()))
    wanted = [next(stream).name for _ in range(25)]
    resumed = Stream(ParquetSource(**_stream(shards)), seed=0)
    resumed.load_state_dict(state)
    assert [next(resumed).name for _ in range(25)] == wanted


def test_stream_is_divided_among_processes(shards):
    parts = [{next(s).name.split()[-1] for _ in range(10)} for s in (Stream(ParquetSource(**_stream(shards)), 0, r, 2) for r in range(2))]
    assert len(parts[0]) == len(parts[1]) == 10
    assert not parts[0] & parts[1]


def test_stream_through_the_loader(shards):
    wanted = take(open_small(settings(_stream(shards))), 12)
    data = settings(_stream(shards), workers=2)
    loader = open_small(data)
    assert same(take(loader, 5), wanted[:5])
    state = json.loads(json.dumps(loader.state_dict()))
    loader.close()
    resumed = open_small(data, state=state)
    assert same(take(resumed, 7), wanted[5:])
    assert any("r3.png" in text or "r11.png" in text for text in resumed.problems() + loader.problems())
    resumed.close()


def test_a_damaged_row_is_replaced_by_a_picture_of_any_source(shards, tmp_path):
    Image.fromarray(picture((70, 80), 1)).save(tmp_path / "p.png")
    loader = open_small(settings(_stream(shards), {"kind": "folder", "path": str(tmp_path)}), batch_size=4)
    batches = take(loader, 20)  # both damaged rows come twice
    assert all(len(batch.names) == 4 for batch in batches)
    assert any("r3.png" in text for text in loader.problems())
    assert same(batches, take(open_small(settings(_stream(shards), {"kind": "folder", "path": str(tmp_path)}), batch_size=4), 20))


def test_a_stream_of_nothing_but_damage_is_said(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"image": [{"bytes": b"x", "path": "a"}] * 3}), tmp_path / "s.parquet")
    with pytest.raises(UserError, match="nothing is left to train on"):
        next(open_small(settings(_stream(tmp_path))))


def test_webdataset_shards(tmp_path):
    for shard in range(2):
        _tar(
            tmp_path / f"s{shard}.tar",
            {f"k{shard}{i}.{kind}": _png(i) if kind == "png" else b"words" for i in range(3) for kind in ("png", "txt")},
        )
    whole = (tmp_path / "s0.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "junk.tar").write_bytes(b"junk" * 200)
    loader = open_small(settings({"kind": "webdataset", "path": str(tmp_path)}, workers=1))
    names = {name for batch in take(loader, 8) for name in batch.names}
    assert {f"s{s}.tar/k{s}{i}.png" for s in range(2) for i in range(3)} <= names
    assert "junk.tar: not read to its end" in "\n".join(loader.problems())
    loader.close()
    streamed = {"kind": "webdataset", "path": str(tmp_path / "s*.tar"), "streaming": True, "column": "png"}
    assert len({name for batch in take(open_small(settings(streamed)), 3) for name in batch.names}) == 6


@pytest.mark.parametrize("column", [None, "png"])
def test_a_stream_of_tar_files_gives_what_the_same_files_give_from_the_disk(tmp_path, column):
    jpeg = io.BytesIO()
    Image.fromarray(picture((72, 80), 0)).save(jpeg, "JPEG")
    _tar(tmp_path / "a.tar", {"k.v1.png": _png(1), "k.v2.png": _png(2), "k.txt": b"words", "deep/photo.1.jpg": jpeg.getvalue()})
    _tar(tmp_path / "b.tar", {"only.JPG": jpeg.getvalue()})
    source = settings({"kind": "webdataset", "path": str(tmp_path), "column": column}).sources[0]
    names = {"k.v1.png", "k.v2.png"} if column else {"k.v1.png", "k.v2.png", "deep/photo.1.jpg", "only.JPG"}
    listed = open_source(source)
    from_disk = {(item.file, item.hr) for item in map(listed.item, range(len(listed)))}
    assert {name for name, _ in from_disk} == names
    assert {(item.file, item.hr) for item in itertools.islice(Stream(source, 0), len(names))} == from_disk


@pytest.mark.parametrize("streaming", [False, True])
def test_a_column_of_something_else_than_pictures_is_named(tmp_path, streaming):
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {"image": [_png(0)], "number": [3], "list": [[1.5, 2.5]], "group": [{"a": 1}], "none": [None]}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    for column, kind in (("number", "int64"), ("list", "list"), ("group", "groups of a"), ("none", "null")):
        for key in ("column", "lr_column"):
            source = {"kind": "parquet", "path": str(tmp_path), "streaming": streaming, key: column}
            with pytest.raises(UserError, match=f"expected encoded pictures in column '{column}', got {kind}; name another column"):
                open_small(settings(source))
    named = {"kind": "parquet", "path": str(tmp_path), "streaming": streaming, "name_column": "number"}
    assert next(open_small(settings(named), batch_size=1)).names[0].endswith(" 3")


def test_a_cell_of_text_is_no_message(tmp_path):
    import base64

    import pyarrow as pa
    import pyarrow.parquet as pq

    text = base64.b64encode(_png(1)).decode()
    pq.write_table(pa.table({"image": [text] * 2}), tmp_path / "t.parquet")
    with pytest.raises(UserError, match="nothing is left to train on") as caught:
        next(open_small(settings({"kind": "parquet", "path": str(tmp_path / "t.parquet")})))
    assert len(str(caught.value)) < 700 < len(text)


def test_pairs_are_found_by_the_names_of_the_usual_sets(tmp_path):
    for folder, name, size in (
        ("hr", "0001", 80),
        ("lr", "0001x4", 20),
        ("hr", "Canon_2_HR", 80),
        ("lr", "Canon_2_LR4", 20),
        ("lr", "9x4", 20),
    ):
        (tmp_path / folder).mkdir(exist_ok=True)
        Image.fromarray(picture((size, size), 1)).save(tmp_path / folder / f"{name}.png")
    loader = open_small(settings({"kind": "pairs", "path": str(tmp_path)}))
    assert {Path(name).stem for batch in take(loader, 3) for name in batch.names} == {"0001", "Canon_2_HR"}
    assert ["9x4.png: no partner of that name in hr/" in text for text in loader.problems()] == [True]


@pytest.fixture
def pairs(tmp_path) -> Path:
    for side in ("hr", "lr"):
        (tmp_path / side / "sub").mkdir(parents=True)
    for i in range(3):
        hr = picture((80, 96), i)
        Image.fromarray(hr).save(tmp_path / "hr" / "sub" / f"p{i}.png")
        Image.fromarray(hr[::4, ::4].copy()).save(tmp_path / "lr" / "sub" / f"p{i}.webp", lossless=True)
    return tmp_path


def test_pairs_stay_aligned_under_crop_and_flip(pairs):
    data = settings({"kind": "pairs", "path": str(pairs)}, crop={"rotate": True})
    for batch in take(open_small(data), 8):
        for hr, lr in zip(batch.hr, batch.lr):
            # the partner is every 4th pixel: after a turn, the pixel at that corner of each block
            corners = [hr[:, y::4, x::4] for y in (0, 3) for x in (0, 3)]
            assert any(torch.equal(corner, lr) for corner in corners)


def test_small_pairs_stay_aligned_when_reflected(tmp_path):
    for folder, size in (("hr", 4), ("lr", 1)):
        (tmp_path / folder).mkdir()
        blocks = np.repeat(
            np.repeat(picture((13, 11), 1), size, axis=0), size, axis=1
        )  # 52x44 is less than the crop, 12 and 20 are missing
        Image.fromarray(blocks).save(tmp_path / folder / "small.png")
    for batch in take(open_small(settings({"kind": "pairs", "path": str(tmp_path)})), 4):
        assert torch.equal(batch.hr, batch.lr.repeat_interleave(4, 2).repeat_interleave(4, 3))


def test_pairs_that_do_not_fit_are_named(pairs):
    Image.fromarray(picture((81, 96), 7)).save(pairs / "hr" / "odd.png")
    Image.fromarray(picture((20, 24), 7)).save(pairs / "lr" / "odd.png")
    Image.fromarray(picture((80, 97), 7)).save(pairs / "hr" / "wide.png")
    Image.fromarray(picture((20, 24), 7)).save(pairs / "lr" / "wide.png")
    Image.fromarray(picture((80, 80), 8)).save(pairs / "hr" / "alone.png")
    loader = open_small(settings({"kind": "pairs", "path": str(pairs)}))
    assert all("sub" in name for batch in take(loader, 6) for name in batch.names)
    text = "\n".join(loader.problems())
    assert "the sizes of the pair do not fit scale 4: 96x81 and 24x20 pixels" in text  # either side alone
    assert "the sizes of the pair do not fit scale 4: 97x80 and 24x20 pixels" in text
    assert "alone.png: no partner of that name in lr/" in text


def test_pairs_mixed_with_synthetic_pairs(pairs):
    data = settings(
        {"kind": "pairs", "path": str(pairs)}, {"kind": "folder", "path": str(pairs / "hr"), "weight": 3}, degradation={"preset": "bicubic"}
    )
    exact = 0
    for batch in take(open_small(data, batch_size=8), 5):
        for hr, lr in zip(batch.hr, batch.lr):
            exact += any(torch.equal(hr[:, y::4, x::4], lr) for y in (0, 3) for x in (0, 3))
    assert 2 <= exact <= 20  # 10 of 40 expected


def test_pairs_in_two_columns(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    hr, lr = [_png(i, (80, 80)) for i in range(3)], [_png(i, (20, 20)) for i in range(3)]
    pq.write_table(pa.table({"sharp": hr, "blurred": lr}), tmp_path / "p.parquet")
    for streaming in (False, True):
        source = {"kind": "parquet", "path": str(tmp_path), "column": "sharp", "lr_column": "blurred", "streaming": streaming}
        assert next(open_small(settings(source))).lr.shape == (2, 3, 16, 16)


def test_missing_pair_folder(tmp_path):
    with pytest.raises(UserError, match=r"expected a folder .*hr"):
        open_small(settings({"kind": "pairs", "path": str(tmp_path)}))


def test_sixteen_bit_pictures_keep_their_depth(tmp_path):
    import cv2

    values = (np.arange(80 * 80 * 3).reshape(80, 80, 3) * 3).astype(np.uint16)
    cv2.imwrite(str(tmp_path / "deep.png"), values)
    hr = next(open_small(settings({"kind": "folder", "path": str(tmp_path)}))).hr
    assert not torch.allclose(hr * 255, (hr * 255).round(), atol=1e-3)


def test_a_row_without_the_column_is_an_empty_picture_not_a_crash():
    found = row_item("stream[3]", {"__key__": "a/b", "txt": "words"}, Columns("jpg", "lr"))
    assert found == Item("stream[3] a/b", b"", b"", file="a/b")


def _tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def rows_and_masks(tmp_path) -> Path:
    """Six pictures p0 to p5 as parquet rows (named in the cell, by a column, not at all) and in a tar; masks full for even numbers."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "masks").mkdir()
    pictures = [_png(i, (64, 64)) for i in range(6)]
    for i in range(6):
        np.save(tmp_path / "masks" / f"p{i}.npy", np.full((64, 64), i % 2 == 0))
    pq.write_table(pa.table({"image": [{"bytes": b, "path": f"p{i}.png"} for i, b in enumerate(pictures)]}), tmp_path / "cell.parquet")
    pq.write_table(pa.table({"image": pictures, "file": [f"set/p{i}.jpg" for i in range(6)]}), tmp_path / "column.parquet")
    _tar(tmp_path / "s.tar", {f"p{i}.png": b for i, b in enumerate(pictures)})
    return tmp_path


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "source",
    [
        {"kind": "parquet", "path": "cell.parquet"},
        {"kind": "hub", "path": "cell.parquet"},
        {"kind": "parquet", "path": "column.parquet", "name_column": "file"},
        {"kind": "webdataset", "path": "s.tar", "column": "png"},
    ],
    ids=["cell", "hub", "column", "webdataset"],
)
def test_mask_files_pair_with_rows_by_name(rows_and_masks, source, streaming):
    path = rows_and_masks / source["path"]
    if source["kind"] == "hub":  # a folder that `datasets` can load
        (rows_and_masks / "hub").mkdir()
        path = path.rename(rows_and_masks / "hub" / "train.parquet").parent
    data = settings({**source, "path": str(path), "streaming": streaming}, mask={"kind": "files", "folder": str(rows_and_masks / "masks")})
    loader = open_small(data)
    full = {
        re.findall(r"p\d", name)[-1]: float(mask.float().mean()) for batch in take(loader, 6) for name, mask in zip(batch.names, batch.mask)
    }
    assert full == {f"p{i}": float(i % 2 == 0) for i in range(6)}
    assert loader.problems() == []


def test_rows_without_names_cannot_have_mask_files(rows_and_masks):
    masks = {"kind": "files", "folder": str(rows_and_masks / "masks")}
    with pytest.raises(UserError, match=r"column\.parquet\[\d\]: expected a file name .* set name_column"):
        next(open_small(settings({"kind": "parquet", "path": str(rows_and_masks / "column.parquet")}, mask=masks)))
    with pytest.raises(UserError, match="expected a column 'names', found image, file"):
        open_small(settings({"kind": "parquet", "path": str(rows_and_masks / "column.parquet"), "name_column": "names"}, mask=masks))
