"""Shared by all tests. Imports nothing beyond torch and numpy: the operator's tests run where diffusers is not installed."""

from __future__ import annotations

import gc
import os

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


# files of a quarter of a minute and more, longest first: a worker that begins one last is left alone with it
LONG = """
    ssg memory_budget ssg_loss hub train_cli kills memory_estimate loop pipeline gan_recipes walks resume out_of_memory training_data
    two_processes channels_last pipeline_seams secrets gan_steps kernels_compile kernels_emulated
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))
    rank = {f"test_{name}.py": number for number, name in enumerate(LONG.split())}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


def pytest_collection_finish() -> None:
    """Imported modules are a million objects that stay: every collection of garbage would look at each of them, half a second a time."""
    gc.collect()
    gc.freeze()
