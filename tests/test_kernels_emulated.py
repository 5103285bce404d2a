"""The CUDA kernels, unchanged and launched with the host's own geometry, on a CPU: values and gradients against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from emulation.emulator import COMPILER, SHARED_LIMIT, EmulatedLauncher
from goldens import load_golden
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripts import load_script
from ssg_cuda_cases import assert_same_gradient, golden_mask
from ssg_inputs import assert_close

from sslsr_diffusion.checkup.cases import CASES, Case, Inputs, draw_inputs, make_inputs, reference_graph, reference_loss
from sslsr_diffusion.ops import ssg_reference
from sslsr_diffusion.ops.settings import GraphSettings
from sslsr_diffusion.ops.ssg_cuda_launch import run_graph, run_graph_backward, run_loss

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++ on Linux")

WEIGHTS = (700.0, 900.0)


def emulate_loss(inputs: Inputs, settings: GraphSettings, weights=WEIGHTS, reverse=False, with_gradient=True, **named):
    launch = EmulatedLauncher(reverse)
    sums, gradient = run_loss(launch, *inputs, settings, weights, with_gradient=with_gradient, shared_limit=SHARED_LIMIT, **named)
    return sums, gradient, launch


# ---- stored results of the published code


@pytest.mark.parametrize("entry", load_golden("ssl/ssg").index, ids=lambda entry: entry["name"])
def test_golden_graphs(entry):
    tensors = load_golden("ssl/ssg").tensors
    image = tensors[entry["image"]].float()[None].contiguous()
    pixels = tensors[f"{entry['name']}.mask"].flatten().nonzero().squeeze(1)
    settings = GraphSettings(entry["search"], entry["window"], entry["sigma"], entry["normalise"])
    got = run_graph(EmulatedLauncher(), image, pixels, settings, shared_limit=SHARED_LIMIT)
    worst = max(2e-6 if entry["normalise"] else 1e-5, 4 * entry["f32_max_abs_dev"])  # the README's
    assert not got.isnan().any()
    assert (got - tensors[f"{entry['name']}.ssg64"]).abs().max() <= worst


@pytest.mark.parametrize("entry", load_golden("ssl/loss").index, ids=lambda entry: entry["name"])
def test_golden_losses(entry):
    name, tensors = entry["name"], load_golden("ssl/loss").tensors
    mask = golden_mask(tensors[f"{name}.mask"], entry["mask_stride"])
    inputs = Inputs(tensors[f"{name}.sr"].float().contiguous(), tensors[f"{name}.gt"].float().contiguous(), mask)
    settings = GraphSettings(entry["search"], entry["window"], entry["sigma"], entry["normalise"])
    entries = entry["rows"] * entry["search"] ** 2
    assert mask.sum() == entry["rows"]
    for weights, term in (((1.0, 0.0), "l1"), ((0.0, 1.0), "kl")):
        sums, gradient, _ = emulate_loss(inputs, settings, weights)
        got = {"l1": float(sums[0]) / entries, "kl": float(sums[1]) / entries}
        want = tensors[f"{name}.grad_{term}"]
        error = (gradient.double() / entries - want).abs().max()
        if name == "identical":
            assert got == {"l1": 0.0, "kl": 0.0}
            assert error <= (0 if term == "l1" else 1e-7)
        else:
            assert got == pytest.approx({"l1": entry["l1"], "kl": entry["kl"]}, rel=5e-5)
            assert error <= 5e-4 * want.abs().max()


# ---- against the float64 reference


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_loss_matches_float64_reference(case):
    inputs = make_inputs(case)
    entries = int(inputs.mask.sum()) * case.search**2
    for weights in ((0.0, 900.0), (700.0, 0.0)):
        _, l1, kl, want = reference_loss(inputs, case, weights)
        sums, gradient, launch = emulate_loss(inputs, case.inner(), weights)
        assert launch.launches == ["ssg_loss", "ssg_gather"]
        assert sums[0] / entries == pytest.approx(float(l1), rel=1e-5)  # up to 1323 float32 terms in a distance
        assert sums[1] / entries == pytest.approx(float(kl), rel=2e-5)  # a sum with cancelling signs
        assert_same_gradient(gradient / entries, want)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_graph_matches_float64_reference(case):
    inputs = make_inputs(case)
    pixels = inputs.mask.flatten().nonzero().squeeze(1)
    cotangent = torch.randn(len(pixels), case.search**2, generator=torch.Generator().manual_seed(1))
    want, want_gradient = reference_graph(inputs, case, cotangent)
    launch = EmulatedLauncher()
    rows = run_graph(launch, inputs.sr, pixels, case.inner(), shared_limit=SHARED_LIMIT)
    gradient = run_graph_backward(launch, inputs.sr, inputs.mask, rows, cotangent, case.inner(), shared_limit=SHARED_LIMIT)
    assert (rows - want).abs().max() <= 2e-6
    assert_same_gradient(gradient, want_gradient)


# each line is a compilation of the kernels by g++, which the cases above have made already but for the first
COMPILED = ((4, 5, 3), (1, 7, 3), (3, 7, 7), (2, 9, 1), (3, 3, 3), (3, 11, 5), (5, 11, 5), (3, 25, 9), (3, 31, 21))


@st.composite
def drawn_cases(draw) -> tuple[Case, Inputs, tuple[float, float]]:
    """Sizes from the smallest that the search allows, any batch, masks from empty to full, image by image."""
    channels, search, window = draw(st.sampled_from(COMPILED))
    side = st.integers(search // 2 + 1, search // 2 + 8)
    shape = (draw(st.integers(1, 3)), channels, draw(side), draw(side))
    case = Case(shape, search, window, draw(st.sampled_from((1e-3, 4e-3, 0.05, 1.0))), draw(st.booleans()))
    sr, gt, _ = draw_inputs(case, draw(st.integers(0, 1000)))
    pixels = torch.rand(shape[0], 1, *shape[2:], generator=torch.Generator().manual_seed(draw(st.integers(0, 1000))))
    most = 3e6 / (channels * search**2 * window**2 * shape[0])  # rows per image: the float64 reference keeps every product
    densities = [draw(st.sampled_from((0.3, 1.0, 0.03, 0.0))) for _ in range(shape[0])]
    mask = pixels < torch.tensor([min(density, most / pixels[0].numel()) for density in densities]).view(-1, 1, 1, 1)
    return case, Inputs(sr, gt, mask), draw(st.sampled_from(((0.0, 900.0), (700.0, 0.0), (700.0, 900.0), (0.0, 0.0))))


def drawn_tolerance(case: Case) -> float:
    """A distance is rounded to 3e-7, and sigma = 1e-3 magnifies that up to 1000 times in the exponent."""
    return 1e-5 + 2e-7 / case.sigma


def gradient_floor(case: Case) -> float:
    """A pixel's gradient is a difference of sums of weight * brightness / kappa; with sigma = 1e-3 only its rounding may be left."""
    return 1e-6 * case.window / (case.shape[1] * case.window**2 * case.sigma)


