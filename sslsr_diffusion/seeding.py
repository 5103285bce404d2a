"""Randomness as a function of (seed, sample index, purpose): the same on one process or eight, before or after a resume."""

import contextlib
import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive_seed(seed: int, *keys: int | str) -> int:
    """A 63-bit seed that depends on every key, in order, and on nothing else.

    >>> derive_seed(42, 7, "crop") == derive_seed(42, 7, "crop") != derive_seed(42, 7, "noise")
    True
    """
    text = "\x1f".join(str(k) for k in (seed, *keys))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def sample_generator(seed: int, *keys: int | str) -> "torch.Generator":
    """A CPU generator for one purpose of one sample, e.g. sample_generator(seed, index, "degradation").

    Draw on the CPU and move the result, so that every device sees the same numbers.
    """
    import torch

    return torch.Generator().manual_seed(derive_seed(seed, *keys))


@contextlib.contextmanager
def seeded(seed: int, *, meta: bool = False) -> Iterator[None]:
    """Around the building of layers: their weights follow from the seed alone, and the caller's random stream is left as it was.

    With `meta` they are on the meta device: shapes alone.
    """
    import torch

    with torch.random.fork_rng(devices=[]), torch.device("meta" if meta else "cpu"):
        torch.manual_seed(seed)
        yield
