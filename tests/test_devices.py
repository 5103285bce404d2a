"""Devices and their memory: sizes as texts, what a container leaves, devices that are not there, allocations that failed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sslsr_diffusion import devices
from sslsr_diffusion.devices import find_device, is_out_of_memory, parse_bytes, shown_bytes
from sslsr_diffusion.errors import UserError


@pytest.mark.parametrize(
    ("text", "count"),
    [("8GB", 8 * 10**9), ("8GiB", 8 * 2**30), ("500MB", 500 * 10**6), ("1.5 gib", 3 * 2**29), ("2g", 2 * 10**9), ("4096", 4096)],
)
def test_sizes_are_read_with_their_units(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "8 XB", "0", "eight", "1e9", "8GBs"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="expected a size such as 8GB"):
        parse_bytes(text)


@pytest.mark.parametrize("count", [1, 999_999, 1_000_001, 99_949_999, 123_456_789, 8_049_999_999, 123 * 10**9])
def test_what_is_shown_is_never_too_little(count: int) -> None:
    assert count <= parse_bytes(shown_bytes(count)) <= 1.01 * count + 10**6


@pytest.mark.parametrize(
    ("folder", "names", "cached"),
    [
        ("", ("memory.max", "memory.current"), "inactive_file"),
        ("memory", ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_inactive_file"),
    ],
)
def test_files_that_a_container_has_read_are_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder, names, cached) -> None:
    """Loading a model leaves its files in the kernel's cache, which a container's usage includes."""
    monkeypatch.setattr(devices, "_CGROUP", tmp_path)
    assert devices._container_bytes() > 10**15
    (tmp_path / folder).mkdir(exist_ok=True)
    for name, value in zip(names, (1000, 900)):
        (tmp_path / folder / name).write_text(f"{value}\n")
    assert devices._container_bytes() == 100
    (tmp_path / folder / "memory.stat").write_text(f"anon 300\n{cached} 500\n")
    assert devices._container_bytes() == 600


def test_devices_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("foo", "cuda:x", "cpu:-7"):
        with pytest.raises(UserError, match=f"--device {name}: expected auto, cpu, cuda, cuda:1 or mps"):
            find_device(name)
    for name in ("meta", "xla", *([] if torch.cuda.is_available() else ["cuda", "cuda:1"])):
        with pytest.raises(UserError, match=f"--device {name}: torch sees no such device here"):
            find_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert find_device("auto").type == "cpu"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert find_device("auto").type == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert find_device("auto").type == "cuda"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried ..."), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_failed_allocations_are_told_from_other_errors(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_the_cpu_allocators_own_error_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
