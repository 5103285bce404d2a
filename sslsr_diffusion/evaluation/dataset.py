"""What `--dataset` means: low-resolution inputs and their ground truths, found or made from high-resolution photographs."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.evaluation.pairing import by_stem
from sslsr_diffusion.evaluation.scoring import load_rgb
from sslsr_diffusion.images import Image, list_images, printable, read_image, resize_bicubic, size_of, to_array, write_image
from sslsr_diffusion.partners import partners

LR_NAMES = ("lr", "lq", "low")
HR_NAMES = ("hr", "gt", "high")
Size = tuple[int, int]  # width, height
Sizes = Mapping[str, tuple[Size, Size]]  # name of a pair -> its input's and its ground truth's


@dataclass(frozen=True)
class Dataset:
    lr: Path
    hr: Path
    scale: float  # leads from every input to its ground truth
    left_out: tuple[str, ...] = ()  # photographs that gave no pair, ground truths that were cut: a sentence each


def find_dataset(text: str, *, scale: int, made: Path, suffix: str = "") -> Dataset:
    """`LR_DIR,HR_DIR`; a folder with lr/ and hr/ (also lq/gt, low/high); or a folder of photographs.

    Photographs are cut to a multiple of `scale` and shrunk (bicubic, antialiased); both go to made/lr and made/hr. Ground truths that
    are no multiple of their inputs are cut at the right and at the bottom, and all go to made/hr. An input may have `suffix` behind the
    name of its ground truth.
    Raises UserError: a folder is not there or holds no picture, or no one scale leads from the inputs to the ground truths.
    """
    lr, comma, hr = text.partition(",")
    if comma and not Path(text).exists():
        return _pairs(_folder(lr.strip()), _folder(hr.strip()), made, suffix)
    root = _folder(text)
    inside = {path.name.lower(): path for path in sorted(root.iterdir()) if path.is_dir()}
    lows, highs = ([inside[name] for name in names if name in inside] for names in (LR_NAMES, HR_NAMES))
    if lows and highs:
        return _pairs(_folder(lows[0]), _folder(highs[0]), made, suffix)
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
    return Dataset(made / "lr", made / "hr", scale, tuple(left_out))


def _pairs(lr: Path, hr: Path, made: Path, suffix: str) -> Dataset:
    """Two folders as they are, or with their ground truths cut to what the inputs show."""
    truths, inputs = by_stem(hr), {stem.removesuffix(suffix): path for stem, path in by_stem(lr).items()}
    found = {truth: (inputs[name], truths[truth]) for truth, name in partners(truths, inputs).items()}
    if not found:
        raise UserError(
            f"--dataset: no picture of {printable(lr)} is named like one of {printable(hr)}; expected the same names, or those of the "
            "usual sets (0001.png and 0001x4.png, NAME_HR.png and NAME_LR4.png); --suffix names what else the inputs have behind the stem."
        )
    measured = {name: (size_of(low), size_of(high)) for name, (low, high) in found.items()}
    sizes = {name: (low, high) for name, (low, high) in measured.items() if low and high}  # the others are left to the reader
    if not sizes:
        raise UserError(f"--dataset: of no pair of {printable(lr)} and {printable(hr)} both pictures can be read.")
    scale = common_scale(sizes)
    wanted = {name: _enlarged(low, scale) for name, (low, high) in sizes.items() if high != _enlarged(low, scale)}
    return _cut(Dataset(lr, hr, scale), truths, wanted, made / "hr") if wanted else Dataset(lr, hr, scale)


def _cut(dataset: Dataset, truths: Mapping[str, Path], wanted: Mapping[str, Size], made: Path) -> Dataset:
    """The ground truths in `made`, those in `wanted` cut to that size."""
    for folder in (dataset.lr, dataset.hr):
        if folder.resolve().is_relative_to(made.resolve()):
            raise UserError(f"--dataset: {printable(folder)} is where this command stores what it makes; choose another --output.")
    shutil.rmtree(made, ignore_errors=True)
    said = [f"what is less than an input's pixel of {len(wanted)} of {len(truths)} ground truths: cut to {dataset.scale:g} times the input"]
    for name, path in truths.items():
        target = made / path.relative_to(dataset.hr)
        target.parent.mkdir(parents=True, exist_ok=True)
        if name not in wanted:
            shutil.copyfile(path, target)
            continue
        width, height = wanted[name]
        try:
            image = read_image(path)
        except UserError as error:
            said.append(str(error))
            continue
        alpha = None if image.alpha is None else image.alpha[:height, :width]
        write_image(target.with_suffix(".png"), replace(image, rgb=image.rgb[:height, :width], alpha=alpha), format="PNG")
    return replace(dataset, hr=made, left_out=tuple(said))


def common_scale(sizes: Sizes) -> float:
    """The enlargement of a whole set: the whole number that leads from each input to its ground truth but for a rest of less than a
    low-resolution pixel, as cutting to a multiple leaves it; else the fraction that gives every size exactly.
    Raises UserError: there is no such number.
    """
    whole = [n for n in range(1, 17) if all(high[k] // n == low[k] for low, high in sizes.values() for k in (0, 1))]
    if whole:
        return min(whole, key=lambda n: sum(high[k] - n * low[k] for low, high in sizes.values() for k in (0, 1)))
    (first, (small, large)), *_ = sizes.items()
    for scale in (large[k] / small[k] for k in (0, 1)):
        if all(high == _enlarged(low, scale) for low, high in sizes.values()):
            return scale
    shown = f"{printable(first)} is {_times(small)} and {_times(large)}"
    odd = next((name for name, pair in sizes.items() if name != first and not _share_a_scale(pair, sizes[first])), None)
    shown += f", {printable(odd)} is {_times(sizes[odd][0])} and {_times(sizes[odd][1])}" if odd else ""
    raise UserError(
        f"--dataset: no one scale leads from the inputs to the ground truths: {shown}; `sslsr prepare pairs` cuts pairs to fit."
    )


def _share_a_scale(*pairs: tuple[Size, Size]) -> bool:
    return any(all(high[k] // n == low[k] for low, high in pairs for k in (0, 1)) for n in range(1, 17))


def _enlarged(size: Size, scale: float) -> Size:
    return round(scale * size[0]), round(scale * size[1])


def _times(size: Size) -> str:
    return f"{size[0]} x {size[1]}"
