"""The files of a one-step result: LoRAs as diffusers loads them, whole layers, the encoded prompt, and how the call is made.

pytorch_lora_weights.safetensors   the network's LoRA, for `load_lora_weights` of the base's stock pipeline
vae_lora.safetensors               the autoencoder's, where it has one; no stock pipeline loads it
full.safetensors                   layers of the network that trained whole, where there are some; nor this
prompt.safetensors                 the encoded prompt, so that no text encoder is needed
one_step.json                      the model section of the recipe, with the base's commit; the defaults of a call
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sslsr_diffusion.config import RecipeError, parse
from sslsr_diffusion.errors import UserError
from sslsr_diffusion.models.base import Base
from sslsr_diffusion.models.condition import Text
from sslsr_diffusion.models.loading import forget_folder
from sslsr_diffusion.models.one_step.settings import RESULT, OneStepSettings
from sslsr_diffusion.models.process import Process

VAE_LORA, PROMPT, FULL = "vae_lora.safetensors", "prompt.safetensors", "full.safetensors"


class Told(NamedTuple):
    """What one_step.json says."""

    settings: OneStepSettings
    seed: int
    call: dict[str, Any]


def write_told(folder: Path, told: Told) -> None:
    plain = {"model": told.settings.model_dump(mode="json"), "seed": told.seed, "call": told.call}
    (folder / RESULT).write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")


def read_told(folder: Path) -> Told:
    """UserError where the file is damaged or says what no recipe may."""
    path = folder / RESULT
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        return Told(parse(OneStepSettings, told["model"]), int(told["seed"]), dict(told["call"]))
    except RecipeError as error:
        raise UserError(f"model {folder}: {RESULT}: {error}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"model {folder}: {RESULT} cannot be read ({type(error).__name__}: {error}); fetch or export the model again."
        ) from None


def write_whole(folder: Path, networks: Mapping[str, Any], process: Process, base: Base | None) -> None:
    """A pipeline folder: these networks, and the base's other components (without an index of them, all its folders that are not hidden);
    without a base, a scheduler alone.
    """
    for part, network in networks.items():
        forget_folder(network)
        network.save_pretrained(folder / part)
    if base is None:
        process.scheduler().save_pretrained(folder / "scheduler")
        return
    index = base.folder / "model_index.json"
    told = json.loads(index.read_text(encoding="utf-8")) if index.is_file() else None
    for other in sorted(path for path in base.folder.iterdir() if path.is_dir() and path.name not in networks):
        if not other.name.startswith(".") and (told is None or other.name in told):
            shutil.copytree(other, folder / other.name)
    if told is not None:
        gone = [name for name, value in told.items() if isinstance(value, list) and not (folder / name).is_dir()]
        (folder / index.name).write_text(json.dumps({**told, **{name: [None, None] for name in gone}}, indent=1) + "\n", encoding="utf-8")


def write_text(text: Text, path: Path) -> None:
    """Half as large where nothing is lost: most text encoders work in bfloat16."""
    parts = {name: part.detach().cpu().contiguous() for name, part in text._asdict().items() if part is not None}
    halves = {name: part.bfloat16() for name, part in parts.items()}
    same = all(torch.equal(half.to(part.dtype), part) for half, part in zip(halves.values(), parts.values()))
    write_tensors(halves if same else parts, path)


def read_text(path: Path) -> Text:
    parts = {name: part.float() for name, part in read_tensors(path).items()}
    if "sequence" not in parts or parts.keys() - set(Text._fields):
        raise UserError(f"model {path.parent}: {path.name}: expected the tensors sequence and pooled, got {', '.join(parts)}.")
    return Text(**parts)


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def copy_tensors(path: Path, into: Mapping[str, Tensor]) -> None:
    """The tensors of a file into networks; UserError where names or shapes are others, as those of another base are."""
    tensors = read_tensors(path)
    own, theirs = ({name: tuple(tensor.shape) for name, tensor in side.items()} for side in (into, tensors))
    if own != theirs:
        odd = next(name for name in (*own, *theirs) if own.get(name) != theirs.get(name))
        raise UserError(
            f"model {path.parent}: {path.name}: expected {odd} of shape {list(own.get(odd, ()))}, got {list(theirs.get(odd, ()))}; is it "
            "of another base?"
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            into[name].copy_(tensor)


def read_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"model {path.parent}: {path.name} cannot be read ({error}); fetch or export the model again.") from None
