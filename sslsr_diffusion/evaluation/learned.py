"""The learned metrics (LPIPS, DISTS, MUSIQ, CLIPIQA, the features of FID) through pyiqa, one image at a time; and LPIPS to train on."""

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
from sslsr_diffusion.evaluation.weights import WEIGHTS, missing, named_origin

log = logging.getLogger(__name__)
_TAPS = (3, 8, 15, 22, 29)  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3 of torchvision's vgg16


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
    """Why pyiqa's `name`, or "lpips-vgg", cannot be computed here, with what to do about it; None when it can."""
    package, extra = ("torchvision", "lpips") if name == "lpips-vgg" else ("pyiqa", "eval")
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            importlib.import_module(package)
            if name == "clipiqa":
                _import_clip()
    except Exception as error:  # an import can fail in any way: a broken binary package raises OSError, an old one AttributeError
        return f'needs {package}, whose import failed ({type(error).__name__}: {error}); pip install "sslsr-diffusion[{extra}]"'
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


class PerceptualDistance(nn.Module):
    """LPIPS = sum_l mean_xy w_l . (a_l - b_l)^2, a_l and b_l the unit-length VGG16 features of layer l   (Zhang et al., CVPR 2018)"""

    def __init__(self, features: nn.Sequential, weights: list[Tensor]) -> None:
        """`features` are vgg16's; `weights` five times [C_l]."""
        super().__init__()
        self.features = features[: _TAPS[-1] + 1]
        for layer, weight in enumerate(weights):
            self.register_buffer(f"weight{layer}", weight.reshape(1, -1, 1, 1))
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).reshape(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).reshape(1, 3, 1, 1))
        self.requires_grad_(False).eval()

    def forward(self, restored: Tensor, reference: Tensor) -> Tensor:
        """[B, 3, H, W] about [0, 1], at least 16 pixels a side -> [B], differentiable in both."""
        a, b = (((x.float() * 2 - 1) - self.get_buffer("shift")) / self.get_buffer("scale") for x in (restored, reference))
        total = torch.zeros(len(a), device=a.device)
        for position, layer in enumerate(self.features):
            a, b = layer(a), layer(b)
            if position in _TAPS:
                weight = self.get_buffer(f"weight{_TAPS.index(position)}")
                total = total + ((_unit(a) - _unit(b)).square() * weight).sum(dim=1).mean(dim=(1, 2))
        return total


def _unit(features: Tensor) -> Tensor:
    """Unit length over the channels; without the small number under the root there is no gradient where all of them are 0."""
    return features / (features.square().sum(dim=1, keepdim=True) + 1e-20).sqrt()


def load_perceptual_distance() -> PerceptualDistance:
    """LPIPS 0.1 with the published weights, downloaded where they are not there yet.

    Raises:
        MissingDependency: torchvision is not installed.
        UserError: the weights are missing or damaged (the message says which files belong where).
    """
    _check("lpips-vgg", "losses: lpips {}.")
    from torchvision.models import vgg16

    backbone, linear = (torch.load(file.path, map_location="cpu", weights_only=True) for file in WEIGHTS["lpips-vgg"])
    with torch.device("meta"):
        features = vgg16(weights=None).features
    state = {name.removeprefix("features."): tensor for name, tensor in backbone.items() if name.startswith("features.")}
    features.load_state_dict(state, assign=True)
    return PerceptualDistance(features, [linear[f"lin{layer}.model.1.weight"].float() for layer in range(len(_TAPS))])
