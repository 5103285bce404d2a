"""Files of weights: read without running anything that is in them, and written so that others read them by their names alone."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.unpickle import read_checkpoint

ENTRIES = ("params_ema", "params-ema", "params", "state_dict", "model_state_dict", "model", "net")  # where trainers put the weights
_PREFIXES = ("module.", "netG.", "params_ema.", "params.")
CALL = ("scale", "color_fix", "detail", "back_projection", "antiring")  # what a call takes from the model where it names nothing
_LARGEST_TEXT = 1 << 16  # characters of an entry of the metadata


@dataclass(frozen=True)
class Weights:
    """What a file holds."""

    tensors: dict[str, Tensor]
    arguments: dict[str, Any]  # these and the next: of a file that was written here, else empty
    call: dict[str, Any]


def read_tensors(path: Path) -> Weights:
    """The tensors of a .safetensors file, or of a pickled one under `params_ema`, `params`, ... or bare, without common prefixes.

    Raises UserError: there is no such file, it is damaged or of another kind, it holds no named tensors.
    """
    found = read_checkpoint(path, entries=ENTRIES).tensors
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in found):
            found = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
    return Weights(found, _told(_metadata(path), "arguments", path), read_call(path))


def read_call(path: Path) -> dict[str, Any]:
    """What a call takes where it names nothing, from the head of a file that was written here; of others there is nothing.

    Raises UserError: it says what no call can take.
    """
    call = _told(_metadata(path), "call", path)
    scale = call.get("scale", 1)
    if not isinstance(scale, int | float) or not 0 < scale < math.inf:
        raise UserError(f"model {path.name}: expected a positive number as the scale in its metadata, got {scale!r}; export it again.")
    return {name: value for name, value in call.items() if name in CALL}


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], architecture: str, arguments: Mapping[str, Any], call: Mapping[str, Any]
) -> None:
    """A .safetensors file whose metadata say what `read_tensors` gives back."""
    from safetensors.torch import save_file

    told = {"format": "pt", "architecture": architecture, "arguments": json.dumps(arguments), "call": json.dumps(call)}
    own = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}  # tied ones too
    save_file(own, path, metadata=told)


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """The part of some arguments that JSON can hold."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | bool | int | float)


def _metadata(path: Path) -> dict[str, str]:
    """Of a pickled file there are none."""
    from safetensors import safe_open

    if path.suffix != ".safetensors":
        return {}
    with safe_open(path, framework="pt") as stream:
        return stream.metadata() or {}


def _told(metadata: Mapping[str, str], key: str, path: Path) -> dict[str, Any]:
    text = metadata.get(key, "{}")
    try:
        found = json.loads(text) if len(text) <= _LARGEST_TEXT else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not all(map(_is_plain, found.values())):
        raise UserError(f"model {path.name}: expected plain values under {key!r} in its metadata, got {text[:60]!r}; export it again.")
    return found
