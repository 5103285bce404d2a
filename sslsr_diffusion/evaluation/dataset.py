"""What `--dataset` means: low-resolution inputs and their ground truths, found or made from high-resolution photographs."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.evaluation.scoring import load_rgb
from sslsr_diffusion.images import Image, list_images, printable, resize_bicubic, to_array, write_image

LR_NAMES = ("lr", "lq", "low")
HR_NAMES = ("hr", "gt", "high")


@dataclass(frozen=True)
class Dataset:
    lr: Path
    hr: Path
    left_out: tuple[str, ...] = ()  # photographs that gave no pair, each with its reason


def find_dataset(text: str, *, scale: int, made: Path) -> Dataset:
    """`LR_DIR,HR_DIR`; a folder with lr/ and hr/ (also lq/gt, low/high); or a folder of photographs.

    Photographs are cut to a multiple of `scale` and shrunk (bicubic, antialiased); both go to made/lr and made/hr.

    Raises:
        UserError: a folder is not there or holds no picture.
    """
    lr, comma, hr = text.partition(",")
    if comma and not Path(text).exists():
        return Dataset(_folder(lr.strip()), _folder(hr.strip()))
    root = _folder(text)
    inside = {path.name.lower(): path for path in sorted(root.iterdir()) if path.is_dir()}
    lows, highs = ([inside[name] for name in names if name in inside] for names in (LR_NAMES, HR_NAMES))
    if lows and highs:
        return Dataset(_folder(lows[0]), _folder(highs[0]))
    return _make(root, scale, made)


def _folder(name: Path | str) -> Path:
    path = Path(name).expanduser()
    if not path.is_dir():
        raise UserError(f"--dataset: {printable(path)} is not a folder; expected a folder with lr/ and hr/, LR_DIR,HR_DIR or photographs.")
    if not list_images(path):
        raise UserError(f"--dataset: {printable(path)} holds no pictures.")
    return path


def _make(root: Path, scale: int, made: Path) -> Dataset:
    left_out: list[str] = []
    owners: dict[Path, Path] = {}
    if any(root.resolve().is_relative_to((made / folder).resolve()) for folder in ("lr", "hr")):
        where = f"--dataset: {printable(root)} is where this command stores what it makes"
        raise UserError(f"{where}; give the photographs, or another --output.")
    for folder in ("lr", "hr"):  # what an earlier call made of other photographs
        shutil.rmtree(made / folder, ignore_errors=True)
    for path in list_images(root):
        name = path.relative_to(root).with_suffix(".png")
        try:
            if owners.setdefault(name, path) is not path:
                raise UserError(f"has the stem of {printable(owners[name].name)}, which was taken.")
            hr = load_rgb(path)
            height, width = (side // scale for side in hr.shape[-2:])
            if min(height, width) < 1:
                raise UserError(f"is smaller than {scale} pixels and cannot be shrunk {scale} times.")
        except UserError as error:
            left_out.append(f"{printable(path)}: {error}")
            continue
        hr = hr[..., : height * scale, : width * scale]
        for folder, picture in {"lr": resize_bicubic(hr, (height, width)).clamp(0, 1), "hr": hr}.items():
            target = made / folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            write_image(target, Image(to_array(picture[0])))
    if len(left_out) == len(list_images(root)):
        raise UserError(f"--dataset: no photograph of {printable(root)} could be used; the first: {left_out[0]}")
    return Dataset(made / "lr", made / "hr", tuple(left_out))


def scale_of(dataset: Dataset) -> float:
    """Size of the first ground truth over the size of its input."""
    truths = {path.relative_to(dataset.hr).with_suffix(""): path for path in list_images(dataset.hr)}
    for path in list_images(dataset.lr):
        truth = truths.get(path.relative_to(dataset.lr).with_suffix(""))
        if truth is not None:
            return float(load_rgb(truth).shape[-1] / load_rgb(path).shape[-1])
    raise UserError(f"--dataset: no picture of {printable(dataset.lr)} has one of the same stem in {printable(dataset.hr)}.")
