"""One training sample from one request, and what happens when a file is bad. Runs in the loader's workers."""

import errno
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sslsr_diffusion.data.degradation import Degradation
from sslsr_diffusion.data.draws import Op
from sslsr_diffusion.data.masks import MaskFiles, capped, make_mask
from sslsr_diffusion.data.settings import DataSettings
from sslsr_diffusion.data.sources import IndexedSource, Item
from sslsr_diffusion.errors import UserError
from sslsr_diffusion.images import printable, read_image, to_tensor
from sslsr_diffusion.seeding import derive_seed, sample_generator

T = TypeVar("T")
_NAMES = "EIO ESTALE ETIMEDOUT EAGAIN EBUSY ENOTCONN ECONNRESET ECONNABORTED EHOSTDOWN EHOSTUNREACH ENETDOWN ENETUNREACH ENOLINK EREMOTEIO"
_HICCUPS = frozenset(getattr(errno, name) for name in _NAMES.split() if hasattr(errno, name))
_PAUSES = (0.5, 2.0)  # seconds before the second and third attempt during a hiccup
_FIRST_WAIT, _LONGEST_WAIT = 30.0, 1800.0  # seconds until a picture is asked for again; doubled each time


@dataclass(frozen=True)
class Request:
    """What the main process asks a worker for."""

    index: int  # of the sample: the seed of everything random in it
    place: int  # global sample index, the place in training: the seed of what training draws; another one where a pool hands it out again
    group: int  # global micro-batch: the seed of draws that a pair pool shares
    source: int
    ordinal: int  # how many samples of this source came before, over all processes
    item: Item | None = None  # streams carry their bytes with them


@dataclass
class Sample:
    hr: Tensor  # [3, H, W]
    lr: Tensor | None  # [3, H / scale, W / scale]; None: to be degraded on the training device
    mask: Tensor  # [1, H, W]
    index: int
    place: int
    name: str
    ops: list[Op] = field(default_factory=list)
    latents: Tensor | None = None  # [c, h, w], scaled: what the upscaler made of lr


Made = tuple[list[Sample], list[str]]
Planes = dict[str, NDArray[np.generic]]  # hr, and lr and mask where they are stored, as [H, W] or [H, W, 3]


class Unusable(UserError):
    """A picture that can be read, but not used for this training."""


class Failure(NamedTuple):
    """What is known of a picture that could not be used: a damaged one stays out, one that the storage did not deliver comes back."""

    problem: str
    again: float  # when it is tried again
    wait: float  # seconds, if it fails again


def patiently(make: Callable[[], T]) -> T:
    """What `make` returns, with two more attempts while a network share or a disk hiccups."""
    for pause in _PAUSES:
        try:
            return make()
        except (ValueError, OSError) as error:
            cause = storage_error(error)
            if cause is None or cause.errno not in _HICCUPS:
                raise
            time.sleep(pause)
    return make()


def storage_error(error: BaseException | None) -> OSError | None:
    """The operating system's error behind an error; Pillow's complaints about damaged files are OSErrors without a number."""
    while error is not None and not (isinstance(error, OSError) and error.errno is not None):
        error = error.__cause__
    return error


