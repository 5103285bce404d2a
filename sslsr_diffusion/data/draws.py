"""What a degradation step draws with and what it draws: random numbers for one sample, and operations as plain values."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, TypeVar

import torch
from pydantic import AfterValidator, Field

T = TypeVar("T")
Value = str | float | tuple[int, int]  # of an operation
Pair = tuple[float, float]  # least, most


def within(least: float, most: float) -> AfterValidator:
    """For pairs [least, most] whose numbers both have to lie between two bounds."""

    def check(pair: Pair) -> Pair:
        if not least <= pair[0] <= pair[1] <= most:
            raise ValueError(f"expected [least, most] with numbers from {least:g} to {most:g}, got {list(pair)}")
        return pair

    return AfterValidator(check)


def _odd(pair: tuple[int, int]) -> tuple[int, int]:
    if pair[0] % 2 == 0 or pair[1] % 2 == 0 or not 1 <= pair[0] <= pair[1] <= 51:
        raise ValueError(f"expected two odd sizes from 1 to 51, [least, most], got {list(pair)}")
    return pair


Probability = Annotated[float, Field(ge=0, le=1)]
Range = Annotated[Pair, within(0, math.inf)]
OddSizes = Annotated[tuple[int, int], AfterValidator(_odd)]


@dataclass(frozen=True)
class Op:
    """One drawn operation: the name of a function in OPERATIONS and the numbers that it gets."""

    name: str
    values: Mapping[str, Value] = field(default_factory=dict)


@dataclass(frozen=True)
class Frame:
    """What a draw may know: size of the crop in pixels, and how many times smaller the result is."""

    height: int
    width: int
    scale: int

    def target(self, factor: float = 1.0) -> tuple[int, int]:
        """The size of the low-resolution picture, times a factor; never empty."""
        return max(1, int(self.height / self.scale * factor)), max(1, int(self.width / self.scale * factor))


class RandomNumbers:
    """Random numbers for one sample. `shared` serves the choices that published pipelines make once for a whole batch."""

    def __init__(self, own: torch.Generator, shared: torch.Generator | None = None) -> None:
        self._generator = own
        self._ahead: Iterator[float] = iter(())
        self.shared: RandomNumbers = self if shared is None else RandomNumbers(shared)

    def unit(self) -> float:
        """Uniform in [0, 1); drawn a block at a time, since one by one costs more than the degradation's own arithmetic."""
        for number in self._ahead:
            return number
        self._ahead = iter(torch.rand(64, generator=self._generator, dtype=torch.float64).tolist())
        return next(self._ahead)

    def uniform(self, pair: Pair) -> float:
        return pair[0] + (pair[1] - pair[0]) * self.unit()

    def chance(self, probability: float) -> bool:
        return self.unit() < probability

    def integer(self, low: int, high: int) -> int:
        """Uniform from low to high, both included."""
        return low + int(self.unit() * (high - low + 1))

    def odd(self, pair: tuple[int, int]) -> int:
        return pair[0] + 2 * self.integer(0, (pair[1] - pair[0]) // 2)

    def pick(self, options: Sequence[T], weights: Sequence[float] | None = None) -> T:
        if weights is None:
            return options[self.integer(0, len(options) - 1)]
        at = self.uniform((0, sum(weights)))
        for option, weight in zip(options, weights, strict=True):
            at -= weight
            if at < 0:
                return option
        return options[max(i for i, weight in enumerate(weights) if weight > 0)]

    def order(self, count: int) -> list[int]:
        """A permutation of 0 .. count - 1."""
        return sorted(range(count), key=[self.unit() for _ in range(count)].__getitem__)
