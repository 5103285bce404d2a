"""Colours by code become a profile that a colour management shows as the standards say."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from picture_files import png
from PIL import Image as Pillow
from PIL import ImageCms

from sslsr_diffusion.images import read_image, write_image
from sslsr_diffusion.metadata.colours import profile_of

D65, DCI = (0.3127, 0.329), (0.314, 0.351)
P3 = ((0.68, 0.32), (0.265, 0.69), (0.15, 0.06))
PRIMARIES = {  # white, red, green, blue
    1: (D65, (0.64, 0.33), (0.3, 0.6), (0.15, 0.06)),
    5: (D65, (0.64, 0.33), (0.29, 0.6), (0.15, 0.06)),
    6: (D65, (0.63, 0.34), (0.31, 0.595), (0.155, 0.07)),
    9: (D65, (0.708, 0.292), (0.17, 0.797), (0.131, 0.046)),
    11: (DCI, *P3),
    12: (D65, *P3),
}


def to_srgb(light):
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def pq(light):
    y = light ** (2610 / 16384)
    return ((3424 / 4096 + 2413 / 128 * y) / (1 + 2392 / 128 * y)) ** (2523 / 32)


def hlg(light):
    a, b = 0.17883277, 0.28466892
    return np.where(light <= 1 / 12, np.sqrt(3 * light), a * np.log(np.maximum(12 * light - b, 1e-9)) + 0.55991073)


def bt709(light):
    return np.where(light < 0.018, 4.5 * light, 1.099 * light**0.45 - 0.099)


ENCODE = {1: bt709, 6: bt709, 14: bt709, 15: bt709, 4: lambda light: light ** (1 / 2.2), 5: lambda light: light ** (1 / 2.8)}
ENCODE |= {8: lambda light: light, 13: to_srgb, 16: pq, 18: hlg}
LIGHT = np.concatenate([[0], np.geomspace(1e-12, 1, 200_000)])  # decoding by a table of the encoding: no inverse is written twice
LEVELS = np.array([0, 3, 20, 64, 128, 201, 255], np.uint8)
COLOURS = np.stack(np.meshgrid(LEVELS, LEVELS, LEVELS), -1).reshape(7, 49, 3)


def xyz(white, *primaries):
    """The matrix of RGB to XYZ, and the white."""
    whole = np.array([white[0] / white[1], 1, (1 - sum(white)) / white[1]])
    columns = np.array([[x / y, 1, (1 - x - y) / y] for x, y in primaries]).T
    return columns @ np.diag(np.linalg.inv(columns) @ whole), whole


def wanted(values, places, encode):
    """8-bit values of these primaries and this curve, as 8-bit sRGB in float64: from white to white by Bradford."""
    linear = np.interp(values / 255, encode(LIGHT), LIGHT)
    (there, white), (here, d65) = xyz(*places), xyz(*PRIMARIES[1])
    cones = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    adapt = np.linalg.inv(cones) @ np.diag((cones @ d65) / (cones @ white)) @ cones
    return 255 * to_srgb(np.clip(linear @ (np.linalg.inv(here) @ adapt @ there).T, 0, 1))


def shown(profile, pixels):
    """By Pillow's lcms; without the short-cut of its gray, a table of 33 points that misses dark values by 9."""
    source, srgb = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
    how = {"renderingIntent": ImageCms.Intent.RELATIVE_COLORIMETRIC, "outputMode": "RGB", "flags": ImageCms.Flags.NOOPTIMIZE}
    return np.asarray(ImageCms.profileToProfile(Pillow.fromarray(pixels), source, srgb, **how)).astype(float)


CODES = [(primaries, 13) for primaries in PRIMARIES if primaries != 1] + [(9, transfer) for transfer in ENCODE]
CHUNKS = {
    **{f"cICP {p}, {t}": ({b"cICP": bytes([p, t, 0, 1])}, PRIMARIES[p], ENCODE[t]) for p, t in CODES},
    "not said": ({b"cICP": bytes([2, 16, 0, 1])}, PRIMARIES[1], pq),
    "gAMA": ({b"gAMA": struct.pack(">I", 55556)}, PRIMARIES[1], lambda light: light**0.55556),
    "cHRM": ({b"cHRM": struct.pack(">8I", *(round(1e5 * x) for place in PRIMARIES[11] for x in place))}, PRIMARIES[11], to_srgb),
    "cICP first": ({b"gAMA": struct.pack(">I", 100000), b"sRGB": b"\0", b"cICP": bytes([12, 4, 0, 1])}, PRIMARIES[12], ENCODE[4]),
}


