"""The CPU backend: dense tiles on sixteen-lane vectors, compiled at first use by numba and cached for later processes.

Loss and gradient of a tile are formed in one visit, so the fused loss needs the padded images, one gradient image per
thread and a few megabytes of tile buffers, whatever the mask. Registered as torch operators: `torch.compile` traces past
them, and inference neither computes nor keeps anything for a backward.
"""

import functools
import importlib.util
import logging

import numpy as np
import torch
from torch import Tensor

from sslsr_diffusion.ops import differentiable_operators
from sslsr_diffusion.ops.settings import GraphSettings

log = logging.getLogger(__name__)


def unavailable(device: torch.device) -> str | None:
    """Why this backend cannot run on `device`; None: it can."""
    if device.type != "cpu":
        return f'it works on CPU tensors, and this one is on {device}; use backend="auto".'
    return _numba_problem()


@functools.cache
def _numba_problem() -> str | None:
    """Also logged, once: what takes over is twenty times slower."""
    problem = None
    if importlib.util.find_spec("numba") is None:
        problem = "numba is not installed: pip install numba."
    else:
        try:
            import numba  # noqa: F401
        except Exception as error:  # a numba that is too old for the NumPy beside it, for example
            problem = f"numba cannot be imported ({type(error).__name__}: {error}); pip install --upgrade numba."
    if problem:
        log.warning("the fast CPU backend of the self-similarity operator cannot be used: %s", problem)
    return problem


unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]  # see cupy_loader; torch 2.6 cannot trace find_spec


@torch.library.custom_op("sslsr::graph_cpu", mutates_args=(), device_types="cpu")
def _graph(image: Tensor, mask: Tensor, search: int, window: int, sigma: float, normalize: bool) -> Tensor:
    from sslsr_diffusion.ops import _cpu_layout as layouts  # here and below: numba is imported at first use

    call = layouts.lay_out(mask, image.shape[1], GraphSettings(search, window, sigma, normalize))
    out = image.new_empty(len(call.rows), search**2)
    if len(out):
        memory, rows = layouts.Memory(call, (image,), with_gradient=False), out.numpy()
        layouts.share(call, "graph", lambda worker: layouts.compiled.graph_tiles(memory.image(0), rows, *memory.tiles(worker)))
        memory.keep()
    return out


@torch.library.custom_op("sslsr::graph_cpu_backward", mutates_args=(), device_types="cpu")
def _graph_backward(
    grad_out: Tensor, out: Tensor, image: Tensor, mask: Tensor, search: int, window: int, sigma: float, normalize: bool
) -> Tensor:
    from sslsr_diffusion.ops import _cpu_layout as layouts

    gradient = torch.zeros_like(image, memory_format=torch.contiguous_format)
    call = layouts.lay_out(mask, image.shape[1], GraphSettings(search, window, sigma, normalize))
    if len(call.rows) == 0:
        return gradient
    memory = layouts.Memory(call, (image,), with_gradient=True)
    padded, weights, pull = memory.image(0), out.detach().numpy(), grad_out.detach().contiguous().numpy()

    def work(worker: int) -> None:
        layouts.compiled.graph_gradient_tiles(padded, weights, pull, memory.gradient_of(worker), *memory.tiles(worker))

    layouts.share(call, "graph gradient", work)
    memory.fold_gradients(gradient.numpy(), 1.0)
    memory.keep()
    return gradient


@torch.library.custom_op("sslsr::loss_cpu", mutates_args=(), device_types="cpu")
def _loss(
    sr: Tensor, gt: Tensor, mask: Tensor, rows: Tensor, search: int, window: int, sigma: float, normalize: bool,
    l1_weight: float, kl_weight: float, with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """total, l1, kl and the gradient of total: [] without with_gradient, since nothing would use it."""
    from sslsr_diffusion.ops import _cpu_layout as layouts

    settings = GraphSettings(search, window, sigma, normalize)
    call = layouts.lay_out(mask, sr.shape[1], settings)
    gradient = sr.new_zeros(sr.shape[0] if with_gradient else 0, *sr.shape[1:])
    if len(call.rows) == 0:
        zero = sr.new_zeros(())
        return zero, zero.clone(), zero.clone(), gradient
    memory = layouts.Memory(call, (sr, gt), with_gradient)
    sums = np.zeros((len(call.tiles), 2))  # by tile: the order of the sum does not depend on the number of threads

    def work(worker: int) -> None:
        own, images = sums[worker :: call.workers].copy(), (memory.image(0), memory.image(1))
        layouts.compiled.loss_tiles(*images, memory.gradient_of(worker), own, l1_weight, kl_weight, *memory.tiles(worker))
        sums[worker :: call.workers] = own

    layouts.share(call, "loss", work)
    share = settings.per_entry(float(rows))
    l1, kl = sums.sum(0) * share
    if with_gradient:
        memory.fold_gradients(gradient.numpy(), share)
    memory.keep()
    return sr.new_tensor(l1_weight * l1 + kl_weight * kl), sr.new_tensor(l1), sr.new_tensor(kl), gradient


graph, loss = differentiable_operators.graph_call(_graph, _graph_backward), differentiable_operators.loss_call(_loss)
