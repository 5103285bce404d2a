"""Every random number of a picture from one seed of its own, so that no picture depends on the batch it was in."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.seeding import sample_generator

Generators = torch.Generator | Sequence[torch.Generator] | None


def image_seeds(generator: Generators, count: int) -> list[int]:
    """One seed per picture, drawn from its generator: from one generator for all in order, or from a list with one each.

    Two pictures in one call get what two calls in a row would have given them. None draws from torch's global generator.
    """
    if isinstance(generator, Sequence):
        if len(generator) != count:
            raise UserError(f"generator: expected one, or as many as there are images ({count}), got {len(generator)}.")
        return [_draw(each) for each in generator]
    return [_draw(generator) for _ in range(count)]


def _draw(generator: torch.Generator | None) -> int:
    device = generator.device if generator is not None else "cpu"
    return int(torch.randint(2**63 - 1, (1,), generator=generator, device=device).item())


class ImageNoise:
    """Standard normal latents, one independent stream per (picture, purpose); drawn on the CPU, so that every device sees the same."""

    def __init__(self, seeds: Sequence[int], shape: Sequence[int], device: torch.device | str) -> None:
        """One seed per picture; `shape` [C, h, w] of one picture's latent."""
        self._seeds, self._shape, self._device = seeds, tuple(shape), device

    def __call__(self, *purpose: int | str) -> Tensor:
        fields = [torch.randn(self._shape, generator=sample_generator(seed, *purpose)) for seed in self._seeds]
        return torch.stack(fields).to(self._device)
