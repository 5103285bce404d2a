"""Where a pipeline's networks go: device, precision, and whether they wait on the CPU, from what is there or from a memory budget."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sslsr_diffusion.devices import shown_bytes
from sslsr_diffusion.errors import NotEnoughMemory, UserError
from sslsr_diffusion.inference.memory import MemoryModel, Offload
from sslsr_diffusion.inference.tile_plan import Room, Tile, check_tile, make_plan
from sslsr_diffusion.models.stablesr.text import count_text_encoder


@dataclass(frozen=True)
class Placement:
    """Device, precision and offload of the networks."""

    device: torch.device
    dtype: torch.dtype
    offload: Offload = "none"

    def __str__(self) -> str:
        waiting = {"none": "", "model": ", networks wait on the CPU", "sequential": ", layers wait on the CPU"}[self.offload]
        return f"{str(self.dtype).removeprefix('torch.')} on {self.device}{waiting}"


def place(folder: Path, device: torch.device, dtype: str, budget: int | None = None, tile: Tile = "auto") -> Placement:
    """The fastest placement of a pipeline folder's networks; with a budget, the first that leaves room for a tile of training size.

    In that order: float32 before bfloat16 on the CPU; float16 on the device, then with the networks, then with their layers
    waiting on the CPU until they are called. Where none has room for such a tile, the first that has room for the smallest.

    Args:
        dtype: "auto" or torch's name of it.
        budget: bytes for weights and work together.
        tile: what the denoiser's tile will be.
    Raises:
        NotEnoughMemory: nothing fits the budget (the message says the least that would).
    """
    chosen = None if dtype == "auto" else getattr(torch, dtype)
    if device.type == "cpu":
        choices = [Placement(device, kind) for kind in ([chosen] if chosen else [torch.float32, torch.bfloat16])]
    else:
        waiting: tuple[Offload, ...] = ("none",) if device.type == "mps" else ("none", "model", "sequential")  # unified memory
        choices = [Placement(device, chosen or torch.float16, offload) for offload in waiting]
    if budget is None:
        return choices[0]
    unet, memory = _memory_of(folder, device)
    fitting, lacking = [], []
    for choice in choices:
        try:
            plan = _plan_at_training_size(unet, memory.at(choice.dtype), Room(budget, strict=True, offload=choice.offload), tile)
        except NotEnoughMemory as error:
            lacking.append(error.least or 0)
            continue
        fitting.append(choice)
        if plan.tile is None:
            return choice
    if not fitting:
        raise NotEnoughMemory(
            f"--memory-budget: {shown_bytes(budget)} is too little for this model; the least that would do is {shown_bytes(min(lacking))}."
        )
    return fitting[0]


def _plan_at_training_size(unet: Any, memory: MemoryModel, room: Room, tile: Tile) -> Any:
    settings: dict[str, Any] = {"vae_scale": memory.zoom, "memory": lambda: memory, "tile": tile, "overlap": None, "vae_tile": "auto"}
    return make_plan(1, 1, unet=unet.config, room=room, **settings)


def check_tile_of(folder: Path, tile: Tile) -> None:
    """Raises UserError for a tile that this model cannot halve as often as it does; says nothing about incomplete folders."""
    try:
        unet, vae = (json.loads((folder / part / "config.json").read_text())["block_out_channels"] for part in ("unet", "vae"))
    except (OSError, ValueError, KeyError):
        return
    check_tile(tile, 2 ** (len(vae) - 1) * 2 ** (len(unet) - 1), "--tile")


def _memory_of(folder: Path, device: torch.device) -> tuple[Any, MemoryModel]:
    """The UNet's shapes and the model of what the folder's networks take; no weights are read."""
    from diffusers import AutoencoderKL

    from sslsr_diffusion.models import AutoencoderKLCFW, SFTUNet2DConditionModel, StructuralEncoder

    try:
        configs = {part: json.loads((folder / part / "config.json").read_text()) for part in ("unet", "structural_encoder", "vae")}
        text = folder / "text_encoder" / "config.json"
        words = count_text_encoder(json.loads(text.read_text())) if text.is_file() else 0
    except (OSError, ValueError) as error:
        raise UserError(f"--model {folder}: cannot be loaded ({error}).") from error
    fused = configs["vae"].get("_class_name") == "AutoencoderKLCFW"
    classes = {
        "unet": SFTUNet2DConditionModel,
        "structural_encoder": StructuralEncoder,
        "vae": AutoencoderKLCFW if fused else AutoencoderKL,
    }
    with torch.device("meta"):
        shapes = {part: cls.from_config(configs[part]) for part, cls in classes.items()}
    return shapes["unet"], MemoryModel(shapes["unet"], shapes["structural_encoder"], shapes["vae"], device, text_parameters=words)
