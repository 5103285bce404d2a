"""From a name to a restorer: the newest finished run, the shipped model, a run or model folder, a file, or a hub id."""

import contextlib
import fnmatch
import hashlib
import logging
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.hub import STATE, WEIGHTS, HubError, Reason, cached, fetch, look_up, read_head, split_file
from sslsr_diffusion.inference.restorer import Described, Restorer
from sslsr_diffusion.models.base import IGNORED
from sslsr_diffusion.models.families import FAMILIES
from sslsr_diffusion.models.family import Family
from sslsr_diffusion.models.networks import Networks
from sslsr_diffusion.shipped_model import SMALL, local_folder, refuse_earlier
from sslsr_diffusion.tables import named

log = logging.getLogger(__name__)

RESULT = "pipeline"  # the folder of a run's result
_ADVICE: dict[Reason, str] = {"invalid": f"The shipped model is {SMALL}."}


@dataclass(frozen=True)
class FoundModel:
    """A model's files on this machine."""

    name: str  # as the user wrote it
    path: Path
    family: Family
    fingerprint: str  # changes with its weights


def default_model(runs: Path) -> tuple[str, str]:
    """What is used where nobody chose, and why: the result of the run in `runs` that finished last, else the shipped small model."""
    found = finished_runs(runs)
    if not found:
        return SMALL, f"the small model that comes with sslsr-diffusion; there is no finished run in {runs}/"
    return str(found[0]), "the newest finished run"


def finished_runs(runs: Path) -> list[Path]:
    """The results of the finished runs in a folder, the newest first."""
    found = [result for result in runs.glob(f"*/{RESULT}") if family_of(result) is not None]
    return sorted(found, key=lambda folder: max(path.stat().st_mtime_ns for path in folder.iterdir()), reverse=True)


def family_of(path: Path) -> Family | None:
    """The family that reads this file or folder."""
    return next((family for family in FAMILIES.values() if family.reads(path)), None)


def find_model(model: str, revision: str | None = None) -> FoundModel:
    """The local files of a model, downloaded first if it is a hub id.
    Raises UserError: there is nothing of that name, or it holds no upscaler.
    """
    here = _found_here(model, revision)
    if here is not None:
        return here
    name, file = split_file(model)
    patterns, ignored = _wanted(file)
    return _found_there(model, fetch(name, revision, patterns=patterns, ignore=ignored, advice=_ADVICE), file)


@contextlib.contextmanager
def glance(model: str) -> Iterator[FoundModel]:
    """`find_model` for `describe_model` alone: of a hub id no weights are fetched but the head of a network's file.
    Raises UserError: as `find_model`.
    """
    here = _found_here(model, None)
    if here is not None:
        yield here
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield _glanced(model, Path(scratch))


def _glanced(model: str, scratch: Path) -> FoundModel:
    """A repository's small files in the hub's cache; where they are no model, files with the heads of its weights in `scratch`."""
    name, file = split_file(model)
    patterns, ignored = _wanted(file)
    try:
        commit, files = look_up(name, field="model", advice=_ADVICE)
    except HubError:
        folder = cached(name, patterns=patterns, ignore=ignored)
        if folder is None:
            raise
        return _found_there(model, folder, file)
    wanted = [each for each in files if _matches(each, patterns) and not _matches(each, ignored)]
    small = [each for each in wanted if not each.endswith(WEIGHTS)]
    folder = fetch(name, commit, patterns=small) if small else None
    if folder is not None and family_of(folder) is not None:
        return _found_there(model, folder, file)
    heads = scratch / commit
    for each in {*wanted} & {*patterns}:  # by its own name: one file is the model
        (heads / each).parent.mkdir(parents=True, exist_ok=True)
        if each.endswith(".safetensors"):
            save_file({}, heads / each, read_head(name, each, commit))
        else:
            (heads / each).touch()
    return _found_there(model, heads, file)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _found_here(model: str, revision: str | None) -> FoundModel | None:
    """The model on this machine; None where it can only be on the hub."""
    path = local_folder(model)
    if path.is_dir() and family_of(path) is None and family_of(path / RESULT) is not None:  # a run folder
        path = path / RESULT
    if path.exists():
        if revision is not None:
            raise UserError(f"revision {revision}: is for a hub id, and model {model} lies on this machine; leave it out.")
        family = family_of(path)
        if family is None:
            raise UserError(
                f"model {model}: expected a model of {_listed()}, such as a folder with a model_index.json of StableSRPipeline or "
                "StableDiffusionUpscalePipeline, or a file of weights that ends in .safetensors or .pth; "
                "a run folder has one in pipeline/ once the run is finished, and `sslsr export` makes one from a checkpoint."
            )
        return FoundModel(model, path, family, _fingerprint(path))
    refuse_earlier(model, "model")
    return None


