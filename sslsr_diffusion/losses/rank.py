"""The rank loss of RankSRGAN: a ranker that was trained to order pictures as a measure of quality does scores the prediction."""

from collections.abc import Iterator
from typing import Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from sslsr_diffusion.losses.base import Means, NoiseGate, SampleLoss, pixels
from sslsr_diffusion.losses.discriminators import Ranker
from sslsr_diffusion.losses.files import load_into, read_tensors
from sslsr_diffusion.types import Outputs

WIDTH = 64  # of the published ranker


class RankSettings(NoiseGate):
    """The score that a frozen ranker gives the prediction, lower is better (RankSRGAN)."""

    kind: Literal["rank"] = "rank"
    weight: float = Field(0.03, ge=0, description="Factor of this term in the sum (RankSRGAN: 0.03); the term grows with the batch.")
    file: str = Field(description="The trained ranker, by RankSRGAN's tensor names: .safetensors, or a .pth with tensors alone.")
    reference: bool = Field(
        False,
        description="As the published SSL code runs it: no gradient reaches the prediction, and batch norm takes the batch's statistics.",
    )

    def misfits(self, *, side: int, alone: bool) -> Iterator[tuple[str, str]]:
        if side < 32:
            yield "kind", f"rank needs pictures of at least 32 pixels a side, these have {side}."
        if self.reference and alone:
            yield "reference", "true cuts the gradient, and rank is the only loss; add another."


class RankLoss(SampleLoss):
    """sum sigmoid(R(sr)) over the samples of a process's optimizer step   (Zhang et al., ICCV 2019, equation 4)

    A sum, as published, so it grows with batch_size * accumulate. R is frozen, by default in evaluation mode.
    """

    settings_class = RankSettings

    def __init__(self, settings: RankSettings, network: Ranker) -> None:
        super().__init__(settings)
        self.network: Ranker = network.requires_grad_(False).train(settings.reference)

    @classmethod
    def build(cls, settings: RankSettings, means: Means) -> Self:
        if means.shapes:
            with torch.device("meta"):
                return cls(settings, Ranker(WIDTH))
        return cls(settings, read_ranker(settings.file, f"losses: {settings.called}.file"))

    @classmethod
    def check(cls, settings: RankSettings) -> str:
        read_ranker(settings.file, f"{settings.called}.file")
        return f"{settings.called}: {settings.file}"

    def errors(self, outputs: Outputs) -> Tensor:
        sr, _ = pixels(outputs)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.settings.reference):
            return torch.sigmoid(self.network(sr)[:, 0])

    def __call__(self, outputs: Outputs, count: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        return super().__call__(outputs, torch.ones(()))  # not a share: a sum


def read_ranker(path: str, key: str) -> Ranker:
    """The ranker in a file, as wide as its tensors say; UserError where there is none."""
    tensors = read_tensors(path, key)
    width = len(tensors["conv0_0.weight"]) if "conv0_0.weight" in tensors else WIDTH
    with torch.random.fork_rng(devices=[]):
        ranker = Ranker(width)
    load_into(ranker, tensors, path=path, key=key)
    return ranker
