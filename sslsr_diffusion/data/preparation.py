"""Preparing files for training: multi-scale copies, sub-images, mask files, low-resolution test sets, pairs. One picture at a time.

Each job is a function (path, relative name, options) -> files written; `run_jobs` spreads them over processes. What exists already is
kept, every file is written under a temporary name first, and a picture that cannot be used comes back with its reason.
"""

import io
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as Pillow
from scipy.io import savemat

from sslsr_diffusion.config import Settings
from sslsr_diffusion.data.degradation import Degradation, DegradationSettings
from sslsr_diffusion.data.filters import opencv
from sslsr_diffusion.data.masks import make_mask
from sslsr_diffusion.data.settings import MaskSettings
from sslsr_diffusion.data.sources import by_stem
from sslsr_diffusion.errors import UserError
from sslsr_diffusion.files import atomic_write
from sslsr_diffusion.images import Image, printable, read_image, resize_bicubic, to_array, to_tensor, write_image
from sslsr_diffusion.partners import partners
from sslsr_diffusion.seeding import sample_generator

T = TypeVar("T")
R = TypeVar("R")
PictureJob = Callable[[Path, Path], int]
_AHEAD = 4  # items per process that wait with their bytes
_MULTI_SCALE = (("T0", 0.75), ("T1", 0.6), ("T2", 1 / 3))


@dataclass(frozen=True)
class Outcome:
    """What became of one picture."""

    name: str
    written: int = 0  # new files; 0 also when all of them were there already
    problem: str = ""


def run_jobs(job: PictureJob, paths: Sequence[Path], base: Path, processes: int) -> Iterator[Outcome]:
    """Yield an Outcome for every path; `job` gets the path and its name relative to `base`.

    Results are named after pictures without suffix: of several pictures whose results could have one name the first is done, the others
    are problems.
    """
    labels = _LABELS.get(getattr(job, "func", job), ("",))
    owners: dict[str, Path] = {}
    pairs: list[tuple[Path, Path]] = []
    for path in paths:
        name = path.relative_to(base) if path.is_relative_to(base) else Path(path.name)
        results = [f"{name.with_suffix('')}{label}" for label in labels]
        other = next((owners[result] for result in results if result in owners), None)
        if other is None:
            owners |= dict.fromkeys(results, name)
            pairs.append((path, name))
        else:
            label = printable(name)
            yield Outcome(label, problem=f"{label}: its results would be named as those of {printable(other)}; rename it.")
    yield from spread(partial(_one, job), pairs, processes)


def _one(job: PictureJob, pair: tuple[Path, Path]) -> Outcome:
    path, name = pair
    label = printable(name)
    try:
        return Outcome(label, job(path, name))
    except (UserError, OSError) as error:
        return Outcome(label, problem=str(error))


def spread(function: Callable[[T], R], items: Iterable[T], processes: int) -> Iterator[R]:
    """What the picklable function makes of every item, in order, over so many processes; items are taken a few ahead, not all at once.
    Raises UserError: the system has ended one of the processes.
    """
    if processes <= 1:
        yield from map(function, items)
        return
    opencv()  # one thread, before any fork
    waiting: deque[Future[R]] = deque()
    try:
        with ProcessPoolExecutor(processes, initializer=_start, initargs=(function,)) as pool:
            for item in items:
                waiting.append(pool.submit(_call, item))
                if len(waiting) >= _AHEAD * processes:
                    yield waiting.popleft().result()
            for future in waiting:
                yield future.result()
    except BrokenProcessPool:
        raise UserError(
            f"one of {processes} processes was ended from outside, most often for lack of memory; "
            "the same command with a smaller --processes goes on."
        ) from None


_function: Callable[[Any], Any]  # of a worker process, sent to it once


def _start(function: Callable[[Any], Any]) -> None:
    global _function
    torch.set_num_threads(1)
    opencv()
    _function = function


def _call(item: Any) -> Any:
    return _function(item)


