"""The one reader and writer: what goes in comes out, what cannot be kept is said, what is damaged is refused in one sentence."""

from __future__ import annotations

import io
import os
import struct
import zlib

import cv2
import numpy as np
import pytest
import torch
from picture_files import tiff
from PIL import Image as Pillow
from PIL import ImageCms, ImageOps

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.files import atomic_write
from sslsr_diffusion.images import (
    Image,
    UnreadableImage,
    list_images,
    printable,
    read_image,
    resize_bicubic,
    to_array,
    to_tensor,
    write_image,
)
from sslsr_diffusion.metadata.blocks import PNG_SIGNATURE, png_chunk
from sslsr_diffusion.metadata.exif import orientation, upright_exif

PREFIX = b"Exif\0\0"
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def smooth(height=23, width=31, channels=3, dtype=np.uint8, seed=0):
    """A smooth picture whose values reach both ends of the range and use the low bits."""
    rng = np.random.default_rng(seed)
    x = cv2.GaussianBlur(rng.random((height, width, channels)), (0, 0), 3).reshape(height, width, channels)
    x = (x - x.min()) / (x.max() - x.min())
    return np.round(x * np.iinfo(dtype).max).astype(dtype)


def encoded(pixels, format, **options):
    buffer = io.BytesIO()
    image = pixels if isinstance(pixels, Pillow.Image) else Pillow.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    image.save(buffer, format, **options)
    return buffer.getvalue()


def exif_block(turn=1, maker=b"\x01\x02maker\x00note"):
    exif = Pillow.Exif()
    exif[0x010F], exif[0x0112] = "Camera", turn
    exif[0x8769] = {0x927C: maker, 0xA002: 31, 0xA003: 23, 0x829A: 0.01}
    exif[0x8825] = {1: "N", 2: (48.0, 8.0, 3.5)}
    return exif.tobytes()


def gray_profile(space=b"GRAY"):
    """The least that counts as a profile: readers look at the header alone."""
    header = bytearray(132)
    header[0:4], header[16:20], header[36:40] = struct.pack(">I", 132), space, b"acsp"
    return bytes(header)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize("gray", [False, True])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_lossless_formats_return_every_bit(tmp_path, dtype, gray, alpha, suffix):
    rgb = smooth(dtype=dtype)
    rgb = rgb[..., [0, 0, 0]] if gray else rgb
    profile = gray_profile() if gray else SRGB
    exif = upright_exif(exif_block().removeprefix(PREFIX), (23, 31))
    image = Image(rgb, smooth(channels=1, dtype=dtype, seed=1)[..., 0] if alpha else None, profile, exif, gray=gray)
    assert write_image(tmp_path / f"a{suffix}", image) == ()
    back = read_image(tmp_path / f"a{suffix}")
    assert back.rgb.dtype == dtype
    np.testing.assert_array_equal(back.rgb, rgb)
    assert (back.alpha is None) is not alpha
    if alpha:
        np.testing.assert_array_equal(back.alpha, image.alpha)
    assert (back.gray, back.icc_profile, back.notes) == (gray, profile, ())
    exif_back = Pillow.Exif()
    exif_back.load(back.exif)
    assert exif_back[0x010F] == "Camera"
    assert exif_back.get_ifd(0x8769)[0x927C] == b"\x01\x02maker\x00note"
    assert exif_back.get_ifd(0x8825)[2] == (48.0, 8.0, 3.5)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (1500, 700)])
def test_other_readers_agree_with_our_16_bit_files(tmp_path, shape, channels):
    tifffile = pytest.importorskip("tifffile", reason="the independent TIFF reader of the dev extra")
    samples = smooth(*shape, channels, np.uint16) if min(shape) > 1 else np.full((*shape, channels), 258, np.uint16)
    gray, alpha = channels < 3, samples[..., -1] if channels in (2, 4) else None
    image = Image(samples[..., [0, 0, 0]] if gray else samples[..., :3], alpha, gray=gray)
    write_image(tmp_path / "a.png", image)
    write_image(tmp_path / "a.tif", image)
    tiff = tifffile.imread(tmp_path / "a.tif").reshape(*shape, -1)
    np.testing.assert_array_equal(tiff, samples)
    png = cv2.imread(str(tmp_path / "a.png"), cv2.IMREAD_UNCHANGED).reshape(*shape, -1)
    order = {1: [0], 2: [0, 3], 3: [2, 1, 0], 4: [2, 1, 0, 3]}[channels]
    np.testing.assert_array_equal(png[..., order], samples)
    with Pillow.open(tmp_path / "a.png") as file:
        file.verify()


