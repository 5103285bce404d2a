"""Kernel formulas against the published code's values."""

from __future__ import annotations

import numpy as np
import pytest
from goldens import load_golden

from sslsr_diffusion.data.blur_kernels import (
    gaussian_like_kernel,
    gaussian_vector,
    kernel_from,
    opencv_sigma,
    shifted_gaussian_kernel,
    sinc_kernel,
    variance_kernel,
)

GOLDEN = load_golden("ssl/degradation")
EXACT = 1e-12  # the goldens' own tolerance; both sides are float64


def _id(item):
    return item["key"]


@pytest.mark.parametrize("item", GOLDEN.index["kernels"], ids=_id)
def test_gaussian_families(item):
    kernel = gaussian_like_kernel(item["family"], item["size"], item["sigma_x"], item["sigma_y"], item["theta"], item["beta"] or 1.0)
    assert np.abs(kernel - GOLDEN.tensors[item["key"]].numpy()).max() < EXACT


@pytest.mark.parametrize("item", GOLDEN.index["sinc"], ids=_id)
def test_sinc(item):
    kernel = sinc_kernel(item["size"], item["cutoff"])
    kernel = np.pad(kernel, max(0, (item["pad_to"] - len(kernel)) // 2))  # as published: to the largest size, so that they stack
    assert np.abs(kernel - GOLDEN.tensors[item["key"]].numpy()).max() < EXACT


@pytest.mark.parametrize("item", GOLDEN.index["bsrgan"], ids=_id)
def test_bsrgan(item):
    if item["kind"] == "anisotropic_gaussian":
        kernel = variance_kernel(item["size"], item["l1"], item["l2"], item["theta"])
    else:
        kernel = gaussian_like_kernel("iso", item["size"], item["sigma"], item["sigma"], 0.0)
    assert np.abs(kernel - GOLDEN.tensors[item["key"]].numpy()).max() < EXACT


def test_the_shifted_kernel_keeps_the_picture_in_place():
    """Filtering a ramp and taking every 4th pixel must give the ramp at the middle of each group of four: x + 1.5."""
    kernel = shifted_gaussian_kernel(21, 0.8, 1.5)
    offsets = np.arange(21) - 10
    assert kernel.sum() == pytest.approx(1.0)
    assert (kernel.sum(axis=0) * offsets).sum() == pytest.approx(1.5, abs=1e-6)
    assert (kernel.sum(axis=1) * offsets).sum() == pytest.approx(1.5, abs=1e-6)


def test_kernel_from_drawn_values():
    values = {"family": "sinc", "size": 9, "cutoff": 2.0}
    assert np.array_equal(kernel_from(values), sinc_kernel(9, 2.0))
    assert values["family"] == "sinc"
    assert kernel_from({"family": "iso", "size": 5, "sigma_x": 1.0, "sigma_y": 0.0, "theta": 0.0}).sum() == pytest.approx(1)


def test_opencv_gaussian_rule():
    cv2 = pytest.importorskip("cv2")
    assert opencv_sigma(51) == pytest.approx(8.0)
    assert np.abs(gaussian_vector(51, 0.0) - cv2.getGaussianKernel(51, 0)[:, 0]).max() < EXACT


def test_an_unknown_family_is_refused():
    with pytest.raises(ValueError, match=r"expected one of iso, .* got 'box'"):
        gaussian_like_kernel("box", 7, 1, 1, 0)
