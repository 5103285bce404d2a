"""The registry of metrics: one table for the command line, the report and training's validation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.evaluation import learned
from sslsr_diffusion.evaluation.fidelity import psnr, ssim
from sslsr_diffusion.evaluation.niqe import niqe
from sslsr_diffusion.evaluation.ssg_distance import ssg_terms
from sslsr_diffusion.evaluation.weights import WEIGHTS, digest
from sslsr_diffusion.tables import named

__all__ = ["METRICS", "Metric", "convention", "psnr", "select", "ssim", "unavailable"]


@dataclass(frozen=True)
class Metric:
    """One number per image: `fn(restored, reference or None, *, crop_border, y_channel) -> [B]`, images [B, 3, H, W] in [0, 1]."""

    fn: Callable[..., Tensor]
    higher_is_better: bool
    needs_reference: bool
    label: str
    digits: int  # decimals in tables
    convention: str  # {channels}, {border}: as the options say
    default: bool = True  # computed when nothing is asked for by name
    whole_set: Callable[..., float] | None = None  # one number for all images (FID) from both sets of features [N, D], which fn gives
    joint: Callable[..., dict[str, Tensor]] | None = None  # gives this and its sisters in one pass


def select(names: str) -> list[str]:
    """`"psnr,ssim"`, `"default"` or `"all"` -> names; UserError lists the known ones."""
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    found: list[str] = []
    for name in wanted:
        if name in ("default", "all"):
            found += [key for key, metric in METRICS.items() if metric.default or name == "all"]
        elif name in METRICS:
            found.append(name)
        else:
            raise UserError(f"--metrics: {name!r} is not known; expected some of {', '.join(METRICS)}, or default, or all.")
    if not found:
        raise UserError(f"--metrics: nothing was named; expected some of {', '.join(METRICS)}.")
    return list(dict.fromkeys(found))


def unavailable(name: str, *, download: bool = True) -> str | None:
    """Why a metric cannot be computed here and what to do about it, or None. Missing weights are downloaded unless told not to."""
    return learned.unavailable(name, download=download) if name in WEIGHTS else None


def convention(name: str, *, crop_border: int, y_channel: bool) -> str:
    """One line that says how the number comes about: channels, border, range, and the weights with their hash."""
    metric = METRICS[name]
    channels = "Y of YCbCr (BT.601, 16..235)" if y_channel else "RGB"
    text = metric.convention.format(channels=channels, border=f"border {crop_border} px cut")
    files = [f"{file.name} (sha256 {digest(file.path)[:16]})" for file in WEIGHTS.get(name, ()) if file.path.is_file()]
    if not files:
        return text
    from importlib.metadata import version

    return f"{text}; pyiqa {version('pyiqa')}; weights {', '.join(files)}"


_SSIM = "data range 255, 11 x 11 Gaussian sigma 1.5, valid area, {border}"
_NIQE = "blocks of 96 x 96, 2 scales, border repeated, published parameters (shipped); {border}"

_SSG = ", on the ground truth's edge mask (Laplacian > 20, no stride), k 25, w 9, sigma 0.004, rows normalised, RGB 0..1, {border}"

METRICS: dict[str, Metric] = {
    "psnr": Metric(psnr, True, True, "PSNR (dB)", 3, "{channels}, not rounded, data range 255, {border}"),
    "ssim": Metric(
        partial(ssim, convention="pyiqa"),
        True,
        True,
        "SSIM",
        4,
        "{channels}, rounded to 8 bits, negative structure counts 0 (pyiqa's convention), " + _SSIM,
    ),
    "ssim_basicsr": Metric(ssim, True, True, "SSIM (BasicSR)", 4, "{channels} (BasicSR's convention), " + _SSIM, default=False),
    "lpips": Metric(
        learned.learned("lpips", needs_reference=True), False, True, "LPIPS", 4, "AlexNet v0.1, RGB -1..1, no resize, {border}"
    ),
    "dists": Metric(learned.learned("dists", needs_reference=True), False, True, "DISTS", 4, "RGB 0..1, no resize, {border}"),
    "fid": Metric(
        learned.inception_features,
        False,
        True,
        "FID",
        2,
        "InceptionV3 (FID weights), pool3 2048, RGB -1..1, bilinear to 299, whole images (no border is cut)",
        whole_set=learned.frechet_distance,
    ),
    "niqe": Metric(
        partial(niqe, convention="pyiqa"), False, False, "NIQE", 3, "full-range luma rounded to 8 bits (pyiqa's convention), " + _NIQE
    ),
    "niqe_basicsr": Metric(
        niqe, False, False, "NIQE (BasicSR)", 3, "Y 16..235 rounded to 8 bits (BasicSR's convention), " + _NIQE, default=False
    ),
    "clipiqa": Metric(
        learned.learned("clipiqa", needs_reference=False),
        True,
        False,
        "CLIPIQA",
        4,
        "CLIP RN50 without positional embedding, five prompt pairs, RGB with CLIP's mean and deviation, no resize, {border}",
    ),
    "musiq": Metric(
        learned.learned("musiq", needs_reference=False),
        True,
        False,
        "MUSIQ",
        3,
        "KonIQ-10k weights, RGB 0..1, multi-scale inside, {border}",
    ),
    "ssg_l1": Metric(
        named("sslsr_diffusion.evaluation.ssg_distance:ssg_l1"), False, True, "SSG L1", 6, "mean |T_sr - T_gt|" + _SSG, joint=ssg_terms
    ),
    "ssg_kl": Metric(
        named("sslsr_diffusion.evaluation.ssg_distance:ssg_kl"),
        False,
        True,
        "SSG KL",
        6,
        "mean T_gt ln(T_gt / T_sr), clamped at 1e-10" + _SSG,
        joint=ssg_terms,
    ),
}
