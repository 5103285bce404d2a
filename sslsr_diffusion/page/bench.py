"""Where the page's models run: one is open, one job runs, and a job can be stopped between any two layers of its networks."""

import contextlib
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import Any

from sslsr_diffusion.errors import MissingDependency, UserError
from sslsr_diffusion.hub import WEIGHTS
from sslsr_diffusion.images import MAX_PIXELS, size_of
from sslsr_diffusion.inference.open import RESULT, FoundModel, describe_model, find_model, glance, open_model
from sslsr_diffusion.inference.progress import Told, listening
from sslsr_diffusion.inference.restorer import Described, Restorer
from sslsr_diffusion.inference.runner import RunnerOptions, Work, find_work, run_work


class Stopped(BaseException):
    """Somebody wants the job to end; no Exception, because the runner goes on with the next picture after one."""


@dataclass(frozen=True)
class Made:
    """What one model made of the pictures: input -> result, and sentences about them."""

    model: str
    results: Mapping[Path, Path]
    said: tuple[str, ...]


@dataclass
class Bench:
    """`where`: device, dtype and memory_budget of every model, as `open_model` takes them."""

    where: Mapping[str, Any] = field(default_factory=dict)
    _open: tuple[FoundModel, Restorer] | None = None
    _described: dict[str, Described] = field(default_factory=dict)  # by fingerprint
    _reading: threading.Lock = field(default_factory=threading.Lock)  # of a model's files: building networks sets what all threads share
    _stop: threading.Event = field(default_factory=threading.Event)
    _owner: str | None = None  # session whose job runs
    _waiting: set[str] = field(default_factory=set)  # sessions that asked for a job whose turn has not come
    _withdrawn: set[str] = field(default_factory=set)  # those of them that want it no more

    def open(self, model: str) -> tuple[FoundModel, Restorer]:
        """A model, which takes the place of the one that was open before. Raises UserError."""
        found = find_model(model.strip())
        if self._open is None or self._open[0].fingerprint != found.fingerprint:
            self._open = None  # its memory, before another one is loaded
            with self._reading:
                self._open = found, open_model(found, **self.where)
        return self._open

    def describe(self, model: str) -> Described:
        """Which options a model has; its weights are not read, and the one that is open stays so. Raises UserError."""
        with glance(model.strip()) as found, self._reading:
            if found.fingerprint not in self._described:
                self._described[found.fingerprint] = describe_model(found)
            return self._described[found.fingerprint]

    def stop(self, owner: str | None = None) -> bool:
        """End the job of a session, or whichever runs; False where none of its jobs runs."""
        if self._owner is None or owner not in (None, self._owner):
            return False
        self._stop.set()
        return True

    def wait(self, owner: str) -> None:
        """A session asks for a job, whose turn comes later: until then it can be withdrawn."""
        self._waiting.add(owner)
        self._withdrawn.discard(owner)

    def withdraw(self, owner: str) -> bool:
        """A session wants its waiting job no more; False where none waits."""
        if owner not in self._waiting:
            return False
        self._withdrawn.add(owner)
        return True

    def upscale(
        self,
        pictures: Sequence[Path],
        models: Sequence[str],
        folder: Path,
        options: RunnerOptions,
        *,
        owner: str = "",
        progress: Told = lambda share, text: None,
    ) -> list[Made]:
        """Every picture by every model, into a new folder per model below `folder`; what a model lacks among the options is not asked.

        A job that is stopped gives what was done by then, nothing where it was withdrawn; of several models, one that cannot be used does
        not stop the others.
        Raises UserError, MissingDependency: the only model or an option cannot be used.
        """
        self._waiting.discard(owner)
        if owner in self._withdrawn:
            self._withdrawn.discard(owner)
            return []
        if not pictures:
            raise UserError("pictures: expected at least one, got none; drop some into the field.")
        if not models:
            raise UserError("models: expected at least one, got none; choose one in the list.")
        made: list[Made] = []
        with self._job(owner):
            for number, model in enumerate(models):
                bar = _Bar(progress, model, number, len(models))
                progress(bar.share(0), f"opening {model}")
                work = None
                label = label_of(model) if len(models) > 1 else ""
                try:
                    found, restorer = self.open(model)
                    call = {name: value for name, value in options.call.items() if name in restorer.options}
                    work = find_work(pictures, folder / f"{number + 1}", replace(options, call=call, model=found.fingerprint))
                    bar.large = _large(work, restorer.scale)
                    with listening(bar.within):
                        run_work(restorer, work, progress=bar.picture)
                except Stopped:
                    made.append(_made(model, work, label, stopped=True))
                    break
                except (UserError, MissingDependency) as error:
                    if len(models) == 1:
                        raise
                    made.append(Made(model, {}, (str(error),)))
                else:
                    made.append(_made(model, work, label))
        return made

    @contextlib.contextmanager
    def _job(self, owner: str) -> Iterator[None]:
        """The networks' layers ask in this thread whether to go on."""
        from torch.nn.modules.module import register_module_forward_pre_hook

        here = threading.get_ident()

        def ask(*_: object) -> None:
            if self._stop.is_set() and threading.get_ident() == here:
                raise Stopped

        self._stop.clear()
        self._owner = owner
        hook = register_module_forward_pre_hook(ask)
        try:
            yield
        finally:
            hook.remove()
            self._owner = None
            self._waiting.discard(owner)  # of a click that came while it ran


