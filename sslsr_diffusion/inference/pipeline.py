"""StableSRPipeline: a low-resolution picture in, a picture of exactly round(scale * size) pixels out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from sslsr_diffusion.devices import free_bytes, hand_freed_blocks_back, is_out_of_memory, release_cached
from sslsr_diffusion.errors import NotEnoughMemory, UserError
from sslsr_diffusion.hub import PIPELINE_FILES, fetch
from sslsr_diffusion.images import resize_bicubic
from sslsr_diffusion.inference.antiring import antiring
from sslsr_diffusion.inference.codec_tiles import TiledCodec
from sslsr_diffusion.inference.color_fix import color_fix
from sslsr_diffusion.inference.denoising import TiledDenoiser
from sslsr_diffusion.inference.memory import MemoryModel, Offload
from sslsr_diffusion.inference.noise import Generators, ImageNoise, image_seeds
from sslsr_diffusion.inference.open import forget_folder, refuse_code
from sslsr_diffusion.inference.options import OnStepEnd, Options, StableSRPipelineOutput
from sslsr_diffusion.inference.pictures import OUTPUT_TYPES, from_tensors, to_tensors
from sslsr_diffusion.inference.prompts import encode_texts, per_picture
from sslsr_diffusion.inference.sampling import build_sampler, sample
from sslsr_diffusion.inference.tile_plan import Part, Plan, Room, Tile, make_plan
from sslsr_diffusion.inference.tiling import pad_to, tile_boxes
from sslsr_diffusion.models.codec import Codec
from sslsr_diffusion.shipped_model import shipped_folder

log = logging.getLogger(__name__)

R = TypeVar("R")
DEFAULT_FIDELITY = 0.5


class StableSRPipeline(DiffusionPipeline):
    """Upscales pictures with a latent diffusion model that is steered by the encoded low-resolution picture (Wang et al., IJCV 2024).

    Args:
        vae: AutoencoderKL, or AutoencoderKLCFW (then `fidelity` has an effect).
        unet: SFTUNet2DConditionModel.
        structural_encoder: StructuralEncoder.
        scheduler: a diffusers scheduler of the DDPM family: betas, prediction type and the default sampler.
        text_encoder, tokenizer: CLIP; without them the text context is zeros and a prompt is refused.
        default_num_inference_steps: sampling steps of a call that names none; kept in model_index.json.
        default_detail, default_antiring: the same for `detail` and `antiring`.
    """

    model_cpu_offload_seq = "text_encoder->unet->vae"  # the structural encoder alternates with the UNet, so both stay
    _optional_components: ClassVar[list[str]] = ["text_encoder", "tokenizer"]

    # no annotations: diffusers checks components against them, and before 0.36 it fails on those that are not plain classes
    def __init__(
        self,
        vae,
        unet,
        structural_encoder,
        scheduler,
        text_encoder=None,
        tokenizer=None,
        default_num_inference_steps=200,
        default_detail=1.0,
        default_antiring=0.0,
    ):
        super().__init__()
        self.register_modules(
            vae=vae,
            unet=unet,
            structural_encoder=structural_encoder,
            scheduler=scheduler,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
        )
        self.register_to_config(
            default_num_inference_steps=default_num_inference_steps, default_detail=default_detail, default_antiring=default_antiring
        )
        self._memory: dict[Any, MemoryModel] = {}
        self._limits: dict[str, int] = {}  # sides above which memory ran out in this process
        self._notes: list[str] = []

    @classmethod
    def download(cls, pretrained_model_name: str, **options: Any) -> str:
        """A repository as a local folder; diffusers' own method refuses components that live in another package than itself."""
        kept = ("revision", "cache_dir", "token", "local_files_only")
        given = {name: options[name] for name in kept if options.get(name) is not None}
        return str(fetch(pretrained_model_name, patterns=PIPELINE_FILES, **given))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **options: Any) -> Any:
        """As diffusers' own, from safetensors alone, and by a shipped model's name; UserError for a local folder with Python files."""
        pretrained_model_name_or_path = shipped_folder(str(pretrained_model_name_or_path)) or pretrained_model_name_or_path
        refuse_code(Path(pretrained_model_name_or_path))
        return super().from_pretrained(pretrained_model_name_or_path, **{"use_safetensors": True, **options})

    def save_pretrained(self, *given: Any, **options: Any) -> None:
        """As diffusers' own, but the configs do not say from which folder of this machine a component was loaded."""
        for component in (self, *self.components.values()):
            forget_folder(component)
        super().save_pretrained(*given, **options)

    @torch.no_grad()
    def __call__(
        self,
        image: Any,
        scale: float = 4,
        num_inference_steps: int | None = None,
        generator: Generators = None,
        strength: float = 1.0,
        fidelity: float | None = None,
        detail: float | None = None,
        antiring: float | None = None,
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
            detail: share of the model's picture in the result, 0 to 1; the rest is the bicubic enlargement. Between a faithful and a
                lively picture, straight lines lead from the least error to the most realism (Freirich et al., NeurIPS 2021); None:
                the pipeline's own default (1 unless its recipe or its base said otherwise).
            antiring: how much is taken back, 0 to 1, of what is brighter or darker in the model's picture than every low-resolution pixel
                nearby (about 7 x 7 of them): the seams beside edges that a discriminator or an already sharpened input leads to. Before
                `detail` mixes in the bicubic enlargement; None: the pipeline's own default (0 unless recipe or base said otherwise).
            prompt, negative_prompt: one text or one per picture; the negative one acts with guidance_scale above 1.
            guidance_scale: u + g (c - u); 1 is off.
            tile: side in output pixels of the square the denoiser sees at once; "auto" chooses from free memory; None: whole.
            tile_overlap: in output pixels; default half a tile, as published.
            tile_batch_size: tiles per network call.
            vae_tile: the same as `tile` for the autoencoder.
            memory_budget: bytes that weights and work of this call may take on the device together; "auto" then chooses tiles
                that stay below. None: what is free.
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
            NotEnoughMemory: the budget is too small, or memory ran out even with the smallest tiles.
        """
        pictures = to_tensors(image)
        texts = per_picture(prompt, len(pictures), "prompt"), per_picture(negative_prompt, len(pictures), "negative_prompt")
        options = Options(
            scale=scale,
            steps=self.config.default_num_inference_steps if num_inference_steps is None else num_inference_steps,
            strength=strength,
            sampler=sampler,
            start=start,
            eta=eta,
            guidance_scale=guidance_scale,
            fidelity=self._fidelity(fidelity),
            antiring=self.config.default_antiring if antiring is None else antiring,
            detail=self.config.default_detail if detail is None else detail,
            tile=tile,
            tile_overlap=tile_overlap,
            tile_batch_size=tile_batch_size,
            vae_tile=vae_tile,
            memory_budget=memory_budget,
            color_fix=color_fix,
            tile_weights=tile_weights,
            on_step_end=callback_on_step_end,
        )
        if output_type not in OUTPUT_TYPES:
            raise UserError(f"output_type: expected one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}.")
        options.check()
        self._notes = []
        restored, plans = self._upscale_all(pictures, image_seeds(generator, len(pictures)), texts, options)
        images = from_tensors(restored, output_type)
        return StableSRPipelineOutput(images=images, plans=plans, notes=self._notes) if return_dict else (images,)

    def _upscale_all(
        self, pictures: list[Tensor], seeds: list[int], texts: tuple[list[str], list[str]], options: Options
    ) -> tuple[list[Tensor], list[Plan]]:
        """Pictures of one size together, others one after the other."""
        one_size = len({picture.shape for picture in pictures}) == 1
        groups = [list(range(len(pictures)))] if one_size else [[k] for k in range(len(pictures))]
        restored: list[Tensor] = []
        plans: list[Plan] = []
        try:
            for group in groups:
                batch = torch.stack([pictures[k] for k in group])
                wanted, unwanted = ([side[k] for k in group] for side in texts)
                results, plan = self._upscale(batch, [seeds[k] for k in group], wanted, unwanted, options)
                restored.extend(results)
                plans.extend([plan] * len(group))
        finally:
            self.maybe_free_model_hooks()
        return restored, plans

    def _upscale(
        self, pictures: Tensor, seeds: list[int], prompts: list[str], negative: list[str], options: Options
    ) -> tuple[Tensor, Plan]:
        """Pictures of one size, [B, 3, h, w] -> [B, 3, H, W] in [0, 1]."""
        height, width = (max(1, round(options.scale * side)) for side in pictures.shape[-2:])
        upsampled = resize_bicubic(pictures.to(self._execution_device), (height, width)).clamp(0, 1)
        plan = self._plan(height, width, len(seeds), options)
        restored, plan = self._restore(pad_to(upsampled, plan.height, plan.width), seeds, prompts, negative, plan, options)
        result = color_fix(options.color_fix, restored[..., :height, :width], upsampled).clamp_(0, 1)
        result = antiring(result, pictures, options.antiring)
        return upsampled.lerp_(result, options.detail), plan  # exactly the result where detail is 1

    def _restore(
        self, padded: Tensor, seeds: list[int], prompts: list[str], negative: list[str], plan: Plan, options: Options
    ) -> tuple[Tensor, Plan]:
        """Encode, read the prompts, denoise, decode: no phase needs the others' networks on the device."""
        codec = Codec(self.vae)
        noise = ImageNoise(seeds, codec.noise_shape(padded)[1:], padded.device)

        def encode(plan: Plan) -> Tensor:
            return TiledCodec(codec, *plan.vae_cells, batch_size=plan.batch).encode(padded, noise("posterior"))

        z_lr, plan = self._within_memory("vae_tile", plan, encode)
        texts = self._texts(prompts, negative, guided=options.guidance_scale > 1, device=padded.device)
        self.maybe_free_model_hooks()

        def denoise(plan: Plan) -> Tensor:
            return self._denoise(z_lr, noise, seeds, texts, plan, options)

        latents, plan = self._within_memory("tile", plan, denoise)

        def decode(plan: Plan) -> Tensor:
            fused = padded if codec.has_fidelity else None
            return TiledCodec(codec, *plan.vae_cells, batch_size=plan.batch).decode(latents, fused, options.fidelity)

        return self._within_memory("vae_tile", plan, decode)

    def _within_memory(self, part: Part, plan: Plan, run: Callable[[Plan], R]) -> tuple[R, Plan]:
        """Run by the plan, or by smaller and smaller ones while memory runs out; what was found holds for later pictures too.

        Raises:
            NotEnoughMemory: the smallest tiles are too large.
        """
        while True:
            try:
                result = run(plan)
                self.maybe_free_model_hooks()
                return result, plan
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            # outside of the handler: there the traceback would keep the failed call's tensors
            release_cached(self._execution_device)
            smaller = plan.smaller(part)
            if smaller is None:
                raise NotEnoughMemory(
                    f"out of memory even with {part} {plan.side(part)}, the smallest; a picture of {plan.width} x {plan.height} pixels is "
                    "too large here: lower the scale, use a half-precision dtype, or another device."
                )
            self._limits.update({part: smaller.side(part), "batch": smaller.batch})
            what = f"{part} {plan.side(part)} -> {smaller.side(part)}" if smaller.batch == plan.batch else "one sample per network call"
            self._notes.append(f"out of memory: {what}")
            log.warning("out of memory with %s %d: going on with %s", part, plan.side(part), what)
            plan = smaller

    def _texts(self, prompts: list[str], negative: list[str], *, guided: bool, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Contexts of the prompts and, for guidance, of the negative ones."""
        if any(negative) and not guided:
            log.warning("negative_prompt has no effect without guidance; set guidance_scale above 1.")
        encoders = (self.text_encoder, self.tokenizer, self.unet, device)
        return encode_texts(prompts, *encoders), encode_texts(negative, *encoders) if guided else None

    def _denoise(
        self, z_lr: Tensor, noise: ImageNoise, seeds: list[int], texts: tuple[Tensor, Tensor | None], plan: Plan, options: Options
    ) -> Tensor:
        """Latents of the upsampled pictures -> latents of the restored ones, both [B, C, h, w] scaled float32."""
        predict = TiledDenoiser(
            self.unet,
            self.structural_encoder,
            z_lr,
            texts[0],
            tile_boxes(z_lr.shape[-2], z_lr.shape[-1], *plan.tile_cells),
            negative_text=texts[1],
            guidance_scale=options.guidance_scale,
            batch_size=plan.batch,
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

    def _plan(self, height: int, width: int, pictures: int, options: Options) -> Plan:
        return make_plan(
            height,
            width,
            unet=self.unet.config,
            vae_scale=Codec(self.vae).scale,
            memory=self.memory_model,
            room=self._room(options.memory_budget),
            tile=options.tile,
            overlap=options.tile_overlap,
            vae_tile=options.vae_tile,
            pictures=pictures,
            batch=options.tile_batch_size,
            guided=options.guidance_scale > 1,
            limits=self._limits,
        )

    def _room(self, budget: int | None) -> Room:
        if budget is None:
            return Room(free_bytes(self._execution_device), offload=self._offload())
        if self._execution_device.type == "cpu":
            hand_freed_blocks_back()
        return Room(budget, strict=True, offload=self._offload())

    def _offload(self) -> Offload:
        """How diffusers' hooks move the weights at present."""
        if getattr(self, "_all_hooks", None):
            return "model"
        return "sequential" if any(hasattr(part, "_hf_hook") for part in (self.unet, self.vae)) else "none"

    def memory_model(self) -> MemoryModel:
        """What a tile of these networks takes; measured on shapes alone, once per device and precision."""
        key = (self.unet.dtype, self.vae.dtype, self._execution_device.type)
        if key not in self._memory:
            text = sum(p.numel() for p in self.text_encoder.parameters()) if self.text_encoder is not None else 0
            networks = (self.unet, self.structural_encoder, self.vae)
            self._memory[key] = MemoryModel(*networks, self._execution_device, text_parameters=text)
        return self._memory[key]

    def _fidelity(self, fidelity: float | None) -> float:
        if fidelity is not None and not Codec(self.vae).has_fidelity:
            log.info("fidelity is ignored: this model's autoencoder has no CFW layers.")
        return DEFAULT_FIDELITY if fidelity is None else float(fidelity)
