"""Distillation: an upscaler's pictures in the place of the true ones, made while training asks for them, or stored as pairs."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sslsr_diffusion.data import DataSettings, TrainingLoader
from sslsr_diffusion.data.masks import capped, make_mask
from sslsr_diffusion.images import resize_bicubic, to_array, to_tensor
from sslsr_diffusion.inference.open import FoundModel, find_model, open_model
from sslsr_diffusion.inference.restorer import Restorer
from sslsr_diffusion.runs.stored_samples import Make, Wanted, make_samples
from sslsr_diffusion.seeding import derive_seed, sample_generator
from sslsr_diffusion.types import Batch


class Teacher:
    """An upscaler that shows how it is done; an `anchor` takes that share of what it gets wrong at the low resolution back."""

    def __init__(self, restorer: Restorer, *, scale: int, seed: int, anchor: float = 0.0) -> None:
        self._restorer, self._scale, self._seed, self._anchor = restorer, scale, seed, anchor

    @classmethod
    def open(cls, model: str, *, device: torch.device, scale: int, seed: int, anchor: float = 0.0) -> "Teacher":
        """By any name that `open_upscaler` takes. UserError: there is no such model, or it cannot be opened."""
        return cls(open_model(find_model(model), device=str(device)), scale=scale, seed=seed, anchor=anchor)

    @torch.no_grad()
    def __call__(self, lr: Tensor, index: Tensor, hr: Tensor) -> Tensor:
        """Pictures of [B, 3, h, w] crops with global sample indices [B]: [B, 3, h scale, w scale] float32 in [0, 1], on the CPU.

        What a teacher draws follows from (seed, index) alone. `hr`: the true pictures, of the same shape.
        """
        generators = [torch.Generator().manual_seed(derive_seed(self._seed, "teacher", i)) for i in index.tolist()]
        images: Tensor = self._restorer(lr, scale=self._scale, generator=generators, output_type="pt").images
        images = images.float().clamp(0, 1).cpu()
        if not self._anchor:
            return images
        low, high = ((picture.shape[-2], picture.shape[-1]) for picture in (lr, images))
        wrong = resize_bicubic(hr.float().cpu(), size=low) - resize_bicubic(images, size=low)
        return (images + self._anchor * resize_bicubic(wrong, size=high)).clamp(0, 1)


class TaughtLoader:
    """The training's batches with a teacher's pictures as what is trained towards, and edge masks of those."""

    def __init__(self, loader: TrainingLoader, teacher: Teacher, settings: DataSettings, *, seed: int) -> None:
        self._loader, self._teacher, self._mask, self._seed = loader, teacher, settings.mask, seed

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._loader:
            hr = self._teacher(batch.lr, batch.index, batch.hr)
            yield replace(batch, hr=hr, mask=batch.mask if self._mask.kind == "files" else self._masks(hr, batch.index))

    def _masks(self, hr: Tensor, index: Tensor) -> Tensor:
        """[B, 1, H, W] bool."""
        drawn = [(picture, sample_generator(self._seed, i, "mask")) for picture, i in zip(hr.split(1), index.tolist())]
        return torch.cat([capped(make_mask(picture, self._mask, drawing), self._mask, drawing) for picture, drawing in drawn])

    def state_dict(self) -> dict[str, Any]:
        return self._loader.state_dict()

    def problems(self) -> list[str]:
        return self._loader.problems()

    def close(self) -> None:
        self._loader.close()


def make_pairs(wanted: Wanted, model: FoundModel, output: Path, *, batch_size: int = 1, device: str = "cpu") -> Iterator[int]:
    """`make_samples` with an upscaler's pictures: pairs for a source of kind `pairs`, hr/ by the upscaler, lr/ degraded by the recipe."""

    def start() -> Make:
        opened, anchor = open_model(model, device=device), wanted.data.teacher_anchor
        teacher = Teacher(opened, scale=wanted.scale, seed=wanted.seed, anchor=anchor)
        return lambda batch: _pairs(teacher, batch)

    made_with = {"teacher": model.fingerprint, "teacher_anchor": wanted.data.teacher_anchor}
    yield from make_samples(wanted, output, start, last="hr", made_with=made_with, batch_size=batch_size, device=device)


def _pairs(teacher: Teacher, batch: Batch) -> dict[str, Tensor]:
    """What the teacher makes of the 8 bits that are stored."""
    lr = torch.stack([to_tensor(to_array(picture)) for picture in batch.lr])
    return {"lr": lr, "hr": teacher(lr, batch.index, batch.hr)}
