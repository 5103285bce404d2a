"""Finds, compiles and launches the CUDA kernels: CuPy compiles them at first use for the device at hand, torch owns all memory."""

import functools
import logging
import re
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sslsr_diffusion.ops.ssg_cuda_launch import Argument

_log = logging.getLogger(__name__)

_PACKAGE = Path(__file__).resolve().parents[1]
SOURCE_FOLDERS = (_PACKAGE / "_cuda", _PACKAGE.parent / "kernels")  # in a wheel; in a checkout

_INCLUDE = re.compile(r'^#include "([\w.]+)"$', re.MULTILINE)
_lock = threading.Lock()
_modules: dict[tuple[int, str, tuple[str, ...]], Any] = {}  # cupy.RawModule by device, file and constants
_failures: dict[tuple[int, str, tuple[str, ...]], str] = {}
_kernels: dict[tuple[int, str, tuple[str, ...], str], Any] = {}  # cupy.RawKernel


def unavailable(device: torch.device) -> str | None:
    """Why the CUDA kernels cannot run on `device`; None: they can."""
    if device.type != "cuda":
        return f"it needs tensors on an NVIDIA GPU, these are on {device}."
    if torch.version.hip is not None:
        return "its kernels are CUDA, this torch is built for ROCm."
    if problem := _cupy_problem():
        return problem
    missing = [name for name in ("ssg_loss.cu", "ssg_dense.cu", "ssg_graph.cu", "ssg_gather.cu") if find_source(name) is None]
    return f"{missing[0]} is neither in {SOURCE_FOLDERS[0]} nor in {SOURCE_FOLDERS[1]}; install the package again." if missing else None


@functools.cache
def _cupy_problem() -> str | None:
    """Also logged, once: the torch backend, which takes over, is far slower."""
    try:
        import cupy

        cupy.cuda.nvrtc.getVersion()  # the compiler is another library, and loaded late
    except Exception as error:  # a broken CUDA installation raises more than ImportError
        wheel = f"cupy-cuda{(torch.version.cuda or '12').split('.')[0]}x"
        mend = f"pip install {wheel}" if isinstance(error, ImportError) else f"mend it, for example by pip install --upgrade {wheel}"
        if isinstance(error, OSError):
            mend = "CuPy keeps compiled kernels on disk: let CUPY_CACHE_DIR name a folder that can be written"
        problem = f"it needs CuPy ({type(error).__name__}: {error}); {mend}"
        _log.warning("the CUDA backend of the self-similarity operator cannot be used: %s", problem)
        return problem
    return None


# What torch.compiler.assume_constant_result does, without importing torch._dynamo, which takes seconds: torch.compile asks once
# and does not look into imports and files.
unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def find_source(name: str) -> Path | None:
    """A kernel file of the package by its name, or any other by its absolute path."""
    return next((folder / name for folder in SOURCE_FOLDERS if (folder / name).is_file()), None)


def read_source(name: str) -> str:
    """The text of a kernel file with our own includes put in: CuPy's cache on disk looks at the text it is given, not at included files."""
    path = find_source(name)
    if path is None:
        raise FileNotFoundError(f"{name} is neither in {SOURCE_FOLDERS[0]} nor in {SOURCE_FOLDERS[1]}; install the package again.")
    return _INCLUDE.sub(lambda found: read_source(found[1]), path.read_text(encoding="utf-8"))


def shared_memory_limit(device: torch.device) -> int:
    """Bytes of shared memory a block may ask for."""
    return _shared_memory_limit(_index(device))


@functools.cache
def _shared_memory_limit(index: int) -> int:
    import cupy

    return int(cupy.cuda.Device(index).attributes["MaxSharedMemoryPerBlockOptin"])


class CupyLauncher:
    """Runs kernels on one device, on the stream that is torch's current one at each launch, on torch's own memory."""

    def __init__(self, device: torch.device):
        self.index = _index(device)

    def __call__(
        self, file: str, kernel: str, defines: tuple[str, ...], grid: int, block: int, shared_bytes: int, args: list[Argument]
    ) -> None:
        import cupy

        with cupy.cuda.Device(self.index), _stream(torch.cuda.current_stream(self.index), self.index):
            function = _kernel(self.index, file, defines, kernel, shared_bytes)
            passed = tuple(np.uint64(arg.data_ptr()) if isinstance(arg, Tensor) else arg for arg in args)
            function((grid,), (block,), passed, shared_mem=shared_bytes)


def _stream(stream: torch.cuda.Stream, index: int) -> Any:
    """torch's stream as CuPy's; ExternalStream is deprecated since CuPy 14, so it may be gone one day."""
    import cupy

    if hasattr(cupy.cuda, "ExternalStream"):
        return cupy.cuda.ExternalStream(stream.cuda_stream, index)
    return cupy.cuda.Stream.from_external(stream)


def _index(device: torch.device) -> int:
    return device.index if device.index is not None else torch.cuda.current_device()


def _kernel(index: int, file: str, defines: tuple[str, ...], name: str, shared_bytes: int) -> Any:
    key = (index, file, defines, name)
    if key not in _kernels:
        with _lock:
            function = _module(index, file, defines).get_function(name)
            if shared_bytes > 48 * 1024:  # more than this must be asked for
                function.max_dynamic_shared_size_bytes = shared_bytes
            _kernels[key] = function
    return _kernels[key]


def _module(index: int, file: str, defines: tuple[str, ...]) -> Any:
    """Compile once per device and set of constants; a build that failed is not tried again, its message is repeated at once."""
    import cupy

    key = (index, file, defines)
    if key in _failures:
        raise RuntimeError(_failures[key])
    if key not in _modules:
        start = time.perf_counter()
        options = ("-std=c++17", *(f"-D{define}" for define in defines))
        try:
            module = cupy.RawModule(code=read_source(file), options=options)
            module.compile()
        except Exception as error:  # NVRTC, the driver and the file system each have their own
            _failures[key] = f"{file} could not be compiled for device {index} with {' '.join(options)}: {error}"
            raise RuntimeError(_failures[key]) from error
        _log.info("compiled %s in %.1f s (CuPy keeps it on disk)", file, time.perf_counter() - start)
        _modules[key] = module
    return _modules[key]
