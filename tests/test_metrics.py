from __future__ import annotations

import math

import pytest
import torch
from goldens import load_golden

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.evaluation.fidelity import crop, luma
from sslsr_diffusion.evaluation.metrics import METRICS, psnr, ssim

PAIRS = load_golden("ssl/metrics").index["pairs"]


def tensor(array: torch.Tensor) -> torch.Tensor:
    """Golden uint8 BGR [H, W, 3] (or gray [H, W]) -> float32 RGB [1, C, H, W] in [0, 1]."""
    image = array.flip(-1).permute(2, 0, 1) if array.ndim == 3 else array[None]
    return image[None].float() / 255


def pair(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    tensors = load_golden("ssl/metrics").tensors
    return tensor(tensors[f"{name}.sr"]), tensor(tensors[f"{name}.gt"])


@pytest.mark.parametrize("y_channel", [False, True], ids=["rgb", "y"])
@pytest.mark.parametrize("crop_border", [0, 4])
@pytest.mark.parametrize("case", PAIRS, ids=lambda case: case["name"])
def test_psnr_and_ssim_match_the_published_code(case, crop_border, y_channel):
    restored, reference = pair(case["name"])
    options = {"crop_border": crop_border, "y_channel": y_channel}
    suffix = f"crop{crop_border}_{'y' if y_channel else 'rgb'}"
    want = float(case[f"psnr_{suffix}"])
    got = psnr(restored, reference, **options).item()
    # the reference converts to luma in float32; ours is float64: 1e-4 dB is the golden README's tolerance
    assert got == want if math.isinf(want) else got == pytest.approx(want, abs=1e-4)
    assert ssim(restored, reference, **options).item() == pytest.approx(case[f"ssim_{suffix}"], abs=1e-6)


def test_the_metric_script_of_the_published_project_is_luma_with_border_4():
    restored, reference = pair("jpeg")
    case = next(c for c in PAIRS if c["name"] == "jpeg")
    assert psnr(restored, reference, crop_border=4, y_channel=True).item() == pytest.approx(case["psnr_script"], abs=1e-4)
    assert ssim(restored, reference, crop_border=4, y_channel=True).item() == pytest.approx(case["ssim_script"], abs=1e-6)


def test_a_batch_is_scored_image_by_image():
    names = ("noise", "blur")
    restored = torch.cat([pair(n)[0][..., :60, :71] for n in names])
    reference = torch.cat([pair(n)[1][..., :60, :71] for n in names])
    for fn in (psnr, ssim):
        together = fn(restored, reference, crop_border=3)
        alone = torch.cat([fn(restored[i : i + 1], reference[i : i + 1], crop_border=3) for i in range(2)])
        assert together.shape == (2,)
        torch.testing.assert_close(together, alone, rtol=1e-12, atol=0)  # the same float64 sums, possibly in another order


def test_half_precision_is_scored_in_float64():
    restored, reference = pair("blur")
    assert psnr(restored.bfloat16(), reference.bfloat16()).dtype == torch.float64


def test_luma_is_limited_range():
    black_white = torch.tensor([0.0, 1.0], dtype=torch.float64).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    torch.testing.assert_close(luma(black_white).flatten(), torch.tensor([16.0, 235.0], dtype=torch.float64))


@pytest.mark.parametrize("fn", [psnr, ssim])
def test_different_sizes_are_an_error_that_names_both(fn):
    with pytest.raises(UserError, match=r"\(1, 3, 8, 9\).*\(1, 3, 8, 8\)"):
        fn(torch.zeros(1, 3, 8, 9), torch.zeros(1, 3, 8, 8))


def test_too_small_images_are_an_error_that_says_so():
    image = torch.zeros(1, 3, 18, 40)
    with pytest.raises(UserError, match="at least 11 x 11 pixels, 32 x 10 are left"):
        ssim(image, image, crop_border=4)
    with pytest.raises(UserError, match="cannot cut 9 pixels"):
        crop(image, 9)


def test_the_registry_says_the_direction():
    assert METRICS["psnr"].higher_is_better
    assert METRICS["ssim"].needs_reference
