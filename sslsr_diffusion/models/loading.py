"""One component of a pipeline folder: read with its config, or drawn at random from an architecture; and what it forgets when saved."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.models.base import Base
from sslsr_diffusion.models.tensor_names import check_tensors
from sslsr_diffusion.seeding import derive_seed, seeded


def loaded(cls: Any, base: Base, part: str, meta: bool, **options: Any) -> Any:
    """A component of a base in float32, or as the `options` of its from_pretrained say; with `meta` its shapes.
    Raises UserError: its weights are not there or not whole, or its config is of another kind.
    """
    config, what = base.config(part), base.part(part)
    try:
        with torch.device("meta"):
            shapes = cls.from_config(config)
        if meta:
            return nn.Module.to(shapes, options.get("torch_dtype", torch.float32))  # not diffusers' own to(), which warns
        check_tensors(base.folder / part, shapes, what)
        return cls.from_pretrained(base.folder / part, use_safetensors=True, **{"torch_dtype": torch.float32, **options})
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise UserError(f"{what} cannot be loaded: {str(error).splitlines()[0]}") from error


def drawn(cls: Any, config: dict[str, Any], meta: bool, seed: int) -> Any:
    """A network of this architecture with weights drawn from `seed`, or its shapes."""
    with seeded(derive_seed(seed, "init"), meta=meta):
        return cls.from_config(config)


def forget_folder(component: Any) -> None:
    """diffusers and transformers write down where a model was loaded from, a user's home folder for example; hub ids stay."""

    def local(name: object) -> bool:
        return bool(name) and (Path(str(name)).is_absolute() or Path(str(name)).is_dir())

    config = getattr(component, "config", None)
    remembered = config.get("_name_or_path") if isinstance(config, dict) else getattr(config, "_name_or_path", None)
    if local(remembered):
        if hasattr(component, "register_to_config"):
            component.register_to_config(_name_or_path="")
        else:
            component.config._name_or_path = ""
    if hasattr(component, "init_kwargs") and local(getattr(component, "name_or_path", "")):
        component.name_or_path = component.init_kwargs["name_or_path"] = ""  # a tokenizer
