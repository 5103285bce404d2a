"""Colours by code (PNG's cICP, gAMA and cHRM, AVIF's nclx) as an ICC profile, for formats that hold nothing else.

The profile is version 4.4 with a matrix and one curve (ICC.1:2022). It repeats a cICP in a tag of its own, so that readers who know
the code can show PQ and HLG as they are meant; to others PQ is light relative to 10,000 cd/m2, HLG light of the scene.
"""

import struct
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
SRGB, D50, DAY = (1, 13), np.array([0.9642, 1.0, 0.8249]), (2022, 1, 1, 0, 0, 0)
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
_D65, _P3 = (0.3127, 0.329), ((0.68, 0.32), (0.265, 0.69), (0.15, 0.06))
PRIMARIES = {  # ITU-T H.273, table 2: (x, y) of white, red, green, blue
    1: (_D65, (0.64, 0.33), (0.3, 0.6), (0.15, 0.06)),
    5: (_D65, (0.64, 0.33), (0.29, 0.6), (0.15, 0.06)),
    6: (_D65, (0.63, 0.34), (0.31, 0.595), (0.155, 0.07)),
    9: (_D65, (0.708, 0.292), (0.17, 0.797), (0.131, 0.046)),
    11: ((0.314, 0.351), *_P3),
    12: (_D65, *_P3),
}
POWERS: dict[int, tuple[float, ...]] = {  # table 3: (g,) is x^g; (g, a, b, c, d) is (a x + b)^g from x = d on, below it c x
    **dict.fromkeys((1, 6, 14, 15), (1 / 0.45, 1 / 1.099, 0.099 / 1.099, 1 / 4.5, 0.081)),  # BT.709
    4: (2.2,),
    5: (2.8,),
    8: (1.0,),
    13: (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045),
}


def _pq(x: Array) -> Array:
    """SMPTE ST 2084, equation 4.1; 1 is 10,000 cd/m2."""
    root = x ** (32 / 2523)
    light: Array = (np.maximum(root - 107 / 128, 0) / (2413 / 128 - 2392 / 128 * root)) ** (8192 / 1305)
    return light


def _hlg(x: Array) -> Array:
    """Inverse OETF of ITU-R BT.2100, table 5."""
    return np.where(x <= 0.5, x * x / 3, (np.exp((x - 0.55991073) / 0.17883277) + 0.28466892) / 12)


SAMPLED: dict[int, Callable[[Array], Array]] = {16: _pq, 18: _hlg}


def profile_of(chunks: Mapping[bytes, bytes], gray: bool) -> bytes | None:
    """An ICC profile, of space GRAY or RGB, that says what a PNG's chunks say of colours; None where that is sRGB.

    The first counts: cICP; sRGB; gAMA with cHRM, where one that is missing is that of sRGB (PNG, third edition, section 4.3).

    Raises ValueError: no profile can say it; the message is the reason.
    """
    if b"cICP" in chunks:
        primaries, transfer, *rest = (known if each == 2 else each for each, known in zip(chunks[b"cICP"], (*SRGB, 0, 1)))  # 2: not said
        if rest != [0, 1] or primaries not in PRIMARIES or transfer not in {*POWERS, *SAMPLED}:
            raise ValueError(f"no profile can say its numbers {', '.join(map(str, chunks[b'cICP']))}")
        code, places, curve = (primaries, transfer, 0, 1), np.array(PRIMARIES[primaries]), _curve(transfer)
        return None if (primaries, transfer) == SRGB else _profile(places, curve, gray, bytes(code))
    if b"sRGB" in chunks:
        return None
    places = np.reshape(struct.unpack(">8I", chunks[b"cHRM"]), (4, 2)) / 1e5 if b"cHRM" in chunks else np.array(PRIMARIES[1])
    gamma = int.from_bytes(chunks.get(b"gAMA", b"\1\0\0")) / 1e5
    if not 0.1 <= gamma <= 10:
        raise ValueError("that is no gamma of a picture")
    return _profile(places, _parametric((1 / gamma,)) if b"gAMA" in chunks else _curve(13), gray)


def romm_profile() -> bytes:
    """ROMM RGB (ISO 22028-2): its primaries, and its curve, 1.8 with a straight beginning."""
    places = np.array([(0.3457, 0.3585), (0.7347, 0.2653), (0.1596, 0.8404), (0.0366, 0.0001)])
    return _profile(places, _parametric((1.8, 1.0, 0.0, 1 / 16, 1 / 32)), False)


