"""StableSRPipeline: a low-resolution picture in, a picture of exactly round(scale * size) pixels out."""

import contextlib
import inspect
import logging
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from torch import Tensor

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.files import usual_modes
from sslsr_diffusion.hub import PIPELINE_FILES, fetch
from sslsr_diffusion.inference.latent import LatentRestorer, quiet_diffusers
from sslsr_diffusion.inference.latent_work import Host
from sslsr_diffusion.inference.memory import MemoryModel, Offload
from sslsr_diffusion.inference.noise import Generators
from sslsr_diffusion.inference.options import OnStepEnd, Texts
from sslsr_diffusion.inference.placement import Placement
from sslsr_diffusion.inference.restorer import Output
from sslsr_diffusion.inference.tile_plan import Tile, TilePlan
from sslsr_diffusion.inference.tiling import Strip
from sslsr_diffusion.models.clip_text import empty_context
from sslsr_diffusion.models.codec import Codec
from sslsr_diffusion.models.compiled import compile_parts
from sslsr_diffusion.models.family import Family
from sslsr_diffusion.models.loading import forget_folder
from sslsr_diffusion.models.process import DDPM, Process
from sslsr_diffusion.models.stablesr.denoiser import Denoiser
from sslsr_diffusion.models.stablesr.networks import StableSRNetworks
from sslsr_diffusion.models.tensor_names import variant_of

log = logging.getLogger(__name__)

DEFAULTS = ("num_inference_steps", "detail", "back_projection", "antiring")  # of a call; kept in model_index.json as default_...


class StableSRPipelineOutput(BaseOutput):
    """
    Args:
        images: the restored pictures, as `output_type` asked.
        plans: how each picture was cut into tiles (sides in output pixels), in the order of `images`.
        notes: a sentence for what has no effect, and for each time that memory ran out and smaller tiles took over.
    """

    images: Any
    plans: list[TilePlan]
    notes: list[str]


class PipelineHost(Host):
    """diffusers' hooks move the networks of a pipeline, its progress bar shows the steps."""

    @property
    def device(self) -> torch.device:
        return self._networks._execution_device

    def offload(self) -> Offload:
        if getattr(self._networks, "_all_hooks", None):
            return "model"
        parts = (part for part in self._networks.components.values() if isinstance(part, torch.nn.Module))
        return "sequential" if any(hasattr(part, "_hf_hook") for part in parts) else "none"

    def release(self) -> None:
        self._networks.maybe_free_model_hooks()

    def progress(self, total: int) -> contextlib.AbstractContextManager[Any]:
        return self._networks.progress_bar(total=total)


