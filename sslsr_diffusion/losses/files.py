"""Weights of a loss's network, out of a file of the user's."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sslsr_diffusion.errors import UserError

_INSIDE = ("params", "params_ema", "state_dict")  # under which published files keep their tensors


def read_tensors(path: str, key: str) -> dict[str, Tensor]:
    """The named tensors of a .safetensors file, or of one written by torch.save; nothing in it is run.

    `key`: of the recipe, for messages. UserError where there is no such file or it holds something else.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"{key}: {path} is not a file; give the file with the network's weights.")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(file)
        else:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # what is damaged can raise anything
        reason = (str(error).splitlines() or [""])[0][:200] or type(error).__name__
        raise UserError(f"{key}: {path} cannot be read as named tensors ({reason}); expected a whole file of tensors alone.") from None
    if isinstance(content, dict):
        content = next((content[name] for name in _INSIDE if isinstance(content.get(name), dict)), content)
    if not isinstance(content, dict) or not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{key}: {path} holds no named tensors; expected a state dict, or a dict with the entry `params`.")
    return {str(name).removeprefix("module."): value for name, value in content.items()}


def load_into(network: nn.Module, tensors: dict[str, Tensor], *, path: str, key: str) -> None:
    """Copy the tensors of a file into a network; UserError where names or shapes are not its own."""
    own = network.state_dict()
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or extra:
        raise UserError(
            f"{key}: {path} belongs to another network: {len(missing)} tensors are missing in it and {len(extra)} are unknown here "
            f"(for example {(missing or extra)[0]})."
        )
    for name, value in own.items():
        if value.shape != tensors[name].shape:
            raise UserError(f"{key}: {path}: {name} has shape {list(tensors[name].shape)}, expected {list(value.shape)}.")
    network.load_state_dict(tensors)
