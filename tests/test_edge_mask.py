"""Edge masks against the published script's output, OpenCV and PIL."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from goldens import load_golden

from sslsr_diffusion.ops.edge_mask import (
    apply_mask_stride,
    cap_mask,
    full_mask,
    grey_levels,
    laplacian_abs_edge_mask,
    laplacian_edge_mask,
    random_mask,
    sobel_edge_mask,
)

GOLDEN = load_golden("ssl/mask")


def _batch(image: torch.Tensor) -> torch.Tensor:
    return (image.permute(2, 0, 1) if image.dim() == 3 else image[None])[None]


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@pytest.mark.parametrize("as_float", [False, True], ids=["uint8", "float"])
@pytest.mark.parametrize("item", GOLDEN.index, ids=lambda item: item["name"])
def test_mask_is_bit_exact_with_the_published_script(item, as_float):
    image = _batch(GOLDEN.tensors[f"{item['name']}.image"])
    mask = laplacian_edge_mask(image.float() / 255 if as_float else image, item["threshold"])
    assert mask.dtype == torch.bool
    assert mask.shape == (1, 1, *item["shape"][:2])
    assert torch.equal(mask[0, 0], GOLDEN.tensors[f"{item['name']}.mask"].bool())


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (2, 2), (3, 5), (33, 64)])
def test_masks_equal_opencv_at_odd_sizes(size):
    cv2 = pytest.importorskip("cv2")
    from PIL import Image

    image = _random(2, 3, *size)
    for one, mask, both in zip(image, laplacian_edge_mask(image), laplacian_abs_edge_mask(image)):
        grey = np.asarray(Image.fromarray(one.permute(1, 2, 0).numpy()).convert("L"))
        assert np.array_equal(grey_levels(one[None])[0, 0].numpy(), grey)
        assert np.array_equal(mask[0].numpy(), cv2.Laplacian(grey, cv2.CV_8U, ksize=1) > 20)
        assert np.array_equal(both[0].numpy(), np.abs(cv2.Laplacian(grey, cv2.CV_16S, ksize=1)) > 20)


@pytest.mark.parametrize("size", [(1, 9), (2, 2), (31, 17)])
def test_sobel_equals_opencv(size):
    cv2 = pytest.importorskip("cv2")
    image = _random(1, 1, *size)
    grey = image[0, 0].numpy()
    gx, gy = cv2.Sobel(grey, cv2.CV_64F, 1, 0, ksize=3), cv2.Sobel(grey, cv2.CV_64F, 0, 1, ksize=3)
    assert np.array_equal(sobel_edge_mask(image)[0, 0].numpy(), gx**2 + gy**2 > 80.0**2)


def test_the_step_of_height_h_answers_h_in_both_kinds():
    image = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    image[..., 4:] = 21
    assert laplacian_edge_mask(image).any()
    assert sobel_edge_mask(image).any()
    image[..., 4:] = 20
    assert not laplacian_edge_mask(image).any()
    assert not sobel_edge_mask(image).any()


def test_a_batch_is_its_images_and_needs_no_gradient():
    image = (_random(3, 3, 20, 24).float() / 255).requires_grad_()
    mask = laplacian_edge_mask(image)
    assert not mask.requires_grad
    assert torch.equal(mask, torch.cat([laplacian_edge_mask(one[None]) for one in image]))


@pytest.mark.parametrize("stride", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.uint8])
def test_stride_is_the_tiled_identity(stride, dtype):
    mask = torch.ones(2, 1, 13, 17, dtype=dtype)
    pattern = torch.eye(stride).repeat(20, 20)[:13, :17]
    strided = apply_mask_stride(mask, stride)
    assert strided.dtype == dtype
    assert torch.equal(strided[1, 0].float(), pattern)


def test_stride_below_one_is_refused():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        apply_mask_stride(torch.ones(1, 1, 4, 4), 0)


def test_cap_keeps_exactly_the_limit_and_only_masked_pixels():
    mask = _random(2, 1, 40, 40) > 128
    mask[1] = False
    mask[1, 0, :2, :3] = True
    capped = cap_mask(mask, 100, torch.Generator().manual_seed(1))
    assert capped.sum(dim=(1, 2, 3)).tolist() == [100, 6]
    assert not (capped & ~mask).any()
    assert torch.equal(capped, cap_mask(mask, 100, torch.Generator().manual_seed(1)))
    assert not torch.equal(capped, cap_mask(mask, 100, torch.Generator().manual_seed(2)))
    with pytest.raises(ValueError, match="at least 1 pixel"):
        cap_mask(mask, 0)


def test_full_and_random_masks():
    image = torch.rand(2, 3, 50, 60)
    assert full_mask(image).all()
    assert full_mask(image).shape == (2, 1, 50, 60)
    drawn = random_mask(image, 0.1, torch.Generator().manual_seed(0))
    assert drawn.shape == (2, 1, 50, 60)
    assert abs(drawn.float().mean() - 0.1) < 0.02  # 6000 draws: five standard deviations


@pytest.mark.parametrize("image", [torch.rand(3, 8, 8), torch.rand(1, 2, 8, 8), torch.ones(1, 3, 8, 8, dtype=torch.int64)])
def test_other_shapes_and_types_are_refused(image):
    with pytest.raises(ValueError, match="got"):
        laplacian_edge_mask(image)


@pytest.mark.cuda
def test_cuda_mask_equals_cpu_mask():
    image = torch.rand(2, 3, 65, 63)
    for mask in (laplacian_edge_mask, laplacian_abs_edge_mask, sobel_edge_mask):
        assert torch.equal(mask(image.cuda()).cpu(), mask(image))


def test_a_cap_takes_any_layout():
    mask = torch.rand(2, 1, 9, 7, generator=torch.Generator().manual_seed(0)) < 0.5
    turned = mask.transpose(2, 3)
    capped = cap_mask(turned, 5, torch.Generator().manual_seed(1))
    assert capped.flatten(1).sum(1).tolist() == [5, 5]
    assert not (capped & ~turned).any()
    assert cap_mask(mask[:0], 5).shape == (0, 1, 9, 7)
