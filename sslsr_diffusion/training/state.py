"""What a resume needs besides the frozen networks: counters, tensors and random streams, out of the live objects and back in."""

import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.losses.base import Learner
from sslsr_diffusion.training.looks import Looks


@dataclass
class Progress:
    """The counters of a run."""

    step: int = 0  # optimizer steps tried
    samples: int = 0  # samples seen, over all processes
    skipped: int = 0  # steps without an update because of a loss or gradient that is not a number
    skipped_in_a_row: int = 0
    best: float | None = None  # best value of the deciding metric
    best_step: int | None = None  # 0: what was there before the first step
    looks: Looks = field(default_factory=Looks)
    seconds: float = 0.0  # spent in the loop
    mean_loss: float | None = None  # running mean, against which a spike is measured


@dataclass
class AutoWeight:
    """The automatic weight of one loss: median ratio of the largest other term to this one, then frozen."""

    steps: int
    ratios: list[float] = field(default_factory=list)
    seen: int = 0

    @property
    def value(self) -> float:
        return median(self.ratios) if self.ratios else 1.0

    @property
    def frozen(self) -> bool:
        return self.seen >= self.steps

    def observe(self, own: float, others: Iterable[float]) -> None:
        """One optimizer step's weighted terms (means over the whole batch, so every process sees the same)."""
        if self.frozen:
            return
        self.seen += 1
        largest = max(others, default=0.0)
        if own > 0 and largest > 0 and np.isfinite(own) and np.isfinite(largest):
            self.ratios.append(largest / own)


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter of what is trained, in a fixed order."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def learned_parameters(learner: Learner) -> dict[str, nn.Parameter]:
    """Name -> parameter of what a learner's optimizer moves, in its order; what else its network holds is frozen."""
    moved = {id(parameter) for group in learner.optimizer.param_groups for parameter in group["params"]}
    return {name: parameter for name, parameter in learner.network.named_parameters() if id(parameter) in moved}


def learned_state(learner: Learner) -> dict[str, Tensor]:
    """What a checkpoint keeps of a learner's network: what learns, and the buffers of the layers that hold it."""
    learned, parameters = learned_parameters(learner), dict(learner.network.named_parameters())
    layers = {name.rpartition(".")[0] for name in learned}
    state = learner.network.state_dict()
    kept = {name for name in state.keys() - parameters.keys() if name.rpartition(".")[0] in layers}
    return {name: value for name, value in state.items() if name in learned or name in kept}


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor on the CPU, contiguous; for a sharded one (FSDP2) every process must call this."""
    tensor = tensor.detach()
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    return tensor.cpu().contiguous()


def copy_full(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into a live one, which may be sharded."""
    mesh = getattr(target, "device_mesh", None)
    if mesh is not None:
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.to(target.device), mesh, getattr(target, "placements", None))
    target.detach().copy_(value)


def load_trained(parameters: Mapping[str, Tensor], tensors: dict[str, Tensor], *, what: str) -> None:
    """Copy saved tensors into the trained parameters; UserError where names or shapes are not those of the model of this recipe."""
    missing, extra = sorted(set(parameters) - set(tensors)), sorted(set(tensors) - set(parameters))
    if missing or extra:
        example = (missing or extra)[0]
        raise UserError(
            f"{what} belongs to another model: {len(missing)} trained tensors are missing in it and {len(extra)} are unknown here "
            f"(for example {example}); use the recipe that it was made with."
        )
    for name, parameter in parameters.items():
        if parameter.shape != tensors[name].shape:
            raise UserError(f"{what}: {name} has shape {tuple(tensors[name].shape)}, this recipe builds {tuple(parameter.shape)}.")
        copy_full(parameter, tensors[name])


def optimizer_state_dict(optimizer: torch.optim.Optimizer, names: list[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Whole tensors as `parameter|key` (bitsandbytes nests its 8-bit states: `parameter|key|inner`), and everything that is no tensor.

    torch.distributed.checkpoint.state_dict would do the same, but it steps an optimizer that has not stepped yet and refuses one that
    has stepped some of its parameters: both would part from the undisturbed run.
    """
    raw = optimizer.state_dict()
    values = {path: value for position, entry in raw["state"].items() for path, value in _flat(names[position], entry)}
    tensors = {path: full_tensor(value).clone() for path, value in values.items() if isinstance(value, Tensor)}
    groups = [{k: v for k, v in group.items() if k != "params"} for group in raw["param_groups"]]
    return tensors, {"state": {path: value for path, value in values.items() if path not in tensors}, "groups": groups}


def load_optimizer_state_dict(
    optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor], plain: dict[str, Any]
) -> None:
    """The inverse of `optimizer_state_dict`, but for the settings: they are those of `optimizer`, which may have changed since."""
    position = {name: i for i, name in enumerate(parameters)}
    state: dict[int, dict[str, Any]] = {}
    for joined, value in [*tensors.items(), *plain["state"].items()]:
        name, *path, key = joined.split("|")
        if isinstance(value, Tensor) and not path and key != "step" and value.shape == parameters[name].shape:
            like = torch.zeros_like(parameters[name], dtype=value.dtype)  # sharded and laid out like its parameter
            copy_full(like, value)
            value = like
        entry = state.setdefault(position[name], {})
        for part in path:
            entry = entry.setdefault(part, {})
        entry[key] = value
    groups = [continued_group(saved, live) for saved, live in zip(plain["groups"], optimizer.state_dict()["param_groups"])]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _flat(prefix: str, entry: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in entry.items():
        if isinstance(value, dict):
            yield from _flat(f"{prefix}|{key}", value)
        else:
            yield f"{prefix}|{key}", value


def continued_group(saved: dict[str, Any], live: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's group with the settings of now; a scheduled rate stays where it was on its way, in proportion to its initial one."""
    if "initial_lr" not in live:
        return live
    same = live["initial_lr"] == saved["initial_lr"]
    return {**live, "lr": saved["lr"] if same else saved["lr"] * live["initial_lr"] / saved["initial_lr"]}


def seed_everything(seed: int) -> None:
    """Seed every global random stream of this process."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries that draw from the global stream


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """The state of every global random stream of this process."""
    version, inner, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=False)  # noqa: NPY002 - the global stream is what others draw from
    streams = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *inner], dtype=torch.int64),
        "python_gauss": torch.tensor([float("nan") if gauss is None else gauss], dtype=torch.float64),
        "numpy": torch.tensor([*numpy_state["state"]["key"].tolist(), numpy_state["state"]["pos"], numpy_state["has_gauss"]]),
        "numpy_gauss": torch.tensor([numpy_state["gauss"]], dtype=torch.float64),
    }
    if device.type == "cuda":
        streams["cuda"] = torch.cuda.get_rng_state(device)
    return streams


def set_rng_state(streams: dict[str, Tensor], device: torch.device) -> None:
    """The inverse of `rng_state`."""
    torch.set_rng_state(streams["torch"])
    version, *inner = streams["python"].tolist()
    gauss = float(streams["python_gauss"])
    random.setstate((version, tuple(inner), None if gauss != gauss else gauss))
    *keys, position, has_gauss = streams["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, float(streams["numpy_gauss"])))  # noqa: NPY002
    if device.type == "cuda" and "cuda" in streams:
        torch.cuda.set_rng_state(streams["cuda"], device)
