"""The operator's contract, on every portable backend, against golden values and the float64 definition."""

from __future__ import annotations

import importlib.util
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from goldens import load_golden
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from ssg_inputs import assert_close, make_pair
from torch.autograd import forward_ad

from sslsr_diffusion.ops import BackendUnavailable, self_similarity_graph, ssg_cpu, ssg_cuda, ssg_torch
from sslsr_diffusion.ops.settings import GraphSettings
from sslsr_diffusion.ops.ssg import choose_backend
from sslsr_diffusion.ops.ssg_cuda_launch import row_geometry

GOLDEN = load_golden("ssl/ssg")
FLOAT32, FLOAT64 = torch.float32, torch.float64
EVERY = [("reference", FLOAT64), ("reference", FLOAT32), ("torch", FLOAT64), ("torch", FLOAT32), ("cpu", FLOAT32)]
# each pair is a compilation of several seconds for the CPU backend, so the drawn cases share few of them
COMPILED = ((3, 9), (1, 5))


@pytest.mark.parametrize(("backend", "dtype"), EVERY)
@pytest.mark.parametrize("case", GOLDEN.index, ids=lambda case: case["name"])
def test_golden(case, backend, dtype):
    image = GOLDEN.tensors[case["image"]][None].to(dtype)
    mask = GOLDEN.tensors[case["name"] + ".mask"][None, None]
    got = self_similarity_graph(
        image,
        mask,
        search_size=case["search"],
        window_size=case["window"],
        sigma=case["sigma"],
        normalize=case["normalise"],
        backend=backend,
    )
    want = GOLDEN.tensors[case["name"] + ".ssg64"]
    assert got.shape == want.shape
    assert got.dtype == dtype
    # the golden README's tolerances
    if dtype == FLOAT64:
        assert ((got - want).abs() <= 1e-12).all()
        assert ((got - want).abs() <= 1e-10 * want)[want > 1e-12].all()
    else:
        assert (got - want).abs().max() <= max(2e-6 if case["normalise"] else 1e-5, 4 * case["f32_max_abs_dev"])


