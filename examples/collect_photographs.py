"""Collect freely licensed photographs for a model trained from scratch: Debian's wallpaper packages and scikit-image's sample data.

    python examples/collect_photographs.py --output photos --crops 256

writes photos/train, photos/validation, photos/SOURCES.md and, with --crops, photos/crops/train. Every picture of the table below was looked
at: photographs only, no drawings, renderings or gradients. Letters are rare in them, so `--pages` of text are drawn beside them.
`divide` shrinks photographs that are soft at full size, so that a pixel shows detail.
"""

from __future__ import annotations

import argparse
import bz2
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sslsr_diffusion.data import preparation
from sslsr_diffusion.errors import UserError
from sslsr_diffusion.images import read_image

SKIMAGE = "scikit-image"  # the Python package; every other name is a Debian package
CC_BY, CC_BY_SA, CC_BY_SA_3, CC0, PUBLIC = "CC BY 4.0", "CC BY-SA 4.0", "CC BY-SA 3.0", "CC0 1.0", "public domain"
GPL, LGPL, LGPL3 = "GPL-2+", "LGPL-2.1+", "LGPL-3"


@dataclass(frozen=True)
class Photograph:
    """One row of the table; `file` is relative to the package's folder of pictures."""

    name: str
    package: str
    file: str
    author: str
    licence: str
    divide: int = 1
    validation: bool = False


FOLDERS = {
    "lomiri-wallpapers-16.04": "usr/share/backgrounds",
    "lomiri-wallpapers-20.04": "usr/share/backgrounds",
    "mate-backgrounds": "usr/share/backgrounds/mate/nature",
    "plasma-workspace-wallpapers": "usr/share/wallpapers",
    "lxqt-themes": "usr/share/lxqt/wallpapers",
    "palapeli-data": "usr/share/palapeli/collection",
    "python3-sklearn": "usr/lib/python3/dist-packages/sklearn/datasets/images",
    "python3-scipy": "usr/lib/python3/dist-packages/scipy/misc",
}


def _lomiri(name: str, file: str, author: str, licence: str, divide: int = 1, validation: bool = False) -> Photograph:
    return Photograph(name, "lomiri-wallpapers-16.04", file, author, licence, divide, validation)


def _mate(name: str, file: str, author: str, divide: int = 1) -> Photograph:
    return Photograph(name, "mate-backgrounds", file, author, GPL, divide)


def _plasma(name: str, folder: str, author: str, divide: int = 1, validation: bool = False) -> Photograph:
    file = f"{folder}/contents/images/2560x1600.jpg"
    return Photograph(name, "plasma-workspace-wallpapers", file, author, LGPL3, divide, validation)


def _lxqt(name: str, file: str, divide: int = 1) -> Photograph:
    return Photograph(name, "lxqt-themes", file, "LXQt team", LGPL, divide)


def _palapeli(file: str, author: str, licence: str, validation: bool = False) -> Photograph:
    return Photograph(file.removesuffix(".jpg"), "palapeli-data", file, author, licence, validation=validation)


def _skimage(file: str, author: str, licence: str, validation: bool = False) -> Photograph:
    return Photograph("cat" if file == "chelsea.png" else Path(file).stem, SKIMAGE, file, author, licence, validation=validation)


