"""The portable backend beyond the shared contract: numerical gradients, and bands that do not show."""

from __future__ import annotations

import pytest
import torch
from ssg_inputs import assert_close, make_pair

from sslsr_diffusion.ops import SelfSimilarityLoss, self_similarity_graph, ssg_torch


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("search", "window"), [(5, 3), (3, 3), (3, 1)])
def test_gradcheck(search, window, normalize):
    sr, gt, mask = make_pair(1, 2, 5, 4, density=0.3, seed=0)
    options = {"search_size": search, "window_size": window, "sigma": 0.2, "normalize": normalize, "backend": "torch"}
    x = sr.requires_grad_()
    assert torch.autograd.gradcheck(lambda image: self_similarity_graph(image, mask, **options), x)
    assert torch.autograd.gradcheck(lambda image: SelfSimilarityLoss(**options, l1_weight=3, kl_weight=2)(image, gt, mask), x)


@pytest.mark.parametrize("elements", [1, 20_000])
def test_bands_do_not_show(monkeypatch, elements):
    sr, gt, mask = make_pair(2, 3, 23, 17, density=0.3, seed=1)
    x = sr.requires_grad_()
    ssl = SelfSimilarityLoss(11, 5, 0.02, backend="torch")
    want = torch.autograd.grad(ssl(x, gt, mask), x)[0]
    monkeypatch.setattr(ssg_torch, "_BAND_ELEMENTS", elements)
    got = torch.autograd.grad(ssl(x, gt, mask), x)[0]
    assert_close(got, want, 1e-12, "gradient")
