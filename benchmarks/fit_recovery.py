"""What `sslsr prepare fit` finds in photographs that were degraded by known parameters.

The photographs are those of examples/photos; none of them was looked at while the estimators were made. Each is shrunk (Lanczos) to a
shorter side of 280 pixels, blurred by a Gaussian of 0.2 to 1.5 pixels, gets independent noise of sigma 2 to 25 in every channel, is
rounded to 8 bits and saved as JPEG of quality 30 to 95 with halved chroma; all three are uniform draws by a fixed seed. A sigma counts as
found within 25 %, a quality within 10; noise that the command calls not measurable counts as not found.

    python benchmarks/fit_recovery.py [--draws 6] [--sigma 2 25] [--kind jpg|png] [--output benchmarks/results/fit_recovery.csv]
"""

from __future__ import annotations

import argparse
import csv
import io
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from sslsr_diffusion.data.estimate import estimate

PHOTOS = sorted((Path(__file__).parents[1] / "examples" / "photos").rglob("*.jpg"))
SEED, SIDE = 280, 280


class Case(NamedTuple):
    picture: str
    blur: float  # pixels
    sigma: float  # grey levels
    quality: int
    data: bytes  # the JPEG file


def cases(draws: int, sigmas: tuple[float, float] = (2, 25)) -> Iterator[Case]:
    import cv2

    for number, path in enumerate(PHOTOS):
        random = np.random.default_rng([SEED, number])
        photo = Image.open(path).convert("RGB")
        shrink = SIDE / min(photo.size)
        small = photo.resize((round(photo.width * shrink), round(photo.height * shrink)), Image.Resampling.LANCZOS)
        for _ in range(draws):
            blur, sigma, quality = random.uniform(0.2, 1.5), random.uniform(*sigmas), int(random.integers(30, 96))
            pixels = cv2.GaussianBlur(np.asarray(small, dtype=np.float64), (0, 0), blur)
            pixels += random.normal(0, sigma, pixels.shape)
            file = io.BytesIO()
            Image.fromarray(np.clip(pixels, 0, 255).round().astype(np.uint8)).save(file, "JPEG", quality=quality)
            yield Case(path.stem, blur, sigma, quality, file.getvalue())


def recover(case: Case, kind: str, folder: Path) -> dict[str, Any]:
    """Parameters and estimates of one case; a png has the blocks, but no tables any more."""
    path = folder / f"case.{kind}"
    if kind == "png":
        Image.open(io.BytesIO(case.data)).save(path)
    else:
        path.write_bytes(case.data)
    found = estimate(path)
    return {
        "picture": case.picture,
        "kind": kind,
        "sigma": round(case.sigma, 1),
        "found_sigma": round(found.noise, 1),
        "measured": found.noise_measured,
        "sigma_ok": found.noise_measured and abs(found.noise / case.sigma - 1) <= 0.25,
        "quality": case.quality,
        "found_quality": found.quality,
        "quality_ok": found.quality is not None and abs(found.quality - case.quality) <= 10,
        "blur": round(case.blur, 2),
        "found_blur": round(found.blur, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=6, help="of every photograph")
    parser.add_argument("--sigma", nargs=2, type=float, default=[2, 25], help="least and greatest")
    parser.add_argument("--kind", nargs="*", default=["jpg", "png"])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [recover(case, kind, Path(folder)) for kind in options.kind for case in cases(options.draws, tuple(options.sigma))]
    for kind in options.kind:
        mine = [row for row in rows if row["kind"] == kind]
        unmeasured = [row for row in mine if not row["measured"]]
        print(
            f"{kind}: {len(mine)} pictures; sigma within 25 %: {sum(row['sigma_ok'] for row in mine)}, "
            f"not measurable: {len(unmeasured)} (bound holds: {sum(row['sigma'] <= row['found_sigma'] for row in unmeasured)}); "
            f"quality within 10: {sum(row['quality_ok'] for row in mine)}"
        )
        for low, high in ((1, 4), (4, 7), (7, 12), (12, 25)):
            line = f"  sigma {low:2} to {high:2}:"
            for least, most in ((30, 49), (50, 69), (70, 84), (85, 95)):
                cell = [row for row in mine if low <= row["sigma"] < high and least <= row["quality"] <= most]
                line += (
                    f"   q{least}-{most} {sum(r['sigma_ok'] for r in cell):2} of {len(cell):2}, {sum(not r['measured'] for r in cell)} n.m."
                )
            print(line)
    for row in rows:
        if not (row["sigma_ok"] and row["quality_ok"]):
            print(row)
    if options.output:
        with options.output.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