def almost_equal_somewhere(case: Case, inputs: Inputs) -> bool:
    """Where float32 cannot tell which graph is larger, the sign in the L1 gradient is anybody's."""
    sr, gt = (ssg_reference.graph(image.double(), inputs.mask, case.inner()) for image in (inputs.sr, inputs.gt))
    return bool(((sr - gt).abs() <= 2 * drawn_tolerance(case) * gt)[(gt > 1e-5) & (gt < 1)].any())


@settings(max_examples=80, suppress_health_check=[HealthCheck.too_slow])
@given(drawn_cases())
def test_drawn_losses_match_float64_reference(drawn):
    case, inputs, weights = drawn
    if weights[0] and almost_equal_somewhere(case, inputs):
        weights = (0.0, weights[1])
    sums, gradient, _ = emulate_loss(inputs, case.inner(), weights)
    rows = max(int(inputs.mask.sum()), 1)
    _, l1, kl, want = reference_loss(inputs, case, weights, num_rows=rows)
    tolerance = drawn_tolerance(case)
    largest = tolerance / (case.search**2 if case.normalize else 1)  # the mean of a graph times its relative error
    assert (sums / (rows * case.search**2)).tolist() == pytest.approx([float(l1), float(kl)], rel=tolerance, abs=largest)
    floor = max(weights) * gradient_floor(case) / (rows * case.search**2)
    assert_close(gradient / (rows * case.search**2), want, 3 * tolerance, "gradient", floor)


