"""The family `x4`: its entry in the table. Light to import; networks are imported where they are built."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sslsr_diffusion.hub import PIPELINE_FILES
from sslsr_diffusion.models.family import Card, Part, is_pipeline
from sslsr_diffusion.models.x4.settings import X4Settings

if TYPE_CHECKING:
    from sslsr_diffusion.models.networks import Networks

PIPELINE_CLASS = "StableDiffusionUpscalePipeline"
_PYTHON = """import torch
from diffusers import StableDiffusionUpscalePipeline
from PIL import Image

pipe = StableDiffusionUpscalePipeline.from_pretrained("{repo_id}", torch_dtype=torch.float16).to("cuda")
image = pipe(prompt="", image=Image.open("small.jpg").convert("RGB"), guidance_scale=1, num_inference_steps=20).images[0]
image.save("large.png")"""
_CITATION = """@inproceedings{rombach2022high,
  title     = {High-Resolution Image Synthesis with Latent Diffusion Models},
  author    = {Rombach, Robin and Blattmann, Andreas and Lorenz, Dominik and Esser, Patrick and Ommer, Bj{\\"o}rn},
  booktitle = {CVPR},
  year      = {2022}
}"""


class X4:
    """Stability AI's x4 upscaler, as diffusers' StableDiffusionUpscalePipeline has it."""

    kind = "x4"
    settings = X4Settings
    restorer = "latent"
    tasks = frozenset({"diffusion"})
    trains: tuple[str, ...] = ("all", "attention", "lora")
    files: tuple[str, ...] = (*PIPELINE_FILES, "call_defaults.json")
    card = Card(
        what="a fine-tuned Stable Diffusion x4 upscaler",
        library="diffusers",
        tags=("stable-diffusion",),
        needs="diffusers loads it; the `sslsr-diffusion` package adds tiles, exact sizes and metadata.",
        python=_PYTHON,
        citation=_CITATION,
    )

    def build(
        self, settings: X4Settings, *, part: Part = "upscaler", train: str | None = None, meta: bool = False, seed: int = 0
    ) -> "Networks":
        from sslsr_diffusion.models.x4.build import build_networks

        return build_networks(settings, train=train or self.trains[0], meta=meta, seed=seed)

    def reads(self, path: Path) -> bool:
        return is_pipeline(path, PIPELINE_CLASS)

    def read(self, path: Path, *, meta: bool = False) -> "Networks":
        from sslsr_diffusion.models.x4.build import read_pipeline

        return read_pipeline(path, meta=meta)

    def call_defaults(self, path: Path) -> dict[str, Any]:
        from sslsr_diffusion.models.base import Base
        from sslsr_diffusion.models.x4.build import read_call

        return read_call(Base(str(path), path)).model_dump()

    def source(self, settings: X4Settings) -> str | None:
        return settings.source()

    def check_files(self, settings: X4Settings) -> dict[str, Callable[[], str]]:
        from sslsr_diffusion.models.lora import import_peft
        from sslsr_diffusion.models.x4.build import check_base_folder

        base = settings.checked(lambda: check_base_folder(settings))
        return {"model": base, **({"model.lora": lambda: f"peft {import_peft().__version__}"} if settings.lora else {})}
