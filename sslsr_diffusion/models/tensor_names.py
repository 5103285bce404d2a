"""Whether a folder of safetensors holds what a network needs: names and shapes from the files' headers, no weights."""

import json
from pathlib import Path

from torch import nn

from sslsr_diffusion.errors import UserError

FILES = ("diffusion_pytorch_model", "model")  # diffusers' and transformers' name of the weights


def check_tensors(folder: Path, network: nn.Module | None, what: str) -> None:
    """Compare the headers of a component's weights with a network, which may be on the meta device.

    UserError where there are no safetensors, a file is damaged, or a tensor is missing or misshapen; `what` is how messages call
    the component, for example "unet of owner/name". Without a network (its library names tensors otherwise) the files must be whole.
    """
    found = _shapes(folder, what)
    if network is None:
        return
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    missing = [name for name in wanted if name not in found]
    if missing:
        raise UserError(f"{what}: lacks {len(missing)} of {len(wanted)} tensors, the first: {missing[0]}; fetch or save the model again.")
    wrong = [name for name, shape in wanted.items() if found[name] != shape]
    if wrong:
        name = wrong[0]
        raise UserError(
            f"{what}: {name}: expected the shape {list(wanted[name])}, got {list(found[name])}; do config and weights belong together?"
        )


def _shapes(folder: Path, what: str) -> dict[str, tuple[int, ...]]:
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for path in weight_files(folder, what):
        try:
            with safe_open(path, framework="pt") as stream:
                shapes |= {name: tuple(stream.get_slice(name).get_shape()) for name in stream.keys()}  # noqa: SIM118 - no mapping
        except (SafetensorError, OSError) as error:
            reason = "it is a git-lfs pointer, run `git lfs pull`" if _is_pointer(path) else f"{error}; fetch the model again"
            raise UserError(f"{what}: {path.name} is not a whole safetensors file: {reason}.") from None
    return shapes


def _is_pointer(path: Path) -> bool:
    """Whether a clone without git-lfs left its note in the place of the file."""
    return path.is_file() and path.stat().st_size < 1024 and path.read_bytes().startswith(b"version https://git-lfs")


def variant_of(folder: Path) -> str | None:
    """`fp16` of a pipeline folder in which a component's weights are there as *.fp16.safetensors alone; None: all are there plain."""
    for part in sorted(path for path in folder.iterdir() if path.is_dir()):
        stems = [path.name.removesuffix(".safetensors").partition(".") for path in part.glob("*.safetensors")]
        variants = [variant.partition("-")[0] for stem, _, variant in stems if stem in FILES and variant]
        if variants and len(variants) == len(stems):
            return variants[0]
    return None


def weight_files(folder: Path, what: str) -> list[Path]:
    """The safetensors of a component; UserError, which names what lies there, where there are none."""
    for stem in FILES:
        if (folder / f"{stem}.safetensors").is_file():
            return [folder / f"{stem}.safetensors"]
        index = folder / f"{stem}.safetensors.index.json"
        if index.is_file():
            try:
                names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{what}: {index.name} cannot be read ({error}); fetch the model again.") from None
            return sorted(folder / Path(str(name)).name for name in names)
    there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    raise UserError(f"{what}: expected {FILES[0]}.safetensors, got {', '.join(there) or 'no files'}; variants and pickles are not read.")
