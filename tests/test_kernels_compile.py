"""Every CUDA source compiles, for every architecture we name, with the constants the host computes. Needs nvcc, no GPU."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest
import torch
from scripts import load_script

from sslsr_diffusion.ops import cupy_loader

code = load_script("benchmarks/kernel_code.py")
KERNELS = Path(__file__).parents[1] / "kernels"
BASELINE = str(KERNELS.parent / "benchmarks" / "ssg_direct.cu")
FILES, SHARED_LIMIT, defines_of = code.FILES, code.SHARED_LIMIT, code.defines_of
needs_nvcc = pytest.mark.skipif(not code.known_archs(), reason="nvcc is not installed")


def compile_for(arch: str, file: str, defines: tuple[str, ...], folder: Path) -> str:
    if arch not in code.known_archs():
        pytest.skip(f"this nvcc does not know {arch}")
    return code.compile_for(arch, file, defines, folder / "one.cubin")


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
    with pytest.raises(RuntimeError, match="count of shared memory"):
        compile_for("sm_90", "ssg_loss.cu", defines, tmp_path)


@needs_nvcc
def test_the_report_of_the_dense_kernels(tmp_path):
    """By the compiler's words alone; instructions and loops, where cuobjdump is there, too."""
    found = {each.kernel: each for each in code.measured("sm_90", "ssg_dense.cu", 25, 9, 3)}
    passes = [found[f"ssg_dense_{name}"] for name in ("sums", "values", "gradient")]
    assert len(found) == 5
    assert all(0 < each.registers <= 255 and each.spilled == 0 for each in found.values())
    assert set(code.asked_bytes("sm_90", 25, 9, 3)) > {each.kernel for each in passes}
    if code.find_cuobjdump():
        assert all(each.loops and each.instructions > 1000 for each in passes)


def test_loops_are_read_from_a_listing():
    listing = """Function : one
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   FADD R2, R2, R1 ;
        /*0020*/                   FFMA R3, R2, R1, R3 ;
        /*0030*/               @P0 BRA 0x20 ;
        /*0040*/              @!P1 BRA 0x10 ;
        /*0050*/                   BRA 0x70 ;
        /*0060*/                   NOP ;
        /*0070*/                   BRA 0x70 ;
    """
    report = "Compiling entry function 'one' for 'sm_90'\n    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\n"
    (one,) = code.code_of(report + "ptxas info    : Used 40 registers, used 1 barriers, 1024 bytes smem", listing)
    assert (one.registers, one.shared, one.stack, one.spilled, one.instructions) == (40, 1024, 8, 16, 7)
    assert one.loops == ((0x20, 0x30, 2), (0x10, 0x40, 4))


@pytest.mark.parametrize("arch", ["sm_75", "sm_90", "sm_120"])
@pytest.mark.parametrize("file", [*FILES, BASELINE], ids=lambda file: Path(file).name)
def test_compiles_with_the_runtime_compiler_that_cupy_uses(file, arch):
    """NVRTC knows no standard headers, and comes with torch's CUDA wheels: it needs neither nvcc nor a GPU."""
    if not (libraries := sorted(Path(torch.__file__).parents[1].glob("nvidia/**/libnvrtc.so.*"))):
        pytest.skip("this torch has no libnvrtc")
    nvrtc = ctypes.CDLL(str(libraries[0]))
    count = ctypes.c_int()
    assert nvrtc.nvrtcGetNumSupportedArchs(ctypes.byref(count)) == 0
    archs = (ctypes.c_int * count.value)()
    assert nvrtc.nvrtcGetSupportedArchs(archs) == 0
    if int(arch.removeprefix("sm_")) not in list(archs):
        pytest.skip(f"this NVRTC does not know {arch}")
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), cupy_loader.read_source(file).encode(), b"", 0, None, None) == 0
    options = ["-std=c++17", f"-arch={arch}", "-ftz=true", *(f"-D{d}" for d in defines_of(file, arch))]  # the ftz is CuPy's
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
