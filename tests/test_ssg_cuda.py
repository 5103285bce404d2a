"""The CUDA backend on a GPU, through the public names. Runs alone: torch, CuPy, numpy and pytest are enough (golden: safetensors)."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from scripts import load_script
from ssg_cuda_cases import assert_same_gradient, golden_mask

from sslsr_diffusion.checkup.cases import CASES, DENSE_CASES, Case, Inputs, draw_inputs, make_inputs, reference_graph, reference_loss
from sslsr_diffusion.checkup.operator import run_path
from sslsr_diffusion.ops import BackendUnavailable, SelfSimilarityLoss, cupy_loader, self_similarity_graph, ssg_cuda, ssg_cuda_launch

cuda = pytest.mark.cuda
WEIGHTS = (700.0, 900.0)


@pytest.fixture(scope="module", autouse=True)
def _needs_cupy():
    if torch.cuda.is_available():
        pytest.importorskip("cupy")


def on_gpu(inputs: Inputs) -> Inputs:
    return Inputs(*(tensor.cuda() for tensor in inputs))


def module(case: Case, weights: tuple[float, float] = WEIGHTS) -> SelfSimilarityLoss:
    return SelfSimilarityLoss(**case.settings(), l1_weight=weights[0], kl_weight=weights[1], backend="cuda")


def loss_and_gradient(inputs: Inputs, case: Case, weights: tuple[float, float] = WEIGHTS, **named):
    sr = inputs.sr.clone().requires_grad_()
    total, terms = module(case, weights)(sr, inputs.gt, inputs.mask, return_terms=True, **named)
    total.backward()
    return total.detach(), terms["l1"], terms["kl"], sr.grad


def large_case(density: float = 0.1, size: int = 512) -> tuple[Case, Inputs]:
    case = Case((1, 3, size, size), sigma=0.004, density=density)
    return case, on_gpu(draw_inputs(case, seed=0))


@cuda
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_loss_matches_float64_reference(case):
    inputs = make_inputs(case)
    for weights in ((0.0, 900.0), (700.0, 0.0)):
        want = reference_loss(inputs, case, weights)
        got = loss_and_gradient(on_gpu(inputs), case, weights)
        torch.testing.assert_close(torch.stack(got[:3]).cpu().double(), torch.stack(want[:3]), rtol=2e-5, atol=0)
        assert_same_gradient(got[3], want[3])


@cuda
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_graph_matches_float64_reference(case):
    inputs = make_inputs(case)
    cotangent = torch.randn(int(inputs.mask.sum()), case.search**2, generator=torch.Generator().manual_seed(1))
    want, want_gradient = reference_graph(inputs, case, cotangent)
    image = inputs.sr.cuda().requires_grad_()
    rows = self_similarity_graph(image, inputs.mask.cuda(), **case.settings(), backend="cuda")
    assert (rows.cpu() - want).abs().max() <= 2e-6
    assert_same_gradient(torch.autograd.grad(rows, image, cotangent.cuda())[0], want_gradient)


@cuda
@pytest.mark.parametrize("case", DENSE_CASES.values(), ids=DENSE_CASES.keys())
def test_loss_by_tiles_matches_float64_reference(case):
    inputs = make_inputs(case)
    entries = int(inputs.mask.sum()) * case.search**2
    for weights in ((0.0, 900.0), (700.0, 0.0)):
        want = reference_loss(inputs, case, weights)
        sums, gradient = run_path("by tiles", on_gpu(inputs), case, weights)
        torch.testing.assert_close(sums.cpu() / entries, torch.stack(want[1:3]), rtol=2e-5, atol=0)
        assert_same_gradient(gradient / entries, want[3])


@cuda
@pytest.mark.parametrize("density", [0.05, 0.2, 1.0])
def test_both_paths_agree_and_the_loss_chooses_between_them(density):
    case, inputs = large_case(density, size=200)
    rows, tiles = (run_path(path, inputs, case, WEIGHTS) for path in ("by rows", "by tiles"))
    torch.testing.assert_close(rows[0], tiles[0], rtol=1e-5, atol=0)
    assert (rows[1] - tiles[1]).norm() <= 2e-3 * rows[1].norm()  # near-ties flip the sign of single L1 entries
    total, *_, gradient = loss_and_gradient(inputs, case)
    entries = int(inputs.mask.sum()) * 625
    torch.testing.assert_close(total.double() * entries, WEIGHTS[0] * tiles[0][0] + WEIGHTS[1] * tiles[0][1], rtol=1e-5, atol=0)
    assert (gradient * entries - tiles[1]).norm() <= 2e-3 * tiles[1].norm()


@cuda
def test_golden_losses():
    pytest.importorskip("safetensors")
    from goldens import load_golden

    index, tensors = load_golden("ssl/loss")
    for entry in index:
        name = entry["name"]
        case = Case((0, 0, 0, 0), entry["search"], entry["window"], entry["sigma"], entry["normalise"])
        mask = golden_mask(tensors[f"{name}.mask"], entry["mask_stride"]).cuda()
        sr, gt = (tensors[f"{name}.{side}"].float().cuda() for side in ("sr", "gt"))
        for weights, term in (((1.0, 0.0), "l1"), ((0.0, 1.0), "kl")):
            ssl = SelfSimilarityLoss(**case.settings(), l1_weight=weights[0], kl_weight=weights[1], backend="cuda")
            picture = sr.clone().requires_grad_()
            total = ssl(picture, gt, mask)
            total.backward()
            want = tensors[f"{name}.grad_{term}"]
            error = (picture.grad.cpu().double() - want).abs().max()
            if name == "identical":
                assert float(total.detach()) == 0.0, name
                assert error <= (0 if term == "l1" else 1e-7), name
            else:
                assert float(total.detach()) == pytest.approx(entry[term], rel=5e-5), name
                assert error <= 5e-4 * want.abs().max(), name


@cuda
def test_golden_graphs():
    pytest.importorskip("safetensors")
    from goldens import load_golden

    index, tensors = load_golden("ssl/ssg")
    for entry in index:
        case = Case((0, 0, 0, 0), entry["search"], entry["window"], entry["sigma"], entry["normalise"])
        image, mask = tensors[entry["image"]].float()[None].cuda(), tensors[f"{entry['name']}.mask"][None, None].cuda()
        got = self_similarity_graph(image, mask, **case.settings(), backend="cuda").cpu()
        worst = max(2e-6 if entry["normalise"] else 1e-5, 4 * entry["f32_max_abs_dev"])
        assert (got - tensors[f"{entry['name']}.ssg64"]).abs().max() <= worst, entry["name"]


@cuda
@pytest.mark.parametrize("density", [0.1, 1.0])
def test_same_input_same_bits(density):
    case, inputs = large_case(density)
    first = loss_and_gradient(inputs, case)
    for _ in range(5):
        for one, other in zip(first, loss_and_gradient(inputs, case)):
            assert torch.equal(one, other)


@cuda
def test_equal_images():
    case, inputs = large_case(size=128)
    sr = inputs.gt.clone().requires_grad_()
    SelfSimilarityLoss(backend="cuda")(sr, inputs.gt, inputs.mask).backward()
    total, l1, kl, _ = loss_and_gradient(inputs._replace(sr=inputs.gt), case)
    assert (float(total), float(l1), float(kl)) == (0.0, 0.0, 0.0)
    only_l1 = inputs.gt.clone().requires_grad_()
    SelfSimilarityLoss(backend="cuda", kl_weight=0.0)(only_l1, inputs.gt, inputs.mask).backward()
    assert torch.equal(only_l1.grad, torch.zeros_like(only_l1))


@cuda
def test_agrees_with_the_direct_kernels_and_the_torch_backend():
    case, inputs = large_case(density=0.03)
    weights = {"l1_weight": WEIGHTS[0], "kl_weight": WEIGHTS[1]}
    got = loss_and_gradient(inputs, case)
    sr = inputs.sr.clone().requires_grad_()
    direct = load_script("benchmarks/ssg_direct.py").direct_loss(sr, inputs.gt, inputs.mask, case.inner(), WEIGHTS, None)
    direct[0].backward()
    portable = SelfSimilarityLoss(**case.settings(), **weights, backend="torch")
    other = inputs.sr.clone().requires_grad_()
    portable(other, inputs.gt, inputs.mask).backward()
    torch.testing.assert_close(torch.stack(got[:3]), torch.stack(direct).detach(), rtol=1e-4, atol=0)
    for gradient in (sr.grad, other.grad):  # 625 offsets at thousands of pixels: near-ties flip the sign of single L1 entries
        assert (got[3] - gradient).norm() <= 2e-3 * gradient.norm()


@cuda
@pytest.mark.parametrize("density", [0.0, 0.03, 1.0])
def test_extra_memory_stays_below_64_megabytes(density):
    case, inputs = large_case(density)
    if density == 0:
        inputs = inputs._replace(mask=torch.zeros_like(inputs.mask))
    loss_and_gradient(inputs, case)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    total, *_, gradient = loss_and_gradient(inputs, case)
    assert torch.cuda.max_memory_allocated() - before < 64e6
    assert total.isfinite()
    assert gradient.isfinite().all()


@cuda
def test_the_host_never_waits():
    case, inputs = large_case(size=64)
    loss_and_gradient(inputs, case)  # compiled here
    rows = torch.tensor(12.5, device="cuda")  # its copy to the GPU is waited for
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss_and_gradient(inputs, case)
        loss_and_gradient(inputs, case, num_rows=rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@cuda
def test_runs_on_the_current_stream():
    """Queued behind slow work on a side stream: run on another stream, the kernels would read the images too early."""
    case, inputs = large_case(size=64)
    want = loss_and_gradient(inputs, case)
    late = [torch.zeros_like(tensor) for tensor in inputs[:2]]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for image, real in zip(late, inputs[:2]):
            image.copy_(real)
        got = loss_and_gradient(Inputs(*late, inputs.mask), case)
    stream.synchronize()
    for one, other in zip(got, want):
        assert torch.equal(one, other)


@cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_tensors_device():
    case, inputs = large_case(size=64)
    want = loss_and_gradient(inputs, case)
    got = loss_and_gradient(Inputs(*(tensor.to("cuda:1") for tensor in inputs)), case)
    for one, other in zip(got, want):
        assert torch.equal(one.cpu(), other.cpu())


@cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_and_autocast_compute_in_float32(dtype):
    case, inputs = large_case(size=64)
    half = Inputs(inputs.sr.to(dtype), inputs.gt.to(dtype), inputs.mask)
    want = loss_and_gradient(Inputs(half.sr.float(), half.gt.float(), half.mask), case)
    got = loss_and_gradient(half, case)
    with torch.autocast("cuda", dtype):
        inside = loss_and_gradient(half, case)
    for values in (got, inside):
        assert torch.equal(values[0], want[0])
        assert values[3].dtype == dtype
        assert torch.equal(values[3], want[3].to(dtype))


@cuda
def test_opcheck_and_compile():
    inputs = on_gpu(make_inputs(CASES["one channel"]))
    sr = inputs.sr.clone().requires_grad_()
    torch.library.opcheck(ssg_cuda._loss, (sr, inputs.gt, inputs.mask, 7, 3, 0.02, True, 1.0, 2.0, True))
    torch.library.opcheck(ssg_cuda._graph, (sr, inputs.mask, 7, 3, 0.02, True))
    ssl = module(CASES["one channel"])

    def step(image):
        return ssl(image * 1.5, inputs.gt, inputs.mask)

    results = []
    for run in (step, torch.compile(step, fullgraph=True)):
        image = inputs.sr.clone().requires_grad_()
        total = run(image)
        total.backward()
        results.append((total.detach(), image.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-7)


@cuda
def test_sizes_beyond_shared_memory_are_refused():
    image = torch.rand(1, 3, 130, 130, device="cuda")
    mask = torch.zeros(1, 1, 130, 130, dtype=torch.bool, device="cuda")
    mask[..., 5, 5] = True
    with pytest.raises(ValueError, match="bytes of shared memory"):
        self_similarity_graph(image, mask, search_size=255, window_size=101, backend="cuda")


# ---- without a GPU


def test_asked_for_on_the_cpu_it_says_why():
    with pytest.raises(BackendUnavailable, match="needs tensors on an NVIDIA GPU, these are on cpu"):
        self_similarity_graph(torch.rand(1, 3, 13, 13), torch.ones(1, 1, 13, 13), backend="cuda")


def test_importing_loads_nothing_slow():
    slow = "{'cupy', 'torch._dynamo'}"  # the second takes seconds
    code = f"import sys, sslsr_diffusion.ops.ssg_cuda; assert not {slow} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert cupy_loader.find_source("ssg_loss.cu") is not None


@pytest.mark.parametrize(
    ("search", "window", "channels"), [(25, 9, 3), (25, 9, 1), (31, 31, 3), (3, 1, 2), (3, 3, 4), (11, 5, 7), (51, 3, 2), (101, 9, 3)]
)
def test_geometry_of_a_row(search, window, channels):
    row = ssg_cuda_launch.row_geometry(search, window, channels, 232448)
    runs = -(-search // row.run)
    assert row.threads % 32 == 0
    assert 32 <= row.threads <= 512
    assert row.stride >= runs * row.run + window - 1
    assert row.plane >= (search + window - 1) * row.stride
    offsets = [(item % search) * row.stride + item // search * row.run for item in range(min(search * runs, row.threads))]
    for warp in range(0, len(offsets), 32):  # each thread of a warp its own bank
        banks = [offset % 32 for offset in offsets[warp : warp + 32]]
        assert len(set(banks)) == len(banks)


def test_geometry_of_the_published_sizes():
    """Five blocks of 128 threads on an H100 (228 KiB of shared memory, 1 KiB of it kept by each block), two on the smallest GPU."""
    row = ssg_cuda_launch.row_geometry(25, 9, 3, 232448)
    assert (row.threads, row.run, row.group) == (128, 5, 3)
    assert 5 * (row.shared_bytes + 1024) <= 228 * 1024
    assert row == ssg_cuda_launch.row_geometry(25, 9, 3, 65536)
    with pytest.raises(ValueError, match=r"search_size = 255 with window_size = 101 needs \d+ bytes of shared memory .* has 232448"):
        ssg_cuda_launch.row_geometry(255, 101, 3, 232448)
    assert ssg_cuda_launch.row_geometry(61, 9, 4, 101376).group < 4  # fewer channels at a time before it is refused


@pytest.mark.parametrize("shape", [(1, 3, 512, 512), (1, 3, 1024, 1024), (8, 3, 512, 512), (1, 3, 64, 64), (1, 3, 13, 14), (64, 3, 64, 64)])
def test_geometry_of_the_tiles(shape):
    tiling = ssg_cuda_launch.tile_geometry(torch.Size(shape), 25)
    launches = list(tiling.launches())
    assert tiling.tiles == shape[0] * -(-shape[2] // tiling.tile_h) * -(-shape[3] // tiling.tile_w)
    assert [tile for launch in launches for tile in launch] == list(range(tiling.tiles))
    assert max(map(len, launches)) * tiling.slot_floats * 4 <= ssg_cuda_launch.SLOT_BYTES
    assert tiling.tile_h * tiling.tile_w <= 256
