"""Finding, compiling and refusing, without a GPU: CuPy is replaced by a stand-in that fails or counts."""

from __future__ import annotations

import logging
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
    assert cupy_loader.read_source("ssg_loss.cu") == "// _cuda"
    (wheel / "ssg_loss.cu").unlink()
    assert cupy_loader.read_source("ssg_loss.cu") == "// kernels"
    (checkout / "ssg_loss.cu").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither in .*_cuda nor in .*kernels"):
        cupy_loader.read_source("ssg_loss.cu")


def test_says_why_it_cannot_run(monkeypatch, tmp_path):
    assert "these are on cpu" in cupy_loader.unavailable(torch.device("cpu"))
    monkeypatch.setitem(sys.modules, "cupy", None)  # importing it raises ImportError
    assert "pip install cupy-cuda" in cupy_loader.unavailable(torch.device("cuda", 0))
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace())
    monkeypatch.setattr(torch.version, "hip", None)
    assert cupy_loader.unavailable(torch.device("cuda", 0)) is None
    monkeypatch.setattr(cupy_loader, "SOURCE_FOLDERS", (tmp_path / "_cuda", tmp_path / "kernels"))
    assert f"neither in {tmp_path / '_cuda'} nor in {tmp_path / 'kernels'}" in cupy_loader.unavailable(torch.device("cuda", 0))
