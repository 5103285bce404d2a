"""Reads tests/golden/: reference values made by running the published code; each folder's README has the tolerances."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"


class Golden(NamedTuple):
    index: Any  # the parsed index.json, or <item>.json
    tensors: dict[str, Tensor]


@functools.cache
def load_golden(name: str) -> Golden:
    """`load_golden("ssl/ssg")` reads index.json + data.safetensors; `load_golden("stablesr/unet")` reads unet.json + unet.safetensors."""
    from safetensors.torch import load_file

    base = GOLDEN / name
    data, index = (
        (base / "data.safetensors", base / "index.json") if base.is_dir() else (base.with_suffix(".safetensors"), base.with_suffix(".json"))
    )
    return Golden(json.loads(index.read_text()) if index.is_file() else None, load_file(data))
