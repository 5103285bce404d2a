"""Reading a data set before training on it: what is there, what is not usable, what is there twice."""

import hashlib
import itertools
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sslsr_diffusion.config import parse
from sslsr_diffusion.data.masks import MaskFiles, make_mask
from sslsr_diffusion.data.preparation import crop_places
from sslsr_diffusion.data.sample_order import is_stream
from sslsr_diffusion.data.samples import check_pair, check_whole, patiently, read_latents
from sslsr_diffusion.data.settings import DataSettings, FolderSource, MaskSettings, RowSource, Source
from sslsr_diffusion.data.shards import reason
from sslsr_diffusion.data.sources import Columns, Item, load_rows, open_source, row_item
from sslsr_diffusion.errors import UserError
from sslsr_diffusion.images import IMAGE_SUFFIXES, list_images, printable, read_image, to_tensor
from sslsr_diffusion.seeding import sample_generator


class Finding(NamedTuple):
    """One picture, or one pair."""

    name: str
    size: tuple[int, int] = (0, 0)  # (H, W)
    format: str = ""
    bits: int = 8
    digest: str = ""  # of the pixels
    density: float = 0.0  # share of masked pixels
    crops: int = 0
    problem: str = ""


class Looker:
    """Decodes whole pictures and measures them; picklable. `settled`: the crop is a recipe's, so samples with latents must be as large."""

    def __init__(self, crop_size: int, scale: int, mask: MaskSettings, *, settled: bool = False) -> None:
        self.crop_size, self._scale, self._mask, self._settled = crop_size, scale, mask, settled
        self._files = MaskFiles(mask.folder) if mask.folder else None

    def __call__(self, item: Item | Finding) -> Finding:
        if isinstance(item, Finding):
            return item
        try:
            return patiently(lambda: self._look(item))
        except (UserError, OSError) as error:
            return Finding(item.name, problem=str(error))

    def _look(self, item: Item) -> Finding:
        image = read_image(item.hr, name=item.name)
        height, width = image.size
        if item.lr is not None:
            check_pair(item.name, image.size, read_image(item.lr, name=f"{item.name} (low-resolution partner)").size, self._scale)
        if item.latents is not None:
            read_latents(item.latents)
            if self._settled:
                check_whole(item, height, width, self.crop_size)
        if self._files is not None:
            density = float(self._files.read(item.name, item.file, (height, width)).mean())
        else:
            density = float(make_mask(to_tensor(image.visible)[None], self._mask, sample_generator(0, "check")).float().mean())
        size = self.crop_size
        count = len(crop_places(height, width, size, max(1, size // 2))) if min(height, width) >= size else 0
        digest = hashlib.blake2b(np.ascontiguousarray(image.rgb).tobytes(), digest_size=16).hexdigest() + f"{height}x{width}"
        return Finding(item.name, image.size, image.format, image.bits, digest, density, count)


def guess_source(path: str, *, kind: str | None = None, **columns: str | None) -> Source:
    """The source that a path given without a recipe means: its kind by its suffix or by what lies in it."""
    kind = kind or _kind(path)
    more = {name: value for name, value in columns.items() if value is not None and kind in ("hub", "parquet", "webdataset")}
    return parse(DataSettings, {"sources": [{"kind": kind, "path": path, **more}]}).sources[0]


def _kind(path: str) -> str:
    suffix = {".txt": "files", ".lst": "files", ".parquet": "parquet", ".tar": "webdataset"}.get(Path(path).suffix.lower())
    base = Path(path).expanduser()
    if suffix or not base.is_dir():
        return suffix or "folder"
    if (base / "hr").is_dir() and (base / "lr").is_dir():
        return "cfw" if (base / "latents").is_dir() else "pairs"
    for kind, pattern in (("parquet", "*.parquet"), ("webdataset", "*.tar")):
        if any(base.rglob(pattern)) and not list_images(base):
            return kind
    return "folder"


def contents(settings: Source) -> tuple[int | None, Iterator[Item | Finding]]:
    """How many items a source has (None: a stream) and all of them, those that cannot even be fetched as findings.
    Raises UserError: there is nothing to read.
    """
    if is_stream(settings):
        return None, _stream(settings)
    source = open_source(settings)
    lost = [Finding(text, problem=text) for text in [*source.lost, *_no_files(settings)]]

    def each() -> Iterator[Item | Finding]:
        yield from lost
        for position in range(len(source)):
            try:
                yield source.item(position)
            except OSError as error:
                yield Finding(f"{source.name}[{position}]", problem=f"{source.name}[{position}]: cannot be read ({reason(error)}).")

    return len(source) + len(lost), each()


def _no_files(settings: Source) -> list[str]:
    """What is named like a picture in a folder and is passed over in training, because no file is behind it."""
    if not isinstance(settings, FolderSource):
        return []
    folders = itertools.islice(os.walk(Path(settings.path).expanduser()), None if settings.recursive else 1)
    below = (Path(folder) / name for folder, _, names in folders for name in sorted(names))
    named = (path for path in below if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith("."))
    return [f"{printable(path)}: {'a link to nothing' if path.is_symlink() else 'no file'}." for path in named if not path.is_file()]


def _stream(settings: RowSource) -> Iterator[Item | Finding]:
    """A stream once from its start to its end, in its own order."""
    rows, lost = load_rows(settings, streaming=True)
    yield from (Finding(text, problem=text) for text in lost)
    number = 0
    try:
        for number, row in enumerate(rows, start=1):
            yield row_item(f"{settings.path}[{number - 1}]", row, Columns.of(settings))
    except Exception as error:  # network, decompression and parsing libraries raise errors of their own
        name = f"{settings.path}[{number}]"
        yield Finding(name, problem=f"{name}: the stream breaks off here ({reason(error)}).")


def report(findings: Sequence[Finding], crop_size: int) -> list[str]:
    """The findings as lines of text: numbers first, then everything that needs attention."""
    good = [f for f in findings if not f.problem]
    bad = [f for f in findings if f.problem]
    lines = [f"{len(findings)} pictures, {len(good)} usable, {len(bad)} not"]
    if good:
        kinds = Counter(f"{f.format} {f.bits} bit" for f in good)
        lines.append("formats: " + ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common()))
        sides = sorted(min(f.size) for f in good)
        longest = max(max(f.size) for f in good)
        lines.append(f"shorter side: {sides[0]} to {sides[-1]} pixels, median {sides[len(sides) // 2]}; longest side {longest}")
        shares = np.array([f.density for f in good])
        quantiles = ", ".join(f"{q:.1%}" for q in np.quantile(shares, [0, 0.5, 1]))
        lines.append(f"mask density (least, median, most): {quantiles}; {int((shares < 1e-4).sum())} pictures with hardly a masked pixel")
        lines.append(f"crops of {crop_size} with half overlap: about {sum(f.crops for f in good)}")
    small = [f for f in good if min(f.size) < crop_size]
    lines += [f"not usable: {f.problem}" for f in bad]
    lines += [f"smaller than the crop of {crop_size}: {f.name} ({f.size[1]}x{f.size[0]})" for f in small]
    first: dict[str, str] = {}
    for f in good:
        if f.digest in first:
            lines.append(f"same pixels twice: {f.name} and {first[f.digest]}")
        first.setdefault(f.digest, f.name)
    return lines
