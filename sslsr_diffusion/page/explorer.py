"""What the explorer shows of a result and its truth: pictures, the pixels where the loss looks, each row's terms, numbers."""

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.evaluation.gallery import data_uri, worst_window
from sslsr_diffusion.evaluation.grid import LEAST
from sslsr_diffusion.evaluation.metrics import METRICS, convention, unavailable
from sslsr_diffusion.evaluation.scoring import load_rgb
from sslsr_diffusion.evaluation.spectrum import spectrum_chart
from sslsr_diffusion.evaluation.summary import arrow, number
from sslsr_diffusion.images import printable, resize_bicubic, to_array, to_tensor
from sslsr_diffusion.ops import laplacian_edge_mask, self_similarity_graph
from sslsr_diffusion.ops.ssg_reference import CLAMP
from sslsr_diffusion.page.views import explorer_page

SIDE = 1024  # of the part that is shown of a larger picture
SETTINGS: dict[str, float] = {"search": 25, "window": 9, "sigma": 0.004, "stride": 1}  # as the metrics SSG L1 and SSG KL
EXAMPLE = Path(__file__).with_name("example")  # a result of the shipped model; examples/explain_the_loss.py made it
_ROWS = 8192  # of the graph at once: 20 MB a picture


class Measured(NamedTuple):
    value: float
    convention: str  # how it came about


@dataclass(frozen=True)
class Explored:
    page: str  # HTML
    notes: tuple[str, ...]  # sentences, which the page shows too


def explore_files(sr: Path, gt: Path, lr: Path | None = None, *, align: bool = False) -> Explored:
    """The explorer of a result and its truth; `lr`: the input of that result, shown enlarged; `align`: resize the result to the truth.
    Raises UserError: a picture cannot be read, or the sizes do not fit.
    """
    result, truth = load_rgb(sr), load_rgb(gt)
    notes = []
    if result.shape != truth.shape:
        scale = truth.shape[-1] / result.shape[-1]
        said = f"sr: expected the size of the truth, {_size(truth)}, got {_size(result)}"
        if not same_shape(result, truth):
            raise UserError(f"{said}, which is of another shape, too; give the truth of this result.")
        if not align:
            raise UserError(f"{said}; resize it {scale:g} times (--align, on the page a box to tick), or give a result of that size.")
        result = resize_bicubic(result, (truth.shape[-2], truth.shape[-1])).clamp(0, 1)
        notes.append(f"The result was resized {scale:g} times (bicubic) to the size of the truth.")
    low = None if lr is None else load_rgb(lr)
    if low is not None and not same_shape(low, truth):
        raise UserError(f"lr: expected the shape of the truth {_size(truth)}, got {_size(low)}; give the input of this result.")
    return explore(result, truth, low, title=f"{printable(sr.name)} and {printable(gt.name)}", notes=notes)


def explore(
    result: Tensor,
    truth: Tensor,
    low: Tensor | None = None,
    *,
    title: str,
    name: str = "result",
    notes: Sequence[str] = (),
    numbers: Mapping[str, Measured] | None = None,
) -> Explored:
    """The explorer of tensors [1, 3, H, W] in [0, 1]; `low` [1, 3, h, w]; numbers: metric -> its value, None: measured here.

    Of pictures above 1024 pixels a side, the window with the largest error is shown. Raises UserError: smaller than the search area.
    """
    height, width = truth.shape[-2:]
    least = int(SETTINGS["search"]) // 2 + 1
    if min(height, width) < least:
        raise UserError(f"gt: expected sides of at least {least} pixels, got {_size(truth)}; the graph looks so far around a pixel.")
    numbers = measured(result, truth, low) if numbers is None else numbers
    names = ["LR bicubic"] * (low is not None) + [name, "truth"]
    enlarged = [] if low is None else [resize_bicubic(low, (height, width)).clamp(0, 1)]
    pictures, said = _part([*enlarged, result, truth])
    eights = [to_array(picture[0]) for picture in pictures]
    *_, shown, reference = (to_tensor(array)[None] for array in eights)
    if any((eight - picture).abs().max() > 1e-4 for eight, picture in zip((shown, reference), pictures[-2:], strict=True)):
        said.append(
            "These pictures have more than 8 bits, or transparency (shown on white): they are shown and compared rounded to 8 bits."
        )
    mask = laplacian_edge_mask(reference)
    if not mask.any():
        said.append("The truth has no edge pixel here: the loss sees nothing of this picture.")
    l1, kl = row_terms(shown, reference, mask)
    data = {
        "width": mask.shape[-1],
        "height": mask.shape[-2],
        "pictures": [
            {"name": name, "src": data_uri(array), "sum": int(array.sum(dtype=np.int64))} for name, array in zip(names, eights, strict=True)
        ],
        "mask": _text(np.packbits(mask.numpy())),
        "l1": _text(l1),
        "kl": _text(kl),
        "settings": SETTINGS,
        "spectrum": spectrum_chart(dict(zip(names, pictures, strict=True)), (name,)) if min(mask.shape[-2:]) >= LEAST else None,
        "numbers": [
            {"label": f"{METRICS[key].label} {arrow(METRICS[key])}", "text": number(value, METRICS[key].digits), "about": how}
            for key, (value, how) in numbers.items()
        ],
        "notes": [*notes, *said],
    }
    return Explored(explorer_page(title, data), (*notes, *said))