def multiscale(path: Path, name: Path, *, output: Path, shortest_edge: int = 512) -> int:
    """Copies at 0.75, 0.6 and 1/3 (`T0`, `T1`, `T2`) while the shorter side stays at least `shortest_edge`, by Lanczos.

    `S` has the shorter side exactly that long (enlarged if need be); the picture itself is kept if it is large enough.
    """
    image = read_image(path, name=printable(name))
    height, width = image.size
    ratio = max(height, width) / min(height, width)
    sizes = {label: (int(width * factor), int(height * factor)) for label, factor in _MULTI_SCALE}
    sizes = {label: size for label, size in sizes.items() if min(size) >= shortest_edge}
    long = int(shortest_edge * ratio)
    sizes["S"] = (long, shortest_edge) if width >= height else (shortest_edge, long)
    if min(height, width) >= shortest_edge:
        sizes[""] = (width, height)
    picture = Pillow.fromarray(image.visible if image.bits == 8 else to_array(to_tensor(image.visible)))
    written = 0
    for label, size in sizes.items():
        target = output / name.with_name(f"{name.stem}{label}.png")
        written += _write_new(target, lambda size=size: np.asarray(picture.resize(size, Pillow.Resampling.LANCZOS)))  # type: ignore[misc]
    return written


def crops(path: Path, name: Path, *, output: Path, size: int = 512, step: int = 256) -> int:
    """Sub-images `<stem>_s001.png`, row by row; a last row and column lie flush with the border. A smaller picture is a problem by name."""
    pixels = read_image(path, name=printable(name)).visible
    height, width = pixels.shape[:2]
    if min(height, width) < size:
        what = f"{printable(name)}: {width}x{height} pixels are less than the crop of {size}"
        raise UserError(f"{what}; enlarge it with `multiscale` or lower --size.")
    written = 0
    for number, (y, x) in enumerate(crop_places(height, width, size, step), start=1):
        cut = pixels[y : y + size, x : x + size]
        written += _write_new(output / name.with_name(f"{name.stem}_s{number:03d}.png"), partial(np.asarray, cut))
    return written


def crop_places(height: int, width: int, size: int, step: int) -> list[tuple[int, int]]:
    """The top-left corners of the sub-images."""
    rows, columns = ([*range(0, n - size + 1, step)] for n in (height, width))
    for starts, n in ((rows, height), (columns, width)):
        if starts[-1] + size < n:
            starts.append(n - size)
    return [(y, x) for y in rows for x in columns]


def masks(path: Path, name: Path, *, output: Path, settings: MaskSettings) -> int:
    """Mask files in the layout of the published script: mat/<stem>.mat (key `mat`, 0/1, compressed) and png/<stem>.png (0/255)."""
    targets = {suffix: (output / suffix / name).with_suffix(f".{suffix}") for suffix in ("mat", "png")}
    if all(_is_there(target) for target in targets.values()):
        return 0
    hr = to_tensor(read_image(path, name=printable(name)).visible)[None]
    mask = make_mask(hr, settings, sample_generator(0, str(name), "mask"))[0, 0].numpy()
    buffer = io.BytesIO()
    savemat(buffer, {"mat": mask.astype(int)}, do_compression=True)
    targets["mat"].parent.mkdir(parents=True, exist_ok=True)
    atomic_write(targets["mat"], buffer.getvalue())
    return 1 + _write_new(targets["png"], lambda: np.repeat(mask.astype(np.uint8)[..., None] * 255, 3, axis=2), gray=True)


