"""What the networks that are written here have in common."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Tensors = Mapping[str, Tensor]


class Architecture(nn.Module):
    """A super-resolution network under its published tensor names.

    Attributes:
        scale: enlargement.
        multiple_of: the network pads both sides to multiples of this many low-resolution pixels.
        sees: how many low-resolution pixels away a pixel may change another; None: further than a tile is large.
        has_branch: whether `forward(lr, branch=True)` gives a second picture beside the first, for a loss.
        takes_half: whether float16 holds its values.
    """

    scale: int
    multiple_of: int = 1
    sees: int | None = None
    has_branch: ClassVar[bool] = False
    takes_half: ClassVar[bool] = True

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.arguments, self._checkpointing = arguments, False

    @classmethod
    def arguments_of(cls, tensors: Tensors) -> dict[str, Any] | None:
        """The arguments that the names and shapes tell; None: these are another network's.
        Raises KeyError, IndexError or ValueError: they are of this one, and incomplete.
        """
        raise NotImplementedError

    @classmethod
    def renamed(cls, tensors: Tensors) -> Tensors:
        """The tensors under the names of this module, where there are other namings of the same network."""
        return tensors

    def enable_gradient_checkpointing(self) -> None:
        self._checkpointing = True

    def step(self, block: Callable[..., Any], *inputs: Any) -> Any:
        """One block of the trunk; with gradient checkpointing it is computed again in the backward pass."""
        if self._checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)


def conv3(inside: int, outside: int) -> nn.Conv2d:
    """3 x 3, stride 1, zero padding, with bias."""
    return nn.Conv2d(inside, outside, 3, padding=1)


def draw_small(*modules: nn.Module, factor: float = 0.1) -> None:
    """Kaiming-normal weights times `factor`, zero bias, for every convolution inside (as BasicSR and the ESRGAN of KAIR begin)."""
    for module in modules:
        for part in module.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight)
                with torch.no_grad():
                    part.weight.mul_(factor)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)


def count(tensors: Tensors, before: str) -> int:
    """How many numbered parts follow `before`: `body.` is followed by 0, 1, ..., n - 1."""
    found = {name.removeprefix(before).split(".")[0] for name in tensors if name.startswith(before)}
    return 1 + max((int(part) for part in found if part.isdecimal()), default=-1)


def at_least(least: int, **values: Any) -> None:
    """Raises ValueError where one of the values is no whole number, or smaller."""
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name}: expected a whole number of at least {least}, got {value!r}")
