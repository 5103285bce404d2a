"""Steps about the operator alone: torch, numpy and CuPy are enough."""

import importlib.util
import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sslsr_diffusion.checkup.cases import CASES, DENSE_CASES, Case, Inputs, draw_inputs, make_inputs, reference_graph, reference_loss
from sslsr_diffusion.checkup.steps import PACKAGE
from sslsr_diffusion.ops import SelfSimilarityLoss, apply_mask_stride, self_similarity_graph, ssg_cuda, ssg_cuda_dense
from sslsr_diffusion.ops.settings import GraphSettings

WEIGHT = 1000.0  # of both terms
PATHS = {"by rows": 2**30, "by tiles": 1}  # of the CUDA loss: masked pixels from which a tile is dense


def machine() -> dict[str, Any]:
    """What the GPU and the libraries are called, and the seconds until the kernels are compiled and have run once."""
    import cupy

    about = torch.cuda.get_device_properties(0)
    major, minor = cupy.cuda.nvrtc.getVersion()
    began = time.perf_counter()
    _seconds(lambda: _loss_and_gradient(Case((1, 3, 64, 64)), "cuda", "cuda"), repeats=1)
    return {
        "GPU": about.name,
        "GiB": round(about.total_memory / 2**30, 1),
        "capability": f"{about.major}.{about.minor}",
        "SMs": about.multi_processor_count,
        "driver": _driver(),
        "CUDA of torch": torch.version.cuda,
        "NVRTC": f"{major}.{minor}",
        "CuPy": cupy.__version__,
        "python": platform.python_version(),
        "first call s": round(time.perf_counter() - began, 1),
    }