def low_resolution(path: Path, name: Path, *, output: Path, degradation: DegradationSettings, scale: int = 4, seed: int = 0) -> int:
    """A test pair: hr/<stem>.png cut to a multiple of the scale, lr/<stem>.png degraded by (seed, name)."""
    hr = to_tensor(read_image(path, name=printable(name)).visible)
    height, width = (n // scale * scale for n in hr.shape[1:])
    if not height or not width:
        raise UserError(f"{printable(name)}: {hr.shape[2]}x{hr.shape[1]} pixels are less than the scale {scale}.")
    targets = {side: (output / side / name).with_suffix(".png") for side in ("hr", "lr")}
    if all(_is_there(target) for target in targets.values()):
        return 0
    cut = hr[None, :, :height, :width].contiguous()
    model = Degradation(degradation, scale)
    ops = model.draw(height, width, sample_generator(seed, name.as_posix(), "test"))
    lr = model.apply(cut, ops, sample_generator(seed, name.as_posix(), "test noise"))
    return _write_new(targets["hr"], lambda: to_array(cut[0])) + _write_new(targets["lr"], lambda: to_array(lr[0]))


def pairs(path: Path, name: Path, *, output: Path, hr: str, lr: str, scale: int = 4) -> int:
    """A real pair that fits: hr/<stem>.png exactly `scale` times as large as lr/<stem>.png.

    A low-resolution picture that is as large as its partner was enlarged (RealSR's layout): it is shrunk again (bicubic, antialiased).
    What one of the two shows more than the other at the right and at the bottom, less than two low-resolution pixels, is cut.
    """
    low = _partners(hr, lr).get(path)
    if low is None:
        raise UserError(f"{printable(name)}: no partner of that name in {lr}.")
    targets = {side: (output / side / name).with_suffix(".png") for side in ("hr", "lr")}
    if all(_is_there(target) for target in targets.values()):
        return 0
    large, small = read_image(path, name=printable(name)).visible, read_image(low).visible
    sizes = (large.shape[:2], small.shape[:2])
    if sizes[0] == sizes[1]:
        rows, columns = (side // scale for side in sizes[0])
    else:
        rows, columns = (min(side // scale, less) for side, less in zip(*sizes))
        if any(abs(scale * less - side) >= 2 * scale for side, less in zip(*sizes)):
            shown = " and ".join(f"{width}x{height}" for height, width in sizes)
            raise UserError(
                f"{printable(name)}: the sizes of the pair do not fit --scale {scale}: {shown} pixels; give the scale that does."
            )
    if not rows or not columns:
        raise UserError(f"{printable(name)}: {sizes[0][1]}x{sizes[0][0]} pixels are less than the scale {scale}.")
    large = large[: rows * scale, : columns * scale]
    if sizes[0] == sizes[1]:
        enlarged = to_tensor(small[: rows * scale, : columns * scale])[None]
        small = to_array(resize_bicubic(enlarged, (rows, columns))[0], small.dtype)
    return _write_new(targets["hr"], lambda: large) + _write_new(targets["lr"], lambda: small[:rows, :columns])


@lru_cache(maxsize=1)
def _partners(hr: str, lr: str) -> dict[Path, Path]:
    high, low = by_stem(Path(hr)), by_stem(Path(lr))
    return {high[mine]: low[theirs] for mine, theirs in partners(high, low).items()}


_LABELS: dict[Callable[..., int], tuple[str, ...]] = {multiscale: ("", "S", *(label for label, _ in _MULTI_SCALE))}


def check_settings(job: partial[int]) -> None:
    """Note a job's settings beside its results, so that results of other settings are never taken for its own.
    Raises UserError: the results in its output were made with other settings, or nothing can be written there.
    """
    output = job.keywords["output"]
    given = {key: value.model_dump() if isinstance(value, Settings) else value for key, value in job.keywords.items() if key != "output"}
    text = json.dumps(given, indent=1, default=str) + "\n"
    note = output / f"prepared-{job.func.__name__}.json"
    try:
        if note.exists() and note.read_text(encoding="utf-8") != text:
            raise UserError(f"--output {output}: holds results of other settings ({note.name} there has them); name another folder.")
        output.mkdir(parents=True, exist_ok=True)
        atomic_write(note, text.encode())
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error.strerror}); name a folder of yours.") from None


def default_processes() -> int:
    return max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def _is_there(target: Path) -> bool:
    """One that was emptied is made again."""
    return target.exists() and target.stat().st_size > 0


def _write_new(target: Path, make: Callable[[], NDArray[np.generic]], *, gray: bool = False) -> int:
    if _is_there(target):
        return 0
    target.parent.mkdir(parents=True, exist_ok=True)
    write_image(target, Image(np.ascontiguousarray(make()), gray=gray), format="PNG")
    return 1
