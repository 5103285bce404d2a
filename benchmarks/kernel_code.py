"""What the compiler makes of the CUDA kernels: registers, shared memory, spills, instructions, and how long each loop is.

    python benchmarks/kernel_code.py [--arch sm_90 sm_120 ...] [--loops] [--search 25] [--window 9] [--channels 3] [--output FILE]

Needs nvcc, no GPU, and for instructions and loops cuobjdump, CUDA's or the one that comes with triton. A loop is a jump back: its
length is in instructions of a warp, with what it jumps over and with the loops inside it.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch

from sslsr_diffusion.ops import cupy_loader
from sslsr_diffusion.ops.ssg_cuda_dense import dense_geometry
from sslsr_diffusion.ops.ssg_cuda_launch import row_geometry

# the opt-in limit of shared memory per block of each architecture, in bytes
SHARED_LIMIT = {"sm_75": 65536, "sm_80": 166912, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376}
FILES = ("ssg_loss.cu", "ssg_dense.cu", "ssg_graph.cu", "ssg_gather.cu")


def defines_of(file: str, arch: str, search: int = 25, window: int = 9, channels: int = 3) -> tuple[str, ...]:
    """The constants that the host computes for a source."""
    if file == "ssg_dense.cu":
        dense = dense_geometry(torch.Size((1, channels, 512, 512)), search, window)
        assert dense is not None
        return dense.defines()
    return row_geometry(search, window, channels, SHARED_LIMIT[arch]).defines() if file in ("ssg_loss.cu", "ssg_graph.cu") else ()


@cache
def known_archs() -> frozenset[str]:
    """Of this nvcc; empty without one."""
    if shutil.which("nvcc") is None:
        return frozenset()
    return frozenset(subprocess.run(["nvcc", "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split())


def compile_for(arch: str, file: str, defines: tuple[str, ...], cubin: Path) -> str:
    """Writes a cubin and a source beside it, all warnings errors; what ptxas says of it. RuntimeError where it does not compile."""
    source = cubin.with_suffix(".cu")
    source.write_text(cupy_loader.read_source(file))  # as CuPy gets it: one text, includes put in
    flags = ["-std=c++17", f"-arch={arch}", "-Xptxas", "-v", "-cubin", "-Werror", "all-warnings"]
    command = ["nvcc", *flags, *(f"-D{define}" for define in defines), "-o", str(cubin), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cubin.parent)
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    return done.stderr


@dataclass(frozen=True)
class Code:
    """One kernel's code; `loops`: first and last address, and length."""

    kernel: str
    registers: int
    shared: int  # bytes, static
    stack: int
    spilled: int  # bytes stored and loaded
    instructions: int = 0  # 0: no cuobjdump
    loops: tuple[tuple[int, int, int], ...] = ()


def code_of(report: str, sass: str | None) -> list[Code]:
    """Kernels by the words of `ptxas -v` and, where there is one, the listing of cuobjdump."""
    listings = {part.split()[0]: part for part in (sass or "").split("Function : ")[1:]}
    return [_code(*found, listings.get(found[0], "")) for found in _told(report)]


def _told(report: str) -> Iterator[tuple[str, int, int, int, int]]:
    for part in report.split("Compiling entry function ")[1:]:
        numbers = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        registers, shared = re.search(r"Used (\d+) registers", part), re.search(r"(\d+) bytes smem", part)
        assert numbers is not None
        assert registers is not None
        stack, stored, loaded = map(int, numbers.groups())
        yield part.split("'")[1], int(registers[1]), int(shared[1]) if shared else 0, stack, stored + loaded


def _code(kernel: str, registers: int, shared: int, stack: int, spilled: int, listing: str) -> Code:
    code = [(int(address, 16), said) for address, said in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", listing)]
    place = {address: number for number, (address, _) in enumerate(code)}
    loops = []
    for number, (address, said) in enumerate(code):
        jump = re.search(r"\bBRA(?:\.\w+)*\s+(?:!?U?P\w+,\s*)?0x([0-9a-f]+)", said)
        target = int(jump[1], 16) if jump else address
        if target < address and target in place:
            loops.append((target, address, number + 1 - place[target]))
    used = len(code) - sum(said.startswith("NOP") for _, said in code)  # it fills up what is fetched at once
    return Code(kernel, registers, shared, stack, spilled, used, tuple(loops))


def asked_bytes(arch: str, search: int, window: int, channels: int) -> dict[str, int]:
    """Shared memory that the host asks for at a launch, by kernel."""
    dense = dense_geometry(torch.Size((1, channels, 512, 512)), search, window)
    row = row_geometry(search, window, channels, SHARED_LIMIT[arch])
    by_row = dict.fromkeys(("ssg_loss", "ssg_graph", "ssg_graph_backward"), row.shared_bytes)
    by_tile = {} if dense is None else dict.fromkeys(("ssg_dense_sums", "ssg_dense_values"), dense.map_bytes)
    return by_row | by_tile | ({} if dense is None else {"ssg_dense_gradient": dense.pull_bytes})


def find_cuobjdump() -> str | None:
    spec = find_spec("triton")
    folders = spec.submodule_search_locations if spec and spec.submodule_search_locations else ()
    found = (Path(folder) / "backends/nvidia/bin/cuobjdump" for folder in folders)
    return shutil.which("cuobjdump") or next((str(path) for path in found if path.is_file()), None)


def measured(arch: str, file: str, search: int, window: int, channels: int) -> list[Code]:
    with tempfile.TemporaryDirectory() as folder:
        cubin, dump = Path(folder) / "one.cubin", find_cuobjdump()
        report = compile_for(arch, file, defines_of(file, arch, search, window, channels), cubin)
        sass = subprocess.run([dump, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout if dump else None
    return code_of(report, sass)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=["sm_90"], choices=SHARED_LIMIT)
    parser.add_argument("--files", nargs="+", default=["ssg_dense.cu", "ssg_loss.cu"], choices=FILES)
    parser.add_argument("--loops", action="store_true", help="the lengths of all loops, too")
    for name, default in (("search", 25), ("window", 9), ("channels", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--output", type=Path, help="write the table into this file, too")
    arguments = parser.parse_args()
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release ([\d.]+)", version)
    sizes = (arguments.search, arguments.window, arguments.channels)
    lines = [
        "nvcc {}; search {}, window {}, {} channels".format(release[1] if release else "unknown", *sizes),
        "",
        "| architecture | kernel | registers | shared memory, bytes | stack, bytes | spilled, bytes | instructions |",
        "|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines))
    for arch in arguments.arch:
        asked = asked_bytes(arch, *sizes)
        for code in (code for file in arguments.files for code in measured(arch, file, *sizes)):
            shared = code.shared + asked.get(code.kernel, 0)
            numbers = (code.registers, shared, code.stack, code.spilled, code.instructions or "")
            lines.append(f"| {arch} | `{code.kernel}` | {' | '.join(map(str, numbers))} |")
            print(lines[-1], flush=True)
            for begin, end, length in code.loops if arguments.loops else ():
                print(f"  {begin:#x} to {end:#x}: {length}")
    if arguments.output:
        arguments.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
