"""The learned metrics (LPIPS, DISTS, MUSIQ, CLIPIQA, the features of FID) through pyiqa, one image at a time."""

import contextlib
import functools
import importlib
import io
import logging
import os
import sys
import types
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from sslsr_diffusion.errors import MissingDependency, UserError
from sslsr_diffusion.evaluation.fidelity import crop
from sslsr_diffusion.weights import WEIGHTS, missing, named_origin

log = logging.getLogger(__name__)


def learned(name: str, *, needs_reference: bool) -> Callable[..., Tensor]:
    """The metric function of pyiqa's `name`: RGB in [0, 1] (clamped), cut, not resized; [B] float64 on the CPU."""

    def score(restored: Tensor, reference: Tensor | None = None, *, crop_border: int = 0, y_channel: bool = False) -> Tensor:
        if needs_reference and reference is None:
            raise UserError(f"{name} compares with a reference, but none was given.")
        model = _model(name, str(restored.device), torch.hub.get_dir())
        images = [crop(image, crop_border).float().clamp(0, 1) for image in (restored, reference) if image is not None]
        singles = zip(*(image.split(1) for image in (images if needs_reference else images[:1])))
        return torch.cat([model(*single).detach().reshape(1).double().cpu() for single in singles])

    return score


def inception_features(images: Tensor) -> Tensor:
    """[B, 3, H, W] in [0, 1] -> [B, 2048] pool3 features, resized to 299 (bilinear) inside   (pytorch-fid, BasicSR's convention)."""
    model = _model("fid", str(images.device), torch.hub.get_dir())
    singles = images.float().clamp(0, 1).split(1)
    return torch.cat([model(single, resize_input=True, normalize_input=True)[0].reshape(1, -1).cpu() for single in singles])


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """|ma - mb|^2 + tr(Sa + Sb - 2 (Sa Sb)^(1/2)) of two sets of features [N, D]   (Heusel et al. 2017).

    With centred and scaled features A, B (S = A^T A) the last trace is the nuclear norm of A B^T, an N x M matrix: exact even
    where the covariances are singular (fewer images than features), where the usual matrix square root is not.
    """
    if min(len(a), len(b)) < 2:
        raise UserError(f"FID compares two sets of at least 2 images, got {len(a)} and {len(b)}.")
    means = [x.mean(axis=0, dtype=np.float64) for x in (a, b)]
    left, right = ((x.astype(np.float64) - m) / np.sqrt(len(x) - 1) for x, m in zip((a, b), means))
    cross = np.linalg.svd(left @ right.T, compute_uv=False).sum()
    return float(np.square(means[0] - means[1]).sum() + np.square(left).sum() + np.square(right).sum() - 2 * cross)


def unavailable(name: str, *, download: bool = True) -> str | None:
    """Why pyiqa's `name` cannot be computed here, with what to do about it; None when it can."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            importlib.import_module("pyiqa")
            if name == "clipiqa":
                _import_clip()
    except Exception as error:  # an import can fail in any way: a broken binary package raises OSError, an old one AttributeError
        return f'needs pyiqa, whose import failed ({type(error).__name__}: {error}); pip install "sslsr-diffusion[eval]"'
    return missing(WEIGHTS[name], download=download)


def origin(name: str) -> str:
    """pyiqa and the weights that are there, for the convention."""
    return named_origin("pyiqa", [file.path for file in WEIGHTS[name]])


def _check(name: str, message: str) -> None:
    reason = unavailable(name)
    if reason is not None:
        raise (MissingDependency if "pip install" in reason else UserError)(message.format(reason))


@functools.cache
def _model(name: str, device: str, hub_folder: str) -> nn.Module:
    _check(name, f"{name}: {{}}")
    import pyiqa
    from pyiqa.utils import download_util

    download_util.DEFAULT_CACHE_DIR = f"{hub_folder}/pyiqa"  # pyiqa reads torch's hub folder only once, at import
    chatter = io.StringIO()
    logging.getLogger("pyiqa").setLevel(logging.WARNING)
    with contextlib.redirect_stdout(chatter), warnings.catch_warnings(), _tensors_only():
        warnings.simplefilter("ignore")  # pyiqa's ways of calling torchvision
        if name == "fid":
            from pyiqa.archs.inception import InceptionV3

            model: nn.Module = InceptionV3().to(device).eval()
        else:
            model = pyiqa.create_metric(name, device=torch.device(device))
    log.debug("%s", chatter.getvalue().strip())
    return model


@contextlib.contextmanager
def _tensors_only() -> Iterator[None]:
    """pyiqa asks torch.load to run whatever a weights file says; here the files may hold tensors and nothing else."""
    key = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(key)
    os.environ[key] = "1"
    try:
        yield
    finally:
        del os.environ[key]
        if before is not None:
            os.environ[key] = before


def _import_clip() -> None:
    """OpenAI's clip package asks pkg_resources for `packaging` and nothing else; setuptools 81 removed pkg_resources.

    For the length of this one import a stand-in answers; the environment is left as it was.
    """
    if "clip" in sys.modules or "pkg_resources" in sys.modules:
        importlib.import_module("clip")
        return
    import packaging.version

    stand_in = types.ModuleType("pkg_resources")
    vars(stand_in)["packaging"] = packaging
    sys.modules["pkg_resources"] = stand_in
    try:
        importlib.import_module("clip")
    finally:
        del sys.modules["pkg_resources"]
