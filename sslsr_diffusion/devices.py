"""The devices of this machine: which are there, how much memory they have and have left, and when it ran out."""

import contextlib
import ctypes
import os
import re
import time
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch

from sslsr_diffusion.errors import UserError

_SHARE = 0.8  # of the free memory that a run may take
_M_MMAP_THRESHOLD = -3  # of glibc's mallopt
_CGROUP = Path("/sys/fs/cgroup")
_SIGNS = ("DefaultCPUAllocator", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


def find_device(name: str, field: str = "--device") -> torch.device:
    """A torch device that is there; "auto": the first GPU (CUDA, then Apple's), else the CPU.

    Args:
        field: what a message begins with.
    Raises UserError: no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"{field} {name}: expected auto, cpu, cuda, cuda:1 or mps.") from None
    backend: Any = getattr(torch, device.type, None)
    there = device.type == "cpu" or (hasattr(backend, "is_available") and backend.is_available())
    if not there or (device.index or 0) >= (backend.device_count() if hasattr(backend, "device_count") else 1):
        raise UserError(f"{field} {name}: torch sees no such device here; use cpu, or auto.")
    return device


def training_device() -> torch.device:
    """Where accelerate trains on this machine."""
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on")
    return torch.device("cpu") if on_cpu else find_device("auto")


def free_bytes(device: torch.device) -> int:
    """Memory that a run on this device may take."""
    if device.type == "cuda":
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(_SHARE * (torch.cuda.mem_get_info(device)[0] + idle))
    if device.type == "mps":
        return int(_SHARE * (torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()))
    import psutil

    return int(_SHARE * min(psutil.virtual_memory().available, _container_bytes()))


def device_bytes(device: torch.device) -> int:
    """Memory that the device has in all; a container's limit counts as the CPU's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    import psutil

    limits = [psutil.virtual_memory().total]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            limits.append(int((_CGROUP / name).read_text()))
    return min(limits)


def _container_bytes() -> int:
    """What a container's limit leaves; a container sees its host's memory as its own."""
    for folder, limit, used, cached in (
        ("", "memory.max", "memory.current", "inactive_file"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        place = _CGROUP / folder
        try:
            room = int((place / limit).read_text()) - int((place / used).read_text())
        except (OSError, ValueError):
            continue  # no such limit, or "max"
        with contextlib.suppress(OSError, ValueError, KeyError):  # files that were read count as used, and go when room is needed
            room += int(dict(line.split() for line in (place / "memory.stat").read_text().splitlines())[cached])
        return max(0, room)
    return 1 << 62


def hand_freed_blocks_back() -> None:
    """Let glibc return every freed block of a megabyte to the system at once: its habit of keeping them is what peaks are made of."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)


@cache
def bfloat16_pays() -> bool:
    """Whether this processor convolves in bfloat16 at least one and a half times as fast as in float32: it is tried once.

    With units for it (AMX) it is two times and more; where only vectors know bfloat16 (AVX-512 BF16) it is slower: the answer is far
    from the border either way.
    """
    times: list[float] = []
    with torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16):
            pictures = torch.ones(1, 64, 64, 64, dtype=dtype).to(memory_format=torch.channels_last)
            kernel = torch.ones(64, 64, 3, 3, dtype=dtype).to(memory_format=torch.channels_last)
            tries = []
            for _ in range(6):  # the first compiles
                began = time.perf_counter()
                torch.nn.functional.conv2d(pictures, kernel, padding=1)
                tries.append(time.perf_counter() - began)
            times.append(min(tries))
    return times[0] >= 1.5 * times[1]


def training_precision(device: torch.device) -> Literal["bf16", "no"]:
    """What `training.mixed_precision: auto` is on a device: bf16 where its own units compute it, else no."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    if device.type == "mps":
        return "bf16" if torch.backends.mps.is_macos_or_newer(14, 0) else "no"
    return "no" if device.type == "cpu" and not bfloat16_pays() else "bf16"


def parse_bytes(text: str, field: str = "--memory-budget") -> int:
    """Bytes of "8GB", "8GiB", "500MB", "1.5 g" (decimal without the i); a bare number is bytes.
    Raises UserError: something else was given.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?)b?|b)?\s*", text, re.IGNORECASE)
    if found is None or not float(found[1]):
        raise UserError(f"{field} {text}: expected a size such as 8GB, 7.5GiB or 500MB.")
    power = " kmgt".index((found[2] or " ").lower())
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


def shown_bytes(count: float) -> str:
    """500 MB, 8.1 GB: rounded up, so that what is shown is enough."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            tenths = -(-count // (unit / 10))
            return f"{tenths / 10:.1f} {name}" if tenths < 1000 else f"{-(-count // unit):.0f} {name}"
    return "1 MB"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: torch has a class for GPUs, the CPU's and Metal's allocators raise plain RuntimeErrors."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def release_cached(device: torch.device) -> None:
    """Give back what the device's allocator keeps after a failed allocation."""
    if device.type in ("cuda", "mps", "xpu"):
        getattr(torch, device.type).empty_cache()
