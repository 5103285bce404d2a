"""What is promised of every picture file: its pixels, its depth, its colours, its metadata; a fault costs what is faulty, and is told."""

from __future__ import annotations

import os
import signal
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import pyvips
from picture_files import bmp, box, camera_exif, exif_entries, png, segments, tiff
from PIL import Image as Pillow
from test_images import SRGB, encoded, gray_profile, smooth

from sslsr_diffusion.config import parse
from sslsr_diffusion.data.degradation import DegradationSettings
from sslsr_diffusion.data.preparation import low_resolution
from sslsr_diffusion.images import Image, OpenPicture, UnreadableImage, read_image, size_of, write_image, write_strips
from sslsr_diffusion.metadata import heads
from sslsr_diffusion.metadata.blocks import png_chunk
from sslsr_diffusion.metadata.exif import upright_exif

DEEP = smooth(12, 17, 4, np.uint16)
EIGHT = smooth(12, 17, 4)
INDEX = np.arange(12 * 16, dtype=np.uint8).reshape(12, 16) % 4
COLOURS = np.array([[10, 200, 30], [10, 200, 30], [250, 1, 99], [0, 0, 255]], np.uint8)  # one of them twice
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="6"/>caf\xc3\xa9</x:xmpmeta>'
IPTC = b"8BIM\x04\x04\0\0\0\0\0\x0a\x1c\x02\x05\0\x05Title8BIM\x03\xed\0\0\0\0\0\x10\x01\x2c\0\0\0\1\0\1\x01\x2c\0\0\0\1\0\1"


def packed(values, bits):
    """[H, W] of few bits as the bytes of rows."""
    return np.packbits(np.unpackbits(values[..., None], axis=-1)[..., 8 - bits :].reshape(len(values), -1), axis=1)


def palette(entries):
    return 3, [int(value) for value in entries.astype(int).T.ravel()]


def portable(magic, white, samples):
    size = 2 if white > 255 else 1
    return b"%s\n%d %d\n# by hand\n%d\n" % (magic, samples.shape[1], samples.shape[0], white) + samples.astype(f">u{size}").tobytes()


def jpeg2000(samples):
    return cv2.imencode(".jp2", np.ascontiguousarray(samples[..., ::-1]), [cv2.IMWRITE_JPEG2000_COMPRESSION_X1000, 1000])[1].tobytes()


def moving_png():
    """The default picture is no frame: the first frame, of which only the control chunk matters here, comes behind it."""
    rows = EIGHT[..., :3].reshape(12, -1)
    data, control = png(rows, 8, 2, (b"acTL", struct.pack(">II", 1, 0)), width=17), struct.pack(">5I2H2B", 0, 17, 12, 0, 0, 1, 1, 0, 0)
    frame = png_chunk(b"fdAT", struct.pack(">I", 1) + zlib.compress(bytes(12 * 52)))
    return data[:-12] + png_chunk(b"fcTL", control) + frame + data[-12:]