PHOTOGRAPHS = (
    _lomiri("fig", "Picture_0B_by_freespace.jpg", 'Trevor "Freespace", 2018', CC_BY, validation=True),
    _lomiri("clock", "greentock_by_Peter_Nerlich.jpg", "Peter Nerlich, 2018", CC_BY_SA, 2, validation=True),
    _lomiri("dandelion", "seeding_by_Clements_Engelhardt.jpg", "Clemens Engelhardt, 2018", CC0, 2, validation=True),
    _skimage("chelsea.png", "Stefan van der Walt", CC0, validation=True),
    _palapeli("castle-maintenon.jpg", "Eric Pouhier", "GFDL", validation=True),
    _plasma("jetty", "ColdRipple", "Risto Saukonpää", validation=True),
    _plasma("moss", "OneStandsOut", "Risto Saukonpää", 2, validation=True),
    Photograph("raccoon", "python3-scipy", "face.dat", "public-domain-image.com", PUBLIC, validation=True),
    _lomiri("bridge", "Bridge_by_Sander_Klootwijk.jpg", "Sander Klootwijk, 2018", CC_BY_SA, 2),
    _lomiri("leaves", "Dragonfly_by_Bolly.jpg", '"Bolly", 2018', CC_BY_SA, 2),
    _lomiri("brushes", "Picture_1A_by_freespace.jpg", 'Trevor "Freespace", 2018', CC_BY),
    _lomiri("table", "Wine_by_Jakkub_Mede.jpg", "Jakub Mede, 2018", CC_BY, 2),
    _lomiri("mountains", "aitzgorri_by_Aitzol_Berasategi.jpg", "Aitzol Berasategi, 2018", CC_BY),
    _lomiri("window", "friends_by_Aitzol_Berasategi.jpg", "Aitzol Berasategi, 2018", CC_BY, 2),
    _lomiri("stream", "life_by_Aitzol_Berasategi.jpg", "Aitzol Berasategi, 2018", CC_BY),
    _lomiri("peaks", "picosdeeuropa_by_Aitzol_Berasategi.jpg", "Aitzol Berasategi, 2018", CC_BY),
    _lomiri("sunset", "sunset_by_Aitzol_Berasategi.jpg", "Aitzol Berasategi, 2018", CC_BY, 2),
    Photograph("nuthatch", "lomiri-wallpapers-20.04", "Kleiber_by_Lukas_Baubkus.jpg", "Lukas Baubkus, 2021", CC_BY_SA_3, 2),
    _mate("splash", "Aqua.jpg", "Charles Barbin, 2008", 2),
    _mate("leaf-veins", "Blinds.jpg", "Lennart Poettering and Andrea Cimitan, 2008", 2),
    _mate("dune", "Dune.jpg", "Marco Cogoni, 2007; Hylke Bons, 2008"),
    _mate("garden", "Garden.jpg", "Charles Barbin, 2008", 2),
    _mate("grass-blades", "GreenMeadow.jpg", "Timothy Schellhase, 2005; Lapo Calamandrei, 2008"),
    _mate("ladybird", "LadyBird.jpg", "Charles Barbin, 2008", 2),
    _mate("drops", "RainDrops.jpg", '"blackcombwhistler07", 2008', 2),
    _mate("seeds", "TwoWings.jpg", "Charles Barbin and Hylke Bons, 2008", 2),
    _mate("wood", "Wood.jpg", "Jean-François Fortin Tam, 2008", 2),
    _mate("yellow-flower", "YellowFlower.jpg", "Charles Barbin, 2008", 2),
    _plasma("planks", "BytheWater", "Maciej Wiklo", 2),
    _plasma("cups", "ColorfulCups", "Dmitri Popov", 2),
    _plasma("boats", "EveningGlow", "Ian Hex"),
    _plasma("fallen-leaf", "FallenLeaf", "Martin Klapetek"),
    _plasma("lattice", "Grey", "Sigi Sagi", 2),
    _plasma("kite", "Kite", "Risto Saukonpää", 2),
    _plasma("forest", "Path", "Risto Saukonpää"),
    _plasma("reeds", "summer_1am", "Risto Saukonpää"),
    _lxqt("fog", "fog.jpg"),
    _lxqt("evening-clouds", "after-the-rain.jpg", 2),
    _lxqt("hills", "this-is-not-windows.jpg"),
    _lxqt("meadow", "flowers.png"),
    _lxqt("blossom", "appleflower.png", 2),
    _lxqt("clouds", "cloud.png", 2),
    _lxqt("blade-with-drop", "drop.png"),
    _lxqt("butterfly", "butterfly.png", 2),
    _palapeli("cincinnati-bridge.jpg", "Derek Jensen", PUBLIC),
    _palapeli("citrus-fruits.jpg", "US Department of Agriculture", PUBLIC),
    _palapeli("european-honey-bee.jpg", "John Severns", PUBLIC),
    _palapeli("panther-chameleon-female.jpg", "B. Navez and others", "GFDL"),
    Photograph("pagoda", "python3-sklearn", "china.jpg", "danielbuechele", "CC BY 2.0"),
    Photograph("dahlia", "python3-sklearn", "flower.jpg", "vultilion", "CC BY 2.0"),
    _skimage("astronaut.png", "NASA", PUBLIC),
    _skimage("brick.png", "ambientCG", CC0),
    _skimage("gravel.png", "ambientCG", CC0),
    _skimage("grass.png", "linolafett", CC0),
    _skimage("coffee.png", "Rachel Michetti", CC0),
    _skimage("rocket.jpg", "SpaceX", PUBLIC),
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Collect freely licensed photographs: train, validation, SOURCES.md.")
    parser.add_argument("--output", type=Path, required=True, help="new folder for the result")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "sslsr_photographs", help="folder of the Debian packages")
    parser.add_argument("--crops", type=int, metavar="PIXELS", help="also cut multi-scale crops of this side into OUTPUT/crops/train")
    parser.add_argument("--pages", type=int, default=6, help="pages of text to draw into OUTPUT/train")
    options = parser.parse_args()
    began = time.monotonic()
    try:
        with appearing_whole(options.output) as folder:
            written = collect(PHOTOGRAPHS, folder, options.cache)
            print(f"{len(written)} photographs for {options.output}, {sum(p.validation for p in written)} of them for validation")
            draw_pages(folder, options.pages)
            if options.crops:
                print(f"{make_crops(folder, options.crops)} crops for {options.output / 'crops' / 'train'}")
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{time.monotonic() - began:.0f} seconds")


