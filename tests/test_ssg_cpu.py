"""The compiled CPU backend beyond the shared contract: operators, threads, repeatability, tile shapes, cache."""

from __future__ import annotations

import logging
import multiprocessing
import os
import subprocess
import sys
import threading

import pytest
import torch
from ssg_inputs import assert_close, make_pair

from sslsr_diffusion.ops import SelfSimilarityLoss, _cpu_layout, self_similarity_graph, ssg_cpu, ssg_torch

SIZES = (7, 3, 0.05, True)  # sizes that other tests compile anyway


def loss_and_gradient(sr, gt, mask, **options):
    x = sr.float().requires_grad_()
    loss = SelfSimilarityLoss(*SIZES, l1_weight=700, kl_weight=900, **{"backend": "cpu", **options})(x, gt.to(x.dtype), mask)
    loss.backward()
    return loss.detach(), x.grad


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("module", [ssg_cpu, ssg_torch])
def test_opcheck(module):
    sr, gt, mask = make_pair(2, 3, 12, 14, density=0.3, seed=0)
    sr, gt = sr.float().requires_grad_(), gt.float()
    rows = mask.sum()
    torch.library.opcheck(module._graph, (sr, mask, *SIZES))
    torch.library.opcheck(module._loss, (sr, gt, mask, rows, *SIZES, 1.0, 2.0, True))
    torch.library.opcheck(module._loss, (sr.detach(), gt, mask, rows, *SIZES, 1.0, 2.0, False))


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_torch_compile_traces_past_it(backend, dynamic):
    sr, gt, mask = make_pair(1, 3, 12, 14, density=0.3, seed=0)
    ssl = SelfSimilarityLoss(*SIZES, backend=backend)
    compiled = torch.compile(lambda a, b, m: 2 * ssl(a, b, m, num_rows=7.5), backend="aot_eager", fullgraph=True, dynamic=dynamic)
    x, y = sr.float().requires_grad_(), sr.float().requires_grad_()
    compiled(x, gt.float(), mask).backward()
    (2 * ssl(y, gt.float(), mask, num_rows=7.5)).backward()
    assert torch.equal(x.grad, y.grad)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_same_input_same_bits_and_threads_do_not_show(threads, count):
    sr, gt, mask = make_pair(2, 3, 50, 60, density=0.2, seed=4)
    threads(1)
    want, want_gradient = loss_and_gradient(sr, gt, mask)
    threads(count)
    first, again = loss_and_gradient(sr, gt, mask), loss_and_gradient(sr, gt, mask)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    torch.testing.assert_close(first[0], want, rtol=1e-6, atol=0)
    assert_close(first[1], want_gradient.double(), 1e-5, "gradient")  # tiles differ, so the order of additions does


