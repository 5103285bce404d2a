"""Which networks there are: ours by a table, all others by spandrel; built by name and arguments, or recognised by their tensors."""

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sslsr_diffusion.errors import MissingDependency, UserError
from sslsr_diffusion.images import pad_to
from sslsr_diffusion.models.network.architecture import Architecture
from sslsr_diffusion.models.network.files import plain
from sslsr_diffusion.seeding import seeded
from sslsr_diffusion.tables import named

OWN = {  # asked before spandrel, which takes some of their tensors for another network's
    "RRDBNet": "rrdb:RRDBNet",
    "SPSRNet": "spsr:SPSRNet",
    "SRResNet": "srresnet:SRResNet",
    "ELAN": "elan:ELAN",
    "SwinIR": "swinir:SwinIR",
}
_FOR_ANY = ("SR", "Restoration")  # spandrel's purposes of networks for any picture
_NOT_FOR_ANY = ("GFPGAN", "RestoreFormer", "LaMa")
_tried: set[str] = set()  # what made a picture in this process
Call = Callable[[nn.Module, Tensor], Tensor]


@dataclass(frozen=True)
class Known:
    """What is known of a network beside its weights.

    Args:
        multiple_of, minimum: of the sides that it works on, in low-resolution pixels; others are padded.
        sees: how many low-resolution pixels away a pixel may change another; None: further than a tile is large.
        call: the network, [B, 3, h, w] -> [B, 3, scale h, scale w].
    """

    architecture: str
    arguments: dict[str, Any]
    scale: int
    call: Call = field(repr=False)
    multiple_of: int = 1
    minimum: int = 0
    sees: int | None = None
    has_branch: bool = False
    takes_half: bool = True
    takes_bfloat16: bool = True


def names() -> list[str]:
    """Of all architectures that can be built: ours, and those of spandrel where it is installed."""
    try:
        return [*OWN, *(name for name in _spandrel_classes() if name not in OWN)]
    except MissingDependency:
        return [*OWN]


def build(architecture: str, arguments: Mapping[str, Any], *, meta: bool = False, seed: int = 0) -> tuple[nn.Module, Known]:
    """A network with drawn weights; with `meta`, shapes alone where that is less work.
    Raises UserError: there is no such architecture, or it cannot be built with these arguments.
    """
    if architecture in OWN:
        make = _own(architecture)
    else:
        classes = _spandrel_classes()
        if architecture not in classes:
            raise UserError(f"model.architecture: {architecture!r} is not known; expected one of {', '.join(names())}.")
        make = classes[architecture][1]
    on_meta = meta and issubclass(make, Architecture)
    with seeded(seed, meta=on_meta):
        try:
            module = make(**arguments)
        except Exception as error:  # whatever a network does with impossible arguments
            raise UserError(f"model.arguments: {architecture} cannot be built with these ({_first_line(error)}).") from None
    if isinstance(module, Architecture):
        return module, _of_own(architecture, module)
    what = f"model.arguments: a file of this {architecture} would not be read as it is"
    if architecture not in OWN:
        module, known = recognise(module.state_dict(), what, built=module)
    else:
        known = _of_own(architecture, module)
    if repr(known) not in _tried:
        if architecture in OWN:
            found = _telling(lambda: make.arguments_of(module.state_dict()), architecture, what)
            _settled(architecture, found or {}, known.arguments, what)
        _try(module, known)
        _tried.add(repr(known))
    return module, known


def _try(module: nn.Module, known: Known) -> None:
    """UserError where a network that could be built makes no picture: some check nothing before."""
    side = max(known.multiple_of, known.minimum)
    try:
        with torch.no_grad():
            known.call(module.eval(), torch.zeros(1, 3, side, side))
    except Exception as error:
        raise UserError(f"model.arguments: {known.architecture} makes no picture with these ({_first_line(error)}).") from None


