"""The family `stablesr`: its entry in the table. Light to import; networks are imported where they are built."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sslsr_diffusion.hub import PIPELINE_FILES
from sslsr_diffusion.models.family import Card, Part, is_pipeline
from sslsr_diffusion.models.stablesr.settings import StableSRSettings

if TYPE_CHECKING:
    from sslsr_diffusion.models.networks import Networks

PIPELINE_CLASS = "StableSRPipeline"
_PYTHON = """from PIL import Image
from sslsr_diffusion import StableSRPipeline

pipe = StableSRPipeline.from_pretrained("{repo_id}")
image = pipe(image=Image.open("small.jpg"), scale={scale}).images[0]
image.save("large.png")"""
_CITATION = """@article{wang2024stablesr,
  title   = {Exploiting Diffusion Prior for Real-World Image Super-Resolution},
  author  = {Wang, Jianyi and Yue, Zongsheng and Zhou, Shangchen and Chan, Kelvin C.K. and Loy, Chen Change},
  journal = {International Journal of Computer Vision},
  year    = {2024}
}"""


class StableSR:
    """StableSR's scheme on a Stable Diffusion 2 UNet: upscalers, and the bases and autoencoders that they begin with."""

    kind = "stablesr"
    settings = StableSRSettings
    restorer = "stablesr"
    tasks = frozenset({"diffusion", "base", "autoencoder", "decoder"})
    trains: tuple[str, ...] = ("sft", "all")
    files: tuple[str, ...] = PIPELINE_FILES
    card = Card(
        what="a latent-diffusion model in the manner of StableSR",
        library="diffusers",
        tags=("StableSR",),
        needs="The pipeline's networks live in the `sslsr-diffusion` package, so it must be installed.",
        python=_PYTHON,
        citation=_CITATION,
    )

    def build(
        self, settings: StableSRSettings, *, part: Part = "upscaler", train: str | None = None, meta: bool = False, seed: int = 0
    ) -> "Networks":
        from sslsr_diffusion.models.stablesr.build import build_autoencoder, build_networks

        if part == "autoencoder":
            return build_autoencoder(settings, meta=meta, seed=seed)
        plain = part == "base"
        return build_networks(settings, plain=plain, train="all" if plain else train or self.trains[0], meta=meta, seed=seed)

    def reads(self, path: Path) -> bool:
        return is_pipeline(path, PIPELINE_CLASS)

    def read(self, path: Path, *, meta: bool = False) -> "Networks":
        from sslsr_diffusion.models.stablesr.build import read_pipeline

        return read_pipeline(path, meta=meta)

    def call_defaults(self, path: Path) -> dict[str, Any]:
        index = json.loads((path / "model_index.json").read_text(encoding="utf-8"))
        return {name.removeprefix("default_"): value for name, value in index.items() if name.startswith("default_")}

    def source(self, settings: StableSRSettings) -> str | None:
        return settings.source()

    def check_files(self, settings: StableSRSettings) -> dict[str, Callable[[], str]]:
        from sslsr_diffusion.models.stablesr.build import check_base_folder, check_vae_folder

        base = settings.checked(lambda: check_base_folder(settings))
        return {"model": base, **({"model.vae": lambda: check_vae_folder(str(settings.vae))} if settings.vae else {})}
