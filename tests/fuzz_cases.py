"""What the fuzz tests throw at the two doors that take foreign bytes (recipes, pictures), and what must hold whatever comes.

`test_fuzz.py` runs a fixed selection for some seconds, `chaos/fuzz_doors.py` new cases for a minute each.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import yaml
from hypothesis import strategies as st
from PIL import Image as Pillow
from PIL import ImageCms

from sslsr_diffusion.config import RecipeError, parse, shipped_recipes
from sslsr_diffusion.images import MAX_PIXELS, Image, UnreadableImage, read_image, write_image
from sslsr_diffusion.runs.recipe import Recipe, load_recipe, resolved

TEXTS = {name: path.read_text(encoding="utf-8") for name, path in shipped_recipes().items()}
PLAIN = {name: resolved(load_recipe(name)) for name in TEXTS}
YAML_PIECES = [
    "a: 1",
    "\t",
    "  ",
    "\n",
    "\r\n",
    "\ufeff",
    "- ",
    "? ",
    ": ",
    "&a ",
    "*a",
    "<<: *a",
    "!!python/object:os.system",
    "!!binary |",
    "!!set",
    "!!timestamp 2001-01-01",
    "2001-99-99",
    "0o17",
    "0x1F",
    "1e999",
    ".nan",
    "-.inf",
    "~",
    "null",
    "yes",
    "'",
    '"',
    "|",
    ">-",
    "#",
    "---",
    "...",
    "%YAML 9.9",
    "{",
    "}",
    "[",
    "]",
    ",",
    "\x00",
    "\x1b[31m",
    "\u2028",
    "\ud7ff",
    "@",
    "`",
    "extends: ",
    "extends: ../x",
    "1_000",
    "1:30:00",
    "task",
    "inference",
    "data",
    "losses",
    "training",
    "kind",
    "sources",
    "model",
    "output",
    "weight: auto",
    "dir",
    "9" * 400,
    "1" * 5000,
    "[" * 200,
]


def _places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [found for key, value in entries for found in ((*path, key), *_places(value, (*path, key)))]


PLACES = {name: _places(tree) for name, tree in PLAIN.items()}
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=12)
    | st.dates()
    | st.binary(max_size=8)
    | st.sampled_from(["diffusion", "auto", "tiny", "folder", "hub", "../../x", "~", "", 10**30, -1, 0, 1e-320, "1e-4"])
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6) | scalars, inner, max_size=4), max_leaves=8
)


@st.composite
def mutated_text(draw: st.DrawFn) -> bytes:
    """A shipped recipe with lines removed, doubled, moved, and pieces of YAML put in."""
    lines = TEXTS[draw(st.sampled_from(sorted(TEXTS)))].splitlines()
    for _ in range(draw(st.integers(1, 4))):
        at, other = draw(st.integers(0, len(lines) - 1)), draw(st.integers(0, len(lines) - 1))
        way = draw(st.sampled_from(["remove", "double", "swap", "insert", "indent", "cut"]))
        if way == "remove" and len(lines) > 1:
            del lines[at]
        elif way == "double":
            lines.insert(other, lines[at])
        elif way == "swap":
            lines[at], lines[other] = lines[other], lines[at]
        elif way == "indent":
            lines[at] = draw(st.sampled_from([" ", "\t", "    ", "- "])) + lines[at]
        else:
            column = draw(st.integers(0, len(lines[at])))
            piece = draw(st.sampled_from(YAML_PIECES) | st.text(max_size=5)) if way == "insert" else ""
            lines[at] = lines[at][:column] + piece + (lines[at][column:] if way == "insert" else "")
    data = "\n".join(lines).encode("utf-8", "surrogatepass")
    return draw(
        st.just(data) | st.just(b"\xef\xbb\xbf" + data) | st.just(data.replace(b"\n", b"\r\n")) | st.just(data.decode().encode("utf-16"))
    )


@st.composite
def mutated_data(draw: st.DrawFn) -> bytes:
    """The resolved data of a shipped recipe with values replaced, keys removed and keys renamed."""
    name = draw(st.sampled_from(sorted(PLAIN)))
    tree = yaml.safe_load(yaml.safe_dump(PLAIN[name]))
    for place in draw(st.lists(st.sampled_from(PLACES[name]), min_size=1, max_size=3)):
        holder: Any = tree
        try:
            for key in place[:-1]:
                holder = holder[key]
            present = isinstance(holder, dict | list) and holder[place[-1]] is not None
        except (LookupError, TypeError):  # an earlier change removed it
            continue
        if not present:
            continue
        way = draw(st.sampled_from(["replace", "replace", "remove", "rename"]))
        if way == "replace" or isinstance(holder, list):
            holder[place[-1]] = draw(values)
        elif way == "remove":
            holder.pop(place[-1], None)
        else:
            holder[draw(st.text(max_size=8))] = holder.pop(place[-1], None)
    return yaml.safe_dump(tree, allow_unicode=True).encode("utf-8", "surrogatepass")


pieces = st.lists(st.sampled_from(YAML_PIECES) | st.text(max_size=6), max_size=25)
recipe_files = mutated_text() | mutated_data() | pieces.map(lambda p: "".join(p).encode("utf-8", "surrogatepass")) | st.binary(max_size=80)
override_keys = st.sampled_from([".".join(map(str, place)) for place in sorted(PLACES["tiny"], key=str)]) | st.text(max_size=12)
overrides = st.lists(
    st.builds("{}={}".format, override_keys, st.sampled_from(YAML_PIECES) | values.map(str)) | st.text(max_size=20), max_size=3
)


def check_recipe(folder: Path, data: bytes, sets: list[str]) -> bool:
    """Reading the file gives a recipe that survives a round trip, or a RecipeError whose every line is one plain sentence."""
    file = folder / "fuzzed.yaml"
    file.write_bytes(data)
    began = time.monotonic()
    try:
        recipe = load_recipe(str(file), sets)
    except RecipeError as error:
        lines = str(error).splitlines()
        assert lines
        for line in lines:
            assert line.strip()
            assert line.isprintable(), line
            assert len(line) < 2000, line
            for internal in ("Traceback", "pydantic", "[type=", "tagged-union", "function-"):
                assert internal not in line, line
        return False
    finally:
        assert time.monotonic() - began < 5
    assert parse(Recipe, yaml.safe_load(yaml.safe_dump(resolved(recipe), allow_unicode=True))) == recipe
    return True


@cache
def real_files() -> dict[str, bytes]:
    """A small real file of every kind that we read."""
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (11, 13, 3), dtype=np.uint8)
    colour, gray = Pillow.fromarray(rgb), Pillow.fromarray(rgb[..., 0])
    alpha = Pillow.fromarray(np.dstack([rgb, rgb[..., 0]]))
    exif = Pillow.Exif()
    exif[0x0112], exif[0x010F] = 6, "Camera"
    exif[0x8769] = {0xA002: 13, 0xA003: 11}
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    block = exif.tobytes()
    files: dict[str, bytes] = {}

    def save(name: str, picture: Pillow.Image, kind: str, **options: Any) -> None:
        buffer = io.BytesIO()
        picture.save(buffer, kind, **options)
        files[name] = buffer.getvalue()

    for name, picture in {"rgb": colour, "gray": gray, "alpha": alpha, "palette": colour.quantize(8), "bit": gray.convert("1")}.items():
        save(f"{name}.png", picture, "PNG")
        save(f"{name}.tif", picture, "TIFF", compression="tiff_lzw" if name != "bit" else "group4")
        if name not in ("alpha",):
            save(f"{name}.gif", picture, "GIF")
            save(f"{name}.bmp", picture, "BMP")
        if name in ("rgb", "gray"):
            save(f"{name}.jpg", picture, "JPEG", exif=block, icc_profile=profile, progressive=name == "gray")
            save(f"{name}.ppm", picture, "PPM")
            save(f"{name}.tga", picture, "TGA", compression="tga_rle")
            save(f"{name}.jp2", picture, "JPEG2000")
    save("rgb.webp", colour, "WEBP", exif=block, icc_profile=profile)
    save("alpha.webp", alpha, "WEBP", lossless=True)
    save("exif.png", colour, "PNG", exif=block, icc_profile=profile)
    save("exif.tif", colour, "TIFF", exif=block, icc_profile=profile)
    save("cmyk.jpg", colour.convert("CMYK"), "JPEG", icc_profile=profile)
    save("cmyk.tif", colour.convert("CMYK"), "TIFF")
    save(
        "lab.tif",
        ImageCms.profileToProfile(colour, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"),
        "TIFF",
    )
    save("float.tif", Pillow.fromarray(rgb[..., 0].astype(np.float32)), "TIFF")
    for kind in ("PNG", "GIF", "WEBP", "TIFF", "MPO"):
        save(f"moving.{kind.lower()}", colour, kind, save_all=True, append_images=[colour.rotate(90, expand=True).resize((13, 11))])
    if "AVIF" in Pillow.SAVE:
        save("rgb.avif", colour, "AVIF")
    for name in ("deep.png", "deep.tif"):
        files[name] = _written(name, Image(rgb.astype(np.uint16) * 257, alpha=rgb[..., 0].astype(np.uint16) * 257, icc_profile=profile))
    files["deep.pgm"] = b"P5 13 11 65535\n" + rng.bytes(13 * 11 * 2)
    return files


def _written(name: str, image: Image) -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        write_image(Path(folder) / name, image)
        return (Path(folder) / name).read_bytes()


@st.composite
def broken_picture(draw: st.DrawFn) -> bytes:
    """A real file that was cut, overwritten, spliced with another, or the head of one with noise behind it."""
    files = real_files()
    data = bytearray(files[draw(st.sampled_from(sorted(files)))])
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        way = draw(st.sampled_from(["cut", "flip", "word", "insert", "remove", "splice", "noise"]))
        if way == "cut":
            del data[at:]
        elif way == "flip":
            data[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
        elif way == "word":
            number = draw(st.sampled_from([0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 100_000]))
            data[at : at + 4] = number.to_bytes(4, draw(st.sampled_from(["little", "big"])))
        elif way == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=16))
        elif way == "remove":
            del data[at : at + draw(st.integers(1, 16))]
        elif way == "splice":
            data[at:] = files[draw(st.sampled_from(sorted(files)))][at:]
        else:
            data[at:] = draw(st.binary(max_size=200))
    return bytes(data)


def check_picture(folder: Path, data: bytes) -> bool:
    """Reading gives a whole picture that can be written again in every format, or an UnreadableImage of one plain line."""
    began = time.monotonic()
    try:
        image = read_image(data, name="fuzzed")
    except UnreadableImage as error:
        text = str(error)
        assert text.startswith("fuzzed: ")
        assert text.isprintable(), text
        assert len(text) < 300, text
        return False
    finally:
        assert time.monotonic() - began < 20
    height, width = image.size
    assert image.rgb.shape == (height, width, 3)
    assert 0 < height * width <= MAX_PIXELS
    assert image.rgb.dtype in (np.uint8, np.uint16)
    if image.alpha is not None:
        assert image.alpha.shape == (height, width)
        assert image.alpha.dtype == image.rgb.dtype
    if image.gray:
        assert (image.rgb == image.rgb[..., :1]).all()
    assert all(note.isprintable() for note in image.notes)
    if height * width < 100_000:
        for name in ("out.png", "out.jpg", "out.webp", "out.tif"):
            write_image(folder / name, image)
            again = read_image(folder / name)
            assert again.size == image.size
            if name in ("out.png", "out.tif"):
                assert (again.rgb == image.rgb).all()
    return True


def run_for(seconds: float, check: Callable[..., bool], *strategies: Any, first_seed: int, examples: int = 200) -> tuple[int, int]:
    """New cases until the time is over; (how many came, how many of them were accepted). A failure shows its smallest case."""
    tried = accepted = 0
    end, seed = time.monotonic() + seconds, first_seed
    while time.monotonic() < end:

        @hypothesis.seed(seed)
        @hypothesis.settings(
            max_examples=examples,
            deadline=None,
            database=None,
            report_multiple_bugs=False,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(st.tuples(*strategies))
        def one(case: tuple[Any, ...]) -> None:
            nonlocal tried, accepted
            tried += 1
            accepted += check(*case)

        one()
        seed += 1
    return tried, accepted