def recognise(
    tensors: Mapping[str, Tensor],
    what: str,
    *,
    told: Mapping[str, Any] | None = None,
    built: nn.Module | None = None,
) -> tuple[nn.Module, Known]:
    """The network that these tensors belong to, with them in it.

    Args:
        what: how messages call the file.
        told: arguments beside those that names and shapes tell; they must not contradict these.
        built: the network that they were taken from, where there is one.
    Raises UserError: no network has these names, some are missing, or the network is not for any colour picture.
    """
    for name in OWN:
        make = _own(name)
        found = _telling(lambda make=make: make.arguments_of(tensors), name, what)  # type: ignore[misc]  # bound in this round
        if found is not None:
            return _loaded(name, make, _settled(name, found, told or {}, what), make.renamed(tensors), what)
    return _by_spandrel(tensors, what, told or {}, built)


def _telling(tell: Callable[[], dict[str, Any] | None], name: str, what: str) -> dict[str, Any] | None:
    try:
        return tell()
    except (KeyError, IndexError, ValueError, ZeroDivisionError, AttributeError, RuntimeError, AssertionError) as error:
        raise UserError(f"{what}: looks like {name}, but tensors are missing or misshaped ({_first_line(error)}).") from None


def _loaded(name: str, make: Any, arguments: dict[str, Any], tensors: Mapping[str, Tensor], what: str) -> tuple[nn.Module, Known]:
    on_meta = issubclass(make, Architecture)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta" if on_meta else "cpu"):
            module: nn.Module = make(**arguments)
    except Exception as error:
        raise UserError(f"{what}: {name} cannot be built as it tells ({_first_line(error)}).") from None
    known = _of_own(name, module)
    wanted = module.state_dict()
    missing, extra = ([n for n in a if n not in b] for a, b in ((wanted, tensors), (tensors, wanted)))
    if missing:
        raise UserError(f"{what}: {name} lacks {len(missing)} of {len(wanted)} tensors, the first: {missing[0]}; download it again.")
    if extra:
        raise UserError(f"{what}: {len(extra)} tensors are not of {name}, the first: {extra[0]}; is it another network's file?")
    wrong = next((n for n in wanted if wanted[n].shape != tensors[n].shape), None)
    if wrong is not None:
        shapes = f"expected {list(wanted[wrong].shape)}, got {list(tensors[wrong].shape)}"
        raise UserError(f"{what}: {name}: {wrong} is misshaped: {shapes}.")
    module = module.to_empty(device="cpu") if on_meta else module
    module.load_state_dict(dict(tensors))
    return module, known


def _own(name: str) -> Any:
    try:
        return named(f"sslsr_diffusion.models.network.{OWN[name]}")
    except ImportError as error:
        raise _missing(error) from None


def _of_own(name: str, module: Any) -> Known:
    arguments = plain(module.arguments)
    sizes = {"multiple_of": module.multiple_of, "sees": module.sees}
    widths = {"has_branch": module.has_branch, "takes_half": module.takes_half}
    channels: dict[str, Any] = {
        key: arguments[key] for key in ("num_in_ch", "num_out_ch", "in_nc", "out_nc", "colors", "in_chans") if key in arguments
    }
    _check_colours(name, channels, name)
    return Known(name, arguments, module.scale, lambda network, lr: network(lr), **sizes, **widths)


def _check_colours(name: str, channels: Mapping[str, int], what: str) -> None:
    odd = next((f"{key} {value}" for key, value in channels.items() if value != 3), None)
    if odd:
        raise UserError(f"{what}: expected a network for colour pictures, 3 channels in and out; this {name} has {odd}.")


def _settled(name: str, found: dict[str, Any], told: Mapping[str, Any], what: str) -> dict[str, Any]:
    """What the shapes tell, and what was told beside. A number that they do not tell (a rate of dropped paths) may be told anew."""
    settled = dict(found)
    for key, value in told.items():
        rate = isinstance(found.get(key), float) and isinstance(value, int | float) and ("drop" in key or key == "img_range")
        if key in found and not rate and plain({key: value}) != plain({key: found[key]}):
            raise UserError(f"{what}: holds {name} with {key} {found[key]}, got {value!r} for it; leave it out.")
        if key not in found or rate:
            settled[key] = float(value) if rate else value
    return settled


