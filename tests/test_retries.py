"""What fails while samples are made: storage that hiccups, pictures that are gone or damaged, workers that are killed."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest
from data_samples import from_folder, open_small, picture, same, take
from PIL import Image

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.images import UnreadableImage


@pytest.fixture
def folder(tmp_path) -> Path:
    for i in range(7):
        Image.fromarray(picture((70 + 3 * i, 90 - 2 * i), i)).save(tmp_path / f"p{i}.png")
    return tmp_path


class Storage:
    """`read_image` whose storage fails on demand, and a clock that the test turns."""

    def __init__(self, monkeypatch) -> None:
        from sslsr_diffusion.data import samples

        self.failures: list[Exception] = []  # raised by the next reads of `name`
        self.name, self.reads, self.now, self.pauses = "", 0, 0.0, list[float]()
        self._read = samples.read_image
        monkeypatch.setattr(samples, "read_image", self.read)
        monkeypatch.setattr(samples.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(samples.time, "sleep", self.pauses.append)

    def read(self, source, *, name):
        if Path(name).name == self.name:
            self.reads += 1
            if self.failures:
                try:
                    raise self.failures.pop(0)
                except OSError as error:
                    raise UnreadableImage(f"{name}: cannot be read.") from error
        return self._read(source, name=name)


def test_a_hiccup_of_the_storage_changes_no_sample(folder, monkeypatch):
    wanted = take(open_small(from_folder(folder)), 4)
    storage = Storage(monkeypatch)
    storage.name, storage.failures = Path(wanted[0].names[1]).name, [OSError(errno.EIO, "io"), OSError(errno.ESTALE, "stale")]
    loader = open_small(from_folder(folder))
    assert same(take(loader, 4), wanted)
    assert storage.pauses == [0.5, 2.0]
    assert loader.problems() == []


def test_a_picture_that_was_away_comes_back_and_a_damaged_one_is_not_read_again(folder, monkeypatch):
    storage = Storage(monkeypatch)
    storage.name, storage.failures = "p2.png", [FileNotFoundError(errno.ENOENT, "gone")] * 2
    loader = open_small(from_folder(folder), batch_size=7)

    def has_it() -> bool:
        return any(Path(name).name == "p2.png" for name in next(loader).names)

    assert [has_it(), has_it(), storage.reads] == [False, False, 1]  # an epoch each; not asked for again at once
    storage.now = 31
    assert [has_it(), has_it(), storage.reads] == [False, False, 2]
    storage.now = 31 + 59
    assert [has_it(), storage.reads] == [False, 2]  # the wait has doubled
    storage.now = 31 + 61
    assert [has_it(), has_it(), storage.reads] == [True, True, 4]
    assert storage.pauses == []  # a file that is not there is no hiccup
    storage.failures = [OSError("image file is truncated")]
    assert [has_it(), storage.reads] == [False, 5]
    storage.now = 1e6
    assert [has_it(), has_it(), storage.reads] == [False, False, 5]


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_left_is_said(tmp_path, workers):
    (tmp_path / "a.png").write_bytes(b"no")
    loader = open_small(from_folder(tmp_path, workers=workers))
    with pytest.raises(UserError, match=r"nothing is left to train on, all 1 pictures") as caught:
        next(loader)
    assert "Traceback" not in str(caught.value)
    loader.close()


def test_a_killed_worker_is_told_in_one_sentence(folder):
    loader = open_small(from_folder(folder, workers=1, prefetch=1))
    next(loader)
    os.kill(loader._batches._workers[0].pid, signal.SIGKILL)
    with pytest.raises(UserError, match=r"ended from outside, .* lower data\.workers or data\.prefetch and resume"):
        take(loader, 5)  # some batches may have been made before


def test_a_fault_of_the_code_in_a_worker_is_not_taken_for_a_killed_one(folder, monkeypatch):
    loader = open_small(from_folder(folder, workers=1))

    def broken(*_):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(loader._maker, "make", broken)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        next(loader)
    loader.close()