def measured(result: Tensor, truth: Tensor, low: Tensor | None) -> dict[str, Measured]:
    """The default metrics of one pair that can be computed here without a download; nan where one has no number for it."""
    found: dict[str, float] = {}
    for name, metric in METRICS.items():
        if not metric.default or metric.whole_set or name in found or unavailable(name, download=False):
            continue
        try:
            values = (metric.joint or metric.fn)(result, metric.against(truth, low), crop_border=0, y_channel=False)
        except UserError:
            values = torch.tensor([math.nan])
        found |= {key: float(value) for key, value in (values if isinstance(values, dict) else {name: values}).items()}
    return {
        name: Measured(value, convention(name, crop_border=0, y_channel=False, has_lr=low is not None)) for name, value in found.items()
    }


def _part(pictures: list[Tensor]) -> tuple[list[Tensor], list[str]]:
    """What is shown of pictures [1, 3, H, W], and a sentence where that is a part of them; the last two are compared."""
    height, width = pictures[-1].shape[-2:]
    sides = (min(height, SIDE), min(width, SIDE))
    if sides == (height, width):
        return pictures, []
    top, left = worst_window(pictures[-2:-1], pictures[-1], sides)
    said = (
        f"The pictures have {width} x {height} pixels: shown are the {sides[1]} x {sides[0]} with the largest error, from {left}, {top}; "
        "the numbers of the pair are of the whole."
    )
    return [picture[..., top : top + sides[0], left : left + sides[1]] for picture in pictures], [said]


def row_terms(result: Tensor, truth: Tensor, mask: Tensor) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Each row's L1 and KL, means over its 625 entries, whose means are SSG L1 and SSG KL: two [N], in parts, because graphs are large.

    result, truth: [1, 3, H, W] float32; mask: [1, 1, H, W] bool.
    """
    found = [torch.empty(2, 0)]
    for part in mask.flatten().nonzero()[:, 0].split(_ROWS):
        some = torch.zeros_like(mask)
        some.view(-1)[part] = True
        a, b = (self_similarity_graph(picture, some) for picture in (result, truth))
        log_a, log_b = (graph.clamp_min(CLAMP).log() for graph in (a, b))
        found.append(torch.stack([(a - b).abs().mean(dim=1), (b.clamp_min(CLAMP) * (log_b - log_a)).mean(dim=1)]))
    l1, kl = torch.cat(found, dim=1).numpy().astype("<f4")
    return l1, kl


def same_shape(one: Tensor, other: Tensor) -> bool:
    """Whether one [..., h, w] is the other enlarged, sides rounded to whole pixels."""
    (h, w), (height, width) = one.shape[-2:], other.shape[-2:]
    return abs(height * w - width * h) <= max(height, width, h, w)


def _size(picture: Tensor) -> str:
    return f"{picture.shape[-1]} x {picture.shape[-2]}"


def _text(array: NDArray[np.generic]) -> str:
    return base64.b64encode(array.tobytes()).decode()
