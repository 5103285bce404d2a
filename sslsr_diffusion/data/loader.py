"""The endless training loader: who makes the samples, and where a resume goes on. And the pairs that validation looks at."""

import logging
import os
import signal
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Self, cast

import torch
from torch import Tensor

from sslsr_diffusion.data.degradation import Degradation
from sslsr_diffusion.data.filters import opencv
from sslsr_diffusion.data.sample_order import LoaderState, PairPool, Requests, SourceOrder, Stream, is_stream
from sslsr_diffusion.data.samples import Made, Sample, SampleMaker, check_pair, patiently
from sslsr_diffusion.data.settings import DataSettings
from sslsr_diffusion.data.sources import IndexedSource, open_source
from sslsr_diffusion.errors import UserError
from sslsr_diffusion.images import read_image, to_tensor
from sslsr_diffusion.seeding import derive_seed, sample_generator
from sslsr_diffusion.types import Batch

log = logging.getLogger(__name__)
_HOPELESS = 50  # streams only: so many batches in a row without one usable picture
_GRACE = 60  # seconds that a worker goes on after the first SIGTERM


class TrainingLoader:
    """Iterates forever over this process's micro-batches; made by `open_training_data`."""

    def __init__(self, maker: SampleMaker, requests: Requests, settings: DataSettings, device: torch.device | None) -> None:
        self._maker, self._requests, self._settings, self._device = maker, requests, settings, device
        self._state = requests.state_dict()
        self._problems: Counter[str] = Counter(requests.lost + [t for source in maker.sources if source is not None for t in source.lost])
        self._batches: Iterator[Made | UserError] | None = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        for _ in range(_HOPELESS):
            if self._batches is None:
                self._batches = self._start()
            samples, problems = self._made()
            self._state = self._requests.marks.popleft()
            for text in problems:
                if text not in self._problems:
                    log.warning("%s", text)
                self._problems[text] += 1
            if samples:
                return self._collate(samples)
        raise UserError(f"data: nothing is left to train on, {_HOPELESS} batches in a row held no usable picture; the last: {problems[-1]}")

    def _made(self) -> Made:
        assert self._batches is not None
        try:
            made = next(self._batches)
        except RuntimeError as error:
            if "DataLoader worker (pid" not in str(error):  # else raised by the samples' own code
                raise
            raise UserError(
                "data: a process that prepares samples was ended from outside, most often for lack of memory; "
                "lower data.workers or data.prefetch and resume."
            ) from error
        if isinstance(made, UserError):
            raise made
        return made

    def raw_samples(self, count: int) -> tuple[list[Sample], list[str]]:
        """The next samples with the operations drawn for them, made in this process, and the problems met."""
        samples: list[Sample] = []
        for _, requests in zip(range(count + _HOPELESS), self._requests):
            made, problems = self._maker.batch(requests)
            samples += made
            self._problems.update(problems)
            if len(samples) >= count:
                break
        return samples[:count], self.problems()

    def state_dict(self) -> dict[str, object]:
        """The position after the last batch handed out, as plain JSON values."""
        return {**self._state}

    def problems(self) -> list[str]:
        """The pictures that were replaced or padded so far, one sentence each, with how often it happened."""
        return [text if count == 1 else f"{text} ({count} times)" for text, count in sorted(self._problems.items())]

    def close(self) -> None:
        """Stop the workers. The state stays valid; iterating again goes on there with new workers."""
        if self._batches is not None:
            self._batches = None
            self._requests.marks.clear()
            self._requests.load_state_dict(self._state)

    def _start(self) -> Iterator[Made | UserError]:
        opencv().setNumThreads(1)  # before any fork, whatever was set or started since
        workers = self._settings.workers
        return iter(
            torch.utils.data.DataLoader(
                self._maker,  # type: ignore[arg-type]  # it has __getitems__, all that a batch sampler needs
                batch_sampler=self._requests,
                collate_fn=_unchanged,  # type: ignore[arg-type]
                num_workers=workers,
                worker_init_fn=_start_worker,
                generator=torch.Generator(),  # or starting the workers would advance the global stream, which a resume restores
                prefetch_factor=self._settings.prefetch if workers else None,
                multiprocessing_context=self._settings.start_method if workers else None,
            )
        )

    def _collate(self, samples: list[Sample]) -> Batch:
        latents = [s.latents for s in samples if s.latents is not None]
        return Batch(
            hr=torch.stack([s.hr for s in samples]),
            lr=torch.stack([self._degraded(s) for s in samples]),
            mask=torch.stack([s.mask for s in samples]),
            index=torch.tensor([s.place for s in samples]),
            names=tuple(s.name for s in samples),
            latents=torch.stack(latents) if len(latents) == len(samples) else None,
        )

    def _degraded(self, sample: Sample) -> torch.Tensor:
        if sample.lr is not None:
            return sample.lr
        hr = sample.hr[None].to(self._device)
        generator = torch.Generator(hr.device).manual_seed(derive_seed(self._maker.seed, sample.index, "noise"))
        return self._maker.degradation.apply(hr, sample.ops, generator)[0].cpu()


