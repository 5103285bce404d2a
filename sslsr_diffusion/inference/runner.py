"""Upscale files, folders and patterns: every good picture is done, every bad one named, nothing else touched."""

import glob as globbing
import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.images import SUFFIXES, Image, OpenPicture, format_of, list_images, printable, suffixes_of, write_strips
from sslsr_diffusion.inference.record import RECORD_NAME, Record, sha256
from sslsr_diffusion.inference.restorer import Restorer
from sslsr_diffusion.inference.strips import upscaled

log = logging.getLogger(__name__)

MAX_PIXELS = 1_000_000_000
Progress = Callable[[int, int, str], None]  # done so far, total, name of the next picture ("" at the end)


@dataclass(frozen=True)
class RunnerOptions:
    """How the pictures of one run are made and stored."""

    scale: float | None = None  # output pixels per input pixel; None: the restorer's own
    seed: int = 0  # of every picture: a result depends on the picture and the settings, not on its neighbours
    call: Mapping[str, Any] = field(default_factory=dict)  # further arguments of the restorer: num_inference_steps, tile, color_fix, ...
    format: str | None = None  # a value of FORMATS; None: the input's, PNG where that cannot be written
    quality: int = 95  # 1 to 100, JPEG and WebP
    overwrite: bool = False  # do again what is done, and replace files that we did not write
    replace_own: bool = False  # do again what this command has made of another picture
    max_pixels: int = MAX_PIXELS  # a larger picture is refused: a few bytes may claim to be a picture that never ends
    model: str = ""  # fingerprint of the model: another one means other settings
    box: tuple[int, int] | None = None  # width, height: each result as large as fits into it, in the place of `scale`

    def scale_of(self, size: tuple[int, int], own: float) -> float:
        """Output pixels per pixel of an input of `size` (H, W), for a restorer whose own scale is `own`."""
        if self.box is not None:
            return min(self.box[0] / size[1], self.box[1] / size[0])
        return own if self.scale is None else self.scale

    @property
    def digest(self) -> str:
        call = {name: value for name, value in self.call.items() if name != "memory_budget"}  # how, not what
        kept = {"scale": self.scale, "seed": self.seed, "call": call, "quality": self.quality, "model": self.model, "box": self.box}
        return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Picture:
    """One picture to be made."""

    source: Path
    name: str  # printable, relative to the input folder
    target: Path  # relative to the output folder
    format: str


@dataclass
class RunnerReport:
    """What became of the pictures, by their printable names."""

    done: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)  # name, reason
    renamed: list[tuple[str, str]] = field(default_factory=list)  # name, output: another picture had taken its name
    replaced: list[str] = field(default_factory=list)  # of those to be made: a result, of other settings for example, is there already
    notes: list[tuple[str, str]] = field(default_factory=list)  # name ("": of every picture), what could not be kept or had no effect


@dataclass
class Work:
    """The work of one call: what is to be made, and what is already known about the rest."""

    output: Path
    options: RunnerOptions
    todo: list[Picture]
    report: RunnerReport
    record: Record


def find_work(inputs: str | Path | Sequence[str | Path], output_dir: str | Path, options: RunnerOptions) -> Work:
    """Decide what is to be made under which name of `inputs` (file, folder or glob pattern, or several), sub-folders kept.

    Opens the output folder, reads no picture whole. UserError: nothing to read, nowhere to write, or both are the same folder.
    """
    output = Path(output_dir).expanduser()
    sources = [inputs] if isinstance(inputs, str | Path) else list(inputs)
    try:
        found = [entry for source in sources for entry in _find(source, output)]
    except (OSError, ValueError) as error:  # a name too long for the file system, for example
        raise UserError(f"--input {', '.join(printable(str(s))[:200] for s in sources)}: cannot be read ({error}).") from None
    if not found:
        raise UserError(f"--input {', '.join(printable(str(s)) for s in sources)}: no pictures there.")
    work = Work(output, options, [], RunnerReport(), _open_output(output))
    root, originals = output.resolve(), {path.resolve() for path, _ in found}
    for item, relative in _items(found, options, work.record):
        if item.target != _plain_target(relative, item.format):
            work.report.renamed.append((item.name, printable(item.target)))
        reason = _obstacle(item, root, originals, work)
        if reason is None:
            work.todo.append(item)
            if (output / item.target).exists():
                work.report.replaced.append(item.name)
        elif reason:
            work.report.failed.append((item.name, reason))
        else:
            work.report.skipped.append(item.name)
    return work


def _find(source: str | Path, output: Path) -> list[tuple[Path, Path]]:
    """(file, path relative to the input folder); former outputs below the input folder are never read again."""
    path, resolved = Path(source).expanduser(), output.resolve()
    root = path if path.is_dir() else path.parent if path.exists() else _fixed_part(path)
    if root.resolve() == resolved:
        raise UserError(f"--output {printable(output)}: is the folder of the input pictures; choose another one, they would be replaced.")
    files = list_images(source, skip_folder=lambda folder: folder.resolve() == resolved or (folder / RECORD_NAME).exists(), unread=True)
    return [(file, file.relative_to(root)) for file in files]


def _fixed_part(pattern: Path) -> Path:
    """The folder of a glob pattern before its first wildcard."""
    return Path(*itertools.takewhile(lambda part: not globbing.has_magic(part), pattern.parts[:-1]))


