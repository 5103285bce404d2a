"""Read a checkpoint file without running anything that is in it."""

import pickle
import tarfile
import types
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from sslsr_diffusion.errors import UserError

_REBUILD = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter")
_STORAGES = [name for name in vars(torch) if name.endswith("Storage")]
_DTYPES = [name for name, value in vars(torch).items() if isinstance(value, torch.dtype)]
_ALLOWED = {
    ("collections", "OrderedDict"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
    *(("torch._utils", name) for name in _REBUILD),
    *(("torch", name) for name in (*_STORAGES, *_DTYPES)),
}


@dataclass(frozen=True)
class Checkpoint:
    """Named tensors of a file, and what else was in it."""

    tensors: dict[str, Tensor]
    foreign: list[str]  # classes and functions that the file named and that were not loaded


class _Inert:
    """Stands for any foreign object: can be made, called, filled and given a state, and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        return super().__new__(cls)

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        pass

    __init__ = __setstate__ = __setitem__ = append = extend = add = _nothing

    def __call__(self, *args: Any, **kwargs: Any) -> Self:
        return self

    def __hash__(self) -> int:
        return id(self)


def _restricted(foreign: set[str]) -> types.ModuleType:
    """A stand-in for the `pickle` module whose unpickler knows tensors and nothing else."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if (module, name) in _ALLOWED:
                return super().find_class(module, name)
            foreign.add(f"{module}.{name}")
            return type(_Inert.__name__, (_Inert,), {})

    module = types.ModuleType("restricted_pickle")
    module.Unpickler = Unpickler  # type: ignore[attr-defined]
    module.load = lambda file, **kwargs: Unpickler(file, **kwargs).load()  # type: ignore[attr-defined]
    return module


def read_checkpoint(path: Path | str, entries: Sequence[str] = ("state_dict",)) -> Checkpoint:
    """The tensors of a .safetensors or a pickled .ckpt/.pt/.pth file: of the first of `entries` that it has, else of the file itself.

    Globals outside a short list of torch's own tensor builders become inert placeholders, so no code of the file runs.
    UserError where there is no such file, it is of another kind, or it holds no named tensors.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"checkpoint: {path} is not a file; give the downloaded .ckpt or .safetensors file.")
    foreign: set[str] = set()
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path, foreign)
    content = content if isinstance(content, dict) else {}
    content = next((content[entry] for entry in entries if isinstance(content.get(entry), dict)), content)
    tensors = {k: v.detach() for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if not tensors:
        known = ", ".join(f"`{entry}`" for entry in entries)
        raise UserError(f"checkpoint: {path.name} holds no named tensors; expected a state dict, or a dict with the entry {known}.")
    return Checkpoint(tensors, sorted(foreign))


def _read_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"checkpoint: {path.name} is not a readable safetensors file ({error}); download it again.") from None


def _read_pickle(path: Path, foreign: set[str]) -> Any:
    zipped = zipfile.is_zipfile(path)
    if zipped:
        with zipfile.ZipFile(path) as archive:
            scripted = any(name.endswith("constants.pkl") for name in archive.namelist())
    if (zipped and scripted) or (not zipped and tarfile.is_tarfile(path)):
        raise UserError(f"checkpoint: {path.name} is a TorchScript or tar archive; expected a state dict written by torch.save.")
    try:
        return torch.load(path, map_location="cpu", weights_only=False, pickle_module=_restricted(foreign), mmap=zipped)
    except Exception as error:  # a damaged pickle can raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"checkpoint: {path.name} cannot be read as a file written by torch.save ({reason}); download it again.") from None
