"""Which restored image belongs to which reference: by name, in every column, with what is missing said aloud."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.images import list_images, printable, size_of
from sslsr_diffusion.partners import partners

SHOWN = 5


@dataclass(frozen=True)
class Scene:
    """One scene: for each column the file of every seed, and what they are compared with."""

    name: str
    restored: dict[str, tuple[Path, ...]]
    reference: Path | None = None
    lr: Path | None = None


@dataclass(frozen=True)
class Pairing:
    scenes: tuple[Scene, ...]
    problems: tuple[str, ...]  # files that have no partner, one sentence each


def pair_files(
    columns: Mapping[str, Sequence[Path]], reference: Path | None = None, lr: Path | None = None, *, suffix: str = ""
) -> Pairing:
    """Scenes that every column (and the reference, if any) has; a restored file is named reference stem + suffix, any extension,
    or differs from the reference by what the usual sets add (`partners`).

    Args:
        columns: name -> one folder (or file, or pattern) per seed of that model.
        reference: folder of ground truths; None leaves only metrics that need none.
        lr: folder of the low-resolution inputs, shown in the report; its files may be missing.
        suffix: what the restored files' stems have after the reference's.
    Raises UserError: two files of one folder share a stem, no scene is complete, or the sizes of a pair differ (both are named).
    """
    truths = by_stem(reference) if reference else None
    restored = {name: [_named_like(truths, by_stem(folder, suffix)) for folder in folders] for name, folders in columns.items()}
    inputs = _named_like(truths, by_stem(lr)) if lr else {}
    if truths and len(truths) == 1:  # one file against one file is a pair whatever the names are
        (stem,) = truths
        for seeds in restored.values():
            seeds[:] = [{stem: next(iter(files.values()))} if len(files) == 1 else files for files in seeds]
    sources = [(name, files) for name, seeds in restored.items() for files in seeds]
    sources += [("the reference", truths)] if truths is not None else []
    everything = sorted({stem for _, files in sources for stem in files})
    whole = [stem for stem in everything if all(stem in files for _, files in sources)]
    problems = [_missing(name, [stem for stem in everything if stem not in files]) for name, files in sources]
    if not whole:
        there = "; ".join(f"{name} has {_some(sorted(files)) or 'no image'}" for name, files in sources)
        hint = f" with {suffix!r} after the stem" if suffix else "; --suffix names what comes after the stem"
        raise UserError(f"no image is in every folder: {there}. Restored files are named like the reference{hint}.")
    scenes = tuple(
        Scene(stem, {c: tuple(files[stem] for files in seeds) for c, seeds in restored.items()}, (truths or {}).get(stem), inputs.get(stem))
        for stem in whole
    )
    _check_sizes(scenes)
    if lr:
        problems.append(_missing("the low-resolution folder", [scene.name for scene in scenes if scene.lr is None]))
    return Pairing(scenes, tuple(p for p in problems if p))


def _named_like(truths: Mapping[str, Path] | None, files: dict[str, Path]) -> dict[str, Path]:
    """The files by the names of their references, where they have one."""
    theirs = {name: truth for truth, name in partners(truths or (), files).items()}
    return {theirs.get(name, name): path for name, path in files.items()}


def by_stem(source: Path, suffix: str = "") -> dict[str, Path]:
    """Path below the folder without extension and suffix -> file. Files that lack the suffix are not the model's output."""
    found: dict[str, Path] = {}
    for path in list_images(source):
        inside = path.relative_to(source) if source.is_dir() else Path(path.name)
        stem = inside.with_suffix("").as_posix()
        if not stem.endswith(suffix):
            continue
        stem = stem.removesuffix(suffix)
        if stem in found:
            raise UserError(f"{printable(found[stem])} and {printable(path)} have the same stem; keep one of them in the folder.")
        found[stem] = path
    return found


def _check_sizes(scenes: Iterable[Scene]) -> None:
    wrong = []
    for scene in scenes:
        files = [path for paths in scene.restored.values() for path in paths]
        first = scene.reference or files[0]
        for path in files:
            a, b = size_of(path), size_of(first)
            if a and b and a != b:
                wrong.append(f"{printable(path)} is {a[0]} x {a[1]}, {printable(first)} is {b[0]} x {b[1]}")
    if wrong:
        more = f"; and {len(wrong) - SHOWN} more pairs" if len(wrong) > SHOWN else ""
        raise UserError(f"sizes differ: {'; '.join(wrong[:SHOWN])}{more}. Restored and reference images must have one size.")


def _missing(who: str, stems: Sequence[str]) -> str:
    return f"{who} has no file for {len(stems)} of the images: {_some(stems)}" if stems else ""


def _some(stems: Sequence[str]) -> str:
    return ", ".join(printable(s) for s in stems[:SHOWN]) + (f" and {len(stems) - SHOWN} more" if len(stems) > SHOWN else "")
