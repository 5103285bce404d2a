"""Which samples come next: of which source, which row of a stream, in which order of the pair pool. All in the main process.

Sources and pool are functions of the seed and the sample's number. Streams only go forward: they are read here, as encoded bytes, and the
workers decode. So any number of workers sees the same samples, and a state is one position. Each process reads its own part of a stream
(`split_dataset_by_node`: whole shards where they divide evenly, else every n-th row).
"""

import copy
import inspect
import logging
import time
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, TypedDict, TypeGuard

import numpy as np
import torch

from sslsr_diffusion.data.samples import Request
from sslsr_diffusion.data.settings import RowSource, Source
from sslsr_diffusion.data.shards import PAUSES, reason
from sslsr_diffusion.data.sources import Columns, Item, Row, load_rows, row_item
from sslsr_diffusion.errors import UserError
from sslsr_diffusion.seeding import derive_seed

if TYPE_CHECKING:
    from datasets import IterableDataset

log = logging.getLogger(__name__)
_BLOCK = 4096  # samples whose sources are drawn at once


class SourceOrder:
    """Draws a source for every sample by weight and counts: `at(n)` is (source, samples of that source before n)."""

    def __init__(self, weights: list[float], seed: int) -> None:
        self._shares = np.array(weights) / sum(weights)
        self._seed = seed
        self._starts = [np.zeros(len(weights), dtype=np.int64)]  # counts before each block
        self._block: tuple[int, np.ndarray, np.ndarray] | None = None

    def at(self, index: int) -> tuple[int, int]:
        if len(self._shares) == 1:
            return 0, index
        number, place = divmod(index, _BLOCK)
        if self._block is None or self._block[0] != number:
            self._block = (number, *self._ordinals(number))
        return int(self._block[1][place]), int(self._block[2][place])

    def _choices(self, number: int) -> np.ndarray:
        random = np.random.default_rng(derive_seed(self._seed, "sources", number))
        return random.choice(len(self._shares), size=_BLOCK, p=self._shares)

    def _ordinals(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        count = len(self._shares)
        while len(self._starts) <= number:
            self._starts.append(self._starts[-1] + np.bincount(self._choices(len(self._starts) - 1), minlength=count))
        choices = self._choices(number)
        ordinals = np.empty(_BLOCK, dtype=np.int64)
        for source in range(count):
            mine = choices == source
            ordinals[mine] = self._starts[number][source] + np.arange(mine.sum())
        return choices, ordinals


class PairPool:
    """The pair pool as an order of sample indices: the pictures themselves are made when they are handed out.

    Until the pool is full, batches pass through and are remembered. Then each new batch takes the place of one drawn at random.
    """

    def __init__(self, size: int, seed: int) -> None:
        self._size, self._seed = size, seed
        self.indices: list[int] = []

    def exchange(self, batch: list[int], number: int) -> list[int]:
        if len(self.indices) < self._size:
            self.indices.extend(batch)
            return batch
        generator = torch.Generator().manual_seed(derive_seed(self._seed, number))
        shuffled = [self.indices[i] for i in torch.randperm(self._size, generator=generator).tolist()]
        self.indices = batch + shuffled[len(batch) :]
        return shuffled[: len(batch)]


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
        self._label = f"{settings.kind} source {settings.path!r}"

    def __iter__(self) -> "Stream":
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
                raise UserError(f"{self._label}: the stream has no rows for process {self._place[0]}.")
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
        pauses = iter(PAUSES)
        while True:
            try:
                return self._rows_of_window()
            except Exception as error:  # network, decompression and parsing libraries raise errors of their own
                pause = next(pauses, None)
                if pause is None:
                    where = f"after row {self._seen} of epoch {self._epoch} of process {self._place[0]} ({reason(error)})"
                    raise UserError(f"{self._label}: the stream breaks off {where}; mend that file and resume.") from error
                log.warning("%s: %s; reading it again in %g seconds", self._settings.path, reason(error), pause)
            time.sleep(pause)
            self._open(self._epoch, self._seen, self._start)

    def _rows_of_window(self) -> list[Item]:
        assert self._iterator is not None
        columns, rows = Columns.of(self._settings), list[Item]()
        for row in self._iterator:
            rows.append(row_item(f"{self._settings.path}[{self._seen + len(rows)}]", row, columns))
            if len(rows) == self._settings.shuffle_window:
                break
        return rows


class LoaderState(TypedDict, total=False):
    batch: int
    lengths: list[int | None]
    pool: list[int]
    streams: dict[str, StreamState]


class Requests:
    """The order of everything, in the main process alone: an endless iterator of micro-batches of requests.

    After each batch it notes its state, because the workers run ahead of what training has seen.
    """

    def __init__(
        self, order: SourceOrder, streams: dict[int, Stream], pool: PairPool | None, place: tuple[int, int, int], lengths: list[int | None]
    ) -> None:
        self._order, self._streams, self._pool, self._lengths = order, streams, pool, lengths
        self._rank, self._world, self._size = place
        self.lost = [text for stream in streams.values() for text in stream.lost]
        self.batch = 0
        self.marks: deque[LoaderState] = deque()

    def __iter__(self) -> Iterator[list[Request]]:
        while True:
            group = self.batch * self._world + self._rank
            places = list(range(group * self._size, (group + 1) * self._size))
            indices = places if self._pool is None else self._pool.exchange(places, self.batch)
            requests = [self._request(index, place) for index, place in zip(indices, places)]
            self.batch += 1
            self.marks.append(self.state_dict())
            yield requests

    def _request(self, index: int, place: int) -> Request:
        source, ordinal = self._order.at(index)
        item = next(self._streams[source]) if source in self._streams else None
        return Request(index, place, index // self._size, source, ordinal, item)

    def state_dict(self) -> LoaderState:
        state: LoaderState = {"batch": self.batch, "lengths": self._lengths}
        if self._pool is not None:
            state["pool"] = list(self._pool.indices)
        if self._streams:
            state["streams"] = {str(k): stream.state_dict() for k, stream in self._streams.items()}
        return state

    def load_state_dict(self, state: LoaderState) -> None:
        self.batch = int(state["batch"])
        if self._pool is not None:
            self._pool.indices = list(state.get("pool", []))
        for key, stream_state in state.get("streams", {}).items():
            if int(key) in self._streams:
                self._streams[int(key)].load_state_dict(stream_state)
