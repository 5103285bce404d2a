"""The family `network`: its entry in the table. Light to import; networks are imported where they are built."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from sslsr_diffusion import hub
from sslsr_diffusion.errors import UserError
from sslsr_diffusion.models.family import Card, Part
from sslsr_diffusion.models.network.settings import FILE, SUFFIXES, NetworkSettings

if TYPE_CHECKING:
    from sslsr_diffusion.models.networks import Networks


class Network:
    """Super-resolution networks in one file, as BasicSR, KAIR, spandrel, ComfyUI and chaiNNer have them."""

    kind = "network"
    settings = NetworkSettings
    restorer = "direct"
    tasks = frozenset({"network"})
    trains: tuple[str, ...] = ("all",)
    files: tuple[str, ...] = (FILE,)
    card = Card(
        what="a super-resolution network",
        library="spandrel",
        tags=("ESRGAN", "GAN"),
        needs=f"The file `{FILE}` has the usual tensor names: ComfyUI, chaiNNer and all else that builds on spandrel take it.",
    )

    def build(
        self, settings: NetworkSettings, *, part: Part = "upscaler", train: str | None = None, meta: bool = False, seed: int = 0
    ) -> "Networks":
        from sslsr_diffusion.models.network.networks import drawn, opened

        networks: Networks
        if settings.base is None or (meta and settings.architecture is not None and not Path(settings.base).expanduser().exists()):
            networks = drawn(settings, meta=meta, seed=seed)
        else:
            path, commit = find_file(settings.base, settings.revision)
            networks = opened(path, base=settings.base, revision=commit, settings=settings, meta=meta)
        networks.set_trainable(train or self.trains[0])
        return networks

    def reads(self, path: Path) -> bool:
        return (path / FILE).is_file() or (path.suffix in SUFFIXES and path.is_file())

    def read(self, path: Path, *, meta: bool = False) -> "Networks":
        from sslsr_diffusion.models.network.networks import opened

        return opened(path / FILE if path.is_dir() else path, base=str(path), meta=meta)

    def source(self, settings: NetworkSettings) -> str | None:
        base = settings.base
        if base is None or "#" in base or Path(base).suffix not in SUFFIXES:
            return base
        return str(Path(base).expanduser().absolute())  # weights/net.pth looks like owner/name

    def check_files(self, settings: NetworkSettings) -> dict[str, Callable[[], str]]:
        def check() -> str:
            if settings.base is None:
                return f"architecture {settings.architecture}, weights drawn"
            networks = self.build(settings)
            names = ", ".join(networks.components())
            return f"{settings.base}: {names}"

        return {"model": check}


def find_file(base: str, revision: str | None) -> tuple[Path, str | None]:
    """The file of weights that a recipe names, fetched first where it lies on the hub, and the commit then.
    Raises UserError: there is no such file (HubError: on the hub).
    """
    path = Path(base).expanduser()
    if path.is_file():
        return path, None
    if path.is_dir():
        for folder in (path, path / "pipeline"):
            if (folder / FILE).is_file():
                return folder / FILE, None
        raise UserError(f"model.base: the folder {base} holds no {FILE}; expected a finished run's result, or a file of weights.")
    name, file = hub.split_file(base)
    if not hub.has_id_shape(name) or (file is None and path.suffix in SUFFIXES):
        kinds = ", ".join(SUFFIXES)
        raise UserError(f"model.base: {base} is no file here; expected a file of weights ({kinds}), or owner/name#file of the hub.")
    folder = hub.fetch(name, revision, patterns=[file or FILE], field="model.base")
    if not (folder / (file or FILE)).is_file():
        raise UserError(f"model.base: the repository {name} holds no {file or FILE}; name the file: {name}#FILE.")
    return folder / (file or FILE), folder.name
