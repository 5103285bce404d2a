"""Which source gives sample n, and the pair pool's order of samples: both functions of the seed and n."""

from __future__ import annotations

import numpy as np
import torch

from sslsr_diffusion.seeding import derive_seed

_BLOCK = 4096


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
