"""LoRA by peft: small trained matrices beside frozen weights, W + alpha / rank B A   (Hu et al., ICLR 2022)."""

import json
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from sslsr_diffusion.config import Settings
from sslsr_diffusion.errors import MissingDependency, UserError
from sslsr_diffusion.seeding import derive_seed, seeded

FILE = "pytorch_lora_weights.safetensors"  # diffusers' name
NAME = "default"  # of the one adapter, in peft's words
_METADATA = "lora_adapter_metadata"  # where diffusers looks for alpha
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_UNET = "conv conv1 conv2 conv_shortcut conv_out proj_in proj_out ff.net.2 ff.net.0.proj"
# what `targets` may say instead of patterns; of these, a model need not have all
TARGETS: dict[str, tuple[str, ...]] = {
    "attention": _ATTENTION,
    "unet": (*_ATTENTION, *_UNET.split()),
}


class LoRASettings(Settings):
    """Small matrices that train beside frozen weights (Hu et al., ICLR 2022)."""

    rank: int = Field(16, ge=1, description="Rank of the matrices: what they can say, and their size.")
    alpha: float | None = Field(None, gt=0, description="Their product counts alpha / rank times; null: as much as the rank, so once.")
    init: Literal["gaussian", "kaiming"] = Field(
        "gaussian", description="How A is drawn: gaussian (deviation 1 / rank) or kaiming (peft's own, init_lora_weights: true). B is 0."
    )
    targets: str | list[str] = Field(
        "attention",
        description="Which layers get them. attention: the projections of all attention layers; unet: those and convolutions, feed-forward "
        "and projection layers of a UNet; or a list of ends of names, in which * stands for anything: [to_q, single_*.attn.to_out].",
    )

    @field_validator("targets")
    @classmethod
    def _known(cls, value: str | list[str]) -> str | list[str]:
        if isinstance(value, str) and value not in TARGETS:
            raise ValueError(f"{value!r} is unknown; expected {', '.join(TARGETS)}, or a list of ends of names.")
        if not value:
            raise ValueError("is empty; expected at least one end of a name.")
        return value


def resolve_targets(
    model: nn.Module, targets: str | Sequence[str], *, within: Sequence[str] = (), key: str = "model.lora.targets"
) -> list[str]:
    """Full names of the Linear and Conv2d layers of `model` (of its parts `within`, where some are named) whose names end in a pattern.

    By full names, because an end alone may be a container's too, which peft refuses (`to_out` of FLUX.2).
    UserError, which begins with `key`, for a pattern of a list without a layer, and where no layer is found.
    """
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    layers = [name for name in layers if not within or name.split(".")[0] in within]
    patterns = TARGETS[targets] if isinstance(targets, str) else targets
    found = {pattern: [name for name in layers if fnmatchcase(f".{name}", f"*.{pattern}")] for pattern in patterns}
    lacking = [pattern for pattern, names in found.items() if not names]
    if lacking and (not isinstance(targets, str) or len(lacking) == len(found)):
        ends = sorted({re.sub(r".*\.(?=\D)", "", name) for name in layers})
        raise UserError(
            f"{key}: expected ends of names of layers of {type(model).__name__}, got {lacking[0]!r}, which none has; "
            f"there are {', '.join(ends)}."
        )
    chosen = {name for names in found.values() for name in names}
    return [name for name in layers if name in chosen]


def add_lora(model: Any, settings: LoRASettings, *, seed: int) -> list[str]:
    """Freeze a diffusers model and give it LoRA layers that train, in float32 whatever the model is in; the names of their parameters.

    B is zero, so the model says what it said. `seed`: of A. Raises MissingDependency: there is no peft.
    """
    peft = import_peft()
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.rank if settings.alpha is None else settings.alpha,
        init_lora_weights="gaussian" if settings.init == "gaussian" else True,
        target_modules="|".join(map(re.escape, resolve_targets(model, settings.targets))),
    )
    model.requires_grad_(False)
    device = next(model.parameters()).device
    with seeded(derive_seed(seed, "lora"), meta=device.type == "meta"):
        model.add_adapter(config, adapter_name=NAME)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for parameter in trained.values():
        parameter.data = parameter.data.float()
    return list(trained)


def has_lora(model: Any) -> bool:
    return NAME in getattr(model, "peft_config", {})


def scale_lora(model: nn.Module, scale: float) -> None:
    """How much of the LoRA layers is taken: 1 as trained, 0 the frozen weights alone."""
    layer = import_peft().tuners.lora.LoraLayer
    for module in model.modules():
        if isinstance(module, layer):
            module.set_scale(NAME, scale)