def srgb_of_sycc(values: NDArray[np.uint8 | np.uint16], middle: float) -> NDArray[np.uint8 | np.uint16]:
    """[H, W, C] of 16 bits: the first three channels by BT.601's matrix (IEC 61966-2-1, amendment 1), others as they are.

    `middle`: the share of white at which there is no colour. Raises ValueError: fewer channels.
    """
    if values.shape[2] < 3:
        raise ValueError(f"sYCC with {values.shape[2]} channels; expected three or more")
    luma, blue, red = np.moveaxis(values[..., :3].astype(np.float32), 2, 0)
    blue, red = blue - 65535 * middle, red - 65535 * middle
    rgb = np.stack([luma + 1.402 * red, luma - 0.344136 * blue - 0.714136 * red, luma + 1.772 * blue], axis=2)
    return np.concatenate([(rgb.clip(0, 65535) + 0.5).astype(np.uint16), values[..., 3:]], axis=2)


def _parametric(numbers: tuple[float, ...]) -> bytes:
    return b"para" + struct.pack(">IHH", 0, 3 if len(numbers) > 1 else 0, 0) + _fixed(numbers)


def _curve(transfer: int) -> bytes:
    if transfer in POWERS:
        return _parametric(POWERS[transfer])
    samples = SAMPLED[transfer](np.linspace(0, 1, 4096))
    return b"curv" + struct.pack(">II", 0, len(samples)) + np.round(samples * 65535).astype(">u2").tobytes()


def _fixed(numbers: ArrayLike) -> bytes:
    """s15Fixed16Number, big-endian."""
    return np.round(np.ravel(numbers) * 65536).astype(">i4").tobytes()


def _matrices(places: Array) -> tuple[Array, Array]:
    """[4, 2] (x, y) of white, red, green, blue -> XYZ of linear RGB at D50 [3, 3], and the Bradford adaptation [3, 3] in it.

    Raises ValueError: these are no primaries.
    """
    white, *primaries = np.column_stack([places, 1 - places.sum(axis=1)])
    columns = np.transpose(primaries)
    usable = places.max() <= 1 and white.min() > 0.05 and abs(np.linalg.det(columns)) > 1e-4
    if not usable or (shares := np.linalg.solve(columns, white / white[1])).min() <= 0:
        raise ValueError("these are no primaries of a picture")
    adapt = np.linalg.inv(BRADFORD) @ np.diag(BRADFORD @ D50 / (BRADFORD @ (white / white[1]))) @ BRADFORD
    return adapt @ (columns * shares), adapt


def _profile(places: Array, curve: bytes, gray: bool, code: bytes = b"") -> bytes:
    matrix, adapt = _matrices(places)
    text = "Colours of the picture".encode("utf-16-be")
    text = b"mluc" + struct.pack(">3I4s2I", 0, 1, 12, b"enUS", len(text), 28) + text
    tags = {b"desc": text, b"cprt": text, b"wtpt": b"XYZ \0\0\0\0" + _fixed(D50), b"chad": b"sf32\0\0\0\0" + _fixed(adapt)}
    if gray:
        tags[b"kTRC"] = curve
    else:
        tags |= {name + b"XYZ": b"XYZ \0\0\0\0" + _fixed(column) for name, column in zip((b"r", b"g", b"b"), matrix.T)}
        tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve) | ({b"cicp": b"cicp\0\0\0\0" + code} if code else {})
    places_of, body, start = dict[bytes, int](), b"", 128 + 4 + 12 * len(tags)
    for each in tags.values():  # equal ones stand there once
        if each not in places_of:
            places_of[each] = start + len(body)
            body += each + bytes(-len(each) % 4)
    table = struct.pack(">I", len(tags)) + b"".join(struct.pack(">4sII", name, places_of[each], len(each)) for name, each in tags.items())
    head = struct.pack(">I4xI4s4s4s6H4s28x", start + len(body), 0x04400000, b"mntr", b"GRAY" if gray else b"RGB ", b"XYZ ", *DAY, b"acsp")
    return (head + _fixed(D50)).ljust(128, b"\0") + table + body
