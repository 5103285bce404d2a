"""The family `network`: its entry in the table. Light to import; networks are imported where they are built."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sslsr_diffusion import hub
from sslsr_diffusion.errors import UserError
from sslsr_diffusion.models.family import Card, Part
from sslsr_diffusion.models.network.settings import FILE, NetworkSettings

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

        file = None
        try:
            file = find_file(settings.base, settings.revision, download=not meta) if settings.base is not None else None
        except UserError:
            if not meta or settings.architecture is None:  # else it is counted as the recipe describes it
                raise
        if file is None:
            networks = drawn(settings, meta=meta, seed=seed)
        else:
            path, commit = file
            networks = opened(path, base=str(settings.base), revision=commit, settings=settings, meta=meta)
        networks.set_trainable(train or self.trains[0])
        return networks

    def reads(self, path: Path) -> bool:
        return (path / FILE).is_file() or (path.suffix in hub.WEIGHTS and path.is_file())

    def read(self, path: Path, *, meta: bool = False) -> "Networks":
        from sslsr_diffusion.models.network.networks import opened

        return opened(path / FILE if path.is_dir() else path, base=str(path), meta=meta)

    def call_defaults(self, path: Path) -> dict[str, Any]:
        from sslsr_diffusion.models.network.files import read_call

        return read_call(path / FILE if path.is_dir() else path)

    def source(self, settings: NetworkSettings) -> str | None:
        return settings.base

    def check_files(self, settings: NetworkSettings) -> dict[str, Callable[[], str]]:
        def check() -> str:
            if settings.base is None:
                return f"architecture {settings.architecture}, weights drawn"
            networks = self.build(settings)
            names = ", ".join(networks.components())
            return f"{settings.base}: {names}"

        return {"model": check}


def find_file(base: str, revision: str | None, *, download: bool = True) -> tuple[Path, str | None]:
    """The file of weights that a recipe names, fetched first where it lies on the hub, and the commit then.
    Raises UserError: there is no such file (HubError: on the hub); without `download`, not in the hub's cache.
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
    if not hub.has_id_shape(name):
        kinds = ", ".join(hub.WEIGHTS)
        raise UserError(f"model.base: {base} is no file here; expected a file of weights ({kinds}), or owner/name#file of the hub.")
    wanted = file or FILE
    ask: dict[str, Any] = {"patterns": [wanted]}
    found = hub.fetch(name, revision, **ask, field="model.base") if download else hub.cached(name, revision, **ask)
    if found is None:
        raise UserError(f"model.base: {base} is not here yet; give model.architecture, too, so that it can be counted before its download.")
    if not (found / wanted).is_file():
        raise UserError(f"model.base: the repository {name} holds no {wanted}; name the file: {name}#FILE.")
    return found / wanted, found.name
