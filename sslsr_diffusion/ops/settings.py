"""What every backend of the operator is told, besides its tensors; and what goes wrong when one is asked for by name."""

import math
from typing import NamedTuple, overload

import torch
from torch import Tensor


class BackendUnavailable(RuntimeError):
    """A backend named explicitly cannot run here; the message says why and what to do. There is never a silent fallback."""


class GraphSettings(NamedTuple):
    """How a graph is drawn; already checked."""

    search: int
    window: int
    sigma: float
    normalize: bool

    @property
    def reach(self) -> int:
        return self.search // 2

    @property
    def half(self) -> int:
        return self.window // 2

    def kappa(self, channels: int) -> float:
        """A distance falls by 1 / e per kappa."""
        return channels * self.window**2 * self.sigma

    @overload
    def per_entry(self, rows: float) -> float: ...
    @overload
    def per_entry(self, rows: Tensor) -> Tensor: ...
    def per_entry(self, rows: float | Tensor) -> float | Tensor:
        """What sums over the rows' entries are multiplied with to become means, of the type of rows; 0 where there are no rows.

        NaN where `rows` is no number of rows, so that a failed reduction does not turn the loss off without a word.
        """
        if isinstance(rows, Tensor):
            share = torch.where(rows == 0, 0, 1 / (rows * self.search**2))
            return torch.where((rows >= 0) & (rows < math.inf), share, math.nan)
        if not 0 <= rows < math.inf:
            return math.nan
        return 1 / (rows * self.search**2) if rows else 0.0