class StableSRPipeline(DiffusionPipeline):
    """Upscales pictures with a latent diffusion model that is steered by the encoded low-resolution picture (Wang et al., IJCV 2024).

    Args:
        vae: AutoencoderKL, or AutoencoderKLCFW (then `fidelity` has an effect).
        unet: SFTUNet2DConditionModel.
        structural_encoder: StructuralEncoder.
        scheduler: a diffusers scheduler of the DDPM family: betas, prediction type and the default sampler.
        text_encoder, tokenizer: CLIP; without them the text context is zeros and a prompt is refused.
        default_num_inference_steps: sampling steps of a call that names none; kept in model_index.json.
        default_scale, default_detail, default_back_projection, default_antiring, default_prompt: the same for `scale`, `detail`,
            `back_projection`, `antiring` and `prompt`.
    """

    model_cpu_offload_seq = "text_encoder->unet->vae"  # the structural encoder alternates with the UNet, so both stay
    _optional_components: ClassVar[list[str]] = ["text_encoder", "tokenizer"]

    # no annotations: diffusers checks components against them, and before 0.36 it fails on those that are not plain classes
    def __init__(  # type: ignore[no-untyped-def]
        self,
        vae,
        unet,
        structural_encoder,
        scheduler,
        text_encoder=None,
        tokenizer=None,
        default_num_inference_steps=200,
        default_scale=4,
        default_detail=1.0,
        default_back_projection=0.0,
        default_antiring=0.0,
        default_prompt="",
    ):
        super().__init__()
        self.register_modules(
            vae=vae, unet=unet, structural_encoder=structural_encoder, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer
        )
        self.register_to_config(
            default_num_inference_steps=default_num_inference_steps,
            default_scale=default_scale,
            default_detail=default_detail,
            default_back_projection=default_back_projection,
            default_antiring=default_antiring,
            default_prompt=default_prompt,
        )
        self.memory_budget: int | None = None  # bytes, of a call that names none
        self._restorer: tuple[Any, LatentRestorer] | None = None

    @property
    def components(self) -> dict[str, Any]:
        """The networks and the defaults of a call: `StableSRPipeline(**pipe.components)` is the same upscaler."""
        return {**super().components, **{name: self.config[name] for name in self.config if name.startswith("default_")}}

    @classmethod
    def download(cls, pretrained_model_name: str, **options: Any) -> str:
        """A repository as a local folder; diffusers' own method refuses components that live in another package than itself."""
        kept = ("revision", "cache_dir", "token", "local_files_only")
        given = {name: options[name] for name in kept if options.get(name) is not None}
        return str(fetch(pretrained_model_name, patterns=PIPELINE_FILES, **given))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **options: Any) -> Any:
        """As diffusers' own, from safetensors alone; UserError for a local folder with Python files."""
        refuse_code(Path(pretrained_model_name_or_path))
        return super().from_pretrained(pretrained_model_name_or_path, **{"use_safetensors": True, **options})

    def save_pretrained(self, save_directory: Any, *given: Any, **options: Any) -> None:
        """As diffusers' own, but the configs do not say from which folder of this machine a component was loaded."""
        for component in (self, *self.components.values()):
            forget_folder(component)
        super().save_pretrained(save_directory, *given, **options)
        usual_modes(Path(save_directory))

    def save(self, folder: Path) -> None:
        self.save_pretrained(folder, safe_serialization=True)

    @property
    def restorer(self) -> LatentRestorer:
        """The pipeline's present components at work; built anew where one of them was replaced."""
        parts = (*(id(part) for part in self.components.values()), self.memory_budget)
        if self._restorer is None or self._restorer[0] != parts:
            process = Process.of(self.scheduler.config, type(self.scheduler).__name__)
            if not isinstance(process, DDPM):
                raise UserError(
                    f"scheduler: expected one of the DDPM family, got {type(self.scheduler).__name__}, which StableSR is not for."
                )
            denoiser = Denoiser(self.unet, self.structural_encoder)
            networks = StableSRNetworks(Codec(self.vae), denoiser, process, empty_context(self.unet))
            networks.text_encoder, networks.tokenizer = self.text_encoder, self.tokenizer
            own = {name: self.config[f"default_{name}"] for name in (*DEFAULTS, "prompt")}
            defaults = {"memory_budget": self.memory_budget, **own}
            restorer = LatentRestorer(
                networks, scale=self.config.default_scale, defaults=defaults, host=PipelineHost(self), scheduler=self.scheduler
            )
            self._restorer = (parts, restorer)
        return self._restorer[1]

    @property
    def options(self) -> frozenset[str]:
        return self.restorer.options

    @property
    def defaults(self) -> dict[str, Any]:
        return self.restorer.defaults

    @property
    def scale(self) -> float:
        return self.config.default_scale

    def check(self, **call: Any) -> list[str]:
        return self.restorer.check(**call)

    def strips(self, size: tuple[int, int], *, scale: float, held: int, **call: Any) -> tuple[list[Strip], dict[str, Any]] | None:
        return self.restorer.strips(size, scale=scale, held=held, **call)

    def bands(self, picture: Tensor, *, scale: float, generator: Generators, **call: Any) -> Output:
        return self.restorer.bands(picture, scale=scale, generator=generator, **call)

    def memory_model(self) -> MemoryModel:
        """What a tile of these networks takes."""
        return self.restorer.memory_model()

    @torch.no_grad()
    def __call__(
        self,
        image: Any,
        scale: float | None = None,
        num_inference_steps: int | None = None,
        generator: Generators = None,
        strength: float = 1.0,
        fidelity: float | None = None,
        detail: float | None = None,
        back_projection: float | None = None,
        antiring: float | None = None,
        prompt: Texts = None,
        negative_prompt: Texts = None,
        guidance_scale: float = 1.0,
        tile: Tile = "auto",
        tile_overlap: int | None = None,
        tile_batch_size: int = 1,
        vae_tile: Tile = "auto",
        memory_budget: int | None = None,
        color_fix: str | None = "wavelet",
        sampler: str | None = None,
        eta: float = 0.0,
        start: Literal["lr", "noise"] = "lr",
        tile_weights: Literal["smooth", "middle", "gaussian", "original"] = "smooth",
        output_type: Literal["pil", "np", "pt"] = "pil",
        return_dict: bool = True,
        callback_on_step_end: OnStepEnd | None = None,
    ) -> StableSRPipelineOutput | tuple[Any]:
        """Upscale one picture or several; each is exactly round(scale * height) x round(scale * width) pixels large.

        Args:
            image: PIL image, array [h, w, 3] or [B, h, w, 3], tensor [3, h, w] or [B, 3, h, w] with values in [0, 1], or a list.
                Pictures of one size run as a batch, others one after the other.
            scale: enlargement, any positive number; None: the pipeline's own.
            num_inference_steps: sampling steps over the full schedule; None: the pipeline's own (200 where it names none).
            generator: one, or one per picture; a picture's result depends on its own generator alone, not on its batch.
            strength: 1 starts at the last timestep; 0.3 runs the last 30 % of the steps from a less noised picture.
            fidelity: how much of the input a CFW decoder takes over (0 to 1, default 0.5); refused above 0 for a plain autoencoder.
            detail: share of the model's picture in the result, 0 to 1; the rest is bicubic (a line from least error to realism: Freirich
                et al., NeurIPS 2021); None: the pipeline's own (1 unless recipe or base said otherwise).
            back_projection: share, 0 to 1, of what the picture, reduced again, lacks of the input that is put back (`back_projection.py`),
                behind the colours and before `antiring`; None: the pipeline's own (0 unless recipe or base said otherwise).
            antiring: how much is taken back, 0 to 1, of what is brighter or darker than every low-resolution pixel nearby (7 x 7): seams
                beside edges. Before `detail` mixes; None: the pipeline's own (0 unless recipe or base said otherwise).
            prompt, negative_prompt: one text or one per picture; the negative one acts with guidance_scale above 1. None: as trained.
            guidance_scale: u + g (c - u); 1 is off.
            tile, vae_tile: side in output pixels of the square that denoiser and autoencoder see at once; "auto": by memory; None: whole.
            tile_overlap: in output pixels; default half a tile, as published.
            tile_batch_size: tiles per network call.
            memory_budget: bytes for weights and work of this call together; "auto" then chooses tiles that stay below. None: what is free.
            color_fix: a key of COLOR_FIXES, None is "none" (`inference/choices.py`): colours from the bicubically upsampled picture.
            sampler: a key of SAMPLERS (there, too) or a diffusers scheduler's class name; None: the pipeline's scheduler.
            eta: DDIM's share of fresh noise.
            start: "lr" begins with the noised low-resolution latent, "noise" with noise alone.
            tile_weights: "smooth" ramps over the overlap, "middle" over half of it; "gaussian"; "original": the published, off centre.
            output_type: "pil", "np" ([B, H, W, 3]) or "pt" ([B, 3, H, W] float32); a list where sizes differ.
            return_dict: False returns a tuple.
            callback_on_step_end: (pipe, step, timestep, {"latents": x}) -> None, or a dict whose "latents" replace x.
        Raises:
            UserError: an argument has an impossible value (the message says which, and what is possible).
            NotEnoughMemory: the budget is too small, or memory ran out even with the smallest tiles.
        """
        given = {**locals(), "color_fix": color_fix or "none"}
        call = {name: given[name] for name in _OPTIONS if given[name] != _SIGNATURE[name]}  # the rest nobody asked for
        if callback_on_step_end is not None:
            call["callback_on_step_end"] = lambda step, t, values: callback_on_step_end(self, step, t, values)  # type: ignore[call-arg]
        output = self.restorer(image, scale=scale, generator=generator, output_type=output_type, **call)
        if not return_dict:
            return (output.images,)
        return StableSRPipelineOutput(images=output.images, plans=output.plans, notes=output.notes)