def lora_layers(model: nn.Module) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Name of each layer that has a LoRA -> A [r, in, ...], B [out, r, ...] and alpha."""
    layer = import_peft().tuners.lora.LoraLayer
    found = {name: module for name, module in model.named_modules() if isinstance(module, layer)}
    return {name: (each.lora_A[NAME].weight, each.lora_B[NAME].weight, float(each.lora_alpha[NAME])) for name, each in found.items()}


def save_lora(models: Mapping[str, Any], folder: Path, file: str = FILE) -> None:
    """Write the LoRA layers of models as diffusers' pipelines read them with `load_lora_weights`.

    Args:
        models: by the names that the pipeline has for them: unet, transformer, ...
        folder: gets the file, with rank and alpha in its metadata.
        file: its name; the default is where diffusers looks.
    """
    from safetensors.torch import save_file

    peft = import_peft()
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, Any] = {}
    for prefix, model in models.items():
        config, state = model.peft_config[NAME], peft.get_peft_model_state_dict(model, adapter_name=NAME)
        tensors |= {f"{prefix}.{name}": tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        layers = [name for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
        known = {"r": config.r, "lora_alpha": config.lora_alpha, "target_modules": layers}
        metadata |= {f"{prefix}.{key}": value for key, value in known.items()}
    save_file(tensors, folder / file, metadata={"format": "pt", _METADATA: json.dumps(metadata, sort_keys=True)})


@torch.no_grad()
def load_lora(model: Any, file: Path, prefix: str, settings: LoRASettings) -> None:
    """Give a model the LoRA layers that the settings say, with the tensors that `save_lora`, or diffusers, wrote for `prefix`.
    UserError where the file has other layers, ranks, widths or another alpha.
    """
    tensors, alpha = _read_lora(file, prefix)
    add_lora(model, settings, seed=0)
    into = import_peft().get_peft_model_state_dict(model, adapter_name=NAME)
    own, theirs = ({name: list(tensor.shape) for name, tensor in side.items()} for side in (into, tensors))
    odd = next((name for name in (*own, *theirs) if own.get(name) != theirs.get(name)), None)
    if odd is not None:
        want, got = (f"the shape {side[odd]}" if odd in side else "none" for side in (own, theirs))
        raise UserError(f"{file}: {prefix}.{odd}: expected {want}, got {got}; is the file of another base, or of another run?")
    if alpha not in (None, settings.alpha or settings.rank):
        raise UserError(f"{file}: expected alpha {settings.alpha or settings.rank:g}, got {alpha:g}; is the file of another run?")
    for name, tensor in tensors.items():
        into[name].copy_(tensor)


def _read_lora(file: Path, prefix: str) -> tuple[dict[str, Tensor], float | None]:
    """The tensors of a LoRA file whose names begin with `prefix`, without it, and alpha, where its metadata has it."""
    from safetensors import SafetensorError, safe_open

    begin = f"{prefix}."
    try:
        with safe_open(file, framework="pt") as stream:
            tensors = {name.removeprefix(begin): stream.get_tensor(name) for name in stream.keys() if name.startswith(begin)}  # noqa: SIM118 - no mapping
            told = json.loads((stream.metadata() or {}).get(_METADATA, "{}"))
        alpha = float(told[f"{begin}lora_alpha"]) if f"{begin}lora_alpha" in told else None
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"{file}: cannot be read as a file of LoRA layers ({reason}); fetch or export the model again.") from error
    if not tensors:
        raise UserError(f"{file}: expected LoRA layers whose names begin with {prefix}, got none; choose the file of another base.")
    return tensors, alpha


@torch.no_grad()
def merged(model: Any) -> Any:
    """A plain model with the LoRA layers added to its weights; it shares all other tensors with `model`, which stays as it is."""
    peft = import_peft()
    with torch.device("meta"):
        plain = type(model).from_config(model.config)
    state = {name.replace(".base_layer.", "."): tensor for name, tensor in model.state_dict().items() if ".lora_" not in name}
    for name, layer in model.named_modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            state[f"{name}.weight"] = layer.base_layer.weight + layer.get_delta_weight(NAME)
    plain.load_state_dict(state, assign=True)
    return plain


def import_peft() -> Any:
    try:
        import peft
    except ImportError:
        raise MissingDependency("LoRA needs peft: pip install 'sslsr-diffusion[lora]'") from None
    return peft
