"""Edge masks by name, and a user's own mask files."""

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.io import loadmat
from torch import Tensor

from sslsr_diffusion.data.filters import opencv
from sslsr_diffusion.data.settings import MaskSettings
from sslsr_diffusion.errors import UserError
from sslsr_diffusion.images import IMAGE_SUFFIXES, printable, read_image
from sslsr_diffusion.ops import edge_mask

MASK_SUFFIXES = (".npy", ".mat", ".png")  # the first that exists counts


class MaskMismatch(UserError):
    """A mask file is missing, unreadable or of another size than its picture."""


def make_mask(hr: Tensor, settings: MaskSettings, generator: torch.Generator) -> Tensor:
    """The mask of a crop, before the cap: hr [B, 3, H, W] in [0, 1] -> bool [B, 1, H, W]."""
    return MASKS[settings.kind](hr, settings, generator)


def capped(mask: Tensor, settings: MaskSettings, generator: torch.Generator) -> Tensor:
    """A mask, one from a file too, with at most `max_pixels` pixels."""
    return mask if settings.max_pixels is None else edge_mask.cap_mask(mask, settings.max_pixels, generator)


def canny_mask(hr: Tensor, threshold: float) -> Tensor:
    """OpenCV's Canny edges of the 8-bit luma, lower threshold half of the upper one."""
    cv2 = opencv()
    grey = edge_mask.grey_levels(hr.cpu())[:, 0].to(torch.uint8).numpy()
    edges = np.stack([cv2.Canny(one, threshold / 2, threshold) for one in grey])
    return torch.from_numpy(edges > 0)[:, None].to(hr.device)


MASKS: dict[str, Callable[[Tensor, MaskSettings, torch.Generator], Tensor]] = {
    "laplacian": lambda hr, settings, generator: edge_mask.laplacian_edge_mask(hr, settings.threshold),
    "laplacian_abs": lambda hr, settings, generator: edge_mask.laplacian_abs_edge_mask(hr, settings.threshold),
    "sobel": lambda hr, settings, generator: edge_mask.sobel_edge_mask(hr, settings.threshold),
    "canny": lambda hr, settings, generator: canny_mask(hr, settings.threshold),
    "all": lambda hr, settings, generator: edge_mask.full_mask(hr),
    "random": lambda hr, settings, generator: edge_mask.random_mask(hr, settings.density, generator),
}


class MaskFiles:
    """The mask files of a folder, found by the names of their pictures without suffix."""

    def __init__(self, folder: str) -> None:
        base = Path(folder).expanduser()
        if not base.is_dir():
            raise UserError(f"mask folder {printable(base)}: expected a folder, found none.")
        self._folder = folder
        self._found: dict[str, list[Path]] = {}
        for suffix in MASK_SUFFIXES:
            found = itertools.groupby(sorted(base.rglob(f"*{suffix}"), key=lambda path: path.stem), lambda path: path.stem)
            self._found = {stem: list(paths) for stem, paths in found} | self._found
        if not self._found:
            raise UserError(f"mask folder {printable(base)}: expected {', '.join(MASK_SUFFIXES)} files, found none.")

    def read(self, name: str, file: str, size: tuple[int, int]) -> NDArray[np.bool_]:
        """The mask [H, W] of a picture of `size` (H, W) by its file name (or key); `name` is for messages.
        Raises MaskMismatch: there is no mask for it, or none that fits.
        """
        if not file:
            raise MaskMismatch(f"{name}: expected a file name to find its mask by, the row has none; set name_column to a column of names.")
        path = self._path(name, Path(file))
        mask = read_mask(path)
        if mask.shape != size:
            got = f"{mask.shape[1]}x{mask.shape[0]}"
            raise MaskMismatch(f"{name}: {size[1]}x{size[0]} pixels, but its mask {printable(path.name)} has {got}.")
        return mask

    def _path(self, name: str, picture: Path) -> Path:
        """Of several masks of that name, the one in folders that are named as the picture's."""
        stem = picture.stem if picture.suffix.lower() in IMAGE_SUFFIXES else picture.name  # a key may hold dots
        paths = self._found.get(stem, [])
        if not paths:
            raise MaskMismatch(f"{name}: no mask named {printable(stem)} in {self._folder}.")
        folders = [zip(picture.parts[-2::-1], path.parts[-2::-1]) for path in paths]  # of both, the innermost first
        alike = [sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], both)) for both in folders]
        best = [path for path, count in zip(paths, alike) if count == max(alike)]
        if len(best) > 1:
            shown = " and ".join(printable(path) for path in best[:2])
            raise MaskMismatch(f"{name}: several masks have its name ({shown}); put them in folders named as the picture's.")
        return best[0]


def read_mask(path: Path) -> NDArray[np.bool_]:
    """A mask file as bool [H, W]: .mat (key `mat`, not 0 counts), .npy (not 0 counts), .png (128 and more counts).
    Raises MaskMismatch: the file is damaged or not of that form.
    """
    try:
        if path.suffix == ".mat":
            values = loadmat(path)["mat"]
        elif path.suffix == ".npy":
            values = np.load(path, allow_pickle=False)
        else:
            values = read_image(path).rgb[..., 0] >= 128
    except UserError:
        raise
    except Exception as error:  # scipy raises nearly everything on damaged files
        raise MaskMismatch(f"{printable(path)}: cannot be read as a mask ({type(error).__name__}: {error}).") from error
    values = np.squeeze(values)
    if values.ndim != 2:
        raise MaskMismatch(f"{printable(path)}: expected a mask [H, W], got shape {list(values.shape)}.")
    return values != 0