@settings(max_examples=80, suppress_health_check=[HealthCheck.too_slow])
@given(drawn_cases())
def test_drawn_graphs_match_float64_reference(drawn):
    case, inputs, _ = drawn
    pixels = inputs.mask.flatten().nonzero().squeeze(1)
    cotangent = torch.randn(len(pixels), case.search**2, generator=torch.Generator().manual_seed(1))
    want, want_gradient = reference_graph(inputs, case, cotangent)
    rows = run_graph(EmulatedLauncher(), inputs.sr, pixels, case.inner(), shared_limit=SHARED_LIMIT)
    named = {"shared_limit": SHARED_LIMIT}
    gradient = run_graph_backward(EmulatedLauncher(), inputs.sr, inputs.mask, rows, cotangent, case.inner(), **named)
    tolerance = drawn_tolerance(case)
    assert rows.shape == want.shape
    if len(rows):
        assert_close(rows, want, tolerance, "rows")
    assert_close(gradient, want_gradient, 3 * tolerance, "gradient", gradient_floor(case))


def test_kl_of_almost_equal_images_keeps_its_digits():
    """Here KL is of second order in the difference while its terms are of first: an error in ln Z would swamp it."""
    case = Case((1, 3, 20, 20), sigma=0.004)
    inputs = make_inputs(case)
    inputs = inputs._replace(sr=inputs.gt + 0.002 * (inputs.sr - inputs.gt))
    _, _, want, _ = reference_loss(inputs, case, WEIGHTS)
    sums, _, _ = emulate_loss(inputs, case.inner(), with_gradient=False)
    assert sums[1] / (int(inputs.mask.sum()) * 625) == pytest.approx(float(want), rel=1e-3, abs=1e-11)


# ---- what a GPU would only show now and then


@pytest.mark.parametrize("name", ["published", "full mask", "many offsets per thread"])
def test_same_bits_in_any_order_of_threads(name):
    """A missing barrier lets a thread read what the one before it has, or has not yet, written."""
    inputs = make_inputs(CASES[name])
    forward, backward = (emulate_loss(inputs, CASES[name].inner(), reverse=reverse) for reverse in (False, True))
    assert torch.equal(forward[0], backward[0])
    assert torch.equal(forward[1], backward[1])


def test_graph_backward_has_the_same_bits_in_any_order_of_threads():
    case = CASES["one channel"]
    inputs = make_inputs(case)
    rows = torch.rand(int(inputs.mask.sum()), case.search**2)
    results = [
        run_graph_backward(EmulatedLauncher(reverse), inputs.sr, inputs.mask, rows, 1 - rows, case.inner(), shared_limit=SHARED_LIMIT)
        for reverse in (False, True)
    ]
    assert torch.equal(*results)


@pytest.mark.parametrize("slot_bytes", [1, 40_000, 90_000])
def test_what_does_not_fit_is_done_in_several_launches(slot_bytes):
    case = Case((3, 3, 18, 33), search=7, window=3, density=0.2)
    inputs = make_inputs(case)
    whole, pieces = (emulate_loss(inputs, case.inner(), **named) for named in ({}, {"slot_bytes": slot_bytes}))
    assert whole[2].launches == ["ssg_loss", "ssg_gather"]
    assert len(pieces[2].launches) > 2
    torch.testing.assert_close(pieces[0], whole[0], rtol=1e-12, atol=0)  # double sums, other tiles
    torch.testing.assert_close(pieces[1], whole[1], rtol=1e-4, atol=1e-5 * float(whole[1].abs().max()))