def test_files_of_other_16_bit_writers_are_read_whole(tmp_path):
    tifffile = pytest.importorskip("tifffile", reason="the independent TIFF writer of the dev extra")
    rgb = smooth(dtype=np.uint16)
    for options in ({"tile": (16, 16)}, {"byteorder": ">"}, {"compression": "zlib"}):
        tifffile.imwrite(tmp_path / "a.tif", rgb, photometric="rgb", **options)
        np.testing.assert_array_equal(read_image(tmp_path / "a.tif").rgb, rgb, err_msg=str(options))
    alpha = np.full(rgb.shape[:2], 32768, np.uint16)
    premultiplied = np.dstack([np.round(rgb * (32768 / 65535)).astype(np.uint16), alpha])
    tifffile.imwrite(tmp_path / "a.tif", premultiplied, photometric="rgb", extrasamples=["assocalpha"])
    back = read_image(tmp_path / "a.tif")
    np.testing.assert_array_equal(back.alpha, alpha)
    assert np.abs(back.rgb.astype(int) - rgb).max() <= 2  # the file itself lost one bit to the multiplication
    for unusual in (rgb.astype(np.float32), rgb.astype(np.int16), rgb.astype(np.uint32)):
        tifffile.imwrite(tmp_path / "a.tif", unusual, photometric="rgb")
        with pytest.raises(UnreadableImage, match=r"a\.tif: "):
            read_image(tmp_path / "a.tif")
    tifffile.imwrite(tmp_path / "a.tif", rgb.transpose(2, 0, 1), photometric="rgb", planarconfig="separate")
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif").rgb, rgb)


def test_16_bit_png_with_one_transparent_colour(tmp_path):
    rgb = smooth(dtype=np.uint16)
    write_image(tmp_path / "a.png", Image(rgb))
    data = (tmp_path / "a.png").read_bytes()
    key = png_chunk(b"tRNS", rgb[4, 5].astype(">u2").tobytes())
    back = read_image(data[:33] + key + data[33:])
    np.testing.assert_array_equal(back.rgb, rgb)
    np.testing.assert_array_equal(back.alpha, np.where((rgb == rgb[4, 5]).all(axis=2), 0, 65535))


def test_16_bit_ppm_and_pgm():
    for channels, magic in ((3, b"P6"), (1, b"P5")):
        samples = smooth(channels=channels, dtype=np.uint16)
        back = read_image(magic + b"\n# by hand\n31 23\n65535\n" + samples.astype(">u2").tobytes())
        np.testing.assert_array_equal(back.rgb, np.broadcast_to(samples, (23, 31, 3)))
        assert (back.format, back.gray) == ("PPM", channels == 1)


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "PNG16", "TIFF16"])
def test_orientation_is_applied_and_reset(tmp_path, format, turn):
    pixels = smooth()
    if format.endswith("16"):
        image = Image(pixels.astype(np.uint16) * 257, exif=exif_block().removeprefix(PREFIX))
        write_image(tmp_path / "a", image, format=format[:-2])
        data = bytearray((tmp_path / "a").read_bytes())
        if format == "PNG16":  # the writer stores 1: put the wanted value into eXIf and mend its checksum
            chunk = png_chunk(b"eXIf", exif_block().removeprefix(PREFIX))
            data = data.replace(chunk, png_chunk(b"eXIf", exif_block(turn).removeprefix(PREFIX)))
        else:
            data = data.replace(struct.pack(">HHIH", 274, 3, 1, 1), struct.pack(">HHIH", 274, 3, 1, turn))
        upright = ImageOps.exif_transpose(_with_turn(pixels, turn))
        want = np.asarray(upright).astype(np.uint16) * 257
    else:
        options = {"lossless": True} if format == "WEBP" else {}
        data = encoded(pixels, format, exif=exif_block(turn), **options)
        want = np.asarray(ImageOps.exif_transpose(Pillow.open(io.BytesIO(data))))
    image = read_image(bytes(data))
    np.testing.assert_array_equal(image.rgb, want)
    assert orientation(image.exif) == 1
    stated = Pillow.Exif()
    stated.load(image.exif)
    assert (stated.get_ifd(0x8769)[0xA003], stated.get_ifd(0x8769)[0xA002]) == image.size


