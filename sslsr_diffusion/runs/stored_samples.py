"""Training samples that are made once and stored: crops, their low-resolution partners, and what a model makes of those.

DIR/FOLDER/000000.SUFFIX, one folder per part of a sample, and settings.json: what they depend on.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sslsr_diffusion.data import DataSettings, TrainingLoader, open_training_data
from sslsr_diffusion.errors import UserError
from sslsr_diffusion.files import atomic_write
from sslsr_diffusion.images import Image, to_array, write_image
from sslsr_diffusion.types import Batch

logger = logging.getLogger(__name__)

Make = Callable[[Batch], Mapping[str, Tensor]]  # a batch -> the parts of its samples, [B, ...] each


@dataclass(frozen=True)
class Wanted:
    """Which samples: sample i follows from (seed, i) and the rest alone."""

    data: DataSettings
    crop_size: int
    scale: int
    seed: int
    count: int

    @property
    def settings(self) -> dict[str, Any]:
        """What a sample depends on, as plain values."""
        chosen_by = {"sources", "degradation", "crop", "small_images"} | ({"mask"} if self.data.crop.kind == "edge_aware" else set())
        own = {"seed": self.seed, "scale": self.scale, "crop_size": self.crop_size}
        return {**own, **self.data.model_dump(mode="json", include=chosen_by)}


def make_samples(
    wanted: Wanted,
    output: Path,
    start: Callable[[], Make],
    *,
    last: str,
    made_with: Mapping[str, Any],
    batch_size: int = 1,
    device: str = "cpu",
) -> Iterator[int]:
    """Write the samples that are not in `output` yet, yielding the number of samples there after each batch.

    A run that goes on, or asks for more, makes what one run would have made.

    Args:
        start: called once, where some samples are missing: opens the model that makes them.
        last: the part that is written last: a sample that has it is whole.
        made_with: what samples depend on beside `wanted`; `output` holds samples of one kind only.
    Raises UserError: `output` was made with other settings, or there are no pictures to begin with.
    """
    _same_settings(output, {**made_with, **wanted.settings}, last)
    done = {path.stem for path in (output / last).glob("*") if path.suffix in (".png", ".safetensors")}
    missing = [i for i in range(wanted.count) if _name(i) not in done]
    present = wanted.count - len(missing)
    yield present
    if not missing:
        return
    make = start()
    loader = _open(wanted, missing[0] // batch_size, batch_size, device)
    try:
        for batch in loader:
            chosen = sorted(set(batch.index.tolist()) & set(missing))
            if chosen:
                batch = _only(batch, chosen)
                _write(output, batch.index.tolist(), make(batch), last)
                present += len(chosen)
                yield present
            if int(batch.index.max()) >= missing[-1]:
                return
    finally:
        for problem in loader.problems():
            logger.warning("training data: %s", problem)
        loader.close()


def _name(index: int) -> str:
    return f"{index:06d}"


def _same_settings(output: Path, settings: dict[str, Any], last: str) -> None:
    path = output / "settings.json"
    if not any((output / last).glob("*")):
        output.mkdir(parents=True, exist_ok=True)
        atomic_write(path, json.dumps(settings, indent=1).encode())
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{path} is missing or damaged, so what made the samples there is not known; give another --output.") from None
    for key, value in settings.items():
        if before.get(key) != value:
            raise UserError(f"{output} holds samples made with {key} {before.get(key)}, now it is {value}; give another --output.")


def _open(wanted: Wanted, first: int, batch_size: int, device: str) -> TrainingLoader:
    """The training's own samples, from a batch on; a stream can only be read from its beginning."""
    pool_free = wanted.data.degradation.model_copy(update={"pool_size": 0})
    streams = any(getattr(source, "streaming", False) for source in wanted.data.sources)
    return open_training_data(
        wanted.data.model_copy(update={"degradation": pool_free}),
        crop_size=wanted.crop_size,
        scale=wanted.scale,
        seed=wanted.seed,
        batch_size=batch_size,
        state=None if streams else {"batch": first},
        device=torch.device(device),
    )


def _only(batch: Batch, wanted: list[int]) -> Batch:
    keep = [place for place, index in enumerate(batch.index.tolist()) if index in wanted]
    return replace(batch, hr=batch.hr[keep], lr=batch.lr[keep], mask=batch.mask[keep], index=batch.index[keep])


def _write(output: Path, indices: list[int], parts: Mapping[str, Tensor], last: str) -> None:
    """Pictures [3, H, W] as PNG, latents as safetensors; the last part when all others of its sample are there."""
    from safetensors.torch import save

    for name in sorted(parts, key=lambda name: name == last):
        (output / name).mkdir(parents=True, exist_ok=True)
        for index, value in zip(indices, parts[name]):
            path = output / name / _name(index)
            if name == "latents":
                atomic_write(path.with_suffix(".safetensors"), save({name: value.float().cpu().contiguous()}))
            else:
                write_image(path.with_suffix(".png"), Image(to_array(value)), format="PNG")
