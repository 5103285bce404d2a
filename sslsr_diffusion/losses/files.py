"""Weights of a loss's network, out of a file of the user's."""

from pathlib import Path

from torch import Tensor, nn

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.unpickle import read_checkpoint


def read_tensors(path: str, key: str) -> dict[str, Tensor]:
    """The named tensors of a .safetensors file, or of one written by torch.save; nothing in it is run.

    `key`: of the recipe, for messages. UserError where there is no such file or it holds something else.
    """
    if not Path(path).expanduser().is_file():
        raise UserError(f"{key}: {path} is not a file; give the file with the network's weights.")
    try:
        tensors = read_checkpoint(path, entries=("params", "params_ema", "state_dict")).tensors
    except UserError as error:
        raise UserError(f"{key}: {str(error).removeprefix('checkpoint: ')}") from None
    return {name.removeprefix("module."): value for name, value in tensors.items()}


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
