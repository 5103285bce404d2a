"""StableSRPipeline: a low-resolution picture in, a picture of exactly round(scale * size) pixels out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from torch import Tensor

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.images import resize_bicubic
from sslsr_diffusion.inference.codec_tiles import TiledCodec
from sslsr_diffusion.inference.color_fix import COLOR_FIXES, color_fix
from sslsr_diffusion.inference.denoising import TiledDenoiser
from sslsr_diffusion.inference.memory import MemoryModel, free_bytes
from sslsr_diffusion.inference.models import download_files
from sslsr_diffusion.inference.noise import Generators, ImageNoise, image_seeds
from sslsr_diffusion.inference.pictures import OUTPUT_TYPES, from_tensors, to_tensors
from sslsr_diffusion.inference.plan import Plan, Tile, make_plan
from sslsr_diffusion.inference.prompts import encode_texts, per_picture
from sslsr_diffusion.inference.sampling import build_sampler, sample
from sslsr_diffusion.inference.tiling import TILE_WEIGHTS, pad_to, tile_boxes
from sslsr_diffusion.models.codec import Codec

log = logging.getLogger(__name__)

OnStepEnd = Callable[[Any, int, float, dict[str, Tensor]], dict[str, Tensor] | None]
DEFAULT_FIDELITY = 0.5


@dataclass
class StableSRPipelineOutput(BaseOutput):
    """
    Args:
        images: the restored pictures, as `output_type` asked.
        plans: how each picture was cut into tiles (sides in output pixels), in the order of `images`.
    """

    images: Any
    plans: list[Plan]


@dataclass(frozen=True)
class _Options:
    """What one call asks for, the same for all its pictures."""

    scale: float
    steps: int
    strength: float
    sampler: str | None
    start: str
    eta: float
    guidance_scale: float
    fidelity: float
    tile: Tile
    tile_overlap: int | None
    tile_batch_size: int
    vae_tile: Tile
    memory_budget: int | None
    color_fix: str | None
    tile_weights: str
    on_step_end: OnStepEnd | None


class StableSRPipeline(DiffusionPipeline):
    """Upscales pictures with a latent diffusion model that is steered by the encoded low-resolution picture (Wang et al., IJCV 2024).

    Args:
        vae: AutoencoderKL, or AutoencoderKLCFW (then `fidelity` has an effect).
        unet: SFTUNet2DConditionModel.
        structural_encoder: StructuralEncoder.
        scheduler: a diffusers scheduler of the DDPM family: betas, prediction type and the default sampler.
        text_encoder, tokenizer: CLIP; without them the text context is zeros and a prompt is refused.
        default_num_inference_steps: sampling steps of a call that names none; kept in model_index.json.
    """

    model_cpu_offload_seq = "text_encoder->unet->vae"  # the structural encoder alternates with the UNet, so both stay
    _optional_components: ClassVar[list[str]] = ["text_encoder", "tokenizer"]

    # no annotations: diffusers checks components against them, and before 0.36 it fails on those that are not plain classes
    def __init__(self, vae, unet, structural_encoder, scheduler, text_encoder=None, tokenizer=None, default_num_inference_steps=200):
        super().__init__()
        self.register_modules(
            vae=vae,
            unet=unet,
            structural_encoder=structural_encoder,
            scheduler=scheduler,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
        )
        self.register_to_config(default_num_inference_steps=default_num_inference_steps)
        self._memory: dict[Any, MemoryModel] = {}

    @classmethod
    def download(cls, pretrained_model_name: str, **options: Any) -> str:
        """A repository as a local folder; diffusers' own method refuses components that live in another package than itself."""
        kept = ("revision", "cache_dir", "token", "force_download", "local_files_only")
        return str(download_files(pretrained_model_name, **{name: options[name] for name in kept if options.get(name) is not None}))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **options: Any) -> Any:
        """As diffusers' own, from safetensors alone; Python files that lie in a local folder are never run.

        Raises:
            UserError: the folder holds Python files (older releases of diffusers would run them).
        """
        folder = Path(pretrained_model_name_or_path)
        found = next((file for pattern in ("*.py", "*/*.py") for file in folder.glob(pattern)), None)
        if found is not None:
            raise UserError(f"{folder}: holds the Python file {found.relative_to(folder)}, which a pipeline never needs; remove it.")
        return super().from_pretrained(pretrained_model_name_or_path, **{"use_safetensors": True, **options})

    @torch.no_grad()
    def __call__(
        self,
        image: Any,
        scale: float = 4,
        num_inference_steps: int | None = None,
        generator: Generators = None,
        strength: float = 1.0,
        fidelity: float | None = None,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
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
        tile_weights: Literal["smooth", "gaussian", "original"] = "smooth",
        output_type: Literal["pil", "np", "pt"] = "pil",
        return_dict: bool = True,
        callback_on_step_end: OnStepEnd | None = None,
    ) -> StableSRPipelineOutput | tuple[Any]:
        """Upscale one picture or several; each is exactly round(scale * height) x round(scale * width) pixels large.

        Args:
            image: PIL image, array [h, w, 3] or [B, h, w, 3], tensor [3, h, w] or [B, 3, h, w] with values in [0, 1], or a list.
                Pictures of one size run as a batch, others one after the other.
            scale: enlargement, any positive number.
            num_inference_steps: sampling steps over the full schedule; None: the pipeline's own default (200; 4 for turbo models).
            generator: one, or one per picture; a picture's result depends on its own generator alone, not on its batch.
            strength: 1 starts at the last timestep; 0.3 runs the last 30 % of the steps from a less noised picture.
            fidelity: how much of the low-resolution picture a CFW decoder takes over (0 to 1, default 0.5); a plain
                autoencoder has no such input and ignores it.
            prompt, negative_prompt: one text or one per picture; the negative one acts with guidance_scale above 1.
            guidance_scale: u + g (c - u); 1 is off.
            tile: side in output pixels of the square the denoiser sees at once; "auto" chooses from free memory; None: whole.
            tile_overlap: in output pixels; default half a tile, as published.
            tile_batch_size: tiles per network call.
            vae_tile: the same as `tile` for the autoencoder.
            memory_budget: bytes that "auto" may count on instead of what is free.
            color_fix: "wavelet", "adain" or "none": colours from the bicubically upsampled picture.
            sampler: ddpm, ddim, ddim-original, dpm++, unipc, euler or a diffusers scheduler's class name; default: what
                the pipeline's scheduler stands for.
            eta: DDIM's share of fresh noise.
            start: "lr" begins with the noised low-resolution latent, "noise" with noise alone.
            tile_weights: "smooth" ramps over the overlap; "gaussian"; "original": the published, off-centre Gaussian.
            output_type: "pil", "np" ([B, H, W, 3]) or "pt" ([B, 3, H, W] float32); a list where sizes differ.
            return_dict: False returns a tuple.
            callback_on_step_end: (pipe, step, timestep, {"latents": x}) -> None, or a dict whose "latents" replace x.
        Raises:
            UserError: an argument has an impossible value (the message says which, and what is possible).
        """
        pictures = to_tensors(image)
        texts = per_picture(prompt, len(pictures), "prompt"), per_picture(negative_prompt, len(pictures), "negative_prompt")
        options = _Options(
            scale=scale,
            steps=self.config.default_num_inference_steps if num_inference_steps is None else num_inference_steps,
            strength=strength,
            sampler=sampler,
            start=start,
            eta=eta,
            guidance_scale=guidance_scale,
            fidelity=self._fidelity(fidelity),
            tile=tile,
            tile_overlap=tile_overlap,
            tile_batch_size=tile_batch_size,
            vae_tile=vae_tile,
            memory_budget=memory_budget,
            color_fix=color_fix,
            tile_weights=tile_weights,
            on_step_end=callback_on_step_end,
        )
        _check(options, output_type, pictures)
        seeds = image_seeds(generator, len(pictures))
        one_size = len({picture.shape for picture in pictures}) == 1
        groups = [list(range(len(pictures)))] if one_size else [[k] for k in range(len(pictures))]
        restored: list[Tensor] = []
        plans: list[Plan] = []
        for group in groups:
            batch = torch.stack([pictures[k] for k in group])
            wanted, unwanted = ([side[k] for k in group] for side in texts)
            results, plan = self._upscale(batch, [seeds[k] for k in group], wanted, unwanted, options)
            restored.extend(results)
            plans.extend([plan] * len(group))
        self.maybe_free_model_hooks()
        images = from_tensors(restored, output_type)
        return StableSRPipelineOutput(images=images, plans=plans) if return_dict else (images,)

    def _upscale(
        self, pictures: Tensor, seeds: list[int], prompts: list[str], negative: list[str], options: _Options
    ) -> tuple[Tensor, Plan]:
        """Pictures of one size, [B, 3, h, w] -> [B, 3, H, W] in [0, 1]."""
        device = self._execution_device
        height, width = (max(1, round(options.scale * side)) for side in pictures.shape[-2:])
        upsampled = resize_bicubic(pictures.to(device), (height, width)).clamp(0, 1)
        plan = self._plan(height, width, len(seeds), options)
        padded = pad_to(upsampled, plan.height, plan.width)
        codec = TiledCodec(Codec(self.vae), *plan.vae_cells, batch_size=options.tile_batch_size)
        noise = ImageNoise(seeds, codec.codec.noise_shape(padded)[1:], device)

        z_lr = codec.encode(padded, noise("posterior"))
        latents = self._denoise(z_lr, noise, seeds, prompts, negative, plan, options)
        fused = padded if codec.codec.has_fidelity else None
        restored = codec.decode(latents, fused, options.fidelity)[..., :height, :width]
        return color_fix(options.color_fix, restored, upsampled).clamp_(0, 1), plan

    def _denoise(
        self, z_lr: Tensor, noise: ImageNoise, seeds: list[int], prompts: list[str], negative: list[str], plan: Plan, options: _Options
    ) -> Tensor:
        """Latents of the upsampled pictures -> latents of the restored ones, both [B, C, h, w] scaled float32."""
        guided = options.guidance_scale > 1
        if any(negative) and not guided:
            log.warning("negative_prompt has no effect without guidance; set guidance_scale above 1.")
        encoders = (self.text_encoder, self.tokenizer, self.unet, z_lr.device)
        predict = TiledDenoiser(
            self.unet,
            self.structural_encoder,
            z_lr,
            encode_texts(prompts, *encoders),
            tile_boxes(z_lr.shape[-2], z_lr.shape[-1], *plan.tile_cells),
            negative_text=encode_texts(negative, *encoders) if guided else None,
            guidance_scale=options.guidance_scale,
            batch_size=options.tile_batch_size,
            overlap=plan.tile_cells[1],
            weights=options.tile_weights,
        )
        sampler = build_sampler(
            options.sampler, self.scheduler, options.steps, strength=options.strength, eta=options.eta, seeds=seeds, device=z_lr.device
        )
        x = sampler.start(z_lr, noise("start"), from_lr=options.start == "lr")
        with self.progress_bar(total=len(sampler.timesteps)) as progress:

            def on_step_end(index: int, t: float, latents: Tensor) -> Tensor:
                progress.update()
                replaced = options.on_step_end(self, index, t, {"latents": latents}) if options.on_step_end else None
                return replaced.get("latents", latents) if replaced else latents

            return sample(sampler, predict, x, lambda index: noise("step", index), on_step_end)

    def _plan(self, height: int, width: int, batch: int, options: _Options) -> Plan:
        budget = options.memory_budget if options.memory_budget is not None else free_bytes(self._execution_device)
        return make_plan(
            height,
            width,
            unet=self.unet.config,
            vae_scale=Codec(self.vae).scale,
            memory=self.memory_model,
            budget=budget,
            tile=options.tile,
            overlap=options.tile_overlap,
            vae_tile=options.vae_tile,
            batch=min(batch, options.tile_batch_size) * (2 if options.guidance_scale > 1 else 1),
        )

    def memory_model(self) -> MemoryModel:
        """What a tile of these networks takes; measured on shapes alone, once per device and precision."""
        key = (self.unet.dtype, self.vae.dtype, self._execution_device.type)
        if key not in self._memory:
            self._memory[key] = MemoryModel(self.unet, self.structural_encoder, self.vae, self._execution_device)
        return self._memory[key]

    def _fidelity(self, fidelity: float | None) -> float:
        if fidelity is not None and not Codec(self.vae).has_fidelity:
            log.info("fidelity is ignored: this model's autoencoder has no CFW layers.")
        return DEFAULT_FIDELITY if fidelity is None else float(fidelity)


