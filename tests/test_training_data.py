"""The training loader: the same samples for any number of workers and processes, exact resume, bad files, crops."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from data_samples import from_folder, open_small, picture, same, settings, take, write_photos
from PIL import Image

from sslsr_diffusion.config import RecipeError, parse
from sslsr_diffusion.data import DataSettings, open_validation_pairs
from sslsr_diffusion.data.sample_order import PairPool, SourceOrder
from sslsr_diffusion.errors import UserError
from sslsr_diffusion.ops.edge_mask import laplacian_edge_mask


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture
def bad_folder(folder, tmp_path) -> Path:
    for i, path in enumerate(sorted(folder.rglob("*.png"))[:3]):
        (tmp_path / f"good{i}.png").write_bytes(path.read_bytes())
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "cut.png").write_bytes(sorted(folder.rglob("*.png"))[0].read_bytes()[:300])
    (tmp_path / "text.jpg").write_text("no picture")
    Image.fromarray(picture((20, 100), 9)).save(tmp_path / "small.png")
    return tmp_path


def test_batches_have_the_promised_form(folder):
    loader = open_small(from_folder(folder))
    batch = next(loader)
    assert batch.hr.shape == (2, 3, 64, 64)
    assert batch.lr.shape == (2, 3, 16, 16)
    assert batch.mask.shape == (2, 1, 64, 64)
    assert batch.mask.dtype == torch.bool
    assert batch.hr.dtype == batch.lr.dtype == torch.float32
    assert 0 <= batch.lr.min() <= batch.lr.max() <= 1
    assert torch.equal(batch.mask, laplacian_edge_mask(batch.hr))
    assert batch.index.tolist() == [0, 1]
    assert all(name.endswith(".png") for name in batch.names)


def test_an_epoch_is_every_picture_once_and_epochs_differ(folder):
    names = [name for batch in take(open_small(from_folder(folder), batch_size=7), 3) for name in batch.names]
    epochs = [names[i : i + 7] for i in (0, 7, 14)]
    assert all(len(set(epoch)) == 7 for epoch in epochs)
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_any_number_of_workers_gives_the_same_samples(folder, start_method):
    wanted = take(open_small(from_folder(folder)), 4)
    loader = open_small(from_folder(folder, workers=2, start_method=start_method))
    assert same(take(loader, 4), wanted)
    loader.close()


def test_processes_see_what_one_process_sees(folder):
    whole = take(open_small(from_folder(folder), batch_size=4), 3)
    parts = [take(open_small(from_folder(folder), rank=rank, world_size=2), 3) for rank in range(2)]
    for m in range(3):
        assert torch.equal(torch.cat([parts[0][m].lr, parts[1][m].lr]), whole[m].lr)
        assert parts[0][m].names + parts[1][m].names == whole[m].names


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_signals_to_the_whole_group_leave_the_workers_at_work(folder, start_method):
    """Schedulers signal every process of a job; the training process must still finish its step. A second SIGTERM ends a worker."""
    wanted = take(open_small(from_folder(folder)), 12)
    others = set(multiprocessing.active_children())
    loader = open_small(from_folder(folder, workers=2, start_method=start_method))
    got = take(loader, 2)  # one of each worker
    workers = [process for process in multiprocessing.active_children() if process not in others]
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker.pid, signal.SIGTERM)
        os.kill(worker.pid, signal.SIGINT)
    assert same(got + take(loader, 10), wanted)
    os.kill(workers[0].pid, signal.SIGTERM)
    workers[0].join(10)
    assert workers[0].exitcode == 0
    with pytest.raises(UserError, match="was ended from outside"):
        take(loader, 20)
    loader.close()
    for worker in workers:
        worker.join(10)


def test_a_worker_whose_grace_is_over_ends_without_a_noise(folder, monkeypatch):
    """An exit code other than 0 would interrupt the training process wherever it is, while it writes its checkpoint for example."""
    monkeypatch.setattr("sslsr_diffusion.data.loader._GRACE", 1)
    loader = open_small(from_folder(folder, workers=1, start_method="fork"))
    others = set(multiprocessing.active_children())
    take(loader, 1)
    (worker,) = set(multiprocessing.active_children()) - others
    os.kill(worker.pid, signal.SIGTERM)
    worker.join(10)
    assert worker.exitcode == 0
    time.sleep(0.1)  # nothing is raised here
    with pytest.raises(UserError, match="was ended from outside"):
        take(loader, 20)
    loader.close()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("pool", [0, 4])
def test_resume_goes_on_exactly(folder, workers, pool):
    data = from_folder(folder, workers=workers, degradation={"pool_size": pool})
    loader = open_small(data)
    take(loader, 3)
    state = json.loads(json.dumps(loader.state_dict()))
    after = take(loader, 5)
    resumed = open_small(data, state=state)
    assert same(take(resumed, 5), after)
    loader.close()
    resumed.close()


def test_closing_and_going_on(folder):
    wanted = take(open_small(from_folder(folder)), 4)
    loader = open_small(from_folder(folder, workers=1))
    first = take(loader, 2)
    loader.close()
    assert same(first + take(loader, 2), wanted)
    loader.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_files_are_replaced_named_and_counted(bad_folder, workers):
    loader = open_small(from_folder(bad_folder, workers=workers, small_images="skip"))
    batches = take(loader, 12)
    loader.close()
    assert {Path(name).name for batch in batches for name in batch.names} == {"good0.png", "good1.png", "good2.png"}
    problems = "\n".join(loader.problems())
    for name in ("empty.png", "cut.png", "text.jpg", "small.png: 100x20 pixels are less than the crop of 64, left out"):
        assert name in problems
    assert "times)" in problems
    assert same(batches, take(open_small(from_folder(bad_folder, small_images="skip")), 12))


def test_small_pictures_are_reflected_by_default(bad_folder):
    (bad_folder / "tiny.png").unlink(missing_ok=True)
    Image.fromarray(picture((1, 2), 1)).save(bad_folder / "tiny.png")
    loader = open_small(from_folder(bad_folder))
    names = {Path(name).name for batch in take(loader, 12) for name in batch.names}
    assert {"small.png", "tiny.png"} <= names
    assert any("small.png" in text and "reflected" in text for text in loader.problems())


def test_sources_without_a_picture(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no")
    (tmp_path / "a.png").unlink()
    with pytest.raises(UserError, match="expected pictures, found none"):
        open_small(from_folder(tmp_path))
    with pytest.raises(UserError, match="nothing there"):
        open_small(from_folder(tmp_path / "missing"))
    with pytest.raises(UserError, match="at least one source"):
        open_small(settings())


def test_sizes_that_cannot_work(folder):
    with pytest.raises(UserError, match="multiple of the scale 4, got 66"):
        open_small(from_folder(folder), crop_size=66)
    with pytest.raises(UserError, match="from 1 to 8, got 9"):
        open_small(from_folder(folder), scale=9)
    with pytest.raises(UserError, match="multiple of the batch of 2, got 5"):
        open_small(from_folder(folder, degradation={"pool_size": 5}))


def test_the_degradation_runs_after_loading_on_request(folder):
    wanted = take(open_small(from_folder(folder)), 2)
    assert same(take(open_small(from_folder(folder, degradation={"device": "training"}), device=torch.device("cpu")), 2), wanted)


def test_flips_and_transposes(folder):
    straight = take(open_small(from_folder(folder, crop={"hflip": False})), 8)
    turned = take(open_small(from_folder(folder, crop={"hflip": True, "rotate": True})), 8)
    seen = set()
    for a, b in zip(torch.cat([x.hr for x in straight]), torch.cat([x.hr for x in turned])):
        for v, h, t in itertools.product((False, True), repeat=3):
            c = a.flip(2) if h else a
            c = c.flip(1) if v else c
            if torch.equal(c.transpose(1, 2) if t else c, b):
                seen.add((v, h, t))
    assert len(seen) >= 5  # 16 draws of 8 kinds


def test_edge_aware_crops_have_more_edges(tmp_path):
    pixels = np.full((300, 300, 3), 128, np.uint8)
    pixels[20:60:4, 20:60] = 0
    Image.fromarray(pixels).save(tmp_path / "a.png")
    share = {}
    for kind in ("random", "edge_aware"):
        batches = take(open_small(from_folder(tmp_path, crop={"kind": kind}, degradation={"preset": "bicubic"})), 30)
        share[kind] = sum(bool(m.any()) for b in batches for m in b.mask) / 60
    assert share["edge_aware"] > 2 * share["random"] > 0


def test_weights_and_exact_coverage():
    order = SourceOrder([3.0, 1.0], seed=0)
    places = [order.at(n) for n in range(10_000)]
    assert sum(source for source, _ in places) == pytest.approx(2500, abs=250)
    for source in (0, 1):
        assert [ordinal for s, ordinal in places if s == source] == list(range(sum(s == source for s, _ in places)))
    again = SourceOrder([3.0, 1.0], seed=0)
    assert [again.at(n) for n in (9_999, 5_000, 3)] == [places[n] for n in (9_999, 5_000, 3)]


def test_two_sources_are_mixed(folder, tmp_path):
    Image.fromarray(picture((80, 80), 1)).save(tmp_path / "other.png")
    data = settings({"kind": "folder", "path": str(folder), "weight": 3}, {"kind": "folder", "path": str(tmp_path)})
    names = [Path(name).name for batch in take(open_small(data, batch_size=10), 12) for name in batch.names]
    assert 15 <= names.count("other.png") <= 45  # 30 expected, sd 4.7


def test_pool_hands_out_every_sample_and_mixes_batches():
    pool = PairPool(6, seed=0)
    batches = [list(range(2 * m, 2 * m + 2)) for m in range(40)]
    out = [pool.exchange(batch, m) for m, batch in enumerate(batches)]
    assert out[:3] == batches[:3]
    later = [i for batch in out[3:] for i in batch]
    assert len(set(later)) == len(later)  # each leaves once
    assert sorted(later + pool.indices) == list(range(80))
    assert any(abs(a - b) > 2 for a, b in out[3:])


def test_pool_samples_equal_the_plain_ones_except_for_shared_draws(folder):
    batches = take(open_small(from_folder(folder, degradation={"pool_size": 4})), 6)
    plain = torch.cat([b.hr for b in take(open_small(from_folder(folder)), 6)])
    found = [next(i for i, hr in enumerate(plain) if torch.equal(hr, mine)) for batch in batches for mine in batch.hr]
    assert len(set(found)) < len(found)  # those that filled the pool come again,
    assert torch.cat([batch.index for batch in batches]).tolist() == list(range(12))  # with another index, and so with other noise


def test_validation_pairs(folder):
    data = parse(DataSettings, {"validation": [{"kind": "folder", "path": str(folder)}]})
    pairs = open_validation_pairs(data, crop_size=64, scale=4, seed=0, limit=3)
    assert len(pairs) == 3
    assert all(p.hr.shape == (3, 64, 64) and p.lr.shape == (3, 16, 16) for p in pairs)
    again = open_validation_pairs(data, crop_size=64, scale=4, seed=0, limit=2)
    assert torch.equal(pairs[1].lr, again[1].lr)
    assert not torch.equal(pairs[1].lr, open_validation_pairs(data, crop_size=64, scale=4, seed=1, limit=2)[1].lr)
    large = open_validation_pairs(data, crop_size=512, scale=4, seed=0, limit=1)[0]
    assert large.hr.shape[1] == large.lr.shape[1] * 4
    assert open_validation_pairs(DataSettings(), crop_size=64, scale=4, seed=0, limit=3) == []


def test_validation_without_one_good_picture_is_said(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no")
    data = parse(DataSettings, {"validation": [{"kind": "folder", "path": str(tmp_path)}]})
    with pytest.raises(UserError, match=r"no usable picture; the last: .*a\.png"):
        open_validation_pairs(data, crop_size=64, scale=4, seed=0, limit=3)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"sources": [{"kind": "foldr", "path": "x"}]}, "did you mean folder"),
        ({"sources": [{"kind": "folder", "path": "x", "weigth": 2}]}, "did you mean"),
        ({"sources": [{"kind": "folder", "path": "x", "weight": 0}]}, "weight"),
        ({"mask": {"kind": "files"}}, "exactly when kind is files"),
        ({"mask": {"kind": "laplace"}}, "did you mean laplacian"),
        (
            {"sources": [{"kind": "hub", "path": "x", "streaming": True}], "degradation": {"pool_size": 4}},
            "cannot be resumed with a stream",
        ),
    ],
)
def test_mistakes_are_explained(raw, message):
    with pytest.raises(RecipeError, match=message):
        parse(DataSettings, raw)


def test_workers_start_after_opencv_has_used_threads(folder):
    """OpenCV's thread pool does not survive a fork: a worker would hang at its first call."""
    import cv2

    cv2.setNumThreads(2)
    cv2.GaussianBlur(np.zeros((2000, 2000, 3), np.float32), (31, 31), 0)
    loader = open_small(from_folder(folder, workers=1, start_method="fork"))
    assert next(loader).hr.shape == (2, 3, 64, 64)
    loader.close()