def _with_turn(pixels, turn):
    image = Pillow.fromarray(pixels)
    image.getexif()[0x0112] = turn
    return image


def test_palette_with_transparency_and_gray_and_one_bit():
    palette = Pillow.fromarray(smooth()).quantize(32)
    plain = read_image(encoded(palette, "PNG"))
    np.testing.assert_array_equal(plain.rgb, np.asarray(palette.convert("RGB")))
    assert plain.alpha is None
    clear = read_image(encoded(palette, "PNG", transparency=bytes([0, 100]) + bytes([255]) * 30))
    np.testing.assert_array_equal(clear.alpha, np.choose(np.minimum(np.asarray(palette), 2), [0, 100, 255]))
    gray = read_image(encoded(smooth(channels=1), "PNG", transparency=7))
    assert gray.gray
    np.testing.assert_array_equal(gray.alpha, np.where(smooth(channels=1)[..., 0] == 7, 0, 255))
    bits = read_image(encoded(Pillow.fromarray(smooth(channels=1)[..., 0]).convert("1"), "PNG"))
    assert bits.gray
    assert set(np.unique(bits.rgb)) == {0, 255}


def cmyk_profile(lab_of_cyan=(128, 100, 100)):
    """A CMYK profile with a two-point table: white paper, `lab_of_cyan` wherever there is cyan, else darker with every ink."""
    table = bytearray()
    for corner in range(16):
        c, m, y, k = (corner >> 3) & 1, (corner >> 2) & 1, (corner >> 1) & 1, corner & 1
        table += bytes(lab_of_cyan) if c and not (m or y or k) else bytes([255 - 60 * (c + m + y + k), 128, 128])
    identity = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    ramp = bytes(range(256))
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + identity + ramp * 4 + bytes(table) + ramp * 3
    lut += b"\0" * (-len(lut) % 4)
    at = 128 + 4 + 12
    header = bytearray(128)
    header[0:4], header[8:12] = struct.pack(">I", at + len(lut)), bytes([2, 0x40, 0, 0])
    header[12:16], header[16:20], header[20:24], header[36:40] = b"prtr", b"CMYK", b"Lab ", b"acsp"
    header[68:80] = struct.pack(">3i", 63190, 65536, 54061)  # D50
    return bytes(header) + struct.pack(">I4sII", 1, b"A2B0", at, len(lut)) + lut


def srgb_of_lab(light, a, b):
    """CIE Lab (D50) to sRGB with the Bradford-adapted matrix, by hand."""
    y = (light + 16) / 116
    f = np.array([y + a / 500, y, y - b / 200])
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * [0.9642, 1.0, 0.8249]
    matrix = [[3.1338561, -1.6168667, -0.4906146], [-0.9787684, 1.9161415, 0.0334540], [0.0719453, -0.2289914, 1.4052427]]
    linear = np.clip(np.array(matrix) @ xyz, 0, 1)
    return np.round(255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055))


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_cmyk_goes_through_its_profile(format):
    cyan = Pillow.new("CMYK", (32, 24), (255, 0, 0, 0))
    options = {"quality": 100} if format == "JPEG" else {}
    with_profile = read_image(encoded(cyan, format, icc_profile=cmyk_profile(), **options))
    without = read_image(encoded(cyan, format, **options))
    want = srgb_of_lab(128 / 2.55, 100 - 128, 100 - 128)
    assert np.abs(with_profile.rgb[12, 16].astype(int) - want).max() <= 4  # JPEG and the 8-bit table round
    assert np.abs(with_profile.rgb[12, 16].astype(int) - without.rgb[12, 16]).max() > 30
    assert with_profile.icc_profile is None
    assert with_profile.notes == ("CMYK converted to sRGB",)
    assert without.notes == ("CMYK without a profile converted to sRGB",)
    broken = read_image(encoded(cyan, format, icc_profile=cmyk_profile()[:200], **options))
    assert "unusable" in broken.notes[0]