def _open_output(output: Path) -> Record:
    try:
        output.mkdir(parents=True, exist_ok=True)
        record = Record(output)
        record.file.touch()
    except OSError as error:
        raise UserError(f"--output {printable(output)}: cannot be written ({error.strerror}); choose another folder.") from None
    return record


def _plain_target(relative: Path, format: str) -> Path:
    suffix = relative.suffix if relative.suffix.lower() in suffixes_of(format) else SUFFIXES[format]
    return relative.with_name(relative.name.removesuffix(relative.suffix) + suffix)


def _items(found: Sequence[tuple[Path, Path]], options: RunnerOptions, record: Record) -> list[tuple[Picture, Path]]:
    """The items in the order of `found`, with their relative paths.

    Of several pictures that want one output name, it goes to the one whose result is there already, else to the one that has the name
    itself: a picture that comes later does not change its neighbours' names.
    """

    def claim(place: int) -> tuple[int, int]:
        path, relative = found[place]
        target = _plain_target(relative, _format(path, options))
        return (0 if record.source(target.as_posix()) == str(path.resolve()) else 1 if target == relative else 2), place

    taken: set[Path] = set()
    made = {place: (_item(*found[place], options, taken), found[place][1]) for place in sorted(range(len(found)), key=claim)}
    return [made[place] for place in range(len(found))]


def _format(path: Path, options: RunnerOptions) -> str:
    format = options.format or format_of(path)
    return format if format in SUFFIXES else "PNG"


def _item(path: Path, relative: Path, options: RunnerOptions, taken: set[Path]) -> Picture:
    format = _format(path, options)
    target = _plain_target(relative, format)
    number = 0
    while target in taken:
        target = relative.with_name(relative.name + (f".{number}" if number else "") + SUFFIXES[format])
        number += 1
    taken.add(target)
    return Picture(path, printable(relative), target, format)


def _obstacle(item: Picture, root: Path, originals: set[Path], work: Work) -> str | None:
    """None: to be made; "": already done; else the reason why it must not be made."""
    target = work.output / item.target
    try:
        if root not in target.parent.resolve().joinpath("x").parents:
            return "its folder in the output is a link that leads out of it"
        if target.resolve() in originals:
            return "its output would replace an input picture; choose another --output"
        if work.options.overwrite or not target.exists():
            return None
        key = item.target.as_posix()
        if not work.record.knows(key):
            return f"{printable(item.target)} is already there and was not made by this command; --overwrite replaces it"
        if work.record.is_done(key, work.options.digest, item.source, target):
            return ""
        made_from = work.record.source(key)
        if made_from != str(item.source.resolve()) and not work.options.replace_own:
            other = printable(made_from or "unknown")
            return f"{printable(item.target)} is the result of another picture ({other}); choose another --output, or --overwrite"
        return None
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def run_work(restorer: Restorer, work: Work, *, progress: Progress | None = None) -> RunnerReport:
    """Make the pictures of some work, one after the other; one bad picture raises nothing.

    `progress` is called before each picture and at the end. UserError where the restorer refuses the options, whatever the picture.
    """
    report, total = work.report, len(work.todo)
    report.notes.extend(("", note) for note in restorer.check(**work.options.call))
    options = replace(work.options, call={name: value for name, value in work.options.call.items() if name in restorer.options})
    for position, item in enumerate(work.todo):
        if progress:
            progress(position, total, item.name)
        try:
            notes = _make(restorer, item, work, options)
        except Exception as error:  # whatever a picture does to the libraries, its neighbours are done
            log.debug("%s failed", item.name, exc_info=True)
            report.failed.append((item.name, _reason(error, item)))
            continue
        report.done.append(item.name)
        report.notes.extend((item.name, note) for note in notes)
    if progress:
        progress(total, total, "")
    return report


def _reason(error: Exception, item: Picture) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be written ({error.strerror})"
    from sslsr_diffusion.devices import is_out_of_memory

    if is_out_of_memory(error):
        return "out of memory; lower the scale, close other programs, or use another device"
    text = printable(str(error).strip().splitlines()[0]) if str(error).strip() else type(error).__name__
    return text.removeprefix(f"{printable(item.source.name)}: ")[:300]


def _make(restorer: Restorer, item: Picture, work: Work, options: RunnerOptions) -> tuple[str, ...]:
    key, target = item.target.as_posix(), work.output / item.target
    stat, input_hash = item.source.stat(), sha256(item.source)  # before the work: the file may be replaced meanwhile

    def opened() -> OpenPicture:
        return OpenPicture(item.source, max_pixels=options.max_pixels, advice="--max-megapixels lifts the limit")

    notes: dict[str, None] = {}
    picture = opened()
    scale = options.scale_of(picture.size, restorer.scale)
    made = _noted(upscaled(restorer, picture, opened, scale, seed=options.seed, call=options.call), notes)
    first = next(made)
    work.record.begin(key, item.source)
    target.parent.mkdir(parents=True, exist_ok=True)
    height, width = (max(1, round(scale * side)) for side in picture.size)
    written = write_strips(target, itertools.chain([first], made), (height, width), format=item.format, quality=work.options.quality)
    work.record.finish(key, work.options.digest, item.source, input_hash, stat, target.stat().st_size)
    return (*notes, *written)


def _noted(strips: Iterator[Image], notes: dict[str, None]) -> Iterator[Image]:
    """The strips, whose notes are kept, each once."""
    for strip in strips:
        notes.update(dict.fromkeys(strip.notes))
        yield strip