class SampleMaker:
    """Reads, crops, turns, masks and degrades. Picklable; `make` depends on its argument and the files alone."""

    def __init__(self, settings: DataSettings, sources: Sequence[IndexedSource | None], crop_size: int, scale: int, seed: int) -> None:
        self.settings, self.sources, self.crop_size, self.scale, self.seed = settings, sources, crop_size, scale, seed
        self.degradation = Degradation(settings.degradation, scale)
        self._mask_files = MaskFiles(settings.mask.folder) if settings.mask.folder else None
        self._failures: dict[tuple[int, int], Failure] = {}  # by source and position, in this process

    def __getitems__(self, requests: Sequence[Request]) -> Made | UserError:
        """The samples of a micro-batch and the problems on the way; DataLoader calls this.

        What ends the training is returned, not raised: DataLoader would put the worker's traceback into its sentence.
        """
        try:
            return self.batch(requests)
        except UserError as error:
            return error

    def batch(self, requests: Sequence[Request]) -> Made:
        """A stream cannot be asked again, so its bad items are replaced by other pictures of the same batch, cropped anew."""
        problems: list[str] = []
        samples = [self._sample(request, problems) for request in requests]
        good = [request for request, sample in zip(requests, samples) if sample is not None]
        for place, (request, sample) in enumerate(zip(requests, samples)):
            if sample is None and good:
                other = replace(good[place % len(good)], index=request.index, place=request.place, group=request.group)
                samples[place] = self._sample(other, problems)
        return [sample for sample in samples if sample is not None], problems

    def _sample(self, request: Request, problems: list[str]) -> Sample | None:
        if request.item is None:
            return self._from_index(request, problems)
        try:
            return self.make(request, request.item, problems)
        except UserError as error:
            problems.append(str(error))
            return None

    def _from_index(self, request: Request, problems: list[str]) -> Sample:
        """The requested picture or, while that is bad, the next one of this epoch's order: the same for any number of workers.

        (Unless the storage fails one worker and not another: then the picture comes back when it can be read again.)
        """
        source = self.sources[request.source]
        assert source is not None
        epoch, start = divmod(request.ordinal, len(source))
        order = permutation(len(source), derive_seed(self.seed, "order", request.source, epoch))
        for step in range(len(source)):
            position = int(order[(start + step) % len(source)])
            key = (request.source, position)
            before = self._failures.get(key)
            if before is not None and time.monotonic() < before.again:
                problems.append(before.problem)
                continue
            try:
                sample = patiently(lambda position=position: self.make(request, source.item(position), problems))  # type: ignore[misc]
            except (UserError, OSError) as error:
                wait = before.wait if before else _FIRST_WAIT
                again = time.monotonic() + wait if storage_error(error) else float("inf")
                self._failures[key] = Failure(str(error), again, min(2 * wait, _LONGEST_WAIT))
                problems.append(str(error))
            else:
                self._failures.pop(key, None)
                return sample
        raise UserError(f"{source.name}: nothing is left to train on, all {len(source)} pictures are unusable; the first: {problems[0]}")

    def make(self, request: Request, item: Item, problems: list[str]) -> Sample:
        """One sample; a picture that was used all the same with a loss is mentioned in `problems`.

        Raises:
            UnreadableImage, Unusable, MaskMismatch: the picture cannot be used.
        """
        with_generator = functools.partial(sample_generator, self.seed, request.index)
        planes = self._read(item, problems)
        crops = self._crop(planes, with_generator("crop"), turn=item.latents is None)
        hr = to_tensor(crops["hr"])[None]
        if item.latents is None:  # else it is the target that latents were stored for
            hr = self.degradation.target(hr)
        generator = with_generator("mask")
        mask = torch.from_numpy(crops["mask"])[None, None] if "mask" in crops else make_mask(hr, self.settings.mask, generator)
        mask = capped(mask, self.settings.mask, generator)
        if "lr" in crops:
            latents = None if item.latents is None else read_latents(item.latents)
            return Sample(hr[0], to_tensor(crops["lr"]), mask[0], request.index, request.place, item.name, [Op("real pair")], latents)
        shared = sample_generator(self.seed, request.group, "shared") if self.settings.degradation.pool_size else None
        ops = self.degradation.draw(hr.shape[2], hr.shape[3], with_generator("degradation"), shared)
        later = self.settings.degradation.device == "training"
        lr = None if later else self.degradation.apply(hr, ops, with_generator("noise"))[0]
        return Sample(hr[0], lr, mask[0], request.index, request.place, item.name, ops)

    def _read(self, item: Item, problems: list[str]) -> Planes:
        """The planes of an item at full size: hr, lr for real pairs, mask for mask files; padded where smaller than the crop."""
        hr = read_image(item.hr, name=item.name).visible
        height, width = hr.shape[:2]
        planes: Planes = {"hr": hr}
        if item.lr is not None:
            planes["lr"] = lr = read_image(item.lr, name=f"{item.name} (low-resolution partner)").visible
            check_pair(item.name, (height, width), lr.shape[:2], self.scale)
        check_whole(item, height, width, self.crop_size)
        if self._mask_files is not None:
            planes["mask"] = self._mask_files.read(item.name, item.file, (height, width))
        if min(height, width) < self.crop_size:
            what = f"{item.name}: {width}x{height} pixels are less than the crop of {self.crop_size}"
            if self.settings.small_images == "skip":
                raise Unusable(f"{what}, left out.")
            problems.append(f"{what}, reflected.")
            grid = self.scale if "lr" in planes else 1
            shrink = {name: self.scale if name == "lr" else 1 for name in planes}
            planes = {name: _reflect(plane, self.crop_size // shrink[name], grid // shrink[name]) for name, plane in planes.items()}
        return planes

    def _crop(self, planes: Planes, generator: torch.Generator, *, turn: bool) -> Planes:
        """An aligned window of all planes, mirrored and transposed alike; in pairs it starts on a low-resolution pixel."""
        crop, size = self.settings.crop, self.crop_size
        grid = self.scale if "lr" in planes else 1
        turns = [turn and bool(t) for t in torch.rand(3, generator=generator) < 0.5]
        for attempt in range(crop.tries if crop.kind == "edge_aware" else 1):
            y, x = (int(torch.randint((n - size) // grid + 1, (), generator=generator)) * grid for n in planes["hr"].shape[:2])
            shrinks = {key: self.scale if key == "lr" else 1 for key in planes}
            cut = {key: planes[key][y // s : (y + size) // s, x // s : (x + size) // s] for key, s in shrinks.items()}
            if crop.kind == "random" or attempt == crop.tries - 1 or self._density(cut, generator) >= crop.least_density:
                break
        hflip, vflip, transpose = crop.hflip and turns[0], crop.rotate and turns[1], crop.rotate and turns[2]
        return {key: _turn(plane, hflip, vflip, transpose) for key, plane in cut.items()}

    def _density(self, cut: Planes, generator: torch.Generator) -> float:
        if "mask" in cut:
            return float(cut["mask"].mean())
        return float(make_mask(to_tensor(cut["hr"])[None], self.settings.mask, generator).float().mean())


def check_pair(name: str, hr: Sequence[int], lr: Sequence[int], scale: int) -> None:
    """Raises Unusable unless the first picture, [H, W], is `scale` times as large as the second."""
    if tuple(hr) != tuple(scale * side for side in lr):
        sizes = f"{hr[1]}x{hr[0]} and {lr[1]}x{lr[0]} pixels"
        raise Unusable(f"{name}: the sizes of the pair do not fit scale {scale}: {sizes}; `sslsr prepare pairs` makes pairs that do.")


def check_whole(item: Item, height: int, width: int, crop_size: int) -> None:
    """Raises Unusable for a sample with latents whose picture is larger or smaller than the crop: they belong to all of it."""
    if item.latents is not None and (height, width) != (crop_size, crop_size):
        raise Unusable(f"{item.name}: latents belong to whole pictures of {width}x{height} pixels, the crop is {crop_size}.")


def read_latents(path: Path) -> Tensor:
    """[c, h, w] float32."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)["latents"].float()
    except (OSError, SafetensorError, KeyError) as error:
        raise Unusable(f"{printable(path)}: cannot be read as latents ({type(error).__name__}); delete it and make it again.") from error


@functools.lru_cache(maxsize=8)
def permutation(length: int, seed: int) -> Tensor:
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed))


def _reflect(plane: NDArray[np.generic], size: int, grid: int) -> NDArray[np.generic]:
    """Grow both sides of the shorter axes to `size` by reflection, as often as it takes; at the start by a multiple of `grid`.

    With the scale as the grid of the large partner and 1 as that of the small one, the two of a pair stay aligned.
    """
    missing = [max(0, size - n) for n in plane.shape[:2]]
    starts = [m // 2 // grid * grid for m in missing]
    pads = [(start, m - start) for start, m in zip(starts, missing)] + [(0, 0)] * (plane.ndim - 2)
    return np.pad(plane, pads, mode="symmetric")


def _turn(plane: NDArray[np.generic], hflip: bool, vflip: bool, transpose: bool) -> NDArray[np.generic]:
    plane = plane[:: -1 if vflip else 1, :: -1 if hflip else 1]
    return np.ascontiguousarray(plane.swapaxes(0, 1) if transpose else plane)
