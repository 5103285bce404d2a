"""Every CUDA source compiles, for every architecture we name, with the constants the host computes. Needs nvcc, no GPU."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from sslsr_diffusion.ops import cupy_loader
from sslsr_diffusion.ops.ssg_cuda_dense import dense_geometry
from sslsr_diffusion.ops.ssg_cuda_launch import row_geometry

NVCC = shutil.which("nvcc")
KERNELS = Path(__file__).parents[1] / "kernels"
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")

# the opt-in limit of shared memory per block of each architecture, in bytes
SHARED_LIMIT = {"sm_75": 65536, "sm_80": 166912, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376}
FILES = ("ssg_loss.cu", "ssg_dense.cu", "ssg_graph.cu", "ssg_gather.cu")
BASELINE = str(KERNELS.parent / "benchmarks" / "ssg_direct.cu")


def compile_for(arch: str, file: str, defines: tuple[str, ...], folder: Path) -> str:
    (folder / "one.cu").write_text(cupy_loader.read_source(file))  # as CuPy gets it: one text, includes put in
    flags = ["-std=c++17", f"-arch={arch}", "-Xptxas", "-v", "-cubin", "-Werror", "all-warnings"]
    done = subprocess.run(
        [str(NVCC), *flags, *(f"-D{d}" for d in defines), "-o", folder / "out.cubin", folder / "one.cu"],
        capture_output=True,
        text=True,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def defines_of(file: str, arch: str, search: int = 25, window: int = 9, channels: int = 3) -> tuple[str, ...]:
    if file == "ssg_dense.cu":
        dense = dense_geometry(torch.Size((1, channels, 512, 512)), search, window)
        assert dense is not None
        return dense.defines()
    return row_geometry(search, window, channels, SHARED_LIMIT[arch]).defines() if file in ("ssg_loss.cu", "ssg_graph.cu") else ()


@needs_nvcc
@pytest.mark.parametrize("arch", SHARED_LIMIT)
@pytest.mark.parametrize("file", [*FILES, BASELINE], ids=lambda file: Path(file).name)
def test_compiles_without_spills(file, arch, tmp_path):
    report = compile_for(arch, file, defines_of(file, arch), tmp_path)
    frame = "" if file == "ssg_gather.cu" else "stack frame|"  # an array that is not in registers; the gather's are of three numbers
    spills = re.findall(rf"(\d+) bytes (?:{frame}spill stores|spill loads)", report)
    assert spills
    assert set(spills) == {"0"}, report


@needs_nvcc
@pytest.mark.parametrize(("search", "window", "channels"), [(3, 1, 1), (31, 31, 3), (41, 9, 6)])
def test_compiles_for_other_sizes(search, window, channels, tmp_path):
    compile_for("sm_90", "ssg_loss.cu", defines_of("ssg_loss.cu", "sm_90", search, window, channels), tmp_path)


@needs_nvcc
def test_a_wrong_count_of_shared_memory_does_not_compile(tmp_path):
    defines = tuple(re.sub(r"(SHARED_BYTES=)\d+", r"\g<1>1024", define) for define in defines_of("ssg_loss.cu", "sm_90"))
    with pytest.raises(AssertionError, match="count of shared memory"):
        compile_for("sm_90", "ssg_loss.cu", defines, tmp_path)


@pytest.mark.parametrize("file", [*FILES, BASELINE], ids=lambda file: Path(file).name)
def test_compiles_with_the_runtime_compiler_that_cupy_uses(file):
    """NVRTC knows no standard headers, and comes with torch's CUDA wheels: it needs neither nvcc nor a GPU."""
    if not (libraries := sorted(Path(torch.__file__).parents[1].glob("nvidia/**/libnvrtc.so.*"))):
        pytest.skip("this torch has no libnvrtc")
    nvrtc = ctypes.CDLL(str(libraries[0]))
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), cupy_loader.read_source(file).encode(), b"", 0, None, None) == 0
    options = ["-std=c++17", "-arch=sm_90", "-ftz=true", *(f"-D{d}" for d in defines_of(file, "sm_90"))]  # the ftz is CuPy's
    failed = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*(o.encode() for o in options)))
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, text)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    assert failed == 0, text.value.decode()


def test_every_source_is_known_and_the_folder_has_no_python():
    names = {path.name for path in KERNELS.iterdir()}
    assert names == {
        *FILES,
        "ssg_rows.cuh",
        "ssg_dense.cuh",
        "ssg_entries.cuh",
    }  # a .py here would shadow the Hugging Face package `kernels`
    assert not any('#include "' in cupy_loader.read_source(file) for file in FILES)
