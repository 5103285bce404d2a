"""Resizing: MATLAB's bicubic against the published results, the pipelines' interpolation against torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from goldens import load_golden

from sslsr_diffusion.data.resizing import area_average, interpolate
from sslsr_diffusion.imresize import matlab_bicubic

GOLDEN = load_golden("ssl/imresize")


@pytest.mark.parametrize("item", GOLDEN.index, ids=lambda item: item["name"])
def test_matlab_bicubic(item):
    image, wanted = GOLDEN.tensors[f"{item['name']}.in"], GOLDEN.tensors[f"{item['name']}.out"]
    planes = image.permute(2, 0, 1) if image.dim() == 3 else image
    out = matlab_bicubic(planes, item["scale"], item["antialiasing"])
    assert (out - (wanted.permute(2, 0, 1) if wanted.dim() == 3 else wanted)).abs().max() < 2e-6  # the goldens' tolerance


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 7)])
def test_tiny_images_fold_at_the_border_as_often_as_it_takes(size):
    assert torch.allclose(matlab_bicubic(torch.full((3, *size), 0.5), 1 / 8), torch.tensor(0.5))


@pytest.mark.parametrize("mode", ["area", "bilinear", "bicubic"])
def test_interpolate_equals_torch(mode):
    generator = torch.Generator().manual_seed(0)
    factors = [1.0, 0.5, 0.25, 0.999, 1.02, 1.5, *(0.15 + 1.35 * torch.rand(40, generator=generator)).tolist()]
    for factor in factors:
        height, width = torch.randint(16, 90, (2,), generator=generator).tolist()
        image = torch.rand(1, 3, height, width, generator=generator)
        corners = {} if mode == "area" else {"align_corners": False}
        by_factor = F.interpolate(image, scale_factor=factor, mode=mode, **corners)
        # OpenCV keeps sampling positions in float32: off by up to 1e-5 of a pixel on white noise
        assert (interpolate(image, mode, factor=factor) - by_factor).abs().max() < 3e-5
        size = tuple(torch.randint(5, 100, (2,), generator=generator).tolist())
        assert (interpolate(image, mode, size=size) - F.interpolate(image, size=size, mode=mode, **corners)).abs().max() < 3e-5


def test_area_average_keeps_the_mean():
    image = torch.rand(1, 3, 40, 60)
    assert area_average(image, (10, 12)).mean() == pytest.approx(image.mean().item(), abs=1e-5)