def test_without_a_gradient_the_values_are_the_same_and_nothing_is_kept():
    inputs = make_inputs(CASES["full mask"])
    settings = CASES["full mask"].inner()
    with_gradient, without = emulate_loss(inputs, settings), emulate_loss(inputs, settings, with_gradient=False)
    assert without[2].launches == ["ssg_loss"]
    assert without[1].numel() == 0
    assert torch.equal(with_gradient[0], without[0])


def test_empty_masks():
    inputs = make_inputs(CASES["full mask"])
    inputs = inputs._replace(mask=torch.zeros_like(inputs.mask))
    sums, gradient, _ = emulate_loss(inputs, CASES["full mask"].inner())
    assert torch.equal(sums, torch.zeros(2, dtype=torch.float64))
    assert torch.equal(gradient, torch.zeros_like(inputs.sr))


@pytest.mark.parametrize(
    ("image", "name"), [(torch.full((1, 3, 14, 15), 0.7), "constant"), (torch.randn(1, 3, 14, 15) * 50, "far outside")]
)
def test_strange_pictures_give_numbers(image, name):
    mask = torch.ones(1, 1, 14, 15, dtype=torch.bool)
    mask[..., 1::2] = False
    sums, gradient, _ = emulate_loss(Inputs(image, image.flip(3).contiguous(), mask), GraphSettings(7, 3, 0.004, True))
    assert sums.isfinite().all()
    assert gradient.isfinite().all()


# ---- the direct formulation agrees


@pytest.mark.parametrize("name", ["published", "one channel", "five channels, the last group not full"])
def test_direct_loss_matches_float64_reference(name):
    case, inputs = CASES[name], make_inputs(CASES[name])
    sr = inputs.sr.clone().requires_grad_()
    direct_loss = load_script("benchmarks/ssg_direct.py").direct_loss
    total, l1, kl = direct_loss(sr, inputs.gt, inputs.mask, case.inner(), WEIGHTS, None, block=64, launch=EmulatedLauncher())
    total.backward()
    want = reference_loss(inputs, case, WEIGHTS)
    torch.testing.assert_close(torch.stack([total, l1, kl]).detach().double(), torch.stack(want[:3]), rtol=2e-5, atol=0)
    assert_same_gradient(sr.grad, want[3])


# ---- the emulation finds what it is there to find

BROKEN = {
    "a thread that skips a barrier": ("if (threadIdx.x != 3) __syncthreads(); out[threadIdx.x] = 1.f;", "wait at a barrier"),
    "a write past shared memory": ("shared_memory[4].x = 1.f; out[threadIdx.x] = 1.f;", "past the end of shared memory"),
    "a write past a tensor": ("out[threadIdx.x + 1] = 1.f;", "outside of the tensor"),
}


@pytest.mark.parametrize(("body", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_emulation_finds(body, message, tmp_path):
    file = tmp_path / "broken.cu"
    file.write_text(f'extern __shared__ float4 shared_memory[];\nextern "C" __global__ void broken(float* out) {{ {body} }}\n')
    with pytest.raises(RuntimeError, match=message):
        EmulatedLauncher()(str(file), "broken", (), 1, 64, 64, [torch.zeros(64)])
    with pytest.raises(RuntimeError, match="the kernel takes p, the host sends pi"):
        EmulatedLauncher()(str(file), "broken", (), 1, 64, 64, [torch.zeros(64), np.int32(1)])


def test_emulation_shows_a_missing_barrier_by_another_order(tmp_path):
    file = tmp_path / "race.cu"
    file.write_text("""extern __shared__ float4 shared_memory[];
extern "C" __global__ void race(float* out) {
    float* line = reinterpret_cast<float*>(shared_memory);
    line[threadIdx.x] = (float)threadIdx.x;
    out[threadIdx.x] = line[(threadIdx.x + 63) % 64];
}""")
    results = [torch.zeros(64), torch.zeros(64)]
    for reverse, out in enumerate(results):
        EmulatedLauncher(bool(reverse))(str(file), "race", (), 1, 64, 256, [out])
    assert not torch.equal(*results)
