"""Sources that only go forward. They are read in the main process, as encoded bytes; the workers decode.

So any number of workers sees the same samples, and a state is one position. Each process reads its own part
(`split_dataset_by_node`: whole shards where they divide evenly, else every n-th row).
"""

from __future__ import annotations

import copy
import inspect
import logging
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, TypedDict, TypeGuard

import torch

from sslsr_diffusion.data.settings import RowSource, Source
from sslsr_diffusion.data.sources import Columns, Item, Row, load_rows, reason, row_item
from sslsr_diffusion.errors import UserError
from sslsr_diffusion.seeding import derive_seed

if TYPE_CHECKING:
    from datasets import IterableDataset

log = logging.getLogger(__name__)
_PAUSES = (1.0, 5.0)  # seconds before the second and third attempt


class StreamState(TypedDict):
    """Where a stream stands: its epoch, the rows before the window, those used of it, and the library's own state at its start."""

    epoch: int
    row: int
    used: int
    stream: dict[str, object] | None


def is_stream(settings: Source) -> TypeGuard[RowSource]:
    return bool(getattr(settings, "streaming", False))


class Stream:
    """An endless, resumable iterator of items: shards in an order per epoch, rows shuffled within windows.

    A window is read, then handed out in random order. The state is the stream's state at the window's start and the place in it,
    so a resume reads one window again and goes on exactly there.
    """

    def __init__(self, settings: RowSource, seed: int, rank: int = 0, world_size: int = 1) -> None:
        self._settings, self._seed, self._place = settings, derive_seed(seed, "stream", settings.path), (rank, world_size)
        self._rows, self.lost = load_rows(settings, streaming=True)
        self._epoch, self._used, self._seen = 0, 0, 0
        self._start: dict[str, object] | None = None
        self._window: list[Item] = []
        self._iterator: Iterator[Row] | None = None
        self._dataset: IterableDataset = None
        self.name = settings.path

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Item:
        if self._used >= len(self._window):
            self._next_window()
        self._used += 1
        return self._window[self._used - 1]

    def state_dict(self) -> StreamState:
        return {"epoch": self._epoch, "row": self._seen, "used": self._used, "stream": self._start}

    def load_state_dict(self, state: StreamState) -> None:
        self._open(state["epoch"], state["row"], state["stream"])
        self._window, self._used = [], 0
        if state["used"]:
            self._read_window()
            self._used = state["used"]

    def _open(self, epoch: int, row: int, state: dict[str, object] | None) -> None:
        from datasets.distributed import split_dataset_by_node

        rank, world_size = self._place
        options = {"seed": derive_seed(self._seed, epoch) % 2**32, "buffer_size": 1}  # the order of shards alone
        if "max_buffer_input_shards" in inspect.signature(self._rows.shuffle).parameters:
            options["max_buffer_input_shards"] = 1  # newer releases else mix shards in threads, and sleep at the end of each epoch
        shuffled = self._rows.shuffle(**options)
        self._dataset = split_dataset_by_node(shuffled, rank=rank, world_size=world_size)
        if state is not None:
            self._dataset.load_state_dict(copy.deepcopy(state))
        self._epoch, self._seen, self._iterator = epoch, row, iter(self._dataset)

    def _next_window(self) -> None:
        if self._iterator is None:
            self._open(0, 0, None)
        self._seen += len(self._window)
        self._read_window()
        if not self._window:
            if self._seen == 0:
                raise UserError(f"{self._settings.kind} source {self.name!r}: the stream has no rows for process {self._place[0]}.")
            self._open(self._epoch + 1, 0, None)
            self._read_window()

    def _read_window(self) -> None:
        assert self._iterator is not None
        self._start = copy.deepcopy(self._dataset.state_dict())
        rows = self._patiently()
        generator = torch.Generator().manual_seed(derive_seed(self._seed, "window", self._epoch, self._seen))
        self._window = [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
        self._used = 0

    def _patiently(self) -> list[Item]:
        """The next rows; what stands behind a stream is often a network, so a failure is met by reading the window again."""
        for pause in _PAUSES:
            try:
                return self._rows_of_window()
            except Exception as error:  # network, decompression and parsing libraries raise errors of their own
                log.warning("%s: %s; reading it again in %g seconds", self.name, reason(error), pause)
            time.sleep(pause)
            self._open(self._epoch, self._seen, self._start)
        try:
            return self._rows_of_window()
        except Exception as error:
            where = f"{self._settings.kind} source {self.name!r}: the stream breaks off after row {self._seen} of epoch {self._epoch}"
            raise UserError(f"{where} of process {self._place[0]} ({reason(error)}); mend that file and resume.") from error

    def _rows_of_window(self) -> list[Item]:
        assert self._iterator is not None
        columns, rows = Columns.of(self._settings), list[Item]()
        for row in self._iterator:
            rows.append(row_item(f"{self.name}[{self._seen + len(rows)}]", row, columns))
            if len(rows) == self._settings.shuffle_window:
                break
        return rows