def test_cmyk_of_16_bits_keeps_them():
    """Linear in each ink from corner to corner of the profile's table: values between those of 8 bits come out between."""
    inks = np.zeros((4, 512, 4), np.uint16)
    inks[..., 3] = np.linspace(0, 65535, 512)
    embedded = (34675, 7, len(cmyk_profile()), cmyk_profile())
    image = read_image(tiff(inks, t262=(3, [5]), extra=[embedded]))
    assert image.rgb.dtype == np.uint16
    assert image.notes == ("CMYK converted to sRGB",)
    assert image.icc_profile is None
    for ink, got in ((0, image.rgb[1, 0]), (1, image.rgb[1, -1])):
        assert np.abs(got / 257 - srgb_of_lab((255 - 60 * ink) / 2.55, 0, 0)).max() <= 1
    assert len(np.unique(image.rgb[1, :, 0])) > 500
    eight = read_image(tiff((inks // 257).astype(np.uint8), t262=(3, [5]), extra=[embedded]))
    assert np.abs(image.rgb / 257 - eight.rgb).max() <= 1.5  # of ink and of light, 8 bits round both
    without = read_image(tiff(inks, t262=(3, [5])))
    assert (without.rgb.dtype, without.notes) == (np.uint16, ("CMYK without a profile converted to sRGB",))


def test_a_profile_stays_only_where_it_describes_the_channels():
    gray = smooth(channels=1)
    assert read_image(encoded(gray, "PNG", icc_profile=gray_profile())).gray
    kept = read_image(encoded(gray, "JPEG", icc_profile=SRGB))
    assert (kept.icc_profile, kept.gray) == (SRGB, False)  # gray pixels become colour for their profile's sake
    dropped = read_image(encoded(smooth(), "PNG", icc_profile=gray_profile(b"CMYK")))
    assert dropped.icc_profile is None
    assert "CMYK" in dropped.notes[0]


def test_animation_and_pages_give_the_first_and_say_so():
    frames = [Pillow.fromarray(smooth(seed=s)) for s in range(3)]
    for format in ("GIF", "PNG", "WEBP", "TIFF"):
        image = read_image(encoded(frames[0], format, save_all=True, append_images=frames[1:]))
        assert len(image.notes) == 1, format
        assert "first" in image.notes[0]
        assert np.abs(image.rgb.astype(int) - np.asarray(frames[0])).mean() < 12  # GIF's palette, WebP's loss


def test_content_decides_not_the_name(tmp_path):
    (tmp_path / "a.jpg").write_bytes(encoded(smooth(), "PNG"))
    assert read_image(tmp_path / "a.jpg").format == "PNG"


def big_png(width, height):
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return PNG_SIGNATURE + header + png_chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + png_chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "reason"),
    {
        "empty": (b"", "empty"),
        "text": (b"not a picture at all\n" * 100, "not a picture"),
        "bomb": (big_png(60000, 60000), "3600 megapixels are more than the 179 .* cut the picture into pieces"),
        "small bomb": (big_png(13000, 14000), "182 megapixels are more than the 179 .* cut the picture into pieces"),
        "text bomb": (
            encoded(smooth(), "PNG")[:33] + png_chunk(b"zTXt", b"k\0\0" + zlib.compress(b"a" * (90 << 20), 9)) + b"\0",
            "damaged|too large|cut off",
        ),
        "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not a picture"),
        "svg": (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "not a picture"),
        "pickle": (b"\x80\x04\x95cos\nsystem\n", "not a picture"),
    }.values(),
    ids=["empty", "text", "bomb", "small bomb", "text bomb", "postscript", "svg", "pickle"],
)
def test_what_is_no_picture_is_refused_in_one_sentence(data, reason):
    with pytest.raises(UnreadableImage, match=reason) as caught:
        read_image(data, name="x.png")
    assert str(caught.value).startswith("x.png: ")
    assert "\n" not in str(caught.value)