def test_concurrent_calls(threads):
    """Several Python threads at once, each with its own workers, as with a validation thread beside the training loop."""
    threads(2)
    inputs = [make_pair(1, 3, 33, 41, density=0.2, seed=seed) for seed in range(6)]
    want = [loss_and_gradient(*one) for one in inputs]
    got: dict[int, list] = {}

    def run(i: int) -> None:
        got[i] = [loss_and_gradient(*inputs[i]) for _ in range(5)]

    workers = [threading.Thread(target=run, args=(i,)) for i in range(len(inputs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for i, results in got.items():
        assert all(torch.equal(loss, want[i][0]) and torch.equal(gradient, want[i][1]) for loss, gradient in results)


def _value(inputs) -> float:
    sr, gt, mask = inputs
    return SelfSimilarityLoss(*SIZES, backend="cpu")(sr.float(), gt.float(), mask).item()


def _in_child(queue, inputs) -> None:
    torch.set_num_threads(1)  # as DataLoader does in its workers: torch's own OpenMP pool does not survive a fork
    queue.put(_value(inputs))


def test_in_a_forked_child(threads):
    """A data-loader worker is a fork of a process whose threads have already run. (torch allows no backward there.)"""
    threads(2)
    inputs = make_pair(1, 3, 33, 41, density=0.2, seed=9)
    _value(inputs)
    threads(1)
    want = _value(inputs)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue, inputs), daemon=True)
    child.start()
    assert queue.get(timeout=60) == want
    child.join(30)
    assert child.exitcode == 0


@pytest.mark.parametrize(
    ("shape", "density"),
    [
        ((1, 8, 8), 1.0),  # one dense tile, smaller than a vector
        ((1, 41, 145), 1.0),  # one past a tile in both directions
        ((2, 17, 33), 0.6),
        ((1, 130, 20), 0.002),  # tiles without a masked pixel
    ],
)
def test_tile_shapes(monkeypatch, shape, density):
    sr, gt, mask = make_pair(shape[0], 3, *shape[1:], density=density, seed=6)
    want, want_gradient = loss_and_gradient(sr, gt, mask, backend="torch")
    for limit in (8_000_000, 50_000):  # the second asks for the smallest tiles
        monkeypatch.setattr(_cpu_layout, "_TILE_BYTES", limit)
        got, gradient = loss_and_gradient(sr, gt, mask)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
        assert_close(gradient, want_gradient.double(), 1e-3, "gradient")  # sign(T_sr - T_gt) may flip at a near-tie


def test_kept_memory_carries_nothing_over(threads):
    """A thread's memory comes back dirty, from larger calls too: poisoned, it must not show, and an image of NaN leaves no trace."""
    threads(2)
    small, large = make_pair(1, 3, 30, 37, density=0.3, seed=8), make_pair(2, 3, 60, 90, density=0.2, seed=9)
    want = [loss_and_gradient(*inputs) for inputs in (small, large)]
    for inputs, (loss, gradient) in zip((small, large), want):
        _cpu_layout._kept.block.fill(float("nan"))
        got, got_gradient = loss_and_gradient(*inputs)
        assert torch.equal(got, loss)
        assert torch.equal(got_gradient, gradient)
    assert loss_and_gradient(large[0] * float("nan"), *large[1:])[0].isnan()
    assert torch.equal(loss_and_gradient(*small)[1], want[0][1])


def test_kept_memory_is_bounded(monkeypatch):
    """A call above the bound frees what it took; a smaller one does not grow what is kept."""
    small, large = make_pair(1, 3, 30, 37, density=0.3, seed=8), make_pair(1, 3, 160, 160, density=0.2, seed=9)
    _cpu_layout._kept.block = None
    loss_and_gradient(*small)
    kept = _cpu_layout._kept.block
    loss_and_gradient(*small)
    assert _cpu_layout._kept.block is kept
    monkeypatch.setattr(_cpu_layout, "_KEPT_BYTES", 2 * kept.nbytes)
    loss_and_gradient(*large)
    assert _cpu_layout._kept.block is None


def test_an_interrupted_call_leaves_its_memory_to_its_workers(monkeypatch):
    """Ctrl-C reaches the calling thread alone; while its workers end, the next call must not get what they write to."""
    sr, gt, mask = make_pair(1, 3, 30, 37, density=0.3, seed=8)

    def interrupted(*_):
        raise KeyboardInterrupt

    def graph():
        return self_similarity_graph(sr.float().requires_grad_(), mask, search_size=7, window_size=3, backend="cpu").square().sum()

    for call in (lambda: loss_and_gradient(sr, gt, mask), graph, graph().backward):
        loss_and_gradient(sr, gt, mask)
        assert _cpu_layout._kept.block is not None
        with monkeypatch.context() as patch:
            patch.setattr(_cpu_layout, "share", interrupted)
            with pytest.raises(KeyboardInterrupt):
                call()
        assert _cpu_layout._kept.block is None


def test_layouts_of_memory():
    """Channels last, slices and expanded masks are taken as they come."""
    sr, _, mask = make_pair(2, 3, 16, 18, density=0.3, seed=0)
    want = self_similarity_graph(sr.float(), mask[:1].expand(2, 1, 16, 18).contiguous(), search_size=7, window_size=3, backend="cpu")
    odd = sr.float().to(memory_format=torch.channels_last)
    assert torch.equal(self_similarity_graph(odd, mask[:1].expand(2, 1, 16, 18), search_size=7, window_size=3, backend="cpu"), want)
    x = odd.clone(memory_format=torch.preserve_format).requires_grad_()
    self_similarity_graph(x, mask, search_size=7, window_size=3, backend="cpu").square().sum().backward()
    assert x.grad.shape == x.shape


def test_first_use_says_that_it_compiles(caplog):
    sr, gt, mask = make_pair(1, 3, 12, 12, density=0.5, seed=0)
    _cpu_layout._ready.clear()
    with caplog.at_level(logging.INFO, logger="sslsr_diffusion"):
        loss_and_gradient(sr, gt, mask)
        loss_and_gradient(sr, gt, mask)
    assert [record.message.split()[0] for record in caplog.records] == ["Compiling", "CPU"]


def test_later_processes_load_from_the_cache():
    loss_and_gradient(*make_pair(1, 3, 12, 12, density=0.5, seed=0))
    code = (
        "import torch; from sslsr_diffusion import SelfSimilarityLoss; from sslsr_diffusion.ops import _cpu_calls as t;"
        "x = torch.rand(1, 3, 12, 12);"
        "SelfSimilarityLoss(7, 3, .05, backend='cpu')(x.clone().requires_grad_(), x, torch.ones(1, 1, 12, 12));"
        "print(sum(t.loss_tiles.stats.cache_hits.values()), sum(t.loss_tiles.stats.cache_misses.values()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ}, check=True)
    assert done.stdout.split() == ["1", "0"]
