"""Fast filtering against the published results and against plain convolution."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from goldens import load_golden

from sslsr_diffusion.data.blur_kernels import gaussian_like_kernel, sinc_kernel
from sslsr_diffusion.data.filters import filter2d, from_pixels, to_pixels, trim_kernel, unsharp_mask

GOLDEN = load_golden("ssl/degradation")


@pytest.mark.parametrize("item", GOLDEN.index["filter2d"], ids=lambda item: item["out"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["planes", "channels_last"])
def test_filter2d(item, layout):
    image = GOLDEN.tensors[item["image"]].contiguous(memory_format=layout)
    kernels = [GOLDEN.tensors[key].numpy() for key in item["kernels"]]
    each = zip(image, kernels, strict=True)
    out = filter2d(image, kernels[0]) if len(kernels) == 1 else torch.cat([filter2d(one[None], kernel) for one, kernel in each])
    assert (out - GOLDEN.tensors[item["out"]]).abs().max() < 3e-6  # the goldens' tolerance


@pytest.mark.parametrize("item", GOLDEN.index["usm"], ids=lambda item: item["out"])
def test_unsharp_mask(item):
    out = unsharp_mask(GOLDEN.tensors["usm.image"], item["weight"], item["radius"], item["threshold"])
    assert (out - GOLDEN.tensors[item["out"]]).abs().max() < 5e-6  # the goldens' tolerance


@pytest.mark.parametrize("size", [3, 7, 11, 13, 21])
@pytest.mark.parametrize("family", ["iso", "aniso", "generalized_aniso", "plateau_iso", "plateau_aniso", "sinc"])
def test_every_path_equals_plain_convolution(family, size):
    image = torch.rand(1, 3, 47, 53, generator=torch.Generator().manual_seed(0))
    kernel = sinc_kernel(size, 1.1) if family == "sinc" else gaussian_like_kernel(family, size, 2.1, 0.7, 0.6, 0.8)
    reach = size // 2
    padded = F.pad(image.double(), (reach,) * 4, mode="reflect")
    plain = F.conv2d(padded, torch.from_numpy(kernel).expand(3, 1, size, size), groups=3)
    assert (filter2d(image, kernel) - plain).abs().max() < 3e-6  # as for the goldens


def test_trimming_leaves_out_only_what_does_not_count():
    kernel = gaussian_like_kernel("iso", 21, 0.5, 0.5, 0)
    trimmed = trim_kernel(kernel)
    assert len(trimmed) < 21
    assert trimmed.sum() > 1 - 3e-7
    assert len(trim_kernel(sinc_kernel(21, 1.0))) == 21
    pulse = np.zeros((21, 21))
    pulse[10, 10] = 1
    assert trim_kernel(pulse).shape == (1, 1)


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (4, 4)])
def test_images_smaller_than_the_kernel(size):
    image = torch.full((1, 3, *size), 0.25)
    assert torch.allclose(filter2d(image, sinc_kernel(21, 1.0)), image, atol=1e-6)


def test_pixels_share_memory_where_they_can():
    image = torch.rand(1, 3, 8, 9).contiguous(memory_format=torch.channels_last)
    pixels = to_pixels(image)
    assert pixels[0].shape == (8, 9, 3)
    assert pixels[0].ctypes.data == image.data_ptr()
    assert torch.equal(from_pixels(to_pixels(torch.cat([image, image]))), torch.cat([image, image]))


@pytest.mark.cuda
def test_cuda_equals_cpu():
    image = torch.rand(2, 3, 40, 44)
    for kernel in (sinc_kernel(21, 1.0), gaussian_like_kernel("plateau_aniso", 11, 2, 1, 0.4, 1.5)):
        assert (filter2d(image.cuda(), kernel).cpu() - filter2d(image, kernel)).abs().max() < 3e-6
    assert (unsharp_mask(image.cuda()).cpu() - unsharp_mask(image)).abs().mean() < 1e-6
