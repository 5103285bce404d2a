from __future__ import annotations

import math

import numpy as np
import pytest

from sslsr_diffusion.evaluation.statistics import difference, mean_with_interval


def test_the_interval_is_that_of_the_mean():
    values = np.random.default_rng(1).normal(30, 2, 200)
    found = mean_with_interval(values)
    half = 1.96 * values.std(ddof=1) / math.sqrt(len(values))
    # the bootstrap's own scatter with 10 000 resamples is about 1.5 % of the half width; 5 % leaves room for the percentiles' skew
    assert found.low == pytest.approx(values.mean() - half, abs=0.05 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.05 * half)
    assert found == mean_with_interval(values)


def test_missing_values_are_left_out_and_counted():
    found = mean_with_interval(np.array([1.0, np.nan, 3.0]))
    assert (found.mean, found.count) == (2.0, 2)
    assert math.isnan(mean_with_interval(np.array([np.nan])).mean)


def test_a_few_images_have_a_mean_and_no_interval():
    """Two images of one sign would span an interval without 0 every other time."""
    few, enough = mean_with_interval(np.arange(1.0, 5.0)), mean_with_interval(np.arange(1.0, 6.0))
    assert (few.mean, few.count) == (2.5, 4)
    assert math.isnan(few.low)
    assert math.isnan(few.high)
    assert enough.low < enough.mean < enough.high


def test_infinite_psnr_has_a_mean_but_no_interval():
    found = mean_with_interval(np.array([30.0, math.inf]))
    assert found.mean == math.inf
    assert math.isnan(found.low)


def test_paired_difference_is_tighter_than_the_columns():
    rng = np.random.default_rng(0)
    first = rng.normal(30, 5, 50)
    second = first + 0.5 + rng.normal(0, 0.1, 50)
    found = difference(first, second, higher_is_better=True)
    assert found.mean == pytest.approx(0.5, abs=0.05)
    assert found.high - found.low < 0.1 < mean_with_interval(first).high - mean_with_interval(first).low
    assert (found.better, found.count) == (50, 50)
    assert difference(first, second, higher_is_better=False).better == 0


def test_two_perfect_images_are_no_difference_and_drop_out():
    found = difference(np.array([math.inf, 30.0]), np.array([math.inf, 31.0]), higher_is_better=True)
    assert (found.mean, found.count) == (1.0, 1)