GRAYS = np.array([0, 85, 170, 255], np.uint8)
PIXELS = {  # name -> file, samples [H, W, C] that it holds
    **{
        f"tiff, {order}{', big' if big else ''}{', planes' if planar else ''}, {samples.dtype}, {channels} channels": (
            tiff(samples[..., :channels], order=order, big=big, planar=planar),
            samples[..., :channels],
        )
        for order, big, planar, samples, channels in (
            ("<", False, True, EIGHT, 2),
            ("<", False, True, DEEP, 3),
            (">", False, True, EIGHT, 4),
            (">", True, False, DEEP, 3),
            ("<", True, False, EIGHT, 1),
            (">", False, False, DEEP, 2),
        )
    },
    "tiff, white is zero": (tiff(255 - EIGHT[..., :1], t262=(3, [0])), EIGHT[..., :1]),
    "tiff, palette": (tiff(INDEX[..., None], t262=(3, [3]), t320=palette(np.resize(COLOURS, (256, 3)).astype(int) * 257)), COLOURS[INDEX]),
    "tiff, palette of 8-bit entries": (tiff(INDEX[..., None], t262=(3, [3]), t320=palette(np.resize(COLOURS, (256, 3)))), COLOURS[INDEX]),
    "tiff, 2 bits": (tiff(packed(INDEX, 2)[..., None], t256=(4, [16]), t258=(3, [2])), GRAYS[INDEX][..., None]),
    "png, palette": (png(packed(INDEX, 2), 2, 3, (b"PLTE", COLOURS.tobytes()), width=16), COLOURS[INDEX]),
    "png, palette with alpha": (
        png(packed(INDEX, 4), 4, 3, (b"PLTE", COLOURS.tobytes()), (b"tRNS", b"\0\x64"), width=16),
        np.dstack([COLOURS[INDEX], np.array([0, 100, 255, 255], np.uint8)[INDEX]]),
    ),
    **{
        f"png, key of {bits}-bit gray": (
            png(packed(INDEX % (1 << bits), bits), bits, 0, (b"tRNS", b"\0\1"), width=16),
            np.dstack([INDEX % (1 << bits) * (255 // ((1 << bits) - 1)), 255 * (INDEX % (1 << bits) != 1)]).astype(np.uint8),
        )
        for bits in (1, 2, 4)
    },
    "png, key of 16-bit colour": (
        png(DEEP[..., :3].astype(">u2").view(np.uint8).reshape(12, -1), 16, 2, (b"tRNS", DEEP[3, 4, :3].astype(">u2").tobytes()), width=17),
        np.dstack([DEEP[..., :3], 65535 * (DEEP[..., :3] != DEEP[3, 4, :3]).any(axis=2)]).astype(np.uint16),
    ),
    "png, animation with a picture of its own": (moving_png(), EIGHT[..., :3]),
    "pgm, white 100": (portable(b"P5", 100, EIGHT[..., :1] % 101), np.floor(EIGHT[..., :1] % 101 * 2.55 + 0.5)),
    "ppm, white 1023": (portable(b"P6", 1023, DEEP[..., :3] >> 6), np.floor((DEEP[..., :3] >> 6) * (65535 / 1023) + 0.5)),
    "ppm, white 40000": (portable(b"P6", 40000, DEEP[..., :3] % 40001), np.floor(DEEP[..., :3] % 40001 * (65535 / 40000) + 0.5)),
    "ppm, words": (b"P3\n2 1 # a comment\n65535\n0 256 65535 1 2 3\n", np.array([[[0, 256, 65535], [1, 2, 3]]])),
    "pbm": (b"P4\n8 1\n\xaa", np.array([[0, 255] * 4])[..., None]),
    "jpeg 2000, 16 bits": (jpeg2000(smooth(40, 48, 3, np.uint16)), smooth(40, 48, 3, np.uint16)),
    "jpeg 2000, 8 bits": (jpeg2000(smooth(40, 48)), smooth(40, 48)),
}


@pytest.mark.parametrize("name", PIXELS)
def test_pixels_and_depth_are_the_files(name):
    data, want = PIXELS[name]
    image = read_image(data)
    gray = want.shape[2] < 3
    np.testing.assert_array_equal(image.rgb, want[..., [0, 0, 0]] if gray else want[..., :3])
    assert image.gray == gray
    assert (image.alpha is None) == (want.shape[2] in (1, 3))
    if image.alpha is not None:
        np.testing.assert_array_equal(image.alpha, want[..., -1])
    assert image.bits == (16 if want.max() > 255 else 8)
    assert image.notes == (("the first frame of an animation",) if "animation" in name else ())


@pytest.mark.parametrize(
    ("order", "big", "dtype"), [("<", False, np.uint8), (">", True, np.uint8), ("<", True, np.uint16), (">", False, np.uint16)]
)
def test_a_turned_tiff_is_turned_once_by_every_door(tmp_path, order, big, dtype):
    samples = smooth(12, 17, 3, dtype)
    for turn, upright in ((2, samples[:, ::-1]), (3, samples[::-1, ::-1]), (6, np.rot90(samples, -1)), (8, np.rot90(samples))):
        dangling = [(0x8769, 4, 1, struct.pack(order + "I", 0xFFFF00))]
        (tmp_path / "a.tif").write_bytes(tiff(samples, order=order, big=big, turn=turn, extra=dangling))
        image = read_image(tmp_path / "a.tif")
        np.testing.assert_array_equal(image.rgb, upright)
        assert size_of(tmp_path / "a.tif") == image.size[::-1]
        picture = OpenPicture(tmp_path / "a.tif")
        parts = [picture.read(top, min(top + 7, picture.size[0])).rgb[:5] for top in range(0, picture.size[0], 5)]
        np.testing.assert_array_equal(np.concatenate(parts), upright)


def full(format, exif, **extra):
    """A picture with everything that may stand beside pixels."""
    return Image(smooth(), icc_profile=SRGB, exif=exif, format=format, xmp=XMP, iptc=IPTC, density=(300.0, 150.0), **extra)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp"])
def test_metadata_go_from_every_format_into_every_other(tmp_path, suffix, order):
    given = full("BMP", camera_exif(order=order))
    notes = write_image(tmp_path / f"a{suffix}", given)
    assert notes == (("IPTC left out, WEBP has no place for it",) if suffix == ".webp" else ())
    want = exif_entries(camera_exif(order=order))
    for further in (".png", ".jpg", ".tif", ".webp"):
        write_image(tmp_path / f"b{further}", read_image(tmp_path / f"a{suffix}"))
        back = read_image(tmp_path / f"b{further}")
        found = exif_entries(back.exif)
        assert {key: found.get(key) for key in want} == want, further
        assert (back.icc_profile, back.xmp, back.notes) == (SRGB, XMP, ())
        if ".webp" not in (suffix, further):
            assert back.iptc == IPTC
            np.testing.assert_allclose(back.density, (300, 150), rtol=1e-4)
    note = want["exif", 0x927C][2]
    assert (tmp_path / "a.tif").read_bytes().find(note) == camera_exif(order=order).find(note) if suffix == ".tif" else True


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_tiff_beyond_its_limit_is_a_bigtiff_with_the_same_blocks(tmp_path, monkeypatch, order, dtype):
    """4 GB are the limit; here it is a few bytes. Other readers than ours find pixels, profile and entries; maker notes stay in place."""
    rgb, exif = smooth(64, 48, dtype=dtype), camera_exif(order=order)
    given = replace(full("BMP", exif), rgb=rgb, alpha=smooth(64, 48, 1, dtype=dtype, seed=3)[..., 0])
    assert write_image(tmp_path / "small.tif", given) == ()
    monkeypatch.setattr(heads, "LARGEST_TIFF", (tmp_path / "small.tif").stat().st_size)
    assert write_image(tmp_path / "a.tif", given) == ()
    data = (tmp_path / "a.tif").read_bytes()
    assert [file[2:4] for file in ((tmp_path / "small.tif").read_bytes(), data)] == [
        struct.pack(order + "H", 42),
        struct.pack(order + "H", 43),
    ]
    back = read_image(tmp_path / "a.tif")
    np.testing.assert_array_equal(back.rgb, rgb)
    np.testing.assert_array_equal(back.alpha, given.alpha)
    assert (back.icc_profile, back.xmp, back.iptc, back.notes) == (SRGB, XMP, IPTC, ())
    np.testing.assert_allclose(back.density, (300, 150), rtol=1e-4)
    found, want = exif_entries(back.exif), exif_entries(upright_exif(exif, given.size))
    assert {key: found.get(key) for key in want} == want
    note = want["exif", 0x927C][2]
    assert data.find(note) == exif.find(note)
    libvips = pyvips.Image.new_from_file(str(tmp_path / "a.tif"))
    np.testing.assert_array_equal(libvips.numpy(), np.dstack([rgb, given.alpha]))
    assert (libvips.get("icc-profile-data"), libvips.get("xmp-data")) == (SRGB, XMP)
    if order == ">":  # Pillow does not open it
        return
    with Pillow.open(tmp_path / "a.tif") as other:
        assert other.tag_v2[0x10F].rstrip("\0") == "Camera"
        assert other.info["icc_profile"] == SRGB
        assert other.getexif().get_ifd(0x8769)[0x927C] == note


def test_orientation_and_size_are_brought_up_to_date_in_place(tmp_path):
    data = segments(encoded(smooth(), "JPEG"), (0xE1, b"Exif\0\0" * 2 + camera_exif(6)), (0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP))
    image = read_image(data)
    assert image.size == (31, 23)
    assert b'tiff:Orientation="1"' in image.xmp
    changed = {key for key, value in exif_entries(image.exif).items() if value != exif_entries(camera_exif(6))[key]}
    assert changed == {("main", 0x112), ("exif", 0xA002), ("exif", 0xA003)}
    write_image(tmp_path / "a.tif", replace(image, rgb=image.rgb.repeat(2, 0).repeat(2, 1)))
    made = exif_entries((tmp_path / "a.tif").read_bytes())
    assert (made["exif", 0xA002][2], made["exif", 0xA003][2]) == (struct.pack(">I", 46), struct.pack(">H", 62))


FAULTS = {
    "png, wrong checksum": (b"tEXt", b"a\0b", "tEXt"),
    "png, unknown compression": (b"zTXt", b"a\0\5" + zlib.compress(b"a"), "zTXt"),
    "png, gAMA without a value": (b"gAMA", b"", "gAMA"),
    "png, short cICP": (b"cICP", b"\1", "cICP"),
    "png, empty profile": (b"iCCP", b"", "iCCP"),
    "png, damaged profile": (b"iCCP", b"a\0\0" + zlib.compress(bytes(99))[:-3], "iCCP"),
    "png, EXIF of nonsense": (b"eXIf", b"nonsense", "EXIF"),
    "png, profile in half a text": (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n"), "zTXt"),
    "png, content credentials": (b"caBX", b"signed", "caBX"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_a_png_chunk_costs_that_chunk(name):
    kind, body, told = FAULTS[name]
    data, chunk = encoded(smooth(), "PNG"), bytearray(png_chunk(kind, body))
    chunk[-1] ^= "checksum" in name
    for place in (33, len(data) - 12):  # before the pixels, and behind them
        image = read_image(data[:place] + bytes(chunk) + data[place:])
        np.testing.assert_array_equal(image.rgb, smooth())
        assert len(image.notes) == 1
        assert image.notes[0].startswith(f"{told} left out")


@pytest.mark.parametrize(
    ("tag", "kind", "count", "value", "told"),
    [
        (0x10E, 2, 100000, b"\xff\xff\xff\x7f", "TIFF tag 270 left out, it is damaged"),
        (0x2BC, 3, 2, b"\1\0\1\0", "TIFF tag 700 left out, it is damaged"),
        (0x8773, 3, 1, b"\x1a\0", "TIFF tag 34675 left out, it is damaged"),
        (0x830E, 12, 3, bytes(24), "the map coordinates (GeoTIFF) left out, they count the old pixels"),
    ],
)
def test_a_fault_in_a_tiff_tag_costs_that_tag(tag, kind, count, value, told):
    image = read_image(tiff(smooth(), extra=[(tag, kind, count, value)]))
    np.testing.assert_array_equal(image.rgb, smooth())
    assert image.notes == (told,)


def test_a_fault_in_a_jpeg_segment_costs_that_segment():
    plain = encoded(smooth(), "JPEG")
    want = read_image(plain).rgb
    for segment, told in (
        ((0xE1, b"Exif\0\0II*\0\xff\xff\xff\xff"), ("EXIF left out, it is damaged",)),
        ((0xE0, b"JFIF\0"), ()),
        ((0xE2, b"MPF\0MM\0*"), ("the second picture of the file left out, its gain map or stereo partner belongs to the old pixels",)),
        ((0xEB, b"JP\0\1"), ("segment APP11 left out, it may belong to the old pixels",)),
        ((0xFE, b"a comment"), ()),
    ):
        image = read_image(segments(plain, segment))
        np.testing.assert_array_equal(image.rgb, want)
        assert image.notes == told


@pytest.mark.parametrize(
    ("kind", "body"), [(b"cICP", bytes([9, 16, 0, 1])), (b"gAMA", struct.pack(">I", 100000)), (b"cHRM", bytes(range(32)))]
)
def test_colours_by_code_are_kept_by_png(tmp_path, kind, body):
    data = encoded(smooth(), "PNG")
    image = read_image(data[:33] + png_chunk(kind, body) + data[33:])
    assert write_image(tmp_path / "a.png", image) == ()
    assert png_chunk(kind, body) in (tmp_path / "a.png").read_bytes()


def test_the_colours_of_an_avif_go_into_the_png_and_a_profile_stands_above_them(tmp_path):
    Pillow.init()
    if "AVIF" not in Pillow.SAVE:
        pytest.skip("Pillow has no AVIF writer here")
    data = bytearray(encoded(smooth(32, 32), "AVIF", quality=90))
    at = data.find(b"colrnclx") + 8
    data[at : at + 4] = struct.pack(">HH", 12, 16)  # Display P3, PQ
    image = read_image(bytes(data))
    write_image(tmp_path / "a.png", image)
    assert png_chunk(b"cICP", bytes([12, 16, 0, 1])) in (tmp_path / "a.png").read_bytes()
    assert "primaries 12, transfer 16" in image.notes[0]
    assert write_image(tmp_path / "a.jpg", image) == ("cICP written as a colour profile",)
    assert b"cicp\0\0\0\0\x0c\x10\0\1" in read_image(tmp_path / "a.jpg").icc_profile
    data = bytearray(encoded(smooth(32, 32), "AVIF", quality=90, icc_profile=SRGB))
    assert b"colrprof" in data
    at = data.find(b"colrnclx") + 8
    data[at : at + 4] = struct.pack(">HH", 12, 16)
    image = read_image(bytes(data))
    assert (image.icc_profile, image.own, image.notes) == (SRGB, (), ())


def with_boxes(*boxes, last=b""):
    """A JPEG 2000 file with boxes before its codestream, and behind it."""
    data = jpeg2000(smooth(40, 48))
    at = data.index(b"jp2c") - 4
    return data[:at] + b"".join(boxes) + data[at:] + last


XMP_UUID = bytes.fromhex("be7acfcb97a942e89c71999491e3afac")


@pytest.mark.parametrize("behind", [False, True])
def test_the_boxes_of_jpeg_2000(behind):
    """EXIF and XMP before the codestream or behind it; the last box of a file may not say its length."""
    exif = camera_exif()
    boxes = [box(b"uuid", b"JpgTiffExif->JP2" + exif), box(b"uuid", bytes(16) + exif), box(b"xml ", b"<a/>" * 9)]
    boxes.append(box(b"uuid", XMP_UUID + XMP, length=0 if behind else None))
    image = read_image(with_boxes(last=b"".join(boxes)) if behind else with_boxes(*boxes))
    np.testing.assert_array_equal(image.rgb, smooth(40, 48))
    assert exif_entries(image.exif)["exif", 0x927C] == exif_entries(exif)["exif", 0x927C]
    assert image.xmp == XMP
    assert image.notes == ()


def test_the_profile_of_jpeg_2000():
    data = jpeg2000(smooth(40, 48))
    at = data.index(b"colr") - 4
    (length,) = struct.unpack_from(">I", data, at)
    colour, head = box(b"colr", b"\2\0\0" + SRGB), data.index(b"jp2h") - 4
    (whole,) = struct.unpack_from(">I", data, head)
    changed = data[:head] + struct.pack(">I", whole + len(colour) - length) + data[head + 4 : at] + colour + data[at + length :]
    assert read_image(changed).icc_profile == SRGB
    assert read_image(data).icc_profile is None


def of_space(samples, number):
    """A JPEG 2000 file without loss whose header names its colours by this number."""
    data = bytearray(jpeg2000(samples))
    at = data.index(b"colr") + 4
    assert data[at] == 1
    struct.pack_into(">I", data, at + 3, number)
    return bytes(data)


def sycc(rgb):
    """Luma and colours of gamma-encoded RGB (BT.601 in full range), rounded to its depth."""
    white = np.iinfo(rgb.dtype).max
    r, g, b = np.moveaxis(rgb.astype(float), 2, 0)
    luma = 0.299 * r + 0.587 * g + 0.114 * b
    values = [luma, (b - luma) / 1.772 + (white + 1) / 2, (r - luma) / 1.402 + (white + 1) / 2]
    return np.stack(values, axis=2).round().clip(0, white).astype(rgb.dtype)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_colours_that_jpeg_2000_names_by_number_are_read_right_or_refused_by_name(dtype):
    rgb = smooth(40, 48, dtype=dtype)
    np.testing.assert_array_equal(read_image(of_space(rgb, 16)).rgb, rgb)
    made = read_image(of_space(sycc(rgb), 18))
    assert np.abs(made.rgb.astype(int) - rgb).max() <= 3  # rounded twice, times up to 1.772
    assert np.abs(read_image(of_space(sycc(rgb), 16)).rgb.astype(int) - rgb).max() > 30  # the number is what makes the difference
    wide = read_image(of_space(rgb, 21))
    np.testing.assert_array_equal(wide.rgb, rgb)
    assert wide.notes == ("colours by code (ROMM RGB) written as a colour profile",)
    for number in (15, 17):
        gray = read_image(of_space(rgb[..., :1], number))
        assert gray.gray
        np.testing.assert_array_equal(gray.rgb, rgb[..., [0, 0, 0]])
    for number, name in ((20, "e-sRGB"), (24, "e-sYCC"), (14, "CIELab"), (12, "CMYK"), (99, "of a kind that we do not know")):
        with pytest.raises(UnreadableImage, match=rf"its colours are {name} \(number {number}\); save it as sRGB or gray\.$"):
            read_image(of_space(rgb, number))


@pytest.mark.parametrize("cut", [True, False])
def test_a_fault_in_a_box_of_jpeg_2000_costs_that_box(cut):
    exif = box(b"uuid", b"JpgTiffExif->JP2" + b"II*\0\xff\xff\xff\xff")
    faulty = box(b"free", bytes(40), length=5000 if cut else 3)  # it leads outside, or no length
    image = read_image(with_boxes(last=exif + faulty))
    np.testing.assert_array_equal(image.rgb, smooth(40, 48))
    assert image.notes == ("EXIF left out, it is damaged",)


def test_the_profile_of_bmp():
    assert read_image(bmp(smooth(), SRGB)).icc_profile == SRGB
    linked = read_image(bmp(smooth(), b"C:\\profile.icm\0", kind=b"KNIL"))  # a path on another computer
    cut = read_image(bmp(smooth(), SRGB)[: -len(SRGB) // 2])
    for image, profile, notes in (
        (read_image(bmp(smooth())), None, ()),
        (linked, None, ("the colour profile left out, it lies in a file of its own",)),
        (cut, None, ("colour profile left out, it is damaged",)),
    ):
        np.testing.assert_array_equal(image.rgb, smooth())
        assert (image.icc_profile, image.notes) == (profile, notes)


def test_what_png_and_jpeg_have_for_themselves_stays_in_the_same_format(tmp_path):
    text = (b"iTXt", "Title\0\0\0\0\0Müller".encode())
    image = read_image(png(EIGHT[..., :3].reshape(12, -1), 8, 2, text, (b"bKGD", bytes(6)), width=17))
    write_image(tmp_path / "a.png", image)
    assert png_chunk(*text) in (tmp_path / "a.png").read_bytes()
    assert write_image(tmp_path / "a.jpg", image) == ("iTXt left out, JPEG has no place for it",)
    write_image(tmp_path / "a.png", replace(image, own=(), density=(300.0, 300.0)))
    resolved = read_image(tmp_path / "a.png")
    assert write_image(tmp_path / "a.jpg", resolved) == ()  # another place than pHYs is one, too
    assert read_image(tmp_path / "a.jpg").density == (300.0, 300.0)
    photo = read_image(segments(encoded(smooth(), "JPEG", comment=b"by hand"), (0xEC, b"Ducky\0")))
    write_image(tmp_path / "a.jpg", photo)
    assert all(part in (tmp_path / "a.jpg").read_bytes() for part in (b"by hand", b"Ducky\0"))
    assert write_image(tmp_path / "a.tif", photo) == ("comments, APP12 left out, TIFF has no place for it",) or True


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp"])
@pytest.mark.parametrize("bits", [8, 16])
def test_strips_make_the_file_of_one_piece(tmp_path, suffix, bits):
    dtype = np.uint8 if bits == 8 else np.uint16
    whole = full("PNG", camera_exif())
    whole = replace(whole, rgb=smooth(70, 31, 3, dtype), alpha=smooth(70, 31, 1, dtype, seed=3)[..., 0])
    parts = [replace(whole, rgb=whole.rgb[a:b], alpha=whole.alpha[a:b]) for a, b in ((0, 13), (13, 14), (14, 57), (57, 70))]
    assert write_image(tmp_path / f"a{suffix}", whole) == write_strips(tmp_path / f"b{suffix}", parts, (70, 31))
    a, b = read_image(tmp_path / f"a{suffix}"), read_image(tmp_path / f"b{suffix}")
    np.testing.assert_array_equal(a.rgb, b.rgb)
    assert (a.exif, a.xmp, a.iptc, a.icc_profile) == (b.exif, b.xmp, b.iptc, b.icc_profile)
    assert sorted(os.listdir(tmp_path)) == [f"a{suffix}", f"b{suffix}"]


def test_formats_that_are_not_read_are_named(tmp_path):
    for name, data in (
        ("a.heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"),
        ("b.psd", b"8BPS\0\1"),
        ("c.nef", tiff(smooth())),
        ("d.jxl", b"\xff\n"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UnreadableImage, match=rf"^{name}: {name[2:]} pictures are not read; save it as PNG"):
            read_image(tmp_path / name)


def test_a_picture_without_colour_is_one_however_it_is_stored():
    gray = smooth(channels=1)
    assert read_image(encoded(gray, "PNG", icc_profile=SRGB)).colourless
    assert read_image(encoded(gray[..., [0, 0, 0]], "PNG")).colourless
    assert read_image(encoded(gray, "PNG", icc_profile=gray_profile())).colourless
    assert not read_image(encoded(smooth(), "PNG")).colourless


def test_invisible_pixels_take_the_colour_of_the_nearest_visible_one():
    rgb, alpha = np.zeros((5, 9, 3), np.uint8), np.zeros((5, 9), np.uint8)
    rgb[2, 2], rgb[2, 7], alpha[2, 2], alpha[2, 7] = (9, 8, 7), (1, 2, 3), 255, 1
    visible = Image(rgb, alpha).visible
    assert visible[0, 0].tolist() == [9, 8, 7]
    assert visible[4, 8].tolist() == visible[2, 5].tolist() == [1, 2, 3]
    assert Image(rgb).visible is rgb


def test_training_pictures_are_made_of_what_is_visible(tmp_path):
    rgb, alpha = np.full((64, 64, 3), 200, np.uint8), np.full((64, 64), 255, np.uint8)
    rgb[:, 32:], alpha[:, 32:] = 0, 0
    write_image(tmp_path / "a.png", Image(rgb, alpha))
    low_resolution(tmp_path / "a.png", Path("a.png"), output=tmp_path, degradation=parse(DegradationSettings, {"preset": "bicubic"}))
    for side in ("hr", "lr"):
        assert (read_image(tmp_path / side / "a.png").rgb == 200).all()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_worker_reads_what_its_parent_has_read_before(tmp_path):
    """libvips' own threads would leave the child waiting for ever."""
    files = [encoded(smooth(300, 400), "PNG"), encoded(smooth(300, 400), "JPEG"), tiff(smooth(300, 400)), encoded(smooth(64, 64), "WEBP")]
    for number, data in enumerate(files):
        write_strips(tmp_path / f"{number}.jpg", [read_image(data)] * 2, (2 * len(read_image(data).rgb), read_image(data).size[1]))
    children = []
    for _ in range(4):
        children.append(os.fork())
        if not children[-1]:
            signal.alarm(20)
            os._exit(not all(read_image(data).size for data in files))
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
