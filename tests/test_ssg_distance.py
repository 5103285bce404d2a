from __future__ import annotations

import pytest
import torch
from evaluation_samples import as_tensor, noisy, picture

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.evaluation.fidelity import ssg_kl, ssg_l1, ssg_terms
from sslsr_diffusion.ops import laplacian_edge_mask, self_similarity_graph


def test_distance_is_the_mean_over_rows_and_offsets_of_the_reference_graph():
    reference, restored = as_tensor(picture(0)), as_tensor(noisy(picture(0), 4))
    mask = laplacian_edge_mask(reference)
    want = self_similarity_graph(reference.double(), mask, backend="reference")
    got = self_similarity_graph(restored.double(), mask, backend="reference")
    terms = ssg_terms(restored, reference)
    # float32 kernels against the float64 graph: 1e-4 relative is ten times what was measured
    assert terms["ssg_l1"].item() == pytest.approx((got - want).abs().mean().item(), rel=1e-4)
    a, b = got.clamp_min(1e-10), want.clamp_min(1e-10)
    assert terms["ssg_kl"].item() == pytest.approx((b * (b.log() - a.log())).mean().item(), rel=1e-4)


def test_images_of_a_batch_are_scored_alone_and_after_the_cut():
    reference = torch.cat([as_tensor(picture(i)) for i in range(2)])
    restored = torch.cat([as_tensor(noisy(picture(i), 3 + i)) for i in range(2)])
    together = ssg_l1(restored, reference, crop_border=4)
    alone = [ssg_l1(restored[i : i + 1, :, 4:-4, 4:-4], reference[i : i + 1, :, 4:-4, 4:-4]).item() for i in range(2)]
    assert together.tolist() == pytest.approx(alone, rel=1e-6)


def test_equal_images_have_distance_zero_and_no_edges_no_distance():
    image = as_tensor(picture(0))
    assert ssg_l1(image, image).item() == 0
    assert ssg_kl(image, image).item() == 0
    assert torch.isnan(ssg_kl(image, torch.full_like(image, 0.5))).all()


def test_too_small_images_are_an_error():
    with pytest.raises(UserError, match="SSG distance: image: expected sides of at least 13"):
        ssg_l1(torch.rand(1, 3, 12, 40), torch.rand(1, 3, 12, 40))
