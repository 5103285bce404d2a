"""The self-similarity loss over a training step: gates, stride pattern and global row count around the public operator."""

from collections.abc import Iterator
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from sslsr_diffusion.losses.base import NoiseGate, PixelLoss, decoded_active, pixels
from sslsr_diffusion.ops import SelfSimilarityLoss as SelfSimilarityOp
from sslsr_diffusion.types import Given, Outputs


class SelfSimilaritySettings(NoiseGate):
    """Self-similarity graphs of prediction and ground truth, compared at the edge pixels (Chen et al., ACM MM 2024)."""

    kind: Literal["self_similarity"] = "self_similarity"
    weight: float | Literal["auto"] = Field(
        1.0,
        description="Factor of both terms together; auto: the median ratio of the largest other term to this one over the first "
        "`auto_steps` optimizer steps, then frozen (the authors' advice: of the order of the largest other term).",
    )
    l1_weight: float = Field(500.0, ge=0, description="Factor of the L1 term; each term is a mean over rows * search_size^2, hence tiny.")
    kl_weight: float = Field(500.0, ge=0, description="Factor of the KL term, D_KL(ground truth || prediction).")
    search_size: int = Field(25, ge=1, le=63, description="Side of the search area in pixels, odd (published: 25).")
    window_size: int = Field(9, ge=1, le=31, description="Side of the compared patch in pixels, odd, at most search_size (published: 9).")
    sigma: float = Field(0.004, gt=0, description="Scaling factor h of the exponential, for images in [0, 1] (published: 0.004).")
    normalize: bool = Field(True, description="Divide each row by its sum (published: true).")
    mask_stride: int = Field(3, ge=1, description="Keep the edge pixels with row mod s == column mod s, 1/s of them (published: 3).")
    prefilter_sigma: float = Field(
        0.0,
        ge=0,
        description="Smooth both pictures by a Gaussian of so many pixels before the graph (the mask stays that of the truth as it is), so "
        "that a fine raster gains nothing; 0: not at all, as published.",
    )
    auto_steps: int = Field(100, ge=1, description="Optimizer steps over which `weight: auto` takes its median.")
    backend: Literal["auto", "reference", "torch", "cpu", "cuda"] = Field("auto", description="Which implementation of the operator runs.")
    published_range: bool = Field(
        False, description="Compare a [-1, 1] prediction with a [0, 1] ground truth, as the published diffusion code does by mistake."
    )

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.search_size % 2 == 0 or self.window_size % 2 == 0:
            raise ValueError(f"search_size {self.search_size} and window_size {self.window_size} must both be odd.")
        if self.window_size > self.search_size:
            raise ValueError(f"window_size {self.window_size} must not exceed search_size {self.search_size}.")
        if self.weight != "auto" and not self.weight >= 0:
            raise ValueError(f"weight {self.weight} must be auto or a number of at least 0.")
        return self

    def misfits(self, *, side: int, alone: bool) -> Iterator[tuple[str, str]]:
        if side <= self.search_size // 2:
            yield "search_size", f"{self.search_size} is too large for pictures of {side} pixels a side."
        if side <= 4 * self.prefilter_sigma + 0.5:
            yield "prefilter_sigma", f"{self.prefilter_sigma:g} is too large for pictures of {side} pixels a side."
        if self.weight == "auto" and alone:
            yield "weight", "auto compares with the other losses, and there is none; give a number."


class SelfSimilarityLoss(PixelLoss):
    """weight * (l1_weight * L1 + kl_weight * KL) of the two graphs, means over all rows of the whole batch."""

    settings_class = SelfSimilaritySettings

    def __init__(self, settings: SelfSimilaritySettings) -> None:
        super().__init__(settings)
        self.auto = settings.weight == "auto"
        self.weight = 1.0 if settings.weight == "auto" else float(settings.weight)
        self.operator = SelfSimilarityOp(
            search_size=settings.search_size,
            window_size=settings.window_size,
            sigma=settings.sigma,
            normalize=settings.normalize,
            l1_weight=settings.l1_weight,
            kl_weight=settings.kl_weight,
            backend=settings.backend,
            prefilter_sigma=settings.prefilter_sigma,
        )
        self.operator.ranges_seen = settings.published_range  # two ranges are what it asks for

    def count(self, given: Given) -> Tensor:
        return self._mask(given).sum().float()

    def __call__(self, outputs: Outputs, count: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        sr, hr = pixels(outputs)
        if sr.shape[0] == 0:  # every sample is gated out: zero, but with a graph
            zero = sr.sum()
            return zero, {f"{self.name}/{term}": zero.detach() for term in ("l1", "kl")}
        if self.settings.published_range:
            sr = sr * 2 - 1
        value, terms = self.operator(sr, hr, self._mask(outputs), num_rows=count, return_terms=True)
        return self.weight * value, {f"{self.name}/{term}": terms[term] for term in ("l1", "kl")}

    def _mask(self, given: Given) -> Tensor:
        """[K, 1, H, W] bool: the rows of the graph: edge pixels on the stride pattern of samples that pass the gate."""
        if given.mask is None:
            raise ValueError("the self-similarity loss needs Given.mask, which this step did not prepare")
        keep = decoded_active(self, given)[:, None, None, None]
        return given.mask & keep & stride_pattern(given, self.settings.mask_stride)


def stride_pattern(given: Given, stride: int) -> Tensor:
    """[K, 1, H, W] bool: row mod s == column mod s, anchored at the top left corner of the full crop, not of the window."""
    assert given.mask is not None
    samples, _, height, width = given.mask.shape
    device = given.mask.device
    origin = given.origin if given.origin is not None else torch.zeros(samples, 2, dtype=torch.int64)
    row = torch.arange(height, device=device)[None, :, None] + origin[:, 0].to(device)[:, None, None]
    column = torch.arange(width, device=device)[None, None, :] + origin[:, 1].to(device)[:, None, None]
    return ((row - column) % stride == 0)[:, None]