def all_kinds(tmp_path):
    eight = smooth(64, 80)
    for format in ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP", "AVIF", "JPEG2000"):
        if format in Pillow.SAVE or (Pillow.init() and format in Pillow.SAVE):
            yield format, encoded(eight, format)
    for suffix in (".png", ".tif"):
        write_image(tmp_path / f"a{suffix}", Image(smooth(64, 80, dtype=np.uint16)))
        yield f"16 bit {suffix}", (tmp_path / f"a{suffix}").read_bytes()
    yield "tiff by opencv", cv2.imencode(".tif", smooth(64, 80, dtype=np.uint16))[1].tobytes()


def test_a_cut_file_is_never_half_a_picture(tmp_path):
    for kind, data in all_kinds(tmp_path):
        whole = read_image(data)
        for part in (0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99):
            try:
                image = read_image(data[: int(len(data) * part)])
            except UnreadableImage:
                continue
            np.testing.assert_array_equal(image.rgb, whole.rgb, err_msg=f"{kind} cut at {part:.0%}")


def test_flipped_bytes_give_a_picture_or_a_refusal(tmp_path):
    rng = np.random.default_rng(0)
    for kind, data in all_kinds(tmp_path):
        for _ in range(25):
            broken = bytearray(data)
            for at in rng.integers(0, min(len(data), 400) if rng.random() < 0.5 else len(data), 5):
                broken[at] = rng.integers(256)
            try:
                image = read_image(bytes(broken))
            except UnreadableImage:
                continue
            assert image.rgb.ndim == 3, kind


def test_huge_exif_is_kept_where_it_fits_and_said_where_not(tmp_path):
    image = Image(smooth(), exif=exif_block(maker=bytes(range(256)) * 800).removeprefix(PREFIX))
    assert write_image(tmp_path / "a.png", image) == ()
    assert len(read_image(tmp_path / "a.png").exif) > 200_000
    assert write_image(tmp_path / "a.jpg", image) == ("EXIF left out, too large for JPEG",)
    assert read_image(tmp_path / "a.jpg").exif is None


def test_broken_exif_loses_only_itself():
    for block in (b"II*\0\xff\xff\xff\xff", b"MM\0*", b"nonsense", b"II*\0\x08\0\0\0\xff\xff" + b"\0" * 40):
        image = read_image(encoded(smooth(), "JPEG", exif=PREFIX + block))
        assert image.exif is None
        assert image.notes == ("EXIF left out, it is damaged",)


