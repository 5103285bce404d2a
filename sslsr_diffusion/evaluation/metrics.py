"""The registry of metrics: one table for the command line, the report and training's validation."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from torch import Tensor

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.evaluation import features, learned
from sslsr_diffusion.evaluation.fidelity import psnr, ssg_terms, ssim
from sslsr_diffusion.evaluation.grid import grid
from sslsr_diffusion.evaluation.niqe import niqe
from sslsr_diffusion.tables import named

__all__ = ["METRICS", "Metric", "convention", "psnr", "select", "ssim", "unavailable"]

T = TypeVar("T")


@dataclass(frozen=True)
class Metric:
    """One number per image: `fn(restored, against or None, *, crop_border, y_channel) -> [B]`, images [B, 3, H, W] in [0, 1]."""

    fn: Callable[..., Tensor]
    higher_is_better: bool
    needs_reference: bool
    label: str
    digits: int  # decimals in tables
    convention: str  # {channels}, {border}, {against}: as the options and the files say
    default: bool = True  # computed when nothing is asked for by name
    whole_set: Callable[..., float] | None = None  # one number for all images (FID) from both sets of features [N, D], which fn gives
    joint: Callable[..., dict[str, Tensor]] | None = None  # gives this and its sisters in one pass
    lacks: Callable[..., str | None] = lambda *, download: None  # why it cannot be computed here and what to do about it
    origin: Callable[[], str] = lambda: ""  # package and weights with their hash, where they are there
    reads_lr: bool = False  # compares with the low-resolution picture where that is given

    def against(self, reference: T | None, lr: T | None) -> T | None:
        """Which of the two an image is compared with; None: with neither."""
        return reference if self.needs_reference else lr if self.reads_lr else None


def select(names: str) -> list[str]:
    """`"psnr,ssim"`, `"default"` or `"all"` -> names; UserError lists the known ones."""
    found: list[str] = []
    for name in filter(None, map(str.strip, names.split(","))):
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
    return METRICS[name].lacks(download=download)


def convention(name: str, *, crop_border: int, y_channel: bool, has_lr: bool = False) -> str:
    """One line that says how the number comes about: channels, border, range, and the weights with their hash.

    `has_lr`: whether every image comes with its low-resolution picture.
    """
    metric = METRICS[name]
    channels = "Y of YCbCr (BT.601, 16..235)" if y_channel else "RGB"
    against = "minus that of the low-resolution picture's bicubic enlargement" if has_lr else "of the picture itself"
    text = metric.convention.format(channels=channels, border=f"border {crop_border} px cut", against=against)
    return "; ".join(filter(None, [text, metric.origin()]))


def _learned(name: str, higher_is_better: bool, needs_reference: bool, digits: int, text: str) -> Metric:
    fn = learned.learned(name, needs_reference=needs_reference)
    return Metric(fn, higher_is_better, needs_reference, name.upper(), digits, text, **_through_pyiqa(name))


def _through_pyiqa(name: str) -> dict[str, Any]:
    return {"lacks": partial(learned.unavailable, name), "origin": partial(learned.origin, name)}


_SSIM = "data range 255, 11 x 11 Gaussian sigma 1.5, valid area, {border}"
_SSIM_PYIQA = "{channels}, rounded to 8 bits, negative structure counts 0 (pyiqa's convention), " + _SSIM
_SSIM_BASICSR = "{channels} (BasicSR's convention), " + _SSIM
_FEATURES = "EfficientNet-Lite0, blocks 0, 2, 4, 7, 10, 15, unit length over the channels, RGB (x - 0.498) / 0.502, no resize, {border}"
_FID = "InceptionV3 (FID weights), pool3 2048, RGB -1..1, bilinear to 299, whole images (no border is cut)"
_NIQE = "blocks of 96 x 96, 2 scales, border repeated, published parameters (shipped); {border}"
_NIQE_PYIQA = "full-range luma rounded to 8 bits (pyiqa's convention), " + _NIQE
_NIQE_BASICSR = "Y 16..235 rounded to 8 bits (BasicSR's convention), " + _NIQE
_CLIP = "CLIP RN50 without positional embedding, five prompt pairs, RGB with CLIP's mean and deviation, no resize, {border}"
_SSG = ", on the ground truth's edge mask (Laplacian > 20, no stride), k 25, w 9, sigma 0.004, rows normalised, RGB 0..1, {border}"
_SSG_L1, _SSG_KL = "mean |T_sr - T_gt|" + _SSG, "mean T_gt ln(T_gt / T_sr), clamped at 1e-10" + _SSG

_GRID = "highest line at k/16 cycles per pixel over its neighbours in the median spectrum, both axes, luma, {against}, {border}"

METRICS: dict[str, Metric] = {
    "psnr": Metric(psnr, True, True, "PSNR (dB)", 3, "{channels}, not rounded, data range 255, {border}"),
    "ssim": Metric(partial(ssim, convention="pyiqa"), True, True, "SSIM", 4, _SSIM_PYIQA),
    "ssim_basicsr": Metric(ssim, True, True, "SSIM (BasicSR)", 4, _SSIM_BASICSR, default=False),
    "features": Metric(
        features.feature_distance, False, True, "Features", 4, _FEATURES, lacks=features.unavailable, origin=features.origin
    ),
    "lpips": _learned("lpips", False, True, 4, "AlexNet v0.1, RGB -1..1, no resize, {border}"),
    "dists": _learned("dists", False, True, 4, "RGB 0..1, no resize, {border}"),
    "fid": Metric(learned.inception_features, False, True, "FID", 2, _FID, whole_set=learned.frechet_distance, **_through_pyiqa("fid")),
    "niqe": Metric(partial(niqe, convention="pyiqa"), False, False, "NIQE", 3, _NIQE_PYIQA),
    "niqe_basicsr": Metric(niqe, False, False, "NIQE (BasicSR)", 3, _NIQE_BASICSR, default=False),
    "clipiqa": _learned("clipiqa", True, False, 4, _CLIP),
    "musiq": _learned("musiq", True, False, 3, "KonIQ-10k weights, RGB 0..1, multi-scale inside, {border}"),
    "ssg_l1": Metric(named("sslsr_diffusion.evaluation.fidelity:ssg_l1"), False, True, "SSG L1", 6, _SSG_L1, joint=ssg_terms),
    "ssg_kl": Metric(named("sslsr_diffusion.evaluation.fidelity:ssg_kl"), False, True, "SSG KL", 6, _SSG_KL, joint=ssg_terms),
    "grid": Metric(grid, False, False, "Grid (dB)", 2, _GRID, reads_lr=True),
}