def _check(options: _Options, output_type: str, pictures: list[Tensor]) -> None:
    if output_type not in OUTPUT_TYPES:
        raise UserError(f"output_type: expected one of {', '.join(OUTPUT_TYPES)}, came {output_type!r}.")
    if (options.color_fix or "none") not in COLOR_FIXES:
        raise UserError(f"color_fix: expected one of {', '.join(COLOR_FIXES)}, came {options.color_fix!r}.")
    if options.tile_weights not in TILE_WEIGHTS:
        raise UserError(f"tile_weights: expected one of {', '.join(TILE_WEIGHTS)}, came {options.tile_weights!r}.")
    if not 0 < options.scale < float("inf"):
        raise UserError(f"scale: expected a positive number, came {options.scale}.")
    if options.start not in ("lr", "noise"):
        raise UserError(f"start: expected 'lr' or 'noise', came {options.start!r}.")
    if options.start == "noise" and options.strength < 1:
        raise UserError(f"start: pure noise needs strength 1, came {options.strength}; use start='lr' for an intermediate step.")
    if options.tile_batch_size < 1:
        raise UserError(f"tile_batch_size: expected 1 or more, came {options.tile_batch_size}.")
    if not 0 <= options.eta <= 1:
        raise UserError(f"eta: expected 0 to 1, came {options.eta}.")