def test_formats_that_cannot_keep_everything_say_what(tmp_path):
    alpha = np.zeros((23, 31), np.uint16)
    alpha[:12] = 65535
    image = Image(smooth(dtype=np.uint16), alpha, SRGB)
    assert set(write_image(tmp_path / "a.jpg", image)) == {"8 of 16 bits", "alpha flattened on white"}
    flat = read_image(tmp_path / "a.jpg")
    assert flat.rgb[16:].min() > 245
    assert flat.icc_profile == SRGB
    assert write_image(tmp_path / "a.webp", image) == ("8 of 16 bits",)
    webp = read_image(tmp_path / "a.webp")
    np.testing.assert_array_equal(webp.alpha, alpha // 257)
    assert write_image(tmp_path / "b.webp", Image(smooth(), icc_profile=gray_profile(), gray=True))[0].startswith("the gray profile")
    with pytest.raises(UserError, match="16383"):
        write_image(tmp_path / "c.webp", Image(np.zeros((1, 16384, 3), np.uint8)))
    with pytest.raises(UserError, match="expected one of PNG"):
        write_image(tmp_path / "c.gif", image)
    assert not list(tmp_path.glob("c.*"))


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path, monkeypatch):
    target = tmp_path / "a.png"
    atomic_write(target, b"old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        atomic_write(target, b"new")
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.png"]


def test_list_images_survives_hostile_trees(tmp_path):
    for name in (b"caf\xe9.png", b"new\nline.jpg", b"-dash.png", b".hidden.png", b"notes.txt", b"B.PNG", b"a.png"):
        (tmp_path / os.fsdecode(name)).write_bytes(b"x")
    (tmp_path / "sub" / "deep").mkdir(parents=True)
    (tmp_path / "sub" / "deep" / "c.webp").write_bytes(b"x")
    (tmp_path / "sub" / "deep" / "loop").symlink_to(tmp_path)
    (tmp_path / "alias").symlink_to(tmp_path / "sub")  # sorts before "sub": the real name must win
    (tmp_path / "broken.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "d.png").write_bytes(b"x")
    os.mkfifo(tmp_path / "pipe.png")
    found = [os.fsencode(p.relative_to(tmp_path)) for p in list_images(tmp_path)]
    assert sorted(found) == sorted([b"-dash.png", b"B.PNG", b"a.png", b"caf\xe9.png", b"new\nline.jpg", b"sub/deep/c.webp"])
    assert found == [os.fsencode(p.relative_to(tmp_path)) for p in sorted(list_images(tmp_path))]
    assert len(list_images(tmp_path, recursive=False)) == 5
    assert [p.name for p in list_images(str(tmp_path / "**" / "*.webp"))] == ["c.webp"]
    assert [p.name for p in list_images(str(tmp_path / "*.PNG"))] == ["B.PNG"]
    assert [p.name for p in list_images(tmp_path, skip_folder=lambda p: p.name == "deep")].count("c.webp") == 0
    assert list_images(tmp_path / "notes.txt") == [tmp_path / "notes.txt"]  # named itself: reading decides
    for missing in (tmp_path / "none", str(tmp_path / "*.tif")):
        with pytest.raises(UserError, match="found nothing"):
            list_images(missing)
    with pytest.raises(UnreadableImage, match="regular"):
        read_image(tmp_path / "pipe.png")
    assert printable(os.fsdecode(b"caf\xe9\n.png")) == "caf\\xe9\\n.png"


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_tensors_and_back(dtype):
    array = smooth(dtype=dtype)
    tensor = to_tensor(array)
    assert (tensor.dtype, tuple(tensor.shape)) == (torch.float32, (3, 23, 31))
    assert float(tensor.min()) == 0.0
    assert float(tensor.max()) == 1.0
    np.testing.assert_array_equal(to_array(tensor, dtype), array)
    beyond = torch.tensor([[[-0.2, 1.3]]])
    assert to_array(beyond, dtype).ravel().tolist() == [0, np.iinfo(dtype).max]
    assert to_tensor(array[..., 0]).shape == (1, 23, 31)
    with pytest.raises(ValueError, match="NaN"):
        to_array(torch.full((1, 2, 2), float("nan")))
    with pytest.raises(ValueError, match="expected"):
        to_tensor(array.astype(np.float32))


def test_bicubic_follows_its_kernel():
    image = to_tensor(smooth(12, 9))[None]
    large = resize_bicubic(image, (48, 36))
    at, a = (22 + 0.5) / 4 - 0.5, -0.75  # row 22 of the result lies here in the source
    base = int(np.floor(at))
    taps = [abs(at - (base + k)) for k in (-1, 0, 1, 2)]
    weights = [(a + 2) * x**3 - (a + 3) * x**2 + 1 if x <= 1 else a * (x**3 - 5 * x**2 + 8 * x - 4) for x in taps]
    flat = image[..., 3:4].expand(-1, -1, -1, 9)  # constant along x: only the vertical kernel counts
    got = resize_bicubic(flat, (48, 36))[0, 1, 22, 18]
    want = sum(w * image[0, 1, base + k, 3] for w, k in zip(weights, (-1, 0, 1, 2)))
    assert abs(float(got - want)) < 1e-6  # float32 sums of four terms below 1
    assert tuple(large.shape) == (1, 3, 48, 36)
    assert resize_bicubic(image, (12, 9)) is image
    checker = (torch.arange(64)[:, None] + torch.arange(64)[None]) % 2
    small = resize_bicubic(checker[None, None].float(), (16, 16))
    assert float((small[..., 2:-2, 2:-2] - 0.5).abs().max()) < 0.02  # antialiased: no moire
