"""Streams through the loader: two processes with two workers each read every row once, and a resume goes on at the very next row."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest
from data_samples import open_small, settings, take
from test_sources import _png, _tar

from sslsr_diffusion.data import sample_order
from sslsr_diffusion.data.sample_order import Stream
from sslsr_diffusion.data.settings import ParquetSource, WebdatasetSource
from sslsr_diffusion.errors import UserError

ROWS = 40


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def _source(folder: Path, kind: str, shards: int) -> dict:
    """Rows id00 to id39 in files of equal length."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = [f"id{i:02d}" for i in range(ROWS)]
    for shard in range(shards):
        mine = names[shard * ROWS // shards : (shard + 1) * ROWS // shards]
        if kind == "webdataset":
            _tar(folder / f"s{shard}.tar", {f"{name}.png": _png(0, (64, 64)) for name in mine})
        else:
            pq.write_table(
                pa.table({"image": [{"bytes": _png(0, (64, 64)), "path": f"{n}.png"} for n in mine]}), folder / f"s{shard}.parquet"
            )
    more = {"column": "png"} if kind == "webdataset" else {}
    return {"kind": kind, "path": str(folder), "streaming": True, "shuffle_window": 4, **more}


def _ids(batches) -> list[str]:
    return [re.findall(r"id\d\d", name)[-1] for batch in batches for name in batch.names]


@pytest.mark.parametrize(
    ("kind", "shards"),
    [("parquet", 4), ("parquet", 5), ("hub", 4), ("webdataset", 1)],
    ids=["whole shards each", "every second row", "hub", "one shard"],
)
def test_two_processes_with_two_workers_see_every_row_once_and_resume(tmp_path, kind, shards):
    (tmp_path / "rows").mkdir()
    data = settings(_source(tmp_path / "rows", kind, shards), workers=2, degradation={"preset": "bicubic"})
    seen = []
    for rank in range(2):
        place = {"rank": rank, "world_size": 2, "batch_size": 1}
        loader = open_small(data, **place)
        whole = _ids(take(loader, 30))  # an epoch and a half
        loader.close()
        first = open_small(data, **place)
        start = _ids(take(first, 10))
        state = json.loads(json.dumps(first.state_dict()))  # the workers have read on meanwhile
        first.close()
        resumed = open_small(data, state=state, **place)
        assert start + _ids(take(resumed, 20)) == whole
        resumed.close()
        assert len(set(whole[:20])) == 20
        seen += whole[:20]
    assert sorted(seen) == [f"id{i:02d}" for i in range(ROWS)]


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
@pytest.mark.parametrize("streaming", [True, False])
def test_a_damaged_shard_is_left_out_and_named(tmp_path, kind, streaming):
    source = _source(tmp_path, kind, 4) | {"streaming": streaming}
    shard = sorted(tmp_path.glob("s*"))[1]
    shard.write_bytes(shard.read_bytes()[: 3 * shard.stat().st_size // 4])
    loader = open_small(settings(source, degradation={"preset": "bicubic"}), batch_size=4)
    found = set(_ids(take(loader, 20)))
    assert {f"id{i:02d}" for i in range(ROWS) if not 10 <= i < 20} <= found
    assert any(shard.name in text and "no whole" in text for text in loader.problems())
    for path in tmp_path.glob("s*"):
        path.write_bytes(b"junk" * 300)
    with pytest.raises(UserError, match="no whole"):
        open_small(settings(source))


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
def test_a_damaged_shard_behind_a_url_is_left_out_while_training(tmp_path, kind):
    """Nobody looks at it before its turn comes; then the next one follows, and a resume sees the same."""
    source = _source(tmp_path, kind, 4)
    shard = sorted(tmp_path.glob("s*"))[1]
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    settings_of = ParquetSource if kind == "parquet" else WebdatasetSource
    remote = settings_of(**source | {"path": f"file://{tmp_path}/*.{'tar' if kind == 'webdataset' else kind}"})
    stream = Stream(remote, 0)
    names = [re.findall(r"id\d\d", item.name)[-1] for item in itertools.islice(stream, 45)]
    assert {f"id{i:02d}" for i in range(ROWS) if not 10 <= i < 20} <= set(names)
    state = json.loads(json.dumps(stream.state_dict()))
    resumed = Stream(remote, 0)
    resumed.load_state_dict(state)
    assert [next(resumed).name for _ in range(40)] == [next(stream).name for _ in range(40)]


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
def test_a_path_that_looks_like_a_pattern_is_a_path(tmp_path, kind):
    folder = tmp_path / "set [v1]*"
    folder.mkdir()
    loader = open_small(settings(_source(folder, kind, 2), degradation={"preset": "bicubic"}), batch_size=4)
    assert len(set(_ids(take(loader, 10)))) == ROWS


def test_a_stream_that_hiccups_loses_nothing_and_one_that_ends_says_where(tmp_path, monkeypatch):
    source = ParquetSource(**_source(tmp_path, "parquet", 4))
    wanted = [item.name for item in itertools.islice(Stream(source, 0), 60)]
    pauses: list[float] = []
    monkeypatch.setattr(sample_order.time, "sleep", pauses.append)
    stream, plain, calls = Stream(source, 0), Stream._rows_of_window, itertools.count()

    def failing(self):
        if next(calls) % 3 < 2:
            list(itertools.islice(self._iterator, 2))  # some rows have come before the failure
            raise ConnectionError("the network is away")
        return plain(self)

    monkeypatch.setattr(Stream, "_rows_of_window", failing)
    assert [item.name for item in itertools.islice(stream, 60)] == wanted
    assert pauses[:4] == [1.0, 5.0, 1.0, 5.0]
    monkeypatch.setattr(Stream, "_rows_of_window", lambda self: 1 / 0)
    with pytest.raises(UserError, match=r"breaks off after row 20 of epoch 1 of process 0 \(division by zero\)"):
        next(stream)
