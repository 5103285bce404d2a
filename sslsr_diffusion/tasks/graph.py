"""One call of a model as a graph of any size, which programs without torch can run: what is called, and with what."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sslsr_diffusion.models.codec import Codec


@dataclass(frozen=True)
class Graph:
    """A module that maps float32 tensors [1, C, H, W] to a picture [1, 3, H', W'], about [0, 1], not clamped.

    Args:
        name: of the file.
        inputs: name -> channels, and pixels of the first input per pixel of this one.
        unit, least, most: sides of the first input are multiples of `unit`, no shorter than `least` and, but for 0, no longer than `most`.
    """

    name: str
    module: nn.Module
    inputs: Mapping[str, tuple[int, int]]
    unit: int = 1
    least: int = 1
    most: int = 0

    def example(self, height: int, width: int) -> tuple[Tensor, ...]:
        """Inputs whose first has so many steps as sides: pictures in [0, 1], latents and noise standard normal."""
        units = math.ceil(max(8, self.least) / self.unit)
        generator, step = torch.Generator().manual_seed(0), self.unit * (units + 1 - units % 2)  # odd: what fits even numbers alone shows
        sizes = [(1, channels, height * step // per, width * step // per) for channels, per in self.inputs.values()]
        return tuple((torch.rand if size[1] == 3 else torch.randn)(size, generator=generator) for size in sizes)


class Decoding(nn.Module):
    """Latents, normalised as the codec says, to a picture."""

    def __init__(self, codec: Codec) -> None:
        super().__init__()
        self.codec = codec

    def forward(self, latents: Tensor) -> Tensor:
        return self.codec.decode(latents)


def decoder_graph(codec: Codec) -> Graph:
    return Graph("decoder", Decoding(codec), {"latents": (codec.latent_channels, 1)})
