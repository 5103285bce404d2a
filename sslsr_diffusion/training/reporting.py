"""Seeing a run: one progress bar, the tracker, the history file and the log. Only the main process shows or writes anything."""

import contextlib
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from sslsr_diffusion.images import to_array
from sslsr_diffusion.training.run_folder import PICTURES, RunFolder
from sslsr_diffusion.training.session import Session, StepReport
from sslsr_diffusion.training.settings import TrainingSettings
from sslsr_diffusion.training.validation import ValidationResult

logger = logging.getLogger(__name__)

_BAR = 18  # pixels of caption above each picture
_GAP = 4
_INK = "#808080"  # of the curves' axes and words: as far from white as from black
_LINE = "#2f87d0"  # of the curves
_LOOK: dict[str, Any] = {f"{part}color": _INK for part in ("text.", "axes.label", "axes.edge", "xtick.", "ytick.")}
_LOOK |= {"savefig.transparent": True, "legend.framealpha": 0.0, "axes.prop_cycle": f"cycler('color', ['{_LINE}'])"}
_LOOK |= {"font.size": 9.0, "axes.labelsize": 9.0, "legend.fontsize": 9.0}  # a page may show the figure at half its size
_TIMED = 10  # steps after which there is a forecast; the first, in which kernels are made, is not in it
_NO_NUMBER = (1.0, 0.0, 1.0)  # the colour of pixels that are none


class Reporter:
    """Collects step reports and shows their means every `log_every` steps."""

    def __init__(self, session: Session, folder: RunFolder, settings: TrainingSettings, *, resumed: Path | None) -> None:
        self.session, self.folder, self.settings = session, folder, settings
        self._rows: list[dict[str, float]] = []
        self._began = time.perf_counter()
        self._bar: Any = None
        self._said = False
        self._first = (session.progress.step + 1, 0.0)  # of this call's steps, and the seconds of the run when it was done
        if session.main:
            from tqdm import tqdm

            self._handlers = [folder.log_to_file()]
            self._bar = tqdm(total=settings.steps, initial=session.progress.step, desc="train", unit="step", dynamic_ncols=True)
            self._handlers.append(_AboveTheBar(self._bar))
            logging.getLogger("sslsr_diffusion").addHandler(self._handlers[-1])
        step = session.progress.step
        session.accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": {"purge_step": step + 1}} if step else {})
        logger.info("%s at step %d of %d", f"resumed from {resumed}" if resumed else "started", step, settings.steps)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._bar is not None:
            self._bar.close()
            if error is not None:
                logger.error("ended by %s: %s", type(error).__name__, error)
            for handler in self._handlers:
                logging.getLogger("sslsr_diffusion").removeHandler(handler)
                handler.close()

    def step(self, report: StepReport) -> None:
        """One optimizer step happened."""
        if self._bar is None:
            return
        if report.updated:
            self._rows.append(report.values())
        self._bar.update(1)
        step = self.session.progress.step
        self._forecast(step, self.session.progress.seconds)
        if step % self.settings.log_every and step != self.settings.steps:
            return
        rows, self._rows = self._rows, []
        found = {key: [row[key] for row in rows if key in row] for row in rows for key in row}  # some are of every other step alone
        values = {key: sum(numbers) / len(numbers) for key, numbers in found.items()}
        began, self._began = self._began, time.perf_counter()  # validation and checkpoints included: what the clock on the wall says
        seconds = (self._began - began) / (step % self.settings.log_every or self.settings.log_every)
        values |= {"train/lr": self.session.learning_rate(), "train/seconds_per_step": seconds}
        values |= {f"train/auto_weight/{name}": auto.value for name, auto in self.session.auto.items()}
        values["train/skipped"] = float(self.session.progress.skipped)
        self._write_down(step, values)
        terms = {key.removeprefix("loss/"): f"{value:.3g}" for key, value in values.items() if key.startswith("loss/")}
        self._bar.set_postfix({**terms, "lr": f"{values['train/lr']:.1e}"}, refresh=False)
        logger.info("step %d  %s", step, "  ".join(f"{key} {value:.4g}" for key, value in values.items()))

    def _forecast(self, step: int, seconds: float) -> None:
        """After ten steps, how long the run will take; `seconds` were spent in steps so far."""
        first, began = self._first
        if step == first:
            self._first = (step, seconds)
        left = self.settings.steps - step
        if step == first + _TIMED - 1 and left:
            each = (seconds - began) / (_TIMED - 1)
            self.say(f"{each:.3g} s per step, {_duration(each * left)} for the {left} to come; validation and checkpoints come on top")

    def validated(self, result: ValidationResult) -> None:
        """A validation pass is over: numbers and the grid to tracker, history and disk."""
        if self._bar is None:
            return
        step, base = self.session.progress.step, self.session.progress.looks.base
        values = {f"validation/{name}": value for name, value in result.values.items()}
        baseline = {f"validation_bicubic/{name}": value for name, value in result.bicubic.items()}
        self._write_down(step, {**values, **baseline}, {PICTURES: result.deciding})
        before = {name: f", before training {value:.4g}" for name, value in base.items() if step}
        told = (f"{n} {v:.4g} (bicubic {result.bicubic[n]:.4g}{before.get(n, '')})" for n, v in result.values.items())
        self.say("  ".join([f"validation{'' if step else ' before training'}", *told]))
        if not step:
            self._began = time.perf_counter()  # this pass is not a part of any step's time
        if not result.rows:
            return
        from PIL import Image

        grid = picture_grid(result.rows, result.captions)
        with self._beside_the_run():
            Image.fromarray(grid).save(self.folder.pictures / f"step-{step:06d}.png")
        for tracker in self.session.accelerator.trackers:
            with self._beside_the_run():
                if tracker.name == "tensorboard":
                    tracker.writer.add_image("validation", grid, step, dataformats="HWC")
                elif hasattr(tracker, "log_images"):
                    tracker.log_images({"validation": np.asarray(grid)[None]}, step=step)

    def base_again(self, base: Mapping[str, float]) -> None:
        """Row 0 of a run that goes on without the history of its first part."""
        self._write_down(0, {f"validation/{name}": value for name, value in base.items()})

    def _write_down(self, step: int, values: dict[str, float], more: Mapping[str, object] = MappingProxyType({})) -> None:
        """`more`: for the history alone."""
        with self._beside_the_run():
            self.folder.append_history({"step": step, **values, **more})
        with self._beside_the_run():
            self.session.accelerator.log(values, step=step)

    @contextlib.contextmanager
    def _beside_the_run(self) -> Iterator[None]:
        """A full disk, or a tracker whose service has gone, costs lines and pictures, never the run; it is said once."""
        try:
            yield
        except Exception as error:
            if not self._said:
                what = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
                logger.warning("step %d: history or pictures could not be written (%s); training goes on", self.session.progress.step, what)
            self._said = True

    def say(self, text: str) -> None:
        """A line above the progress bar and in the log."""
        if self._bar is not None:
            self._bar.write(f"step {self.session.progress.step}: {text}")
            logger.info("step %d: %s", self.session.progress.step, text)

    def problems(self, problems: list[str]) -> None:
        """The summary of unreadable or too small training pictures."""
        if self._bar is not None and problems:
            unique = list(dict.fromkeys(problems))
            logger.warning("%d training pictures could not be used: %s", len(unique), "; ".join(unique[:20]))


