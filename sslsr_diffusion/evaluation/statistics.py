"""Means with bootstrap intervals over the images, and paired differences between two columns."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
LEAST = 5  # of fewer images a bootstrap says almost nothing: two of the same sign would always be "beyond chance"


@dataclass(frozen=True)
class Mean:
    """Mean over the images that have a number, and its 95 % bootstrap interval (nan for fewer than LEAST images)."""

    mean: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Difference(Mean):
    """Second column minus first over the same images; `better` counts the images on which the second column is better."""

    better: int


def mean_with_interval(values: NDArray[np.float64]) -> Mean:
    """Percentile bootstrap of the mean, 10 000 resamples, always the same random numbers   (Efron 1979)."""
    values = values[~np.isnan(values)]
    low = high = math.nan
    if len(values) >= LEAST and np.isfinite(values).all():
        rng = np.random.default_rng(0)
        means = [values[rng.integers(0, len(values), (100, len(values)))].mean(axis=1) for _ in range(RESAMPLES // 100)]
        low, high = (float(end) for end in np.percentile(np.concatenate(means), [2.5, 97.5]))
    return Mean(float(values.mean()) if len(values) else math.nan, low, high, len(values))


def difference(first: NDArray[np.float64], second: NDArray[np.float64], *, higher_is_better: bool) -> Difference:
    """Mean of second - first over the images that have both numbers, with its interval."""
    with np.errstate(invalid="ignore"):
        change = second - first  # two infinite PSNRs: nan, left out
    better = int(((change > 0) if higher_is_better else (change < 0)).sum())
    return Difference(**vars(mean_with_interval(change)), better=better)
