"""Shared by all tests. Imports nothing beyond torch and numpy: the operator's tests run where diffusers is not installed."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from collections.abc import Generator, Iterator
from typing import Any

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

# Containers forbid bytecode, and then each process that a test starts compiles the whole package again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# The xet client remembers by address what a server has; a test server may get the port of an earlier one, which had other things.
_REMEMBERED = tempfile.TemporaryDirectory(prefix="xet-")
os.environ["HF_XET_CACHE"] = _REMEMBERED.name


# Files of a quarter of a minute and more, longest first: a worker that begins one last is left alone with it. A line stays with one
# worker: what the first of its files compiled, or the process that forks begin from, serves the others, too.
LONG = """
    gan walks two_processes memory_budget hub pipeline loop memory_estimate secrets install
    ssg ssg_loss
    train_cli
    kills
    gan_recipes
    resume
    out_of_memory
    training_data
    channels_last
    pipeline_seams
    gan_steps
    kernels_compile
    kernels_emulated
"""
LINES = [[f"test_{name}.py" for name in line.split()] for line in LONG.split("\n")]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class ByLine(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return next((line[0] for line in LINES if file.rpartition("/")[2] in line), file)

    return ByLine(config, log) if config.getoption("dist") == "loadscope" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))
    rank = {file: number for number, file in enumerate(file for line in LINES for file in line)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, Any, Any]:
    """Imported modules are a million objects that stay, and every collection of garbage would look at all that are there: a quarter of
    the time while they are imported, half a second each later."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="session", autouse=True)
def runs_leave_out_what_nobody_looks_at() -> Iterator[None]:
    """Drawing a run's curves takes longer than most runs here train: an empty file stands for them, unless a test asks for
    `drawn_curves`. And no test pulls the plug: what a killed process wrote is there without being forced to the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        if "sslsr_diffusion.training.outputs" in sys.modules:  # not where the operator alone is tested
            patch.setattr("sslsr_diffusion.training.outputs.plot_losses", lambda history, path: path.touch())
        yield


@pytest.fixture
def drawn_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    from sslsr_diffusion.training.reporting import plot_losses

    monkeypatch.setattr("sslsr_diffusion.training.outputs.plot_losses", plot_losses)
