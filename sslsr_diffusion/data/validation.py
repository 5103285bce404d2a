"""Validation pairs: held-out pictures, cropped in the middle, degraded once and for all by (seed, position)."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from sslsr_diffusion.data.degradation import Degradation
from sslsr_diffusion.data.loader import check_sizes
from sslsr_diffusion.data.samples import check_pair, patiently
from sslsr_diffusion.data.settings import DataSettings
from sslsr_diffusion.data.sources import IndexedSource, open_source
from sslsr_diffusion.errors import UserError
from sslsr_diffusion.images import read_image, to_tensor
from sslsr_diffusion.seeding import sample_generator

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ValidationPair:
    name: str
    lr: Tensor  # [3, h, w] in [0, 1]
    hr: Tensor  # [3, h * scale, w * scale] in [0, 1]


def open_validation_pairs(settings: DataSettings, *, crop_size: int, scale: int, seed: int, limit: int) -> list[ValidationPair]:
    """At most `limit` pairs of the validation sources, in their order, cut in the middle to at most `crop_size`.

    Real pairs keep their low-resolution partner. Unreadable pictures are named in the log and left out.

    Raises:
        UserError: there are validation sources, but not one usable picture in them.
    """
    check_sizes(crop_size, scale)
    degradation = Degradation(settings.degradation, scale)
    pairs: list[ValidationPair] = []
    reason = ""
    for source_settings in settings.validation:
        source = open_source(
            source_settings.model_copy(update={"streaming": False}) if hasattr(source_settings, "streaming") else source_settings
        )
        for position in range(len(source)):
            if len(pairs) >= limit:
                return pairs
            try:
                pairs.append(patiently(partial(_pair, source, position, degradation, crop_size, seed)))
            except (UserError, OSError) as error:
                reason = str(error)
                log.warning("validation: %s", reason)
    if settings.validation and limit > 0 and not pairs:
        raise UserError(f"data.validation: no usable picture; the last: {reason}")
    return pairs


def _pair(source: IndexedSource, position: int, degradation: Degradation, crop_size: int, seed: int) -> ValidationPair:
    item, scale = source.item(position), degradation.scale
    hr = to_tensor(read_image(item.hr, name=item.name).rgb)
    height, width = (min(crop_size, n) // scale * scale for n in hr.shape[1:])
    if not height or not width:
        raise UserError(f"{item.name}: {hr.shape[2]}x{hr.shape[1]} pixels are less than the scale {scale}.")
    top, left = ((n - size) // 2 // scale * scale for n, size in zip(hr.shape[1:], (height, width)))
    cut = hr[:, top : top + height, left : left + width].contiguous()
    if item.lr is None:
        ops = degradation.draw(height, width, sample_generator(seed, position, "validation"))
        return ValidationPair(item.name, degradation.apply(cut[None], ops, sample_generator(seed, position, "validation noise"))[0], cut)
    lr = to_tensor(read_image(item.lr, name=item.name).rgb)
    check_pair(item.name, hr.shape[1:], lr.shape[1:], scale)
    low = lr[:, top // scale : (top + height) // scale, left // scale : (left + width) // scale].contiguous()
    return ValidationPair(item.name, low, cut)
