"""What a denoiser is told beside the noisy latent and the timestep."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor


class Text(NamedTuple):
    """Encoded texts: one for all pictures, or one per picture."""

    sequence: Tensor  # [1 or B, L, D] hidden states
    pooled: Tensor | None = None  # [1 or B, E] one vector per text, of encoders that give one

    def each(self, change: Callable[[Tensor], Tensor]) -> Self:
        return type(self)(change(self.sequence), None if self.pooled is None else change(self.pooled))

    def repeated(self, count: int) -> Self:
        """One per picture."""
        return self.each(lambda part: part.expand(count, *part.shape[1:]))

    def followed_by(self, other: "Text") -> Self:
        """Both in one batch; they have the same parts."""
        pooled = None if self.pooled is None or other.pooled is None else torch.cat([self.pooled, other.pooled])
        return type(self)(torch.cat([self.sequence, other.sequence]), pooled)


def guided(wanted: Tensor, unwanted: Tensor, scale: float) -> Tensor:
    """u + s (c - u), classifier-free guidance of two predictions of one shape; s = 1 is none   (Ho and Salimans, 2022)"""
    return unwanted + scale * (wanted - unwanted)


class Condition(NamedTuple):
    """Tensors that travel with the call; nothing is stored on a module, where gradient checkpointing would find the wrong ones.

    Named tuples, so that DDP, FSDP2 and torch's pytrees see the tensors in them. `LatentNetworks.see` makes them. With guidance, the
    noisy latents and `text` are twice as many as the rest: the denoiser repeats that.
    """

    z_lr: Tensor | None = None  # [B, C, h, w] latent of the enlarged low-resolution picture
    text: Text | None = None
    pixels: Tensor | None = None  # [B, 3, h, w] pixels that lie on the latent's grid, to be concatenated to the noisy latent
    labels: Tensor | None = None  # [B] int64 class labels

    @property
    def grids(self) -> dict[str, Tensor]:
        """What lies on the latent's grid, and is cut into tiles with it."""
        return {name: value for name in ("z_lr", "pixels") if (value := getattr(self, name)) is not None}

    def tile(self, grids: Mapping[str, Tensor], samples: Sequence[int], dtype: torch.dtype) -> Self:
        """The condition of tiles: their grids, and what belongs to the pictures `samples` that they were cut from; in `dtype`."""
        labels = None if self.labels is None else self.labels[list(samples)]
        text = None if self.text is None else self.text.each(lambda part: part[list(samples)].to(dtype))
        return self._replace(text=text, labels=labels, **{name: value.to(dtype) for name, value in grids.items()})