_SIGNATURE = {name: parameter.default for name, parameter in inspect.signature(StableSRPipeline.__call__).parameters.items()}
_OPTIONS = [name for name in _SIGNATURE if name not in ("self", "image", "scale", "generator", "output_type", "return_dict")]


class StableSRRestorer(LatentRestorer):
    """StableSR's networks, which may still be training; saved as, and opened as, a StableSRPipeline."""

    networks: StableSRNetworks

    @classmethod
    def open(cls, family: Family, path: Path, placement: Placement) -> StableSRPipeline:
        """In the wanted precision at once: both copies together would be the peak."""
        with quiet_diffusers():
            pipe = StableSRPipeline.from_pretrained(path, local_files_only=True, torch_dtype=placement.dtype, variant=variant_of(path))
        pipe.memory_budget = placement.memory_budget
        if placement.compile:
            compile_parts(pipe.components, placement.device, field="compile")
        if placement.offload == "model":
            pipe.enable_model_cpu_offload(device=placement.device)
        elif placement.offload == "sequential":
            pipe.enable_sequential_cpu_offload(device=placement.device)
        else:
            pipe.to(placement.device)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def save(self, folder: Path) -> None:
        defaults = {f"default_{name}": self.defaults[name] for name in DEFAULTS}
        defaults["default_prompt"] = self.networks.prompt
        StableSRPipeline(**self.networks.components(), default_scale=self.scale, **defaults).save(folder)


def refuse_code(folder: Path) -> None:
    """Raises UserError for a pipeline folder with Python files: older releases of diffusers would run them."""
    found = next((file for pattern in ("*.py", "*/*.py") for file in folder.glob(pattern)), None)
    if found is not None:
        raise UserError(f"{folder}: holds the Python file {found.relative_to(folder)}, which a pipeline never needs; remove it.")
