"""Seeing a run: one progress bar, the tracker, the history file and the log. Only the main process shows or writes anything."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from sslsr_diffusion.training.plots import picture_grid
from sslsr_diffusion.training.run_folder import RunFolder
from sslsr_diffusion.training.session import Session, StepReport
from sslsr_diffusion.training.settings import TrainingSettings
from sslsr_diffusion.training.validation import ValidationResult

logger = logging.getLogger(__name__)


class Reporter:
    """Collects step reports and shows their means every `log_every` steps."""

    def __init__(self, session: Session, folder: RunFolder, settings: TrainingSettings, *, resumed: Path | None) -> None:
        self.session, self.folder, self.settings = session, folder, settings
        self._rows: list[dict[str, float]] = []
        self._began = time.perf_counter()
        self._bar: Any = None
        self._full = False
        if session.main:
            from tqdm import tqdm

            self._handlers = [folder.log_to_file()]
            self._bar = tqdm(total=settings.steps, initial=session.progress.step, desc="train", unit="step", dynamic_ncols=True)
            self._handlers.append(_AboveTheBar(self._bar))
            logging.getLogger("sslsr_diffusion").addHandler(self._handlers[-1])
        step = session.progress.step
        session.accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": {"purge_step": step + 1}} if step else {})
        logger.info("%s at step %d of %d", f"resumed from {resumed}" if resumed else "started", step, settings.steps)

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
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
        if step % self.settings.log_every and step != self.settings.steps:
            return
        values = _means(self._rows)
        self._rows = []
        values |= {"train/lr": self.session.learning_rate(), "train/seconds_per_step": self._seconds_per_step()}
        values |= {f"train/auto_weight/{name}": auto.value for name, auto in self.session.auto.items()}
        values["train/skipped"] = float(self.session.progress.skipped)
        self._write_down(step, values)
        terms = {key.removeprefix("loss/"): f"{value:.3g}" for key, value in values.items() if key.startswith("loss/")}
        self._bar.set_postfix({**terms, "lr": f"{values['train/lr']:.1e}"}, refresh=False)
        logger.info("step %d  %s", step, "  ".join(f"{key} {value:.4g}" for key, value in values.items()))

    def validated(self, result: ValidationResult) -> None:
        """A validation pass is over: numbers and the grid to tracker, history and disk."""
        if self._bar is None:
            return
        step = self.session.progress.step
        values = {f"validation/{name}": value for name, value in result.values.items()}
        baseline = {f"validation_bicubic/{name}": value for name, value in result.bicubic.items()}
        self._write_down(step, {**values, **baseline})
        self.say("validation  " + "  ".join(f"{n} {v:.4g} (bicubic {result.bicubic[n]:.4g})" for n, v in result.values.items()))
        if not result.rows:
            return
        from PIL import Image

        grid = picture_grid(result.rows, result.captions)
        with self._disk():
            Image.fromarray(grid).save(self.folder.pictures / f"step-{step:06d}.png")
        for tracker in self.session.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.writer.add_image("validation", grid, step, dataformats="HWC")
            elif hasattr(tracker, "log_images"):
                tracker.log_images({"validation": np.asarray(grid)[None]}, step=step)

    def _write_down(self, step: int, values: dict[str, float]) -> None:
        with self._disk():
            self.folder.append_history({"step": step, **values})
        with self._disk():
            self.session.accelerator.log(values, step=step)

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        """A full disk costs lines and pictures, never the run; it is said once."""
        try:
            yield
        except OSError as error:
            if not self._full:
                logger.warning(
                    "step %d: history or pictures could not be written (%s); training goes on", self.session.progress.step, error
                )
            self._full = True

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

    def _seconds_per_step(self) -> float:
        """Over the steps since the last line, validation and checkpoints included: what the clock on the wall says."""
        now = time.perf_counter()
        steps = self.session.progress.step % self.settings.log_every or self.settings.log_every
        seconds, self._began = (now - self._began) / steps, now
        return seconds


def _means(rows: list[dict[str, float]]) -> dict[str, float]:
    return {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]} if rows else {}


class _AboveTheBar(logging.Handler):
    """Warnings of the loop, the checkpoints and the hub on the terminal too; pictures are summed up at the end."""

    def __init__(self, bar: Any) -> None:
        super().__init__(logging.WARNING)
        self._bar = bar

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.startswith("sslsr_diffusion.training.") and record.name != __name__:
            with contextlib.suppress(OSError):  # a terminal that has gone is no reason to stop
                self._bar.write(self.format(record), file=sys.stderr)
