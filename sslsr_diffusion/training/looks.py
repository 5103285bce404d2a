"""What the looks at held-out pictures have found so far, whether they still find anything new, and what the run was worth."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite

import numpy as np

from sslsr_diffusion.evaluation.statistics import LEAST, difference

Values = Sequence[float | None]  # of one metric, picture by picture; None where it has no number


@dataclass
class Looks:
    """The record of a run's validation passes; every checkpoint keeps it, every process has the same.

    The reference is the first look, and from then on each look that is better than it by more than its noise. So a gain that
    is too small for one look counts when it has grown.
    """

    base: dict[str, float] = field(default_factory=dict)  # means by metric, before the first step
    newest: int | None = None  # step of the newest look
    reference: list[float | None] = field(default_factory=list)  # its values of validation.best
    reference_step: int | None = None
    since: int = 0  # looks after it

    def add(self, step: int, means: Mapping[str, float | None], values: Values, *, higher_is_better: bool) -> None:
        """One more look: its means by metric, and its values of `validation.best`."""
        self.newest = step
        if step == 0:
            self.base = {metric: mean for metric, mean in means.items() if mean is not None and isfinite(mean)}
        comparable = sum(value is not None for value in self.reference) >= LEAST
        if comparable and not better_by_more_than_noise(self.reference, values, higher_is_better=higher_is_better):
            self.since += 1
        else:
            self.reference, self.reference_step, self.since = list(values), step, 0

    def worn_out(self, patience: int | None, metric: str) -> str | None:
        """Why the run need not go on, by `validation.patience`; None while it should."""
        if patience is None or self.since < patience:
            return None
        pictures = sum(value is not None for value in self.reference)
        since = "the first step" if self.reference_step == 0 else f"step {self.reference_step}"
        return f"{metric} has not improved by more than the noise of its {pictures} pictures in {self.since} looks, since {since}"

    def verdict(self, metric: str, best_step: int | None) -> str | None:
        """A sentence about a run that is no better than what it started from; None where it is, or where that is not known."""
        start = self.base.get(metric)
        if start is None or not self.newest:
            return None
        said = f"by {metric} ({start:.4g} before the first step) this run is no better than what it started from"
        if best_step == 0:
            return said
        return f"{said}, or by no more than its noise" if self.reference_step == 0 else None


def better_by_more_than_noise(before: Values, now: Values, *, higher_is_better: bool) -> bool:
    """Whether the 95 % interval of now - before, paired by picture, lies wholly on the better side of zero.

    False where fewer than `LEAST` pictures have both numbers: there is no interval.
    """
    first, second = (np.array(values, dtype=np.float64) for values in (before, now))  # None becomes nan
    found = difference(first, second, higher_is_better=higher_is_better)
    return found.low > 0 if higher_is_better else found.high < 0