@st.composite
def cases(draw, pairs):
    channels, window = draw(st.sampled_from(pairs))
    search = draw(st.integers(max(1, window // 2), 15)) * 2 + 1
    side = st.integers(search // 2 + 1, search // 2 + 1 + 14)
    return {
        "shape": (draw(st.integers(1, 3)), channels, draw(side), draw(side)),
        "search": search,
        "window": window,
        "sigma": draw(st.sampled_from((1e-3, 4e-3, 0.05, 1.0))),
        "normalize": draw(st.booleans()),
        "density": draw(st.sampled_from((0.0, 0.02, 0.1, 0.5, 1.0))),
        "seed": draw(st.integers(0, 1000)),
    }


def value_and_gradient(image, mask, case, backend, cotangent=None):
    image = image.clone().requires_grad_()
    out = self_similarity_graph(
        image,
        mask,
        search_size=case["search"],
        window_size=case["window"],
        sigma=case["sigma"],
        normalize=case["normalize"],
        backend=backend,
    )
    # rows sum to 1, so out.sum().backward() would be zero by construction: weigh with a random cotangent
    if cotangent is None:
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(case["seed"]), dtype=out.dtype)
    (gradient,) = torch.autograd.grad(out, image, cotangent.to(out.dtype))
    return out.detach(), gradient, cotangent


def check_against_reference(case, backends):
    image, _, mask = make_pair(*case["shape"], density=case["density"], seed=case["seed"])
    want, want_gradient, cotangent = value_and_gradient(image, mask, case, "reference")
    for backend, dtype in backends:
        got, gradient, _ = value_and_gradient(image.to(dtype), mask, case, backend, cotangent)
        # float32: a distance is rounded to 3e-7 and sigma = 1e-3 magnifies it up to 1000 times in the exponent
        tolerance = 1e-10 if dtype == FLOAT64 else 1e-5 + 2e-7 / case["sigma"]
        assert got.shape == want.shape
        if len(want):
            assert_close(got, want, tolerance, f"{backend} {dtype} value")
        assert_close(gradient, want_gradient, 3 * tolerance, f"{backend} {dtype} gradient")


@settings(max_examples=20, suppress_health_check=[HealthCheck.too_slow])
@given(cases([(c, w) for c in (1, 2, 3, 4) for w in (1, 3, 5, 7, 9, 15)]))
def test_torch_matches_float64_reference(case):
    check_against_reference(case, [("torch", FLOAT64), ("torch", FLOAT32)])


@settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(cases(COMPILED))
@example({"shape": (1, 3, 43, 150), "search": 25, "window": 9, "sigma": 0.004, "normalize": True, "density": 0.03, "seed": 1})
@example({"shape": (1, 3, 13, 13), "search": 25, "window": 9, "sigma": 0.004, "normalize": True, "density": 1.0, "seed": 2})
@example({"shape": (2, 1, 41, 137), "search": 7, "window": 5, "sigma": 0.05, "normalize": False, "density": 0.9, "seed": 3})
def test_cpu_matches_float64_reference(case):
    check_against_reference(case, [("cpu", FLOAT32)])


@pytest.mark.slow
def test_cpu_takes_any_sizes():
    """A window beyond two vectors of sixteen and as wide as the search, more channels than an image has. The definition in float64
    takes long for a pixel of such a window: a few of them."""
    check_against_reference(
        {"shape": (1, 5, 21, 26), "search": 35, "window": 35, "sigma": 0.02, "normalize": True, "density": 0.03, "seed": 0},
        [("cpu", FLOAT32)],
    )


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
@pytest.mark.parametrize("kind", ["constant", "noise", "out of range"])
def test_no_nan(kind, backend):
    generator = torch.Generator().manual_seed(0)
    image = {
        "constant": torch.full((1, 3, 16, 16), 0.3),
        "noise": torch.rand(1, 3, 16, 16, generator=generator),
        "out of range": torch.randn(1, 3, 16, 16, generator=generator) * 5,
    }[kind].requires_grad_()
    mask = torch.ones(1, 1, 16, 16, dtype=torch.bool)
    out = self_similarity_graph(image, mask, backend=backend)
    (gradient,) = torch.autograd.grad(out, image, torch.randn(out.shape, generator=generator))
    assert torch.isfinite(out).all()
    assert torch.isfinite(gradient).all()
    assert torch.allclose(out.sum(1), torch.ones(256), atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
def test_rows_come_by_image_then_raster(backend):
    image, _, mask = make_pair(3, 3, 21, 18, density=0.2, seed=5)
    image = image.float()
    whole = self_similarity_graph(image, mask, backend=backend)
    parts = [self_similarity_graph(image[i : i + 1], mask[i : i + 1], backend=backend) for i in range(3)]
    assert [len(part) for part in parts] == mask.sum((1, 2, 3)).tolist()
    torch.testing.assert_close(whole, torch.cat(parts), rtol=1e-6, atol=1e-7)  # a batch may be cut into other tiles


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
def test_only_ones_of_the_mask_count(backend):
    image = make_pair(1, 3, 14, 14, density=0.1, seed=0)[0].float()
    mask = torch.zeros(1, 1, 14, 14)
    mask[0, 0, 3, 4], mask[0, 0, 5, 5], mask[0, 0, 6, 6], mask[0, 0, 7, 7] = 1, 0.5, 2, 255
    assert self_similarity_graph(image, mask, backend=backend).shape == (1, 625)


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
def test_half_types_and_autocast_compute_in_float32(backend):
    image, _, mask = make_pair(1, 3, 16, 16, density=0.2, seed=0)
    for dtype in (torch.float16, torch.bfloat16):
        low = image.to(dtype).requires_grad_()
        out = self_similarity_graph(low, mask, backend=backend)
        want = self_similarity_graph(low.detach().float(), mask, backend=backend)
        assert out.dtype == torch.float32
        assert torch.equal(out.detach(), want)
        out.square().sum().backward()
        assert low.grad.dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(
            self_similarity_graph(image.float(), mask, backend=backend), self_similarity_graph(image.float(), mask, backend=backend).float()
        )
        inside = self_similarity_graph(image.float(), mask, backend=backend)
    assert torch.equal(inside, self_similarity_graph(image.float(), mask, backend=backend))


IMAGE, MASK = torch.rand(2, 3, 16, 16), torch.ones(2, 1, 16, 16, dtype=torch.bool)


@pytest.mark.parametrize(
    ("image", "mask", "options", "both_sides"),
    [
        (IMAGE[0], MASK, {}, r"\[B, C, H, W\], got \[3, 16, 16\]"),
        (IMAGE, MASK[:1], {}, r"\[2, 1, 16, 16\].*got \[1, 1, 16, 16\]"),
        (IMAGE, MASK.expand(2, 3, 16, 16), {}, r"\[2, 1, 16, 16\].*got \[2, 3, 16, 16\]"),
        ((IMAGE * 255).byte(), MASK, {}, r"floating point.*got torch.uint8"),
        (IMAGE, MASK.to("meta"), {}, r"device cpu, got on meta"),
        (IMAGE, MASK, {"search_size": 24}, r"search_size: expected a positive odd integer, got 24"),
        (IMAGE, MASK, {"window_size": 8}, r"window_size: .*got 8"),
        (IMAGE, MASK, {"search_size": 7, "window_size": 9}, r"at most search_size = 7, got 9"),
        (IMAGE, MASK, {"sigma": 0.0}, r"sigma: .*got 0.0"),
        (IMAGE, MASK, {"search_size": 33}, r"at least 17 pixels for search_size = 33, got 16 x 16"),
        (IMAGE, MASK, {"backend": "gpu"}, r"one of auto, reference, torch, cpu, cuda, got 'gpu'"),
        (IMAGE.double(), MASK, {"backend": "cpu"}, r"float32, got torch.float64"),
    ],
)
def test_mistakes_show_both_sides(image, mask, options, both_sides):
    with pytest.raises(ValueError, match=both_sides):
        self_similarity_graph(image, mask, **options)


@pytest.fixture
def asked_anew():
    """Whether numba is there is asked once per process."""
    yield
    ssg_cpu._numba_problem.cache_clear()


@pytest.mark.usefixtures("asked_anew")
def test_a_backend_by_name_never_falls_back(monkeypatch, caplog):
    with pytest.raises(BackendUnavailable, match=r'backend="cpu" cannot run here.*meta'):
        self_similarity_graph(IMAGE.to("meta"), MASK.to("meta"), backend="cpu")
    with pytest.raises(BackendUnavailable, match='backend="cuda" cannot run here'):
        self_similarity_graph(IMAGE, MASK, backend="cuda")
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        without_numba(caplog, "numba is not installed: pip install numba")
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: name)
        patch.setitem(sys.modules, "numba", None)  # its import fails, as that of one that does not fit the NumPy beside it
        without_numba(caplog, "numba cannot be imported (ModuleNotFoundError: import of numba halted")


def without_numba(caplog, reason):
    """By name it is refused; auto goes on with torch and says so once."""
    ssg_cpu._numba_problem.cache_clear()
    caplog.clear()
    with pytest.raises(BackendUnavailable, match=re.escape(reason)):
        self_similarity_graph(IMAGE, MASK, backend="cpu")
    for _ in range(2):
        assert len(self_similarity_graph(IMAGE, MASK)) == 512
    assert len(caplog.records) == 1
    assert reason in caplog.text


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("power", [1, 2])
def test_second_derivatives_raise(backend, power):
    """Also where the upstream gradient is a constant (power 1): the operator's own curvature would be missing."""
    image = IMAGE.clone().requires_grad_()
    out = self_similarity_graph(image, MASK, backend=backend)
    (gradient,) = torch.autograd.grad(out.pow(power).sum(), image, create_graph=True)
    with pytest.raises(RuntimeError, match='has no second derivative in its fast backends; backend="reference" has one'):
        gradient.sum().backward()


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_a_forward_mode_derivative_is_refused(backend):
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(IMAGE, torch.ones_like(IMAGE))
        with pytest.raises(RuntimeError, match="has no forward-mode derivative"):
            self_similarity_graph(dual, MASK, backend=backend)
        assert forward_ad.unpack_dual(self_similarity_graph(dual, MASK, backend="reference")).tangent is not None


def test_what_is_no_tensor_is_named():
    with pytest.raises(ValueError, match="mask: expected a torch tensor, got ndarray"):
        self_similarity_graph(IMAGE, MASK.numpy())
    with pytest.raises(ValueError, match=r"sigma: expected a positive finite number, got '0\.004'"):
        self_similarity_graph(IMAGE, MASK, sigma="0.004")


def test_auto_takes_torch_for_sizes_that_a_gpu_has_no_room_for(monkeypatch):
    """As on a card with 64 KB of shared memory per block; by name it is never another backend."""
    image = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float32, shape=(1, 3, 256, 256))
    monkeypatch.setattr(ssg_cuda, "unavailable", lambda device: None)
    monkeypatch.setattr(ssg_cuda, "shared_memory_limit", lambda device: 64 * 1024)
    small, large = GraphSettings(25, 9, 0.004, True), GraphSettings(127, 31, 0.004, True)
    assert choose_backend("auto", image, small) is ssg_cuda
    assert choose_backend("auto", image, large) is ssg_torch
    assert choose_backend("cuda", image, large) is ssg_cuda
    with pytest.raises(ValueError, match=r"search_size = 127 with window_size = 31 needs \d+ bytes of shared memory"):
        row_geometry(127, 31, 3, 64 * 1024)
