"""Streams through the loader: two processes with two workers each read every row once, and a resume goes on at the very next row."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import forks
import numpy as np
import pytest
from data_samples import open_small, settings, take
from hub_server import HubServer
from huggingface_hub.errors import HfHubHTTPError
from test_sources import _png, _tar

from sslsr_diffusion.data import sample_order, shards
from sslsr_diffusion.data.sample_order import Stream
from sslsr_diffusion.data.settings import HubSource, ParquetSource, WebdatasetSource
from sslsr_diffusion.errors import UserError

ROOT = Path(__file__).parent.parent
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


def test_a_shard_with_other_columns_is_not_called_damaged(tmp_path, monkeypatch, caplog):
    from pyarrow import parquet

    monkeypatch.setattr(shards.time, "sleep", lambda seconds: None)
    source = _source(tmp_path, "parquet", 4)
    shard = sorted(tmp_path.glob("s*"))[1]
    table = parquet.read_table(shard)
    parquet.write_table(table.append_column("more", [[1] * len(table)]), shard)
    remote = ParquetSource(**source | {"path": f"file://{tmp_path}/*.parquet"})
    with pytest.raises(UserError, match=r"Couldn't cast"):
        list(itertools.islice(Stream(remote, 0), 60))
    assert "damaged" not in caplog.text


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
def test_a_damaged_shard_behind_a_url_is_left_out_while_training(tmp_path, kind, monkeypatch):
    """Nobody looks at it before its turn comes; then the next one follows, and a resume sees the same."""
    monkeypatch.setattr(shards.time, "sleep", lambda seconds: None)
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


def damaged_parquet(folder: Path, names: dict[str, list[str]]) -> Path:
    """Shards by name, of rows by name, in groups of two; behind the first four rows, the second one's bytes are noise."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for shard, rows in names.items():
        cells = [{"bytes": _png(0, (64, 64)), "path": f"{name}.png"} for name in rows]
        pq.write_table(pa.table({"image": cells}), folder / shard, row_group_size=2, use_dictionary=False, compression="zstd")
    hurt = folder / list(names)[1]
    groups = pq.ParquetFile(hurt).metadata
    start, end = (groups.row_group(k).column(0).data_page_offset for k in (2, 3))
    data = bytearray(hurt.read_bytes())
    data[start:end] = np.random.default_rng(0).bytes(end - start)
    hurt.write_bytes(data)
    return hurt


SHARDS = {f"train-{k}.parquet": [f"id{10 * k + i:02d}" for i in range(10)] for k in range(3)}
WHOLE = {name for rows in SHARDS.values() for name in rows} - {f"id{i}" for i in range(14, 20)}


def test_a_shard_of_a_hub_data_set_ends_where_it_is_damaged_and_a_resume_sees_the_same(tmp_path, monkeypatch, caplog):
    (tmp_path / "rows").mkdir()
    hurt = damaged_parquet(tmp_path / "rows", SHARDS)
    source, pauses = HubSource(kind="hub", path=str(tmp_path / "rows"), streaming=True, shuffle_window=4), list[float]()
    monkeypatch.setattr(shards.time, "sleep", pauses.append)

    def ids(stream: Stream, count: int) -> list[str]:
        return [re.findall(r"id\d\d", item.name)[-1] for item in itertools.islice(stream, count)]

    stream = Stream(source, 0)
    epochs = [ids(stream, 24) for _ in range(2)]
    assert [set(epoch) for epoch in epochs] == [WHOLE] * 2
    assert pauses == [1.0, 5.0]  # tried again in the first epoch, known in the second
    notes = [record.message for record in caplog.records if "not read to its end" in record.message]
    assert len(notes) == 1
    assert hurt.name in notes[0]
    state = json.loads(json.dumps(stream.state_dict()))
    for seen in (5, 17):
        first = Stream(source, 0)
        start = ids(first, seen)
        resumed = Stream(source, 0)
        resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert start + ids(resumed, 24 - seen) == epochs[0]
    resumed = Stream(source, 0)
    resumed.load_state_dict(state)
    assert ids(resumed, 24) == ids(stream, 24)


def test_what_was_only_cut_off_on_the_way_is_whole_the_next_time_and_a_networks_error_is_no_damage(tmp_path, monkeypatch):
    pauses: list[float] = []
    monkeypatch.setattr(shards.time, "sleep", pauses.append)
    errors: list[Exception] = [ValueError("half a page"), OSError("Corrupt snappy compressed data.")]

    def generate(files):
        yield from enumerate("ab")
        if errors:
            raise errors.pop(0)
        yield 2, "c"

    patient = shards._Patient(generate)
    assert [row for _, row in patient(files=["a"])] == ["a", "b", "c"]
    assert pauses == [1.0, 5.0]

    class Refused(HfHubHTTPError):
        def __init__(self) -> None:
            """Without a response, which each release of the client wants from another library."""

    for error in (ConnectionError("gone"), TimeoutError(), OSError(5, "Input/output error"), Refused()):
        errors.append(error)
        with pytest.raises(type(error)):
            list(patient(files=["a"]))
    assert len(pauses) == 2


STREAM = """
import re, os, itertools, logging
import datasets
datasets.config.HF_ENDPOINT = os.environ["HF_ENDPOINT"]  # it is read once
from sslsr_diffusion.data import shards
from sslsr_diffusion.data.sample_order import Stream
from sslsr_diffusion.data.settings import HubSource
shards.time.sleep = lambda seconds: print("pause", seconds)
logging.basicConfig()
stream = Stream(HubSource(kind="hub", path="someone/photos", streaming=True, shuffle_window=4), 0)
ids = [re.findall(r"id\\d\\d", item.name)[-1] for item in itertools.islice(stream, 48)]
print(sorted(ids[:24]) == sorted(ids[24:]), sorted(ids[:24]))
"""


def test_a_damaged_shard_on_the_hub(tmp_path):
    """In a process of its own: the client reads HF_ENDPOINT once."""
    (tmp_path / "made").mkdir()
    hurt = damaged_parquet(tmp_path / "made", SHARDS)
    with HubServer() as hub:
        files = {f"data/{path.name}": path.read_bytes() for path in (tmp_path / "made").iterdir()}
        hub.put("someone/photos", "1a" * 20, files)
        own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0"}
        done = forks.python("-c", STREAM, cwd=tmp_path, path=[ROOT], environment=own)
    assert done.stdout.splitlines() == ["pause 1.0", "pause 5.0", f"True {sorted(WHOLE)}"], done.stderr[-3000:]
    assert done.stderr.count(f"data/{hurt.name}: not read to its end, it is damaged") == 1


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