@dataclass
class _Bar:
    """How far one of several models is, told before each picture and each part of one."""

    progress: Told
    model: str
    number: int
    models: int
    done: int = 0
    total: int = 1
    large: Mapping[str, str] = field(default_factory=dict)  # name of a picture that takes long -> what to say about it

    def share(self, pictures: float) -> float:
        return (self.number + pictures / max(1, self.total)) / self.models

    def picture(self, done: int, total: int, name: str) -> None:
        self.done, self.total = done, total
        if name:
            self.progress(self.share(done), f"{self.model}: {name}, {done + 1} of {total}{self.large.get(name, '')}")

    def within(self, share: float, text: str) -> None:
        self.progress(self.share(self.done + share), f"{self.model}: picture {self.done + 1} of {self.total}, {text}")


def _large(work: Work, scale: float) -> dict[str, str]:
    """Of results that are too large to be shown: how large, before they are begun."""
    found = {}
    for item in work.todo:
        width, height = size_of(item.source) or (0, 0)
        pixels = width * height * work.options.scale_of((height, width), scale) ** 2 if width else 0
        if pixels > MAX_PIXELS:
            found[item.name] = f"; its result has {pixels / 1e6:.0f} megapixels, which takes long and is not shown, only given to download"
    return found


def _made(model: str, work: Work | None, label: str, stopped: bool = False) -> Made:
    """`label`: stands behind the names of the results, where it is not empty."""
    if work is None:
        return Made(model, {}, (f"{model}: stopped while it was opened",))
    report = work.report
    said = [f"{model}: {len(report.done)} of {len(work.todo)} done" + (", stopped" if stopped else "")]
    said += [f"{name or model}: {note}" for name, note in report.notes]
    said += [f"{name} failed: {reason}" for name, reason in report.failed]
    results = {item.source: work.output / item.target for item in work.todo}  # names may repeat: files tell what was done
    results = {source: result for source, result in results.items() if result.is_file()}
    if label:
        (work.output / label).mkdir()  # where no new name is another result's old one
        for source, result in results.items():
            results[source] = result.rename(work.output / label / f"{result.stem}_{label}{result.suffix}")
    return Made(model, results, tuple(said))


def label_of(model: str) -> str:
    """`mine` of runs/mine/pipeline, `net` of owner/name#folder/net.pth: what a file's name can hold."""
    path = PurePath(model.strip())
    name = path.parent.name if path.name == RESULT else path.stem if path.suffix in WEIGHTS else path.name
    return re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII)[:40] or "model"
