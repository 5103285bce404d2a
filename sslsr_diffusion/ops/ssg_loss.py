"""The self-similarity loss as a module: pulls the graph of a restored image towards that of the ground truth."""

import math
import warnings
from typing import Literal, overload

import torch
from torch import Tensor, nn

from sslsr_diffusion.ops.edge_mask import apply_mask_stride, laplacian_edge_mask
from sslsr_diffusion.ops.prefilter import reach, smoothed
from sslsr_diffusion.ops.settings import GraphSettings
from sslsr_diffusion.ops.ssg import backend_module, check_sizes, check_tensors, checked, choose_backend, is_number


class SelfSimilarityLoss(nn.Module):
    """l1_weight * mean|T_sr - T_gt| + kl_weight * mean b (ln b - ln a), a and b the graphs clamped at 1e-10 (Chen et al., ACM MM 2024).

    Both means run over N * search_size^2 entries and are tiny: published recipes weigh them with 500 to 1000.
    The fused paths ("cpu", "cuda", "torch") never hold a graph. Equal images give exactly 0 for both terms and for the
    L1 gradient; with normalize=False the KL gradient is NOT zero there, because un-normalised rows are no distributions.
    Second derivatives, forward-mode derivatives and torch.func transforms need backend="reference".

    Args:
        search_size, window_size, sigma, normalize, backend: as in `self_similarity_graph`.
        l1_weight, kl_weight: weights of the two terms, at least 0.
        mask_stride: s > 1 keeps the masked pixels with y mod s == x mod s, 1/s of them.
        prefilter_sigma: both pictures are smoothed by a Gaussian of so many pixels before their graphs are drawn, the default mask is
            that of the unsmoothed gt; 0, as published: not at all. Where nothing else holds a network back, it answers the published
            loss with a fine raster over every surface: that lowers self-similarity as the truth's grain and texture do. The graph of
            a smoothed picture does not see the raster, so it gains nothing.
    """

    def __init__(
        self,
        search_size: int = 25,
        window_size: int = 9,
        sigma: float = 0.004,
        normalize: bool = True,
        l1_weight: float = 1.0,
        kl_weight: float = 1.0,
        mask_stride: int = 1,
        backend: str = "auto",
        prefilter_sigma: float = 0.0,
    ):
        super().__init__()
        check_sizes(search_size, window_size, sigma)
        for name, weight in (("l1_weight", l1_weight), ("kl_weight", kl_weight)):
            if not is_number(weight) or not 0 <= weight < math.inf:
                raise ValueError(f"{name}: expected a finite number of at least 0, got {weight!r}.")
        if not isinstance(mask_stride, int) or mask_stride < 1:
            raise ValueError(f"mask_stride: expected an integer of at least 1, got {mask_stride!r}.")
        if not is_number(prefilter_sigma) or not 0 <= prefilter_sigma < math.inf:
            raise ValueError(f"prefilter_sigma: expected a finite number of pixels, at least 0, got {prefilter_sigma!r}.")
        if backend != "auto":
            backend_module(backend)
        self.search_size, self.window_size, self.sigma, self.normalize = search_size, window_size, float(sigma), bool(normalize)
        self.l1_weight, self.kl_weight = float(l1_weight), float(kl_weight)
        self.mask_stride, self.backend, self.prefilter_sigma = mask_stride, backend, float(prefilter_sigma)
        self.ranges_seen = False  # the first call looks whether the pictures are in [0, 1]

    @overload
    def forward(
        self, sr: Tensor, gt: Tensor, mask: Tensor | None = ..., *, num_rows: float | Tensor | None = ...,
        return_terms: Literal[False] = ...,
    ) -> Tensor: ...  # fmt: skip
    @overload
    def forward(
        self, sr: Tensor, gt: Tensor, mask: Tensor | None = ..., *, num_rows: float | Tensor | None = ..., return_terms: Literal[True]
    ) -> tuple[Tensor, dict[str, Tensor]]: ...
    def forward(
        self, sr: Tensor, gt: Tensor, mask: Tensor | None = None, *, num_rows: float | Tensor | None = None, return_terms: bool = False
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of both terms: a scalar that is differentiable in sr; an empty mask gives 0 that still has a graph.

        Args:
            sr: [B, C, H, W] float, about [0, 1], not clamped; the gradient goes here.
            gt: [B, C, H, W] float in [0, 1], same range as sr; never receives a gradient.
            mask: [B, 1, H, W] bool, or numbers of which exactly 1 counts (255 does not), before the stride; None:
                `laplacian_edge_mask(gt)`.
            num_rows: rows the mean counts, at least 0; None: this mask's own, after the stride. Distributed training passes
                all_reduce(rows) / world_size over all micro-batches of an optimizer step (rows after the stride, see
                `apply_mask_stride`), so that N processes equal one big batch. 0, as a number or a tensor, is that sum when no process
                has a row: loss, terms and gradient are then 0, whatever the mask. A tensor that is no number of rows gives NaN.
            return_terms: also return {"l1", "kl", "rows"}: unweighted, detached 0-dim tensors.

        Raises:
            ValueError: sr, gt and mask do not fit together (the message shows both sides). In the first call also: gt leaves [0, 1] by
                more than 0.1, or no entry of mask is 1. A sr that seems to be in another range than gt is a warning there.
            BackendUnavailable: the backend asked for by name cannot run here.
        """
        check_tensors(sr=sr, gt=gt)
        if sr.shape != gt.shape:
            raise ValueError(f"gt: expected the shape of sr {list(sr.shape)}, got {list(gt.shape)}.")
        if sr.device != gt.device:
            raise ValueError(f"gt: expected on the device of sr {sr.device}, got on {gt.device}.")
        mask = laplacian_edge_mask(gt) if mask is None else mask
        settings = GraphSettings(self.search_size, self.window_size, self.sigma, self.normalize)
        sr, marked = checked(sr, mask, *settings[:3])
        gt, _ = checked(gt.detach(), mask, *settings[:3])
        if sr.dtype != gt.dtype:
            raise ValueError(f"gt: expected the dtype of sr {sr.dtype}, got {gt.dtype}.")
        if isinstance(num_rows, Tensor) and num_rows.ndim != 0:
            raise ValueError(f"num_rows: expected a number or a 0-dim tensor, got shape {list(num_rows.shape)}.")
        if num_rows is not None and not isinstance(num_rows, Tensor) and not (is_number(num_rows) and 0 <= num_rows < math.inf):
            raise ValueError(f"num_rows: expected a finite number of at least 0 rows, got {num_rows!r}.")
        if not (self.ranges_seen or torch.compiler.is_compiling() or sr.is_meta):  # once: a GPU has to be waited for
            _check_ranges(sr.detach(), gt, mask)
            self.ranges_seen = True
        marked = apply_mask_stride(marked, self.mask_stride)
        if self.prefilter_sigma:
            sr, gt = (self._smoothed(picture) for picture in (sr, gt))
        weights = (self.l1_weight, self.kl_weight)
        total, l1, kl = choose_backend(self.backend, sr, settings).loss(sr, gt, marked, settings, weights, num_rows)
        return (total, {"l1": l1, "kl": kl, "rows": marked.sum()}) if return_terms else total

    def _smoothed(self, picture: Tensor) -> Tensor:
        least = reach(self.prefilter_sigma) + 1
        if min(picture.shape[-2:]) < least:
            height, width = picture.shape[-2:]
            raise ValueError(
                f"image: expected sides of at least {least} pixels for prefilter_sigma = {self.prefilter_sigma:g}, got {height} x {width}."
            )
        return smoothed(picture, self.prefilter_sigma)

    def extra_repr(self) -> str:
        names = ("search_size", "window_size", "sigma", "normalize", "l1_weight", "kl_weight", "mask_stride", "backend", "prefilter_sigma")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


def _check_ranges(sr: Tensor, gt: Tensor, mask: Tensor) -> None:
    """Pictures of 0 to 255 or -1 to 1 and masks of 0 and 255 give a loss of 0 or of another scale, and nothing else would say so."""
    if not gt.numel():
        return
    low, high = gt.amin().item(), gt.amax().item()
    if low < -0.1 or high > 1.1:  # a resized picture may leave [0, 1] by a little
        raise ValueError(
            f"gt: expected a picture in [0, 1], got values from {low:.3g} to {high:.3g}; "
            "give (sr + 1) / 2 and (gt + 1) / 2 where they are in [-1, 1], both divided by 255 where they are in [0, 255]."
        )
    if mask.dtype != torch.bool and mask.any() and not (mask == 1).any():
        raise ValueError(f"mask: expected entries of exactly 1, got none (the largest is {mask.max().item():.3g}); give mask > 0.")
    if sr.amin() < -0.1 or sr.amax() > 1.1:
        apart = (sr - gt).abs().mean()
        for name, like in (("[-1, 1]", 2 * gt - 1), ("[0, 255]", 255 * gt)):
            if (sr - like).abs().mean() < 0.5 * apart:
                warnings.warn(
                    f"sr: seems to be in {name}, and gt is in [0, 1], which sigma is made for; bring sr there, too.", stacklevel=5
                )