def open_training_data(
    settings: DataSettings,
    *,
    crop_size: int,
    scale: int,
    seed: int,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    state: Mapping[str, object] | None = None,
    device: torch.device | None = None,
) -> TrainingLoader:
    """Open the sources and return an endless loader of this process's micro-batches.

    Micro-batch m of process `rank` holds the samples [(m * world_size + rank) * batch_size, + batch_size): N processes with batches of
    B see what one process with batches of N * B sees. (Streams are divided among the processes instead.)

    Args:
        settings: the `data` section.
        crop_size: side of the high-resolution crop in pixels, a multiple of `scale`.
        scale: how many times smaller the low-resolution crop is, 1 to 8.
        seed: everything random follows from it and the sample's index.
        state: from `TrainingLoader.state_dict`, to go on there.
        device: where degradation runs when `degradation.device` is `training`.
    Raises UserError: nothing to train on, or sizes that do not fit.
    """
    check_sizes(crop_size, scale)
    if not settings.sources:
        raise UserError("data.sources: expected at least one source to train on, got none; for example [{kind: folder, path: photos}].")
    pool = settings.degradation.pool_size
    if pool % batch_size:
        raise UserError(f"data.degradation.pool_size: expected a multiple of the batch of {batch_size}, got {pool}.")
    streams = {i: Stream(s, seed, rank, world_size) for i, s in enumerate(settings.sources) if is_stream(s)}
    sources: list[IndexedSource | None] = [None if i in streams else open_source(s) for i, s in enumerate(settings.sources)]
    order = SourceOrder([s.weight for s in settings.sources], seed)
    lengths = [None if s is None else len(s) for s in sources]
    exchange = PairPool(pool, derive_seed(seed, "pool", rank)) if pool else None
    requests = Requests(order, streams, exchange, (rank, world_size, batch_size), lengths)
    if state is not None:
        old = state.get("lengths")
        if old is not None and old != lengths:  # another number of pictures is another order: say it, and go on
            log.warning("The training pictures have changed since the checkpoint (%s, now %s): the order goes on differently", old, lengths)
        requests.load_state_dict(cast(LoaderState, state))
    return TrainingLoader(SampleMaker(settings, sources, crop_size, scale, seed), requests, settings, device)


def check_sizes(crop_size: int, scale: int) -> None:
    if not 1 <= scale <= 8:
        raise UserError(f"scale: expected a whole number from 1 to 8, got {scale}.")
    if crop_size < scale or crop_size % scale:
        raise UserError(f"crop size: expected a multiple of the scale {scale}, got {crop_size}.")


def _unchanged(made: Made | UserError) -> Made | UserError:
    return made


def _start_worker(worker: int) -> None:
    """One thread; and a signal to the whole process group (a scheduler's, Ctrl-C) is the training process's to act on."""
    opencv()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _linger)


def _linger(number: int, frame: FrameType | None) -> None:
    """Batches go on until the training process has taken its checkpoint, but not for ever; a second SIGTERM ends the worker at once.

    With exit code 0: any other interrupts the training process wherever it is, in the middle of a checkpoint for example.
    """
    signal.signal(signal.SIGTERM, _end)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGALRM, _end)
        signal.alarm(_GRACE)


def _end(number: int, frame: FrameType | None) -> None:
    os._exit(0)


def open_samples(settings: DataSettings, *, crop_size: int, scale: int, seed: int, count: int) -> tuple[list[Sample], list[str]]:
    """The first samples of training with what was drawn for them, for inspection; and the problems met on the way."""
    degradation = settings.degradation.model_copy(update={"device": "cpu", "pool_size": 0})
    here = settings.model_copy(update={"workers": 0, "degradation": degradation})
    loader = open_training_data(here, crop_size=crop_size, scale=scale, seed=seed, batch_size=1)
    return loader.raw_samples(count)


@dataclass(frozen=True)
class ValidationPair:
    name: str
    lr: Tensor  # [3, h, w] in [0, 1]
    hr: Tensor  # [3, h * scale, w * scale] in [0, 1]


def open_validation_pairs(settings: DataSettings, *, crop_size: int, scale: int, seed: int, limit: int) -> list[ValidationPair]:
    """At most `limit` pairs of the validation sources, in their order, cut in the middle to at most `crop_size`.

    Real pairs keep their low-resolution partner. Unreadable pictures are named in the log and left out.
    Raises UserError: there are validation sources, but not one usable picture in them.
    """
    check_sizes(crop_size, scale)
    degradation = Degradation(settings.degradation, scale)
    pairs: list[ValidationPair] = []
    reason = ""
    for source_settings in settings.validation:
        source = open_source(source_settings)
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
    hr = to_tensor(read_image(item.hr, name=item.name).visible)
    height, width = (min(crop_size, n) // scale * scale for n in hr.shape[1:])
    if not height or not width:
        raise UserError(f"{item.name}: {hr.shape[2]}x{hr.shape[1]} pixels are less than the scale {scale}.")
    top, left = ((n - size) // 2 // scale * scale for n, size in zip(hr.shape[1:], (height, width)))
    cut = hr[:, top : top + height, left : left + width].contiguous()
    if item.lr is None:
        ops = degradation.draw(height, width, sample_generator(seed, position, "validation"))
        return ValidationPair(item.name, degradation.apply(cut[None], ops, sample_generator(seed, position, "validation noise"))[0], cut)
    lr = to_tensor(read_image(item.lr, name=item.name).visible)
    check_pair(item.name, hr.shape[1:], lr.shape[1:], scale)
    low = lr[:, top // scale : (top + height) // scale, left // scale : (left + width) // scale].contiguous()
    return ValidationPair(item.name, low, cut)
