"""What sizes a family's networks take: the only derivation, read by training, tiles, estimates and checks."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SizeRequirements:
    """Sides of a picture in output pixels.

    Args:
        multiple_of: both sides are multiples of it.
        minimum: no side may be shorter; 0: any.
        maximum: no side may be longer; 0: any.
        trained: side of the pictures that the networks were trained on; 0: not known. Smaller pictures are outside of what they learned.
    """

    multiple_of: int = 1
    minimum: int = 0
    maximum: int = 0
    trained: int = 0

    def __post_init__(self) -> None:
        if self.multiple_of < 1 or min(self.minimum, self.maximum, self.trained) < 0:
            raise ValueError(f"expected multiple_of of at least 1, minimum, maximum and trained of at least 0, got {self}.")

    def fits(self, side: int) -> bool:
        return side % self.multiple_of == 0 and self.minimum <= side <= (self.maximum or side)

    def nearest(self, side: int) -> int:
        """The nearest side that fits."""
        near = max(self.rounded_up(self.minimum), self.multiple_of, round(side / self.multiple_of) * self.multiple_of)
        return min(near, self.maximum // self.multiple_of * self.multiple_of or near)

    def rounded_up(self, side: int, least: int = 0) -> int:
        """The smallest multiple that is not below `side` nor below `least`."""
        return -(-max(side, least) // self.multiple_of) * self.multiple_of

    def padded(self, side: int) -> int:
        """The side to which a picture is padded: a multiple, no shorter than the minimum nor than what was trained."""
        return self.rounded_up(side, max(self.minimum, self.trained))


def pixels_per_latent(config: Mapping[str, Any]) -> int:
    """Pixels per latent pixel along a side, by an autoencoder's config: it halves once per level but the last, and may pack the rest."""
    return int(2 ** (len(config["block_out_channels"]) - 1) * config.get("patch_size", (1,))[0])
