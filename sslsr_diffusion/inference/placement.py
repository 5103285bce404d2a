"""Where a pipeline's networks go: device, precision, and whether they wait on the CPU, from what is there or from a memory budget."""

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sslsr_diffusion.devices import shown_bytes
from sslsr_diffusion.errors import NotEnoughMemory, UserError
from sslsr_diffusion.inference.memory import MemoryModel, Offload
from sslsr_diffusion.inference.tile_plan import Room, Tile, plan_tiles
from sslsr_diffusion.models.family import Family
from sslsr_diffusion.models.networks import LatentNetworks

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Placement:
    """Device, precision and offload of the networks."""

    device: torch.device
    dtype: torch.dtype
    offload: Offload = "none"
    memory_budget: int | None = None  # bytes for weights and work of a call that names no other
    compile: bool = False  # whether torch.compile makes the networks faster
    may_be_faster: bool = False  # nobody chose the precision: one that is faster and leaves the picture alone may take its place

    @property
    def defaults(self) -> dict[str, int]:
        """What a call takes where it names nothing."""
        return {} if self.memory_budget is None else {"memory_budget": self.memory_budget}

    def __str__(self) -> str:
        waiting = {"none": "", "model": ", networks wait on the CPU", "sequential": ", layers wait on the CPU"}[self.offload]
        return f"{str(self.dtype).removeprefix('torch.')} on {self.device}{waiting}{', compiled' if self.compile else ''}"


def place(family: Family, path: Path, device: torch.device, dtype: str, budget: int | None = None, tile: Tile = "auto") -> Placement:
    """The fastest placement of a model's networks; with a budget, the first that leaves room for a tile of training size.

    In that order: float32 before bfloat16 on the CPU; float16 on the device, then with the networks, then with their layers
    waiting on the CPU until they are called. Where none has room for such a tile, the first that has room for the smallest;
    NotEnoughMemory where nothing fits the budget, in bytes for weights and work together (the message says the least that would).
    """
    if dtype not in ("auto", *DTYPES):
        raise UserError(f"dtype: expected auto, {', '.join(DTYPES)}, got {dtype!r}.")
    chosen = DTYPES.get(dtype)
    if device.type == "cpu":
        if chosen == torch.float16:
            log.warning("dtype float16 is slow on a CPU, often more than ten times: float32 is fast, and bfloat16 needs as little memory")
        kinds = [chosen] if chosen else [torch.float32, torch.bfloat16]
        choices = [Placement(device, kind, memory_budget=budget, may_be_faster=chosen is None) for kind in kinds]
    else:
        waiting: tuple[Offload, ...] = ("none",) if device.type == "mps" else ("none", "model", "sequential")  # unified memory
        choices = [Placement(device, chosen or torch.float16, offload, budget) for offload in waiting]
    if budget is None:
        return choices[0]
    networks = family.read(path, meta=True)
    if not isinstance(networks, LatentNetworks):
        return choices[0]  # its restorer chooses tiles by the budget of each call
    memory = MemoryModel(networks, device, text_parameters=networks.parameters_per_part().get("text encoder", (0, 0))[0])
    sizes: dict[str, Any] = {"size": networks.size(), "vae_scale": memory.zoom, "tile": tile, "vae_tile": "auto", "overlap": None}
    fitting, lacking = [], []
    for choice in (each for each in choices if each.offload == "none" or networks.can_wait):
        networks.cast(choice.dtype)
        try:
            room = Room(budget, strict=True, offload=choice.offload)
            plan = plan_tiles(1, 1, memory=partial(memory.at, networks), room=room, **sizes)
        except NotEnoughMemory as error:
            lacking.append(error.least or 0)
            continue
        fitting.append(choice)
        if plan.tile is None:
            return choice
    if not fitting:
        least = min(lacking)
        raise NotEnoughMemory(
            f"memory_budget: {shown_bytes(budget)} is too little for this model; the least that would do is {shown_bytes(least)}.", least
        )
    return fitting[0]
