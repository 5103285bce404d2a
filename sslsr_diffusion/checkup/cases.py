"""Cases that the CUDA kernels are tested on, emulated and on a GPU alike, and what is compared there. Needs torch alone."""

import functools
import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sslsr_diffusion.ops import ssg_reference
from sslsr_diffusion.ops.settings import GraphSettings


class Case(NamedTuple):
    shape: tuple[int, int, int, int]
    search: int = 25
    window: int = 9
    sigma: float = 0.02
    normalize: bool = True
    density: float = 0.1

    def settings(self) -> dict[str, Any]:
        """For the public functions."""
        return {"search_size": self.search, "window_size": self.window, "sigma": self.sigma, "normalize": self.normalize}

    def inner(self) -> GraphSettings:
        """For the backends."""
        return GraphSettings(self.search, self.window, self.sigma, self.normalize)


CASES = {
    "published": Case((1, 3, 26, 19), sigma=0.004),
    "smallest image": Case((2, 3, 13, 14), sigma=0.01, normalize=False),
    "six channels in two groups": Case((1, 6, 17, 11), search=11, window=5),
    "five channels, the last group not full": Case((1, 5, 12, 12), search=11, window=5, normalize=False, density=0.3),
    "one channel": Case((2, 1, 10, 15), search=7, window=3, density=0.4),
    "full mask": Case((1, 3, 9, 17), search=7, window=3, density=1.0),
    "window of one": Case((1, 2, 7, 8), search=9, window=1, density=0.5),
    "window as large as the search": Case((1, 3, 9, 8), search=7, window=7, density=0.5),
    "search of three": Case((2, 3, 5, 6), search=3, window=3, density=0.6),
    "many offsets per thread": Case((1, 2, 30, 27), search=51, window=3, density=0.01),
    "wide window": Case((1, 3, 18, 17), search=31, window=21, density=0.03),
}

# for the path that works on whole tiles: 32 rows, and 32 - (window - 1) columns
DENSE_CASES = {
    "published": CASES["published"],
    "un-normalised": CASES["smallest image"],
    "one channel": CASES["one channel"],
    "full mask": CASES["full mask"],
    "window as large as the search": CASES["window as large as the search"],
    "search of three": CASES["search of three"],
    "one row and one column past a tile": Case((1, 1, 33, 31), search=7, window=3, density=0.9),
    "two and a half tiles, two pictures": Case((2, 1, 20, 70), search=5, window=3, density=1.0),
    "a window cut by two groups of offsets": Case((1, 3, 12, 11), search=15, window=11, density=0.2),
    "window of fifteen": Case((1, 2, 9, 21), search=17, window=15, density=0.1),
    "many whole offsets": Case((1, 3, 14, 17), search=27, window=5, density=0.05),
}


class Inputs(NamedTuple):
    sr: Tensor
    gt: Tensor
    mask: Tensor


@functools.cache
def make_inputs(case: Case) -> Inputs:
    """Smooth images (on white noise the graph is one-hot and proves nothing), some masked corners; the last mask of a batch is empty.

    The first seed is taken for which T_sr and T_gt nowhere almost agree: at a tie, rounding decides about the sign in the L1
    gradient, in any float32 code, and one flipped entry is worth 2 % of the largest gradient.
    """
    for seed in itertools.count():
        inputs = draw_inputs(case, seed)
        sr, gt = (ssg_reference.graph(image.double(), inputs.mask, case.inner()) for image in (inputs.sr, inputs.gt))
        relevant = (gt > 1e-5) & (gt < 1)  # un-normalised, the centre is 1 in both, exactly
        if ((sr - gt).abs() > 2e-6 * gt)[relevant].all():
            return inputs
    raise AssertionError


def draw_inputs(case: Case, seed: int) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    batch, channels, height, width = case.shape
    noise = torch.rand(batch, channels, height + 4, width + 4, generator=generator, dtype=torch.float64)
    gt = (F.avg_pool2d(noise, 5, stride=1) - 0.5) * 2 + 0.5
    sr = gt + 0.05 * torch.randn(gt.shape, generator=generator, dtype=torch.float64)
    mask = torch.rand(batch, 1, height, width, generator=generator) < case.density
    mask[0, 0, 0, 0] = mask[0, 0, -1, -1] = mask[0, 0, height // 2, 0] = True
    if batch > 1:
        mask[-1] = False
    return Inputs(sr.float(), gt.float(), mask)


def reference_loss(inputs: Inputs, case: Case, weights: tuple[float, float], num_rows: float | None = None) -> tuple[Tensor, ...]:
    """(total, l1, kl, gradient) in float64, by the definition and autograd."""
    sr = inputs.sr.double().requires_grad_()
    total, l1, kl = ssg_reference.loss(sr, inputs.gt.double(), inputs.mask, case.inner(), weights, num_rows)
    (gradient,) = torch.autograd.grad(total, sr)
    return total.detach(), l1, kl, gradient


def reference_graph(inputs: Inputs, case: Case, cotangent: Tensor) -> tuple[Tensor, Tensor]:
    """(graph, gradient) in float64."""
    image = inputs.sr.double().requires_grad_()
    graph = ssg_reference.graph(image, inputs.mask, case.inner())
    (gradient,) = torch.autograd.grad(graph, image, cotangent.double())
    return graph.detach(), gradient