def _by_spandrel(tensors: Mapping[str, Tensor], what: str, told: Mapping[str, Any], built: nn.Module | None) -> tuple[nn.Module, Known]:
    classes = _spandrel_classes()
    from spandrel import MAIN_REGISTRY

    support = next((entry for entry in MAIN_REGISTRY.architectures("detection") if entry.detect(dict(tensors))), None)
    if support is None:
        raise UserError(f"{what}: its tensors are of no network that is known here; known are {', '.join(names())}.")
    try:
        found: Any = support.architecture.load(dict(tensors))
    except Exception as error:  # missing tensors, misshaped ones: each architecture has its own words
        raise UserError(f"{what}: looks like {support.architecture.name}, but cannot be loaded ({_first_line(error)}).") from None
    if found.purpose not in _FOR_ANY:
        purpose = {"FaceSR": "faces", "Inpainting": "filling holes"}.get(found.purpose, found.purpose)
        raise UserError(f"{what}: holds {support.architecture.name}, a network for {purpose}; expected one that enlarges any picture.")
    _check_colours(support.architecture.name, {"input_channels": found.input_channels, "output_channels": found.output_channels}, what)
    kind = type(found.model)
    name = next((name for name, (_, made) in classes.items() if made is kind), support.architecture.id)
    arguments = dict(getattr(built or found.model, "hyperparameters", {}))
    settled = _settled(name, arguments, told, what)
    module = built or found.model
    if built is not None and type(built) is kind:
        _settled(name, dict(getattr(found.model, "hyperparameters", {})), plain(arguments), what)
    if settled != arguments:
        module = kind(**settled)
        module.load_state_dict(found.model.state_dict())
    return module, _of_spandrel(name, found, plain(settled))


def _of_spandrel(name: str, found: Any, arguments: dict[str, Any]) -> Known:
    needs, scale, window = found.size_requirements, int(found.scale), getattr(found.model, "window_size", 1)
    plainly: Call = found._call_fn  # unlike calling the descriptor, it clamps nothing and leaves the training mode alone

    def call(network: nn.Module, lr: Tensor) -> Tensor:
        height, width = lr.shape[-2:]
        right, below = needs.get_padding(width, height)
        return plainly(network, pad_to(lr, height + below, width + right))[..., : height * scale, : width * scale]

    aligned = window if isinstance(window, int) and window > 0 else 1  # tiles begin where a window would begin in the whole picture
    sizes = {"multiple_of": math.lcm(needs.multiple_of, aligned), "minimum": needs.minimum}
    return Known(name, arguments, scale, call, **sizes, takes_half=found.supports_half, takes_bfloat16=found.supports_bfloat16)


def _spandrel_classes() -> dict[str, tuple[str, type[nn.Module]]]:
    """Name of a network -> its spandrel id and class."""
    try:
        from spandrel import MAIN_REGISTRY
    except ImportError as error:
        raise _missing(error) from None
    found: dict[str, tuple[str, type[nn.Module]]] = {}
    for entry in MAIN_REGISTRY.architectures():
        identity = str(entry.architecture.id)
        package = importlib.import_module(type(entry.architecture).__module__)
        for name in getattr(package, "__all__", ()):
            made = getattr(package, name)
            if isinstance(made, type) and issubclass(made, nn.Module) and identity not in _NOT_FOR_ANY:
                found[name] = (identity, made)
    return found


def _missing(error: ImportError) -> MissingDependency:
    return MissingDependency(
        f"this network needs spandrel, whose import failed ({_first_line(error)}): pip install 'sslsr-diffusion[networks]'."
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"{lines[0]}{' ' + lines[1].strip() if len(lines) > 1 else ''}"[:160].rstrip(" .")
