"""SelfSimilarityLoss(prefilter_sigma=...): the graphs of smoothed pictures, against another library's Gaussian in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from ssg_inputs import make_pair
from toys import smooth

from sslsr_diffusion.losses.self_similarity import SelfSimilarityLoss as RecipeLoss
from sslsr_diffusion.losses.self_similarity import SelfSimilaritySettings
from sslsr_diffusion.ops import SelfSimilarityLoss, laplacian_edge_mask
from sslsr_diffusion.ops.prefilter import smoothed
from sslsr_diffusion.types import Outputs

SMALL = {"search_size": 7, "window_size": 3, "sigma": 0.05, "l1_weight": 300.0, "kl_weight": 200.0}


def by_scipy(picture: torch.Tensor, sigma: float) -> torch.Tensor:
    """The same kernel (four deviations) and border (mirrored without the edge), in double precision."""
    return torch.from_numpy(gaussian_filter(picture.double().numpy(), (0, 0, sigma, sigma), mode="mirror", truncate=4.0))


@pytest.mark.parametrize("sigma", [0.05, 0.5, 1.2, 3.0])
def test_it_is_a_gaussian(sigma):
    picture = torch.rand(2, 3, 17, 23, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert (smoothed(picture, sigma) - by_scipy(picture, sigma)).abs().max() <= 1e-14
    assert (smoothed(picture.float(), sigma) - by_scipy(picture, sigma)).abs().max() <= 1e-6


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
def test_value_and_gradient_on_every_backend(backend):
    sr, gt, mask = make_pair(2, 3, 19, 24, density=0.2, seed=5)
    wide = [sr.clone().requires_grad_(), gt]
    want, terms = SelfSimilarityLoss(**SMALL, backend="reference")(*(smoothed(p, 1.2) for p in wide), mask, return_terms=True)
    (gradient,) = torch.autograd.grad(-0.7 * want, wide[0])
    x = sr.float().requires_grad_()
    value, own = SelfSimilarityLoss(**SMALL, backend=backend, prefilter_sigma=1.2)(x, gt.float(), mask, return_terms=True)
    (-0.7 * value).backward()
    assert value.item() == pytest.approx(want.item(), rel=1e-4)
    assert {name: t.item() for name, t in own.items()} == pytest.approx({name: t.item() for name, t in terms.items()}, rel=1e-4)
    assert (x.grad - gradient).norm() <= 1e-4 * gradient.norm()  # float32, as without the filter


def test_gradient_by_differences():
    generator = torch.Generator().manual_seed(3)
    sr, gt = (torch.rand(1, 2, 9, 9, generator=generator, dtype=torch.float64) * 0.2 + 0.4 for _ in range(2))
    mask = torch.zeros(1, 1, 9, 9, dtype=torch.bool)
    mask[..., 3:7, 2::3] = True
    loss = SelfSimilarityLoss(5, 3, 0.05, l1_weight=0.0, kl_weight=100.0, backend="reference", prefilter_sigma=0.8)
    assert torch.autograd.gradcheck(lambda x: loss(x, gt, mask), sr.requires_grad_(), eps=1e-6, atol=1e-7)


def test_nought_is_the_published_loss_bit_by_bit():
    sr, gt, mask = make_pair(1, 3, 16, 18, density=0.3, seed=2)
    plain, nought = (SelfSimilarityLoss(**SMALL, backend="torch", **more) for more in ({}, {"prefilter_sigma": 0}))
    assert torch.equal(plain(sr, gt, mask), nought(sr, gt, mask))


def test_the_mask_is_that_of_the_truth_as_it_is():
    gt = torch.stack([smooth(1), smooth(2)])
    gt[:, :, :, 16:] = 1 - gt[:, :, :, 16:]
    sr = gt + 0.05 * torch.stack([smooth(3), smooth(4)])
    loss = SelfSimilarityLoss(**SMALL, backend="torch", prefilter_sigma=2.0)
    given, own = loss(sr, gt, laplacian_edge_mask(gt), return_terms=True), loss(sr, gt, return_terms=True)
    assert own[1]["rows"] == given[1]["rows"] > 0
    assert torch.equal(own[0], given[0])


def test_it_does_not_see_a_raster():
    """What the published loss is answered with: adding it or taking it away changes a prefiltered loss by next to nothing."""
    gt = torch.stack([smooth(1, size=48)]) * 0.4 + 0.3
    sr = gt + 0.02 * torch.stack([smooth(2, size=48)])
    y, x = np.mgrid[:48, :48]
    raster = sr + 0.03 * torch.from_numpy(np.where((x + y) % 2 == 0, 1.0, -1.0)).float()
    mask = torch.zeros(1, 1, 48, 48, dtype=torch.bool)
    mask[..., 9:39:3, 9:39:3] = True  # away from the borders, where the mirrored raster is another one

    def change(sigma: float) -> float:
        loss = SelfSimilarityLoss(7, 3, 0.004, backend="torch", prefilter_sigma=sigma)
        return abs((loss(raster, gt, mask) / loss(sr, gt, mask)).item() - 1)

    assert change(0.0) > 1
    assert change(1.2) < 1e-3


@pytest.mark.parametrize("wrong", [-1.0, float("nan"), float("inf"), "1", True, None])
def test_what_is_no_number_of_pixels_is_refused(wrong):
    with pytest.raises(ValueError, match="prefilter_sigma: expected a finite number of pixels, at least 0, got"):
        SelfSimilarityLoss(prefilter_sigma=wrong)


def test_a_picture_smaller_than_the_kernel_is_refused():
    picture = torch.zeros(1, 3, 12, 30)
    with pytest.raises(ValueError, match=r"expected sides of at least 13 pixels for prefilter_sigma = 3, got 12 x 30\."):
        SelfSimilarityLoss(7, 3, prefilter_sigma=3.0)(picture, picture, torch.ones(1, 1, 12, 30))


def test_the_recipe_has_it():
    settings = SelfSimilaritySettings(prefilter_sigma=1.2, search_size=7, window_size=3, mask_stride=1, backend="torch")
    sr, hr, mask = make_pair(2, 3, 32, 32, density=0.1, seed=4)
    sr, hr = sr.float(), hr.float()
    value, _ = RecipeLoss(settings)(Outputs(t=torch.zeros(2), noise_level=torch.ones(2), decoded=torch.arange(2), sr=sr, hr=hr, mask=mask))
    operator = SelfSimilarityLoss(7, 3, l1_weight=500, kl_weight=500, backend="torch", prefilter_sigma=1.2)
    torch.testing.assert_close(value, operator(sr, hr, mask))
    assert list(settings.misfits(side=5, alone=False)) == [("prefilter_sigma", "1.2 is too large for pictures of 5 pixels a side.")]
