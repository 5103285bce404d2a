"""The family `one_step`: its entry in the table. Light to import; networks are imported where they are built."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sslsr_diffusion.hub import PIPELINE_FILES
from sslsr_diffusion.models.family import Card, Part
from sslsr_diffusion.models.one_step.settings import RESULT, OneStepSettings

if TYPE_CHECKING:
    from sslsr_diffusion.models.networks import Networks

_NEEDS = """A stock pipeline does not start from a picture's latents as `one_step.json` says: `sslsr-diffusion` does. Where `vae/` is
here, this is the whole model. Else `pytorch_lora_weights.safetensors` is a LoRA that stock diffusers loads onto the base's own pipeline
(`load_lora_weights`; it loads neither `vae_lora.safetensors` nor `full.safetensors`, where they are here), and the base is fetched from
its own repository, under its own licence and terms."""


class OneStep:
    """One call of a Stable Diffusion UNet or flow transformer, with a LoRA or whole, from the low-resolution latents to the clean ones."""

    kind = "one_step"
    settings = OneStepSettings
    restorer = "one_step"
    tasks = frozenset({"one_step"})
    trains: tuple[str, ...] = ("lora", "whole")
    files: tuple[str, ...] = (RESULT, "*.safetensors", *PIPELINE_FILES)
    card = Card(what="a one-step model", library="diffusers", tags=("one-step",), needs=_NEEDS)

    def build(
        self, settings: OneStepSettings, *, part: Part = "upscaler", train: str | None = None, meta: bool = False, seed: int = 0
    ) -> "Networks":
        from sslsr_diffusion.models.one_step.build import build_networks

        return build_networks(settings, train=train or self.trains[0], meta=meta, seed=seed)

    def reads(self, path: Path) -> bool:
        return (path / RESULT).is_file()

    def read(self, path: Path, *, meta: bool = False) -> "Networks":
        from sslsr_diffusion.models.one_step.build import read_networks

        return read_networks(path, meta=meta)

    def call_defaults(self, path: Path) -> dict[str, Any]:
        from sslsr_diffusion.models.one_step.result import read_told

        return read_told(path).call

    def source(self, settings: OneStepSettings) -> str | None:
        return settings.source()

    def check_files(self, settings: OneStepSettings) -> dict[str, Callable[[], str]]:
        from sslsr_diffusion.models.one_step.build import check_base_folder

        return {"model": settings.checked(lambda: check_base_folder(settings))}
