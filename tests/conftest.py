"""Shared by all tests. Imports nothing beyond torch and numpy: the operator's tests run where diffusers is not installed."""

from __future__ import annotations

import gc
import os
from collections import Counter

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers of xdist share the cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import pytest

try:
    from hypothesis import settings

    settings.register_profile("repeatable", derandomize=True, deadline=None)
    settings.load_profile("repeatable")
except ImportError:
    pass


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    slow: Counter[str] = Counter()
    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))
        slow[item.location[0]] += item.get_closest_marker("slow") is not None
    items.sort(key=lambda item: -slow[item.location[0]])  # long files first: no worker is left alone with one at the end


def pytest_collection_finish() -> None:
    """Imported modules are a million objects that stay: every collection of garbage would look at each of them, half a second a time."""
    gc.collect()
    gc.freeze()
