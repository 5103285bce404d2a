"""Small networks of every architecture, and a smooth picture for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sslsr_diffusion.models.network.networks import SuperResolution, drawn
from sslsr_diffusion.models.network.settings import NetworkSettings

TINY: dict[str, dict[str, Any]] = {
    "RRDBNet": {"num_feat": 4, "num_block": 1},
    "SRResNet": {"nf": 4, "nb": 1},
    "SPSRNet": {"nf": 4, "nb": 20, "gc": 2},
    "ELAN": {"m_elan": 2, "c_elan": 12, "window_sizes": [2, 4, 8]},
    "SwinIR": {
        "upscale": 4,
        "img_size": 16,
        "window_size": 8,
        "depths": [2],
        "num_heads": [2],
        "embed_dim": 8,
        "upsampler": "pixelshuffle",
    },
}
OTHERS: dict[str, dict[str, Any]] = {
    "Compact": {"num_in_ch": 3, "num_out_ch": 3, "num_feat": 8, "num_conv": 2, "upscale": 2},
    "SPAN": {"num_in_ch": 3, "num_out_ch": 3, "feature_channels": 8, "upscale": 2},
}


def smooth(height: int, width: int) -> Tensor:
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([0.5 + 0.4 * torch.sin((x * (1 + c) + y * 2) / 7) for c in range(3)])[None]


def tiny(name: str, **changes: Any) -> SuperResolution:
    return drawn(NetworkSettings(architecture=name, arguments={**{**TINY, **OTHERS}[name], **changes})).eval()


def save(folder: Path, name: str = "RRDBNet", **changes: Any) -> Path:
    tiny(name, **changes).save(folder, scale=4)
    return folder / "network.safetensors"
