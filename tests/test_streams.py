"""Streams through the loader: two processes with two workers each read every row once, and a resume goes on at the very next row."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from test_sources import _png, _tar
from test_training_data import open_small, settings, take

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