@contextmanager
def appearing_whole(output: Path) -> Iterator[Path]:
    """A folder to fill that becomes `output` at the end: a run that stops half-way leaves nothing that looks like a collection."""
    if output.is_symlink() and not output.exists():
        raise UserError(f"{output}: expected a new or empty folder, got a link to nothing; remove it or make the folder that it names.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output}: expected a new or empty folder; name another --output or remove this one.")
    output = output.absolute()  # "." has no name
    output.parent.mkdir(parents=True, exist_ok=True)
    # within a folder that is there: the one around it may be closed to us, or lie on another disk
    with tempfile.TemporaryDirectory(dir=output if output.exists() else output.parent, prefix=f".{output.name}-") as scratch:
        filled = Path(scratch) / output.name
        filled.mkdir()
        yield filled
        if output.exists():  # a mount point or a link can be filled, but not replaced
            for part in sorted(filled.iterdir(), key=lambda part: part.name == "crops"):  # last: what `make small-model` looks for
                shutil.move(part, output / part.name)
        else:
            filled.rename(output)


def collect(photographs: Sequence[Photograph], output: Path, cache: Path) -> list[Photograph]:
    """Write the photographs as PNG below `output` with SOURCES.md, and return those written; a second copy of a picture is left out."""
    for split in ("train", "validation"):
        (output / split).mkdir(parents=True)
    written: list[Photograph] = []
    thumbnails: list[np.ndarray] = []
    lines = []
    for photograph in sorted(photographs, key=lambda p: not p.validation):  # of two copies the validation's stays
        picture = _open(photograph, cache)
        thumbnail = _thumbnail(picture)
        twin = next((p for p, other in zip(written, thumbnails) if float((thumbnail * other).mean()) > 0.995), None)
        if twin is not None:
            print(f"{photograph.name} is the same picture as {twin.name}: left out")
            continue
        width, height = (side // photograph.divide for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
        split = "validation" if photograph.validation else "train"
        picture.save(output / split / f"{photograph.name}.png")
        cells = (f"`{split}/{photograph.name}.png` ({width}x{height})", photograph.author, photograph.licence, photograph.package)
        lines.append(f"| {' | '.join(cells)} | `{photograph.file}` | {photograph.divide} |")
        written.append(photograph)
        thumbnails.append(thumbnail)
    (output / "SOURCES.md").write_text(_SOURCES + "\n".join(lines) + "\n", encoding="utf-8")
    return written


_SOURCES = """# Where the photographs come from

They keep their own licences. Packages are Debian's, but for scikit-image, the Python package. "divided by" is the reduction (Lanczos).

| picture | author | licence | package | file in it | divided by |
|---|---|---|---|---|---|
"""


def _open(photograph: Photograph, cache: Path) -> Image.Image:
    if photograph.package == SKIMAGE:
        spec = importlib.util.find_spec("skimage")
        if spec is None or spec.origin is None:
            raise UserError("scikit-image's sample photographs are part of the collection; install it: pip install scikit-image")
        path = Path(spec.origin).parent / "data" / photograph.file
    else:
        path = unpacked(photograph.package, cache) / FOLDERS[photograph.package] / photograph.file
    if not path.is_file():
        raise UserError(f"{photograph.package}: expected {photograph.file} in it, as in Debian 12; take out its row of the table.")
    if path.suffix == ".dat":  # SciPy's raccoon: bare pixels
        return Image.fromarray(np.frombuffer(bz2.decompress(path.read_bytes()), np.uint8).reshape(768, 1024, 3))
    pixels = read_image(path).rgb
    return Image.fromarray(pixels if pixels.dtype == np.uint8 else (pixels // 257).astype(np.uint8))


def unpacked(package: str, cache: Path) -> Path:
    """The folder with the files of a Debian package, downloaded and unpacked into `cache` where it is not there yet."""
    folder = cache / "x" / package
    if folder.is_dir():
        return folder
    if shutil.which("dpkg-deb") is None:
        raise UserError(f"{package}: unpacking needs dpkg-deb; run this on Debian or Ubuntu, or copy a filled --cache from there.")
    if not list(cache.glob(f"{package}_*.deb")):
        if shutil.which("apt-get") is None:
            raise UserError(f"{package}: downloading needs apt-get (Debian 12); run this there, or put {package}_*.deb into {cache}.")
        cache.mkdir(parents=True, exist_ok=True)
        _command(["apt-get", "download", "--quiet", package], cache)
    with tempfile.TemporaryDirectory(dir=cache) as part:
        _command(["dpkg-deb", "--extract", str(sorted(cache.glob(f"{package}_*.deb"))[-1].resolve()), part], cache)
        folder.parent.mkdir(exist_ok=True)
        shutil.copytree(part, folder, symlinks=True)
    return folder


def _command(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"`{' '.join(command)}` failed: {done.stderr.strip()}")


def _thumbnail(picture: Image.Image) -> np.ndarray:
    """A 24x24 gray thumbnail of mean 0 and deviation 1: the mean product of two is their correlation."""
    gray = np.asarray(picture.convert("L").resize((24, 24), Image.Resampling.BOX), dtype=np.float64)
    return (gray - gray.mean()) / max(float(gray.std()), 1e-6)


def draw_pages(output: Path, count: int) -> None:
    """Write `count` pages of words into output/train: the DejaVu faces that matplotlib brings, many sizes, dark and light paper."""
    from matplotlib import get_data_path

    faces = sorted((Path(get_data_path()) / "fonts" / "ttf").glob("DejaVuS*.ttf"))
    for number in range(count):
        draw = np.random.default_rng(number)
        paper, ink = draw.integers(200, 256, 3), draw.integers(0, 110, 3)
        if number % 3 == 2:
            paper, ink = ink, paper
        page = Image.new("RGB", _PAGE, tuple(paper.tolist()))
        pen, top = ImageDraw.Draw(page), 12
        while top < _PAGE[1]:
            size = int(draw.integers(14, 64))
            words = " ".join(draw.choice(_TEXT.split(), 40))
            colour = ink if draw.random() < 0.8 else draw.integers(0, 256, 3)
            face = ImageFont.truetype(str(draw.choice(faces)), size)
            pen.text((int(draw.integers(-40, 20)), top), words, fill=tuple(colour.tolist()), font=face)
            top += int(size * draw.uniform(1.1, 1.7))
        page.save(output / "train" / f"page-{number + 1}.png")


_PAGE = (1280, 960)
_TEXT = """
the quick brown fox jumps over a lazy dog; Sphinx of black quartz, judge my vow! Pack 24 boxes (with 57 liquor jugs) at 13:30 &
8.69 EUR No. 10 Exit LEFT Gate B7 Room 204 km/h +49 1/250 s f/2.8 ISO 400 Total: 1,206.35 % @home # A-Z Question? Yes / No
"""


def make_crops(output: Path, size: int, least_detail: float = 1.5) -> int:
    """Cut output/train at several scales into output/crops/train and return how many crops stay.

    A crop stays if neighbouring pixels differ by `least_detail` gray levels on average: sky and blur teach nothing and cost as much.
    """
    processes = preparation.default_processes()
    target = output / "crops" / "train"
    with tempfile.TemporaryDirectory(dir=output) as scratch:
        scales = Path(scratch)
        for source, folder, job in (
            (output / "train", scales, partial(preparation.multiscale, output=scales, shortest_edge=size)),
            (scales, target, partial(preparation.crops, output=target, size=size, step=size)),
        ):
            paths = sorted(source.glob("*.png"))
            for outcome in preparation.run_jobs(job, paths, source, processes):
                if outcome.problem:
                    raise UserError(f"{folder}: {outcome.problem}")
    crops = list(target.glob("*.png"))
    flat = [path for path in crops if _detail(path) < least_detail]
    for path in flat:
        path.unlink()
    return len(crops) - len(flat)


def _detail(path: Path) -> float:
    gray = np.asarray(Image.open(path).convert("L"), dtype=np.float32)
    return float(np.abs(np.diff(gray, axis=0)).mean() + np.abs(np.diff(gray, axis=1)).mean()) / 2


if __name__ == "__main__":
    main()