@pytest.mark.parametrize("name", CHUNKS)
def test_a_profile_shows_what_the_code_says(name):
    chunks, places, encode = CHUNKS[name]
    got = shown(profile_of(chunks, gray=False), COLOURS)
    assert np.abs(got - wanted(COLOURS, places, encode)).max() <= 1
    gray = shown(profile_of(chunks, gray=True), LEVELS[None])
    assert np.abs(gray - wanted(LEVELS[None, :, None].repeat(3, 2), places, encode)).max() <= 1


@pytest.mark.parametrize(
    ("chunks", "reason"),
    [
        ({b"cICP": bytes([9, 10, 0, 1])}, "no profile can say its numbers 9, 10, 0, 1"),
        ({b"cICP": bytes([3, 13, 0, 1])}, "no profile can say its numbers 3, 13, 0, 1"),
        ({b"cICP": bytes([9, 16, 0, 0])}, "no profile can say its numbers 9, 16, 0, 0"),  # black is 16
        ({b"gAMA": bytes(4)}, "that is no gamma of a picture"),
        ({b"gAMA": b"\xff" * 4}, "that is no gamma of a picture"),
        ({b"cHRM": bytes(32)}, "these are no primaries of a picture"),
        ({b"cHRM": bytes(range(32))}, "these are no primaries of a picture"),
        ({b"cHRM": struct.pack(">8I", 31270, 32900, *[64000, 33000] * 3)}, "these are no primaries of a picture"),
        ({b"cHRM": struct.pack(">8I", 31270, 32900, 300000, 33000, 10000, 90000, 10000, 1000)}, "these are no primaries of a picture"),
        ({b"cHRM": struct.pack(">8I", 2000, 2000, 64000, 33000, 30000, 60000, 100, 100)}, "these are no primaries of a picture"),
        ({b"cHRM": struct.pack(">8I", 80000, 10000, 64000, 33000, 30000, 60000, 15000, 6000)}, "these are no primaries of a picture"),
    ],
)
def test_what_no_profile_can_say_is_told(tmp_path, chunks, reason):
    image = read_image(png(COLOURS.reshape(7, -1), 8, 2, *chunks.items(), width=49))
    for suffix in (".jpg", ".tif", ".webp"):
        assert write_image(tmp_path / f"a{suffix}", image) == (f"{next(iter(chunks)).decode()} left out, {reason}",)
        assert read_image(tmp_path / f"a{suffix}").icc_profile is None


@pytest.mark.parametrize("gray", [False, True])
def test_the_profile_lies_in_formats_without_a_code_for_colours(tmp_path, gray):
    code, light = (b"cICP", bytes([9, 16, 0, 1])), (b"mDCV", bytes(24))
    rows = COLOURS[..., 0] if gray else COLOURS.reshape(7, -1)
    image = read_image(png(rows, 8, 0 if gray else 2, code, light, (b"gAMA", struct.pack(">I", 45455)), width=49))
    for suffix, name in ((".jpg", "JPEG"), (".tif", "TIFF"), (".webp", "WEBP")):
        notes = ("cICP, gAMA written as a colour profile", f"mDCV left out, {name} has no place for it")
        assert write_image(tmp_path / f"a{suffix}", image) == notes
        written = read_image(tmp_path / f"a{suffix}")
        assert written.icc_profile == profile_of(dict([code]), gray=gray and name != "WEBP")
        assert written.notes == ()
        assert (b"cicp\0\0\0\0\x09\x10\0\1" in written.icc_profile) == (not gray or name == "WEBP")
    assert write_image(tmp_path / "a.png", image) == ()
    assert read_image(tmp_path / "a.png").icc_profile is None


def test_srgb_by_code_and_codes_under_a_profile_need_no_word(tmp_path):
    rows, gamma = COLOURS.reshape(7, -1), (b"gAMA", struct.pack(">I", 45455))
    for code in ((b"cICP", bytes([1, 13, 0, 1])), (b"cICP", bytes([2, 2, 0, 1])), (b"sRGB", b"\0")):
        image = read_image(png(rows, 8, 2, code, gamma, width=49))
        assert write_image(tmp_path / "a.jpg", image) == ()
        assert read_image(tmp_path / "a.jpg").icc_profile is None
    buffer, profile = io.BytesIO(), profile_of({b"cICP": bytes([12, 13, 0, 1])}, gray=False)
    Pillow.fromarray(COLOURS).save(buffer, "PNG", icc_profile=profile)
    data = buffer.getvalue()
    for chunk, notes in ((gamma, ()), ((b"cICP", bytes([9, 16, 0, 1])), ("cICP left out, JPEG has no place for it",))):
        image = read_image(data[:33] + png(rows, 8, 2, chunk, width=49)[33:].split(b"IDAT")[0][:-4] + data[33:])
        assert write_image(tmp_path / "a.jpg", image) == notes
        assert read_image(tmp_path / "a.jpg").icc_profile == profile
