"""Every metric on every image of every column, read once, resumable; no printing, no choosing of files."""

import base64
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sslsr_diffusion import __version__
from sslsr_diffusion.errors import UserError
from sslsr_diffusion.evaluation.metrics import METRICS, convention
from sslsr_diffusion.evaluation.pairing import Scene
from sslsr_diffusion.evaluation.results import Key, ResultStore
from sslsr_diffusion.images import printable, read_image, to_tensor

PIXEL_STD = "pixel_std"  # per-pixel standard deviation over the seeds, on the 0..255 scale
Array = NDArray[np.float64]
Features = NDArray[np.float32]


@dataclass(frozen=True)
class Scores:
    """What was measured. Numbers are nan where a metric has none for an image (`problems` says why)."""

    columns: tuple[str, ...]
    scenes: tuple[Scene, ...]
    values: dict[str, dict[str, Array]]  # metric -> column -> [images, seeds]
    whole_set: dict[str, dict[str, Array]]  # metric -> column -> [seeds]
    pixel_std: dict[str, Array]  # column -> [images], only for columns with several seeds
    conventions: dict[str, str]
    seconds: dict[str, float]  # metric -> mean seconds per image
    problems: tuple[str, ...] = ()


class _File:
    """A picture that is read once, and decoded only when a number is missing."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._bytes = path.read_bytes()
        except OSError as error:
            raise UserError(f"{printable(path)} cannot be read ({error.strerror}).") from None
        self.digest = hashlib.sha256(self._bytes).hexdigest()
        self._tensor: Tensor | None = None

    def tensor(self, device: str) -> Tensor:
        if self._tensor is None:
            self._tensor = load_rgb(self._bytes, name=str(self.path)).to(device)
        return self._tensor


def load_rgb(source: Path | bytes, *, name: str | None = None) -> Tensor:
    """[1, 3, H, W] float32 in [0, 1]; where there is transparency, as seen on white."""
    image = read_image(source, name=name)
    rgb = to_tensor(image.rgb)[None]
    if image.alpha is None:
        return rgb
    alpha = to_tensor(image.alpha)[None]
    return rgb * alpha + (1 - alpha)


@dataclass
class _Run:
    metrics: Sequence[str]
    crop_border: int
    y_channel: bool
    device: str
    store: ResultStore
    conventions: dict[str, str]
    timed: dict[str, list[float]]  # metric -> seconds of each image
    has_lr: bool
    problems: list[str] = field(default_factory=list)


def score(
    scenes: Sequence[Scene],
    metrics: Sequence[str],
    store: ResultStore,
    *,
    crop_border: int = 0,
    y_channel: bool = False,
    device: str = "cpu",
    progress: Callable[[str], object] = lambda name: None,
) -> Scores:
    """Score the scenes; whatever `store` already knows for the same file contents and conventions is not computed again.

    `progress` is called with the name of each image when it is done. Images that cannot be read are left out of every column and named
    in `problems`.
    """
    has_lr = all(scene.lr is not None for scene in scenes)  # one number means one thing: without all of them, none is compared with
    conventions = {m: convention(m, crop_border=crop_border, y_channel=y_channel, has_lr=has_lr) for m in metrics}
    run = _Run(metrics, crop_border, y_channel, device, store, conventions, {m: [] for m in metrics}, has_lr)
    columns = tuple(scenes[0].restored)
    spreads: dict[str, list[float]] = {c: [] for c in columns if len(scenes[0].restored[c]) > 1}
    kept: list[Scene] = []
    measured: list[dict[str, list[dict[str, Any]]]] = []
    for scene in scenes:
        try:
            measured.append(_score_scene(run, scene))
        except UserError as error:
            run.problems.append(f"{printable(scene.name)} is left out: {error}")
        else:
            kept.append(scene)
            for column in spreads:
                spreads[column].append(_spread(run, scene, column))
        progress(scene.name)
    if not kept:
        raise UserError("no image could be scored: " + " ".join(run.problems[:3]))
    per_image = {
        m: {c: np.array([[seed[m] for seed in found[c]] for found in measured], dtype=np.float64) for c in columns}
        for m in metrics
        if not METRICS[m].whole_set
    }
    whole = {
        m: {c: _set_distance(distance, [[seed[m] for seed in found[c]] for found in measured]) for c in columns}
        for m in metrics
        if (distance := METRICS[m].whole_set)
    }
    return Scores(
        columns,
        tuple(kept),
        per_image,
        whole,
        {c: np.array(v) for c, v in spreads.items()},
        conventions,
        {m: float(np.mean(t)) for m, t in run.timed.items() if t},
        tuple(dict.fromkeys(run.problems)),
    )


def _score_scene(run: _Run, scene: Scene) -> dict[str, list[dict[str, Any]]]:
    """Column -> for each seed: metric -> its number; of metrics over the whole set, the features of restored and reference."""
    reference = _File(scene.reference) if scene.reference else None
    lr = _File(scene.lr) if scene.lr and run.has_lr else None
    return {
        column: [{metric: _value(run, metric, file, reference, lr) for metric in run.metrics} for file in map(_File, paths)]
        for column, paths in scene.restored.items()
    }


def _value(run: _Run, name: str, file: _File, reference: _File | None, lr: _File | None) -> float | tuple[Features, Features]:
    """One metric of one image, from the store or computed now (and put there)."""
    metric = METRICS[name]
    if metric.whole_set:
        assert reference is not None
        return _features(run, name, file), _features(run, name, reference)
    against = metric.against(reference, lr)
    key = _key(run, name, file, against)
    if key not in run.store:
        images = (file.tensor(run.device), against.tensor(run.device) if against else None)
        started = time.perf_counter()
        options = {"crop_border": run.crop_border, "y_channel": run.y_channel}
        try:
            scores = metric.joint(*images, **options) if metric.joint else {name: metric.fn(*images, **options)}
        except UserError as error:
            run.problems.append(f"{metric.label} has no value for {printable(file.path)}: {error}")
            return float("nan")
        seconds = (time.perf_counter() - started) / len(scores)
        for sister, value in scores.items():
            if sister in run.metrics:
                run.store.put(_key(run, sister, file, against), float(value.reshape(-1)[0]), seconds)
    run.timed[name].append(run.store.seconds(key))
    return float(run.store.value(key))


def _features(run: _Run, name: str, file: _File) -> Features:
    key = _key(run, name, file, None)
    if key not in run.store:
        started = time.perf_counter()
        features = METRICS[name].fn(file.tensor(run.device))[0].numpy().astype("<f4")
        run.store.put(key, base64.b64encode(features.tobytes()).decode(), time.perf_counter() - started)
    run.timed[name].append(run.store.seconds(key))
    return np.frombuffer(base64.b64decode(str(run.store.value(key))), "<f4")


def _set_distance(distance: Callable[[Features, Features], float], rows: list[list[tuple[Features, Features]]]) -> Array:
    """[images][seeds] of (restored, reference) features -> distance per seed; nan with fewer than two images."""
    if len(rows) < 2:
        return np.full(len(rows[0]), np.nan)
    return np.array([distance(*(np.stack([row[seed][side] for row in rows]) for side in (0, 1))) for seed in range(len(rows[0]))])


def _spread(run: _Run, scene: Scene, column: str) -> float:
    """Standard deviation over the seeds (n - 1), per pixel and channel, averaged over the image; 0..255 scale."""
    files = [_File(path) for path in scene.restored[column]]
    key = Key(hashlib.sha256("".join(f.digest for f in files).encode()).hexdigest(), "", PIXEL_STD, __version__)
    if key not in run.store:
        started = time.perf_counter()
        deviation = torch.cat([f.tensor("cpu") for f in files]).double().std(dim=0).mean().item() * 255
        run.store.put(key, deviation, time.perf_counter() - started)
    return float(run.store.value(key))


def _key(run: _Run, metric: str, file: _File, against: _File | None) -> Key:
    return Key(file.digest, against.digest if against else "", metric, f"{__version__}: {run.conventions[metric]}")
