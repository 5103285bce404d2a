"""A discriminator that sees what a frozen ConvNeXt of open_clip sees: heads that learn, one on each of its stages."""

import importlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import spectral_norm

from sslsr_diffusion import hub
from sslsr_diffusion.config import Settings
from sslsr_diffusion.errors import MissingDependency, UserError
from sslsr_diffusion.losses.files import load_into, read_tensors

EXTRA = 'pip install "sslsr-diffusion[open-clip-torch]"'
FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
_TRUNK = "visual.trunk."


class ConvNextSettings(Settings):
    """Which network of open_clip."""

    name: str = Field("convnext_xxlarge", description="open_clip's name of the network (HYPIR, StrSR: convnext_xxlarge, 843 M parameters).")
    pretrained: str = Field("laion2b_s34b_b82k_augreg_soup", description="open_clip's name of its weights, which are fetched from the hub.")
    file: str | None = Field(None, description="A file with them in place of the hub's, by open_clip's tensor names.")


class FeatureDiscriminator(nn.Module):
    """Logits of heads that learn, on the stages of a frozen network   (Kumari et al., CVPR 2022, "Ensembling Off-the-shelf Models")"""

    mean: Tensor
    deviation: Tensor

    def __init__(self, stem: nn.Module, stages: Sequence[nn.Module], channels: Sequence[int], width: int) -> None:
        """`stages` follow each other and give [B, channels[k], h, w] each; `width`: channels inside a head."""
        super().__init__()
        self.stem, self.stages = stem.requires_grad_(False).eval(), nn.ModuleList(stages).requires_grad_(False).eval()
        self.heads = nn.ModuleList(_head(inside, width) for inside in channels)
        self.register_buffer("mean", torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None], persistent=False)  # of CLIP
        self.register_buffer("deviation", torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None], persistent=False)

    def forward(self, pictures: Tensor) -> list[Tensor]:
        """[B, 3, H, W] in [0, 1] -> [B, 1, h, w] per stage"""
        x = self.stem((pictures - self.mean) / self.deviation)
        logits = []
        for stage, head in zip(self.stages, self.heads):
            x = stage(x)
            logits.append(head(x))
        return logits


def _head(inside: int, width: int) -> nn.Module:
    return nn.Sequential(spectral_norm(nn.Conv2d(inside, width, 3, 1, 1)), nn.LeakyReLU(0.2), spectral_norm(nn.Conv2d(width, 1, 1)))


def convnext_discriminator(settings: ConvNextSettings, width: int, key: str, *, shapes: bool) -> FeatureDiscriminator:
    """The frozen network with fresh heads; with `shapes` on the meta device, and nothing is read.

    `key`: of the recipe, for messages. MissingDependency where open_clip is missing, UserError (HubError) where weights are.
    """
    trunk = _trunk(settings.name, key)
    channels, x = [], trunk.stem(torch.empty(1, 3, 64, 64, device="meta"))
    for stage in trunk.stages:
        x = stage(x)
        channels.append(x.shape[1])
    if not shapes:
        path = settings.file or _file_of_hub(settings, key, download=True)
        tensors = read_tensors(path, f"{key}.file")
        own = {name: tensors[_TRUNK + name].float() for name in trunk.state_dict() if _TRUNK + name in tensors}
        load_into(trunk.to_empty(device="cpu"), own, path=path, key=f"{key}.file")
    return FeatureDiscriminator(trunk.stem, list(trunk.stages), channels, width)


def check_convnext(settings: ConvNextSettings, key: str) -> str:
    """What is there of it, for the dry run; raises what `convnext_discriminator` would. No weights are fetched."""
    _open_clip(key)
    if settings.file is not None:
        return f"{len(read_tensors(settings.file, f'{key}.file'))} tensors in {settings.file}"
    return _file_of_hub(settings, key, download=False)


def _open_clip(key: str) -> Any:
    try:
        return importlib.import_module("open_clip")
    except Exception as error:  # an import can fail in any way
        said = f"{type(error).__name__}: {error}"
        raise MissingDependency(f"{key}: convnext needs open_clip, whose import failed ({said}); {EXTRA}") from error


def _trunk(name: str, key: str) -> Any:
    """The image network on the meta device, without its text sister."""
    open_clip = _open_clip(key)
    if name not in open_clip.list_models():
        known = ", ".join(known for known in open_clip.list_models() if known.startswith("convnext"))
        raise UserError(f"{key}.name: expected one of open_clip's {known}; got {name!r}.")
    with torch.device("meta"), _quietly():
        trunk = getattr(open_clip.create_model(name, device="meta").visual, "trunk", None)
    if not (hasattr(trunk, "stem") and hasattr(trunk, "stages")):
        raise UserError(f"{key}.name: expected a network with stages, as convnext_xxlarge is; got {name!r}.")
    return trunk


def _file_of_hub(settings: ConvNextSettings, key: str, *, download: bool) -> str:
    """The file of weights in the hub's cache, or (without download) what is known of it."""
    config = _open_clip(key).get_pretrained_cfg(settings.name, settings.pretrained)
    repository = str(config.get("hf_hub", "")).rstrip("/")
    if not repository:
        raise UserError(f"{key}.pretrained: open_clip knows no {settings.pretrained!r} of {settings.name} on the hub; give file.")
    folder = hub.cached(repository, patterns=FILES)
    kept = next((folder / name for name in FILES if (folder / name).is_file()), None) if folder is not None else None
    if kept is not None:
        return str(kept)
    there = hub.look_up(repository, field=key)
    name = next((name for name in FILES if name in there.files), None)
    if name is None:
        raise UserError(f"{key}: {repository} on the hub holds none of {', '.join(FILES)}; give file.")
    if not download:
        return f"{repository} on the hub, commit {there.commit[:12]}; {name} is downloaded when training starts"
    return str(hub.fetch(repository, patterns=[name], field=key) / name)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the library's warning that a network on the meta device has no weights yet."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