def _wanted(file: str | None) -> tuple[list[str], list[str]]:
    """Patterns of the files of a repository that are a model, or that one file; and of those among them that are not."""
    patterns = [file] if file else [pattern for family in FAMILIES.values() for pattern in family.files]
    return patterns, [f"{STATE}/*", *([] if file else IGNORED)]


def _found_there(model: str, folder: Path, file: str | None) -> FoundModel:
    """The model in a folder with files of a repository, whose name is the commit."""
    path = folder / file if file else folder
    family = family_of(path)
    if family is None:
        raise UserError(f"model {model}: that repository holds no {f'file {file}' if file else f'model of {_listed()}'}.")
    return FoundModel(model, path, family, f"{model}@{folder.name}")


def _listed() -> str:
    return ", ".join(FAMILIES)


def _fingerprint(path: Path) -> str:
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    states = [(str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr(states).encode()).hexdigest()[:16]


def open_model(
    found: FoundModel,
    *,
    device: str = "auto",
    dtype: str = "auto",
    memory_budget: int | None = None,
    tile: Any = "auto",
    compile: bool = False,
) -> Restorer:
    """The restorer of a found model on a device, ready to be called.

    Args:
        device: "auto" (the first GPU, else the CPU) or a torch device.
        dtype: "float32", "float16", "bfloat16" or "auto": float16 on a GPU; on the CPU float32, for plain networks bfloat16 where the
            processor is faster in it and a sample differs by less than 1/255 on the mean.
        memory_budget: bytes for weights and work of every call that names no other; dtype "auto" and offload follow from it, too.
        tile: what the restorer will be called with; matters for a budget alone.
        compile: have torch.compile make the networks faster, each when it is first called, for as long as this process lives; results
            differ by rounding.
    Raises:
        UserError: the device is not there, the model's files are incomplete or damaged, or nothing can be compiled here.
        NotEnoughMemory: nothing fits the budget.
    """
    from sslsr_diffusion.devices import find_device
    from sslsr_diffusion.inference.placement import place

    with _sentences(found.name):
        placement = place(found.family, found.path, find_device(device, field="device"), dtype, memory_budget, tile)
        if compile and placement.offload == "sequential":
            raise UserError(
                "compile: expected networks that lie on the device when they compute, got layers that wait on the CPU, as this "
                "memory_budget needs; raise it, or leave compile out."
            )
        placement = replace(placement, compile=compile)
        restorer: Restorer = restorer_class(found.family).open(found.family, found.path, placement)
    log.info("%s", placement)
    return restorer


def describe_model(found: FoundModel) -> Described:
    """Which options the restorer of a found model has, and what its calls take where they name none; no weights are read.
    Raises UserError: the files that tell it are incomplete or damaged.
    """
    with _sentences(found.name):
        described: Described = restorer_class(found.family).describe(found.family, found.path)
    return described


@contextlib.contextmanager
def _sentences(name: str) -> Iterator[None]:
    """Whatever libraries raise on a model's files becomes a UserError."""
    try:
        yield
    except Exception as error:  # diffusers and safetensors raise many kinds on incomplete folders
        text = str(error).strip() or type(error).__name__
        key = re.match(r"model\.\w+: ", text)  # of a recipe, where this file would be a base
        if isinstance(error, UserError) and key is None:
            raise
        reason = text[key.end() if key else 0 :].splitlines()[0][:200].rstrip(".")
        raise UserError(f"model {name}: cannot be loaded ({reason}).") from error


def restorer_of(networks: Networks, family: Family, *, scale: float, **defaults: Any) -> Restorer:
    """The restorer of networks in memory, which may still be training."""
    return restorer_class(family)(networks, scale=scale, defaults=defaults)


def restorer_class(family: Family) -> Any:
    """The class of a family's restorer; imported now, because diffusers takes seconds."""
    return named(f"sslsr_diffusion.inference.{RESTORERS[family.restorer]}")


RESTORERS = {
    "direct": "direct:DirectRestorer",
    "latent": "latent:LatentRestorer",
    "one_step": "one_step:OneStepRestorer",
    "stablesr": "pipeline:StableSRRestorer",
}