def _duration(seconds: float) -> str:
    """45 s, 12 min, 3 h 20 min, 2 d 5 h"""
    days, hours, minutes = (int(seconds // unit) for unit in (86400, 3600, 60))
    if days:
        return f"{days} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min" if minutes else f"{seconds:.0f} s"


class _AboveTheBar(logging.Handler):
    """Warnings of the loop, the checkpoints and the hub on the terminal too; pictures are summed up at the end."""

    def __init__(self, bar: Any) -> None:
        super().__init__(logging.WARNING)
        self._bar = bar

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.startswith("sslsr_diffusion.training.") and record.name != __name__:
            with contextlib.suppress(OSError):  # a terminal that has gone is no reason to stop
                self._bar.write(self.format(record), file=sys.stderr)


def picture_grid(rows: Sequence[Sequence[Tensor]], captions: Sequence[Sequence[str]]) -> np.ndarray:
    """Rows of equally large pictures [3, H, W] in about [0, 1] (clamped here), each below its caption, as [H_all, W_all, 3] uint8."""
    from PIL import Image, ImageDraw

    cell_h = max(p.shape[-2] for row in rows for p in row) + _BAR + _GAP
    cell_w = max(p.shape[-1] for row in rows for p in row) + _GAP
    sheet = Image.new("RGB", (cell_w * max(len(r) for r in rows) + _GAP, cell_h * len(rows) + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for y, (row, names) in enumerate(zip(rows, captions)):
        for x, (picture, name) in enumerate(zip(row, names)):
            left, top = x * cell_w + _GAP, y * cell_h + _GAP
            draw.text((left, top + 2), name, fill="black")
            sheet.paste(Image.fromarray(to_array(_with_numbers(picture.float().cpu()))), (left, top + _BAR))
    return np.asarray(sheet)


def _with_numbers(picture: Tensor) -> Tensor:
    """[3, H, W] with pixels that are no numbers in a colour of their own."""
    return torch.where(picture.isfinite().all(dim=0), picture, torch.tensor(_NO_NUMBER)[:, None, None])


def plot_losses(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One panel per raw loss term and validation metric over the optimizer steps, to be read on white and on black."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogFormatter

    series: dict[str, tuple[list[int], list[float]]] = {}
    for row in history:
        for key, value in row.items():
            if key.startswith(("loss/", "validation/")) and isinstance(value, int | float):
                steps, values = series.setdefault(key, ([], []))
                steps.append(int(row["step"]))
                values.append(float(value))
    if not series:
        return
    with matplotlib.rc_context(_LOOK):
        figure, axes = plt.subplots(len(series), 1, figsize=(6.4, 1.9 * len(series)), sharex=True, squeeze=False)
        for axis, (key, (steps, values)) in zip(axes[:, 0], series.items()):
            axis.plot(steps, values, linewidth=1, marker="." if len(steps) < 60 else None)
            if steps[0] == 0:  # a validation metric's
                axis.axhline(values[0], linewidth=1, linestyle="--", color=_INK, label="before training")
                axis.legend()
            axis.set_ylabel(key.split("/", 1)[1])
            axis.grid(alpha=0.3)
            if key.startswith("loss/") and max(values) >= 10 * min(values) > 0:  # of less than a decade the labels would repeat
                axis.set_yscale("log")
                axis.yaxis.set_major_formatter(LogFormatter())
                axis.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.4)))
        axes[-1, 0].set_xlabel("optimizer step")
        figure.tight_layout(rect=(0, 0, 1, 1 - 0.15 / len(series)))  # a page's buttons lie over the upper edge
        figure.savefig(path, dpi=160)
        plt.close(figure)
