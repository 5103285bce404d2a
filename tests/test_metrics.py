from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from goldens import load_golden
from PIL import Image

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.evaluation.fidelity import crop, luma
from sslsr_diffusion.evaluation.metrics import METRICS, convention, psnr, select, ssim, unavailable

BENCHMARK = os.environ.get("SSLSR_BENCHMARK_DIR")
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


def test_pyiqas_ssim_differs_by_rounding_and_by_what_is_negative():
    restored, reference = pair("noise")  # 8-bit RGB, structure nowhere negative: both conventions are one
    ours, theirs = METRICS["ssim_basicsr"].fn, METRICS["ssim"].fn
    assert ours is ssim
    assert theirs(restored, reference).item() == pytest.approx(ours(restored, reference).item(), abs=1e-8)  # float32 pixels are not whole
    assert theirs(restored, reference, y_channel=True).item() != pytest.approx(ours(restored, reference, y_channel=True).item(), abs=1e-6)
    waves = torch.linspace(0, 60, 40).sin().mul(0.4).expand(1, 3, 40, 40)  # the reference upside down
    assert ours(0.5 + waves, 0.5 - waves).item() < 0
    assert theirs(0.5 + waves, 0.5 - waves).item() == 0


@pytest.mark.skipif(not BENCHMARK, reason="SSLSR_BENCHMARK_DIR is not set")
def test_psnr_and_ssim_match_the_benchmark_log():
    folder = Path(BENCHMARK)
    for row in json.loads((folder / "published_metrics.json").read_text()):
        restored, reference = (read(folder / side / row["file"]) for side in ("published", "hr"))
        assert psnr(restored, reference, y_channel=True).item() == pytest.approx(row["psnr_y"], abs=1e-3), row["file"]
        assert METRICS["ssim"].fn(restored, reference, y_channel=True).item() == pytest.approx(row["ssim_y"], abs=1e-4), row["file"]


def read(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)[None].float() / 255


def test_names_are_chosen_in_order_and_once():
    assert select("niqe, psnr,psnr") == ["niqe", "psnr"]
    assert set(select("all")) == set(METRICS)
    assert set(select("all")) - set(select("default")) == {"ssim_basicsr", "niqe_basicsr"}
    for text in ("", "psnr,nope"):
        with pytest.raises(UserError, match="expected some of psnr"):
            select(text)


def test_the_registry_says_the_direction_and_the_convention():
    assert METRICS["psnr"].higher_is_better
    assert METRICS["ssim"].needs_reference
    assert not METRICS["niqe"].higher_is_better
    assert not METRICS["niqe"].needs_reference
    text = convention("ssim", crop_border=4, y_channel=True)
    assert "Y of YCbCr" in text
    assert "border 4 px" in text
    assert all(unavailable(name) is None for name in ("psnr", "ssim", "niqe", "ssg_l1"))