def _driver() -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return "?"
    asked = subprocess.run([program, "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True, check=False)
    return asked.stdout.split("\n")[0].strip() or "?"


def agreement(backend: str = "cuda", device: str = "cuda", names: tuple[str, ...] = tuple(CASES)) -> dict[str, Any]:
    """The worst relative errors of a backend over the cases; AssertionError beyond what float32 explains (as in tests/test_ssg_cuda.py).

    Loss values: 2e-5; rows of the graph: 2e-6, absolute; gradients: 3e-5 of their largest entry. At 256 pixels, where float64 would
    take too much memory, against the backend `torch`: 1e-4, and 2e-3 of the gradient's norm (near-ties flip the sign of single entries).
    The CUDA loss has a path for dense masks: it is asked for whatever the mask, too.
    """
    worst = {"loss": 0.0, "graph": 0.0, "gradient": 0.0, "loss at 256": 0.0, "gradient at 256": 0.0}
    most = {"loss": 2e-5, "graph": 2e-6, "gradient": 3e-5, "loss at 256": 1e-4, "gradient at 256": 2e-3}

    def note(what: str, error: float, case: str) -> None:
        worst[what] = max(worst[what], error)
        if not error <= most[what]:
            raise AssertionError(f"{what} of the case {case!r}: expected an error of at most {most[what]:g}, got {error:.3g}.")

    for name in names:
        case, inputs = CASES[name], make_inputs(CASES[name])
        for weights in ((0.0, 900.0), (700.0, 0.0)):
            want = reference_loss(inputs, case, weights)
            got = _loss_and_gradient(case, backend, device, weights)
            note("loss", float(((torch.stack(got[:3]) - torch.stack(want[:3])).abs() / torch.stack(want[:3])).max()), name)
            note("gradient", _largest(got[3], want[3]), name)
        cotangent = torch.randn(int(inputs.mask.sum()), case.search**2, generator=torch.Generator().manual_seed(1))
        rows, slope = reference_graph(inputs, case, cotangent)
        image = inputs.sr.to(device, copy=True).requires_grad_()
        graph = self_similarity_graph(image, inputs.mask.to(device), **case.settings(), backend=backend)
        note("graph", float((graph.detach().cpu() - rows).abs().max()), name)
        note("gradient", _largest(torch.autograd.grad(graph, image, cotangent.to(device))[0].cpu().double(), slope), name)
    if backend == "cuda":
        for density in (0.1, 1.0):
            large = Case((1, 3, 256, 256), sigma=0.004, density=density)
            one, other = (_loss_and_gradient(large, kind, device) for kind in (backend, "torch"))
            name = f"256 pixels, {density:.0%}"
            note("loss at 256", float(((torch.stack(one[:3]) - torch.stack(other[:3])) / torch.stack(other[:3])).abs().max()), name)
            note("gradient at 256", float((one[3] - other[3]).norm() / other[3].norm()), name)
        for name, case in DENSE_CASES.items():
            inputs = make_inputs(case)
            entries = int(inputs.mask.sum()) * case.search**2
            for weights in ((0.0, 900.0), (700.0, 0.0)):
                want = reference_loss(inputs, case, weights)
                sums, slope = run_path("by tiles", Inputs(*(tensor.to(device) for tensor in inputs)), case, weights)
                terms = torch.stack(want[1:3])
                note("loss", float(((sums.cpu() / entries - terms) / terms).abs().max()), f"{name}, by tiles")
                note("gradient", _largest(slope.cpu().double() / entries, want[3]), f"{name}, by tiles")
    return worst


def run_path(path: str, inputs: Inputs, case: Case, weights: tuple[float, float] = (WEIGHT, WEIGHT)) -> tuple[Tensor, Tensor]:
    """The CUDA loss by one of PATHS, whatever the mask: sums [L1, KL] and their gradient, as in `ssg_cuda_dense.run_loss`."""
    launch, shared_limit = ssg_cuda.launcher(inputs.sr.device)
    settings, least = case.inner(), PATHS[path]
    return ssg_cuda_dense.run_loss(launch, *inputs, settings, weights, with_gradient=True, shared_limit=shared_limit, least=least)


def _largest(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


def _loss_and_gradient(case: Case, backend: str, device: str, weights: tuple[float, float] = (WEIGHT, WEIGHT)) -> list[Tensor]:
    """Total, L1, KL and gradient on the CPU, float64."""
    inputs = make_inputs(case) if case in CASES.values() else draw_inputs(case, seed=0)
    sr = inputs.sr.to(device, copy=True).requires_grad_()
    ssl = SelfSimilarityLoss(**case.settings(), l1_weight=weights[0], kl_weight=weights[1], backend=backend)
    total, terms = ssl(sr, inputs.gt.to(device), inputs.mask.to(device), return_terms=True)
    total.backward()
    assert sr.grad is not None
    return [tensor.detach().cpu().double() for tensor in (total, terms["l1"], terms["kl"], sr.grad)]


def make_pair(size: int, density: float, stride: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """A smooth picture with edges, a blurred and noised copy [1, 3, size, size] of it, a random mask [1, 1, size, size]: sr, gt, mask."""
    generator = torch.Generator().manual_seed(size)
    coarse = torch.rand(1, 3, size // 4 + 2, size // 4 + 2, generator=generator)
    gt = F.interpolate(coarse, size=(size, size), mode="bicubic").clamp(0, 1)
    sr = F.avg_pool2d(F.pad(gt, (1,) * 4, mode="reflect"), 3, stride=1) + 0.02 * torch.randn(gt.shape, generator=generator)
    mask = torch.rand(1, 1, size, size, generator=generator) < density
    return sr.to(device), gt.to(device), apply_mask_stride(mask, stride).to(device)


def speed(device: str = "cuda", size: int = 512, densities: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0), repeats: int = 5) -> dict[str, Any]:
    """Median milliseconds of forward and backward and the peak of extra memory, of the device's own backend and of others beside it.

    On a GPU also the path by rows and that by tiles on a full mask, and the density at which they meet: the first takes its time per
    masked pixel, the second per tile.
    """
    found: dict[str, Any] = {}
    for density in densities:
        inputs = make_pair(size, density, 1, device)
        for name, loss in _losses(device).items():
            if name == "direct" and int(inputs[2].sum()) * 625 * 4 * 9.5 > torch.cuda.mem_get_info()[0]:
                continue  # it keeps about nine values per entry of the graph
            seconds, extra = _seconds(lambda: _gradient(loss, inputs), repeats if name == "ours" else 1)  # noqa: B023  # called here
            found[f"{name} {density:.0%} ms"] = round(1e3 * seconds, 3)
            if name == "ours":
                found[f"{name} {density:.0%} MiB"] = round(extra / 2**20, 1)
    return {**found, **_crossing(size, repeats)} if device == "cuda" else found


def _crossing(size: int, repeats: int) -> dict[str, float]:
    case = Case((1, 3, size, size), sigma=0.004)
    inputs = Inputs(*make_pair(size, 1.0, 1, "cuda"))
    times = {path: 1e3 * _seconds(lambda: run_path(path, inputs, case), repeats)[0] for path in PATHS}  # noqa: B023  # called here
    found = {f"full mask {path} ms": round(time, 3) for path, time in times.items()}
    return {**found, "density where they meet": round(times["by tiles"] / times["by rows"], 3), "assumed": ssg_cuda_dense.crossing(9, 3)}


def _losses(device: str) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """The loss by the device's own backend, by torch, and in a checkout on a GPU by the direct kernels of benchmarks/ssg_direct.py."""
    found: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        name: SelfSimilarityLoss(l1_weight=WEIGHT, kl_weight=WEIGHT, backend=backend)
        for name, backend in (("ours", device), ("torch", "torch"))  # a device's name is its backend's
    }
    file = PACKAGE.parent / "benchmarks" / "ssg_direct.py"
    if device == "cuda" and file.is_file():
        spec = importlib.util.spec_from_file_location("ssg_direct", file)
        assert spec is not None
        assert spec.loader is not None
        direct = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(direct)
        settings = GraphSettings(25, 9, 0.004, True)
        found["direct"] = lambda sr, gt, mask: direct.direct_loss(sr, gt, mask, settings, (WEIGHT, WEIGHT), None)[0]
    return found


def _gradient(loss: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    sr = inputs[0].clone().requires_grad_()
    return torch.autograd.grad(loss(sr, *inputs[1:]), sr)[0]


def _seconds(call: Callable[[], object], repeats: int) -> tuple[float, int]:
    """Median wall clock of a call after one to warm up, and the bytes that it takes beyond what was there (GPU alone)."""
    on_gpu = torch.cuda.is_available()
    call()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if on_gpu else 0
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return sorted(times)[len(times) // 2], (torch.cuda.max_memory_allocated() if on_gpu else 0) - before
