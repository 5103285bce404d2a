"""Reader against reader: seconds of processor and peak memory of decoding 1, 12 and 100 megapixels, each in a process of its own.

python benchmarks/readers.py [megapixels ...]      # needs the readers that are compared: pip install tifffile imagecodecs
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

SIZES = {"1": (1000, 1000), "12": (3000, 4000), "100": (10000, 10000)}


def files(folder: Path, size: str) -> list[Path]:
    import cv2
    import tifffile

    height, width = SIZES[size]
    coarse = np.random.default_rng(0).integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
    rgb = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    made = [folder / name for name in ("8.png", "16.png", "8.jpg", "8.tif")]
    cv2.imwrite(str(made[0]), rgb)
    cv2.imwrite(str(made[1]), rgb.astype(np.uint16) * 257)
    cv2.imwrite(str(made[2]), rgb)
    tifffile.imwrite(made[3], rgb, photometric="rgb", compression="zlib", predictor=True, rowsperstrip=64)
    return made


def vips(path: str) -> None:
    import pyvips

    image = pyvips.Image.new_from_file(path, access="sequential", fail_on="error")
    pyvips.Region.new(image).fetch(0, 0, image.width, image.height)


def vips_strips(path: str) -> None:
    import pyvips

    image = pyvips.Image.new_from_file(path, access="sequential", fail_on="error")
    region = pyvips.Region.new(image)
    for y in range(0, image.height, 256):
        region.fetch(0, y, image.width, min(256, image.height - y))


def pillow(path: str) -> None:
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None
    np.asarray(Image.open(path))


def opencv(path: str) -> None:
    import cv2

    assert cv2.imread(path, cv2.IMREAD_UNCHANGED) is not None


def imagecodecs(path: str) -> None:
    import imagecodecs
    import tifffile

    if path.endswith("tif"):
        tifffile.imread(path)
    else:
        {"png": imagecodecs.png_decode, "jpg": imagecodecs.jpeg_decode}[path[-3:]](Path(path).read_bytes())


READERS = {function.__name__: function for function in (vips, vips_strips, pillow, opencv, imagecodecs)}


def peak() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] in READERS:
        reader, path, small = READERS[sys.argv[1]], sys.argv[2], sys.argv[3]
        reader(small)  # imports and tables
        before, began = peak(), time.process_time()
        reader(path)
        print(json.dumps([round(time.process_time() - began, 2), round(peak() - before)]))
        return
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "1").mkdir()
        small = {path.name: path for path in files(Path(folder) / "1", "1")}
        for size in sys.argv[1:] or SIZES:
            for path in files(Path(folder), size):
                row = [f"{size} MP {path.name}"]
                for name in READERS:
                    command = [sys.executable, __file__, name, str(path), str(small[path.name])]
                    made = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
                    seconds, memory = json.loads(made.stdout) if made.returncode == 0 else ("-", "-")
                    row.append(f"{name} {seconds} s, {memory} MB")
                print(" | ".join(row), flush=True)


if __name__ == "__main__":
    main()
