"""Reading a data set before training on it: what is there, what is not usable, what is there twice."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from sslsr_diffusion.data.opencv import opencv
from sslsr_diffusion.data.preparation import crop_places
from sslsr_diffusion.errors import UserError
from sslsr_diffusion.images import printable, read_image, to_tensor
from sslsr_diffusion.ops.edge_mask import laplacian_edge_mask


@dataclass(frozen=True)
class Finding:
    """One file."""

    name: str
    size: tuple[int, int] = (0, 0)  # (H, W)
    format: str = ""
    bits: int = 8
    digest: str = ""  # of the pixels
    density: float = 0.0  # share of edge pixels
    crops: int = 0
    problem: str = ""


def look_all(paths: Sequence[Path], *, crop_size: int, processes: int) -> Iterator[Finding]:
    """A Finding for every path, in order."""
    one = partial(look, crop_size=crop_size)
    if processes <= 1:
        yield from map(one, paths)
        return
    opencv()
    with ProcessPoolExecutor(processes) as pool:
        yield from pool.map(one, paths, chunksize=4)


def look(path: Path, *, crop_size: int) -> Finding:
    """Decode one file whole and measure it."""
    name = printable(path)
    try:
        image = read_image(path, name=name)
    except UserError as error:
        return Finding(name, problem=str(error))
    height, width = image.size
    density = float(laplacian_edge_mask(to_tensor(image.rgb)[None]).float().mean())
    count = len(crop_places(height, width, crop_size, max(1, crop_size // 2))) if min(height, width) >= crop_size else 0
    digest = hashlib.blake2b(np.ascontiguousarray(image.rgb).tobytes(), digest_size=16).hexdigest() + f"{height}x{width}"
    return Finding(name, image.size, image.format, image.bits, digest, density, count)


def report(findings: Iterable[Finding], crop_size: int) -> list[str]:
    """The findings as lines of text: numbers first, then every file that needs attention."""
    found = list(findings)
    good = [f for f in found if not f.problem]
    bad = [f for f in found if f.problem]
    lines = [f"{len(found)} files, {len(good)} readable, {len(bad)} not"]
    if good:
        kinds = Counter(f"{f.format} {f.bits} bit" for f in good)
        lines.append("formats: " + ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common()))
        sides = sorted(min(f.size) for f in good)
        longest = max(max(f.size) for f in good)
        lines.append(f"shorter side: {sides[0]} to {sides[-1]} pixels, median {sides[len(sides) // 2]}; longest side {longest}")
        densities = np.array([f.density for f in good])
        quantiles = ", ".join(f"{q:.1%}" for q in np.quantile(densities, [0, 0.5, 1]))
        lines.append(f"edge mask density (least, median, most): {quantiles}; {int((densities < 1e-4).sum())} files with hardly an edge")
        lines.append(f"crops of {crop_size} with half overlap: about {sum(f.crops for f in good)}")
    small = [f for f in good if min(f.size) < crop_size]
    lines += [f"unreadable: {f.problem}" for f in bad]
    lines += [f"smaller than the crop of {crop_size}: {f.name} ({f.size[1]}x{f.size[0]})" for f in small]
    first: dict[str, str] = {}
    for f in good:
        if f.digest in first:
            lines.append(f"same pixels twice: {f.name} and {first[f.digest]}")
        first.setdefault(f.digest, f.name)
    return lines
