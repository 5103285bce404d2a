"""The CUDA backend's torch ops over the emulated kernels: values, gradients, opcheck, torch.compile."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from emulation.emulator import COMPILER, SHARED_LIMIT, EmulatedLauncher
from ssg_cuda_cases import assert_same_gradient

from sslsr_diffusion.checkup.cases import Case, make_inputs, reference_graph, reference_loss
from sslsr_diffusion.ops import SelfSimilarityLoss, cupy_loader, differentiable_operators, ssg_cuda

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++ on Linux")

WEIGHTS = (700.0, 900.0)


@pytest.fixture(scope="module")
def cpu_ops():
    """Gives the custom ops a CPU kernel that emulates: opcheck, autograd and torch.compile then run without a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ssg_cuda, "launcher", lambda device: (EmulatedLauncher(), SHARED_LIMIT))
        for op in (ssg_cuda._loss, ssg_cuda._graph, ssg_cuda._graph_backward):
            op.register_kernel("cpu")(op._init_fn)
        yield


SMALL = Case((2, 3, 9, 10), search=7, window=3, density=0.3)


@pytest.mark.parametrize("num_rows", [None, 11.5, torch.tensor(0.125)])
def test_loss_glue(cpu_ops, num_rows):
    inputs = make_inputs(SMALL)
    sr = inputs.sr.clone().requires_grad_()
    total, l1, kl = ssg_cuda.loss(sr, inputs.gt, inputs.mask, SMALL.inner(), WEIGHTS, num_rows)
    want = reference_loss(inputs, SMALL, WEIGHTS, None if num_rows is None else float(num_rows))
    torch.testing.assert_close(torch.stack([total, l1, kl]).double(), torch.stack(want[:3]), rtol=5e-6, atol=0)
    assert (total.dtype, total.shape, l1.requires_grad, kl.requires_grad) == (torch.float32, (), False, False)
    (3 * total).backward()
    assert_same_gradient(sr.grad / 3, want[3])


@pytest.mark.parametrize("num_rows", [0, torch.tensor(0.0)])
def test_no_rows_at_all_is_zero(cpu_ops, num_rows):
    inputs = make_inputs(SMALL)
    sr = inputs.sr.clone().requires_grad_()
    total, l1, kl = ssg_cuda.loss(sr, inputs.gt, inputs.mask, SMALL.inner(), WEIGHTS, num_rows)
    total.backward()
    assert total == l1 == kl == 0
    assert torch.equal(sr.grad, torch.zeros_like(sr))


def test_loss_glue_on_an_empty_mask(cpu_ops):
    inputs = make_inputs(SMALL)
    sr = inputs.sr.clone().requires_grad_()
    total, l1, kl = ssg_cuda.loss(sr, inputs.gt, torch.zeros_like(inputs.mask), SMALL.inner(), WEIGHTS, None)
    total.backward()
    assert torch.equal(torch.stack([total, l1, kl]), torch.zeros(3))
    assert torch.equal(sr.grad, torch.zeros_like(sr))


def test_graph_glue(cpu_ops):
    inputs = make_inputs(SMALL)
    image = inputs.sr.to(memory_format=torch.channels_last).requires_grad_()
    rows = ssg_cuda.graph(image, inputs.mask, SMALL.inner())
    cotangent = torch.randn(rows.shape, generator=torch.Generator().manual_seed(2))
    want, want_gradient = reference_graph(inputs, SMALL, cotangent)
    assert (rows - want).abs().max() <= 2e-6
    (got,) = torch.autograd.grad(rows, image, cotangent)
    assert_same_gradient(got, want_gradient)
    empty = ssg_cuda.graph(image, torch.zeros_like(inputs.mask), SMALL.inner())
    assert empty.shape == (0, 49)
    assert torch.equal(torch.autograd.grad(empty.sum(), image)[0], torch.zeros_like(image))


def test_a_second_derivative_raises(cpu_ops):
    inputs = make_inputs(SMALL)
    sr = inputs.sr.clone().requires_grad_()
    for value in (
        ssg_cuda.loss(sr, inputs.gt, inputs.mask, SMALL.inner(), WEIGHTS, None)[0],
        ssg_cuda.graph(sr, inputs.mask, SMALL.inner()).square().sum(),
    ):
        (gradient,) = torch.autograd.grad(value, sr, create_graph=True)
        with pytest.raises(RuntimeError):
            gradient.square().sum().backward()


def test_opcheck(cpu_ops):
    inputs = make_inputs(SMALL)
    sr = inputs.sr.clone().requires_grad_()
    rows = torch.rand(int(inputs.mask.sum()), 49)
    for with_gradient in (True, False):
        image = sr if with_gradient else inputs.sr
        torch.library.opcheck(ssg_cuda._loss, (image, inputs.gt, inputs.mask, 7, 3, 0.02, True, 1.0, 2.0, with_gradient))
    torch.library.opcheck(ssg_cuda._graph, (sr, inputs.mask, 7, 3, 0.02, True))
    torch.library.opcheck(ssg_cuda._graph_backward, (rows.flip(1).contiguous(), rows, inputs.sr, inputs.mask, 7, 3, 0.02, True))
    torch.library.opcheck(differentiable_operators.scale_gradient, (inputs.sr, torch.tensor(2.0, dtype=torch.float64), inputs.sr))


def test_the_module_compiles_into_one_graph(cpu_ops, monkeypatch):
    """Through the public module, with the real question whether a GPU's backend is available."""
    ask = ssg_cuda.unavailable
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=SimpleNamespace(nvrtc=SimpleNamespace(getVersion=lambda: (13, 0)))))
    cupy_loader._cupy_problem.cache_clear()
    monkeypatch.setattr(ssg_cuda, "unavailable", lambda device: ask(torch.device("cuda", 0)))
    monkeypatch.setattr(torch.version, "hip", None)
    inputs = make_inputs(SMALL)
    ssl = SelfSimilarityLoss(**SMALL.settings(), l1_weight=WEIGHTS[0], kl_weight=WEIGHTS[1], mask_stride=2, backend="cuda")

    def step(sr):
        return ssl(sr * 1.5, inputs.gt, inputs.mask)

    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        sr = inputs.sr.clone().requires_grad_()
        total = run(sr)
        total.backward()
        results.append((total.detach(), sr.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
