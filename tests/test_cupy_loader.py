"""Finding, compiling and refusing, without a GPU: CuPy is replaced by a stand-in that fails or counts."""

from __future__ import annotations

import logging
import re
import sys
from types import SimpleNamespace

import pytest
import torch

from sslsr_diffusion.ops import cupy_loader


@pytest.fixture
def cupy(monkeypatch):
    """A module `cupy` whose compiler fails as often as it is asked; `.builds` holds what it was given."""
    fake = SimpleNamespace(builds=[], failing=True)

    class RawModule:
        def __init__(self, code, options):
            fake.builds.append((code, options))

        def compile(self):
            if fake.failing:
                raise ValueError("nvrtc: error: bad kernel")

    fake.RawModule = RawModule
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setattr(cupy_loader, "_modules", {})
    monkeypatch.setattr(cupy_loader, "_failures", {})
    return fake


def test_a_failed_build_is_remembered_and_its_message_repeated(cupy):
    for _ in range(3):
        with pytest.raises(RuntimeError, match=r"ssg_gather\.cu could not be compiled for device 0 .*bad kernel"):
            cupy_loader._module(0, "ssg_gather.cu", ("A=1",))
    assert len(cupy.builds) == 1


def test_a_module_is_built_once_for_each_device_and_set_of_constants(cupy, caplog):
    cupy.failing = False
    with caplog.at_level(logging.INFO):
        first = cupy_loader._module(0, "ssg_loss.cu", ("A=1",))
        assert cupy_loader._module(0, "ssg_loss.cu", ("A=1",)) is first
        assert cupy_loader._module(1, "ssg_loss.cu", ("A=1",)) is not first
        assert cupy_loader._module(0, "ssg_loss.cu", ("A=2",)) is not first
    code, options = cupy.builds[0]
    assert "-DA=1" in options
    assert "struct __align__(16) Shared" in code  # the header is part of the text
    assert caplog.text.count("compiled ssg_loss.cu") == 3


def test_sources_are_looked_for_in_the_package_first(monkeypatch, tmp_path):
    wheel, checkout = tmp_path / "_cuda", tmp_path / "kernels"
    for folder in (wheel, checkout):
        folder.mkdir()
        (folder / "ssg_loss.cu").write_text(f"// {folder.name}")
    monkeypatch.setattr(cupy_loader, "SOURCE_FOLDERS", (wheel, checkout))
    (tmp_path / "own.cu").write_text("// a path")
    assert cupy_loader.read_source("ssg_loss.cu") == "// _cuda"
    (wheel / "ssg_loss.cu").unlink()
    assert cupy_loader.read_source("ssg_loss.cu") == "// kernels"
    assert cupy_loader.read_source(str(tmp_path / "own.cu")) == "// a path"  # of another folder, as the benchmark's
    (checkout / "ssg_loss.cu").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither in .*_cuda nor in .*kernels"):
        cupy_loader.read_source("ssg_loss.cu")


@pytest.fixture
def asked_anew():
    """Whether CuPy works is asked once per process."""
    cupy_loader._cupy_problem.cache_clear()
    yield
    cupy_loader._cupy_problem.cache_clear()


@pytest.mark.usefixtures("asked_anew")
def test_says_why_it_cannot_run(monkeypatch, tmp_path):
    assert "these are on cpu" in cupy_loader.unavailable(torch.device("cpu"))
    monkeypatch.setitem(sys.modules, "cupy", None)  # importing it raises ImportError
    assert "pip install cupy-cuda" in cupy_loader.unavailable(torch.device("cuda", 0))
    cupy_loader._cupy_problem.cache_clear()
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=SimpleNamespace(nvrtc=SimpleNamespace(getVersion=lambda: (13, 0)))))
    monkeypatch.setattr(torch.version, "hip", None)
    assert cupy_loader.unavailable(torch.device("cuda", 0)) is None
    monkeypatch.setattr(cupy_loader, "SOURCE_FOLDERS", (tmp_path / "_cuda", tmp_path / "kernels"))
    assert f"neither in {tmp_path / '_cuda'} nor in {tmp_path / 'kernels'}" in cupy_loader.unavailable(torch.device("cuda", 0))


@pytest.mark.usefixtures("asked_anew")
@pytest.mark.parametrize(
    ("error", "mend"),
    [
        (RuntimeError("failed to load libnvrtc.so.12"), r"pip install --upgrade cupy-cuda1\dx"),
        (PermissionError("/home/nobody/.cupy"), "let CUPY_CACHE_DIR name a folder that can be written"),
    ],
)
def test_a_cupy_that_cannot_compile_is_told_once_with_what_mends_it(monkeypatch, caplog, error, mend):
    """It imports, and its compiler cannot be loaded; asked before the first step, so that another backend can take over."""

    def version():
        raise error

    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=SimpleNamespace(nvrtc=SimpleNamespace(getVersion=version))))
    monkeypatch.setattr(torch.version, "hip", None)
    for _ in range(2):
        reason = cupy_loader.unavailable(torch.device("cuda", 0))
        assert reason.startswith(f"it needs CuPy ({type(error).__name__}: {error}); ")
        assert re.search(mend, reason)
    assert len(caplog.records) == 1
    assert reason in caplog.text


@pytest.mark.usefixtures("asked_anew")
def test_a_cupy_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(torch.version, "hip", None)
    assert re.search(r"; pip install cupy-cuda1\dx$", cupy_loader.unavailable(torch.device("cuda", 0)))
