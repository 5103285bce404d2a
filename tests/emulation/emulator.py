"""Compiles `kernels/*.cu`, unchanged, as C++ over cuda_emulation.h and runs them on CPU tensors: a Launcher of ssg_cuda_launch."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

HERE = Path(__file__).parent
HEADER = HERE / "cuda_emulation.h"
KERNELS = HERE.parents[1] / "kernels"
SHARED_LIMIT = 232448  # of an H100
COMPILER = shutil.which("g++") if sys.platform == "linux" else None  # ucontext, and fibers that longjmp

_KERNEL_NAME = re.compile(r'extern "C" __global__ void (?:__launch_bounds__\([^)]*\)\s*)?(\w+)\(')
_FLAGS = ("-O2", "-march=native", "-std=c++17", "-fPIC", "-shared", "-ffp-contract=off", "-fno-strict-aliasing", "-fno-gnu-unique", "-w")
_GUARD = 4096  # bytes on either side of every tensor


@cache
def compile_kernels(file: str, defines: tuple[str, ...]) -> ctypes.CDLL:
    """A library per file and set of constants."""
    text = _translation_unit(file)
    flags = [*(f"-D{d}" for d in defines), f"-I{_precompiled().parent}", f"-I{HERE}", f"-I{KERNELS}", "-x", "c++", "-"]
    sources = [HEADER, *sorted(KERNELS.glob("*.cuh")), KERNELS / file]
    return ctypes.CDLL(str(_kept(_digest(*defines, text, *(path.read_text() for path in sources)) + ".so", flags, text)))


@cache
def _precompiled() -> Path:
    """The header as g++ has read it, which takes half the time of compiling a kernel; g++ finds it by its name."""
    return _kept(f"{_digest(HEADER.read_text())}/{HEADER.name}.gch", ["-x", "c++-header", str(HEADER)])


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join([*_FLAGS, *parts]).encode()).hexdigest()[:24]


def _kept(name: str, arguments: list[str], text: str = "") -> Path:
    """What g++ makes of its arguments, in a folder of this user's under the temporary folder; `name` says by content what that is."""
    folder = Path(tempfile.gettempdir()) / f"sslsr-emulation-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / name
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        unfinished = path.with_name(f"{os.getpid()}.{path.name}")
        subprocess.run([str(COMPILER), *_FLAGS, *arguments, "-o", str(unfinished)], input=text, text=True, check=True)
        unfinished.replace(path)
    return path


def _translation_unit(file: str) -> str:
    names = _KERNEL_NAME.findall((KERNELS / file).read_text())
    calls = "".join(
        f'    if (std::string(name) == "{name}") {{\n'
        f"        emulation::run({name}, kinds, grid, threads, shared_bytes, args, reverse);\n"
        "        return nullptr;\n"
        "    }\n"
        for name in names
    )
    return f"""#include "cuda_emulation.h"
#include "{file}"
extern "C" const char* emulate(
    const char* name, const char* kinds, unsigned grid, unsigned threads, unsigned shared_bytes, void** args, bool reverse) try {{
{calls}    return "no such kernel";
}} catch (const std::exception& error) {{
    static std::string message;
    message = error.what();
    return message.c_str();
}}
"""


class EmulatedLauncher:
    """Runs each launch on guarded copies of its tensors: a write outside of a tensor is found, a read outside gives NaN."""

    def __init__(self, reverse: bool = False):
        self.reverse = reverse
        self.launches: list[str] = []

    def __call__(
        self, file: str, kernel: str, defines: tuple[str, ...], grid: int, block: int, shared_bytes: int, args: list[Tensor | np.generic]
    ) -> None:
        assert shared_bytes <= SHARED_LIMIT
        library = compile_kernels(file, defines)
        library.emulate.restype = ctypes.c_char_p
        guarded = [_Guarded(arg) if isinstance(arg, Tensor) else None for arg in args]
        values = [
            ctypes.c_void_p(copy.pointer)
            if copy is not None
            else (ctypes.c_int(int(arg)) if isinstance(arg, np.int32) else ctypes.c_float(float(arg)))
            for arg, copy in zip(args, guarded)
        ]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        kinds = "".join("p" if isinstance(arg, Tensor) else {"int32": "i", "float32": "f"}[arg.dtype.name] for arg in args)
        error = library.emulate(kernel.encode(), kinds.encode(), grid, block, shared_bytes, pointers, self.reverse)
        if error:
            raise RuntimeError(f"{kernel}: {error.decode()}")
        for index, copy in enumerate(guarded):
            if copy is not None:
                copy.give_back(f"{kernel}, argument {index}")
        self.launches.append(kernel)


class _Guarded:
    def __init__(self, tensor: Tensor):
        assert tensor.is_contiguous()
        assert tensor.device.type == "cpu"
        self.tensor = tensor
        self.size = tensor.numel() * tensor.element_size()
        self.bytes = torch.full((self.size + 2 * _GUARD,), 0xFF, dtype=torch.uint8)
        self.inside.copy_(self._flat)
        self.pointer = self.inside.data_ptr()

    @property
    def inside(self) -> Tensor:
        return self.bytes[_GUARD : _GUARD + self.size]

    @property
    def _flat(self) -> Tensor:
        return self.tensor.detach().reshape(-1).view(torch.uint8)

    def give_back(self, what: str) -> None:
        if not (bool((self.bytes[:_GUARD] == 0xFF).all()) and bool((self.bytes[_GUARD + self.size :] == 0xFF).all())):
            raise RuntimeError(f"{what}: a write outside of the tensor")
        if not torch.equal(self._flat, self.inside):  # inputs stay untouched, as autograd sees it
            self._flat.copy_(self.inside)
