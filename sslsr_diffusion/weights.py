"""Weights of learned metrics and losses: which files, where they lie, and how they get there."""

import functools
import hashlib
import os
import shutil
import tempfile
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from sslsr_diffusion.errors import UserError

TIMEOUT_S = 10


@dataclass(frozen=True)
class Weights:
    """One file below torch's hub folder ($TORCH_HOME/hub, by default ~/.cache/torch/hub), where pyiqa and torchvision look."""

    folder: str
    name: str
    url: str
    sha256: str  # the first digits or all
    megabytes: int

    @property
    def path(self) -> Path:
        return Path(torch.hub.get_dir()) / self.folder / self.name


def missing(files: tuple[Weights, ...], *, download: bool = True) -> str | None:
    """None when every file is there (downloaded now if that is wanted and possible), else one sentence: what to put where, and why."""
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "TRUE", "YES", "ON"}
    for file in files:
        if file.path.is_file():
            if not digest(file.path).startswith(file.sha256):
                expected = f"its SHA-256 does not begin with {file.sha256}"
                return f"{_shown(file.path)} is damaged ({expected}); delete it and download {file.url} again"
        elif reason := _fetch(file) if download and not offline else "no download was tried (offline)":
            wanted = "; ".join(f"{f.url} ({f.megabytes} MB) to {_shown(f.path)}" for f in files if not f.path.is_file())
            return f"weights are missing and {reason}; download {wanted}"
    return None


def _shown(path: Path) -> str:
    """With ~ for the home folder: the sentence ends up in reports that people share."""
    return f"~/{path.relative_to(Path.home()).as_posix()}" if path.is_relative_to(Path.home()) else str(path)


def digest(path: Path) -> str:
    """SHA-256 of a file, read once per process and state of the file."""
    state = path.stat()
    return _digest(path, state.st_size, state.st_mtime_ns)


@functools.cache
def _digest(path: Path, size: int, mtime_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def named_origin(package: str, files: Iterable[Path]) -> str:
    """`pyiqa 0.1.16; weights NAME (sha256 ...)`: what numbers came from; empty where the package or the files are not there."""
    there = [f"{path.name} (sha256 {digest(path)[:16]})" for path in files if path.is_file()]
    try:
        return f"{package} {version(package)}; weights {', '.join(there)}" if there else ""
    except PackageNotFoundError:
        return ""


def _fetch(file: Weights) -> str | None:
    """Download beside the target, check, rename; the reason when that fails."""
    temporary = None
    try:
        file.path.parent.mkdir(parents=True, exist_ok=True)
        with (
            urllib.request.urlopen(file.url, timeout=TIMEOUT_S) as source,  # noqa: S310 - https, from the table below
            tempfile.NamedTemporaryFile(dir=file.path.parent, suffix=".part", delete=False) as target,
        ):
            temporary = Path(target.name)
            shutil.copyfileobj(source, target, 1 << 20)
        if not digest(temporary).startswith(file.sha256):
            return f"what {file.url} sent is damaged (its SHA-256 does not begin with {file.sha256})"
        temporary.replace(file.path)
        return None
    except OSError as error:
        cause = getattr(error, "reason", error)
        return f"cannot be downloaded ({getattr(cause, 'strerror', None) or cause})"
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def use_folder(folder: Path) -> None:
    """Look for (and put) weights below `folder` instead of torch's hub folder: folder/pyiqa, folder/checkpoints, folder/clip."""
    if not folder.is_dir():
        wanted = "expected one with pyiqa/, checkpoints/ and clip/ as in ~/.cache/torch/hub"
        raise UserError(f"--weights-dir: {folder} is not a folder; {wanted}.")
    torch.hub.set_dir(str(folder))


def _pyiqa(name: str, sha256: str, megabytes: int) -> Weights:
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    return Weights("pyiqa", name, f"{endpoint}/chaofengc/IQA-PyTorch-Weights/resolve/main/{name}", sha256, megabytes)


def _torchvision(name: str, sha256: str, megabytes: int) -> Weights:
    return Weights("checkpoints", name, f"https://download.pytorch.org/models/{name}", sha256, megabytes)


_CLIP_RN50 = "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762"

WEIGHTS: dict[str, tuple[Weights, ...]] = {
    "lpips": (_torchvision("alexnet-owt-7be5be79.pth", "7be5be79", 233), _pyiqa("LPIPS_v0.1_alex-df73285e.pth", "df73285e", 1)),
    "lpips-vgg": (_torchvision("vgg16-397923af.pth", "397923af", 528), _pyiqa("LPIPS_v0.1_vgg-a78928a0.pth", "a78928a0", 1)),
    "vgg19": (_torchvision("vgg19-dcbb9e9d.pth", "dcbb9e9d", 548),),
    "dists": (_torchvision("vgg16-397923af.pth", "397923af", 528), _pyiqa("DISTS_weights-f5e65c96.pth", "f5e65c96", 1)),
    "musiq": (_pyiqa("musiq_koniq_ckpt-e95806b9.pth", "e95806b9", 104),),
    "clipiqa": (Weights("clip", "RN50.pt", f"https://openaipublic.azureedge.net/clip/models/{_CLIP_RN50}/RN50.pt", _CLIP_RN50, 244),),
    "fid": (_pyiqa("pt_inception-2015-12-05-6726825d.pth", "6726825d", 91),),
}
