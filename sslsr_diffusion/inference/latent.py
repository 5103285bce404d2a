"""Pictures by a latent diffusion model of any family: enlarge, encode, denoise in tiles, decode, finish."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor

from sslsr_diffusion.devices import free_bytes, hand_freed_blocks_back, is_out_of_memory, release_cached
from sslsr_diffusion.errors import NotEnoughMemory
from sslsr_diffusion.inference.codec_tiles import TiledCodec
from sslsr_diffusion.inference.denoising import TiledDenoiser
from sslsr_diffusion.inference.memory import MemoryModel, Offload
from sslsr_diffusion.inference.noise import Generators, ImageNoise, image_seeds
from sslsr_diffusion.inference.options import DEFAULT_FIDELITY, LatentOptions
from sslsr_diffusion.inference.pictures import from_tensors, to_tensors
from sslsr_diffusion.inference.placement import Placement
from sslsr_diffusion.inference.prompts import per_picture
from sslsr_diffusion.inference.restorer import FINISHING, Finishing, Output, Restorer, accepted, by_size, check_call, enlarged
from sslsr_diffusion.inference.sampling import build_sampler, sample
from sslsr_diffusion.inference.tile_plan import Part, Room, TilePlan, plan_tiles
from sslsr_diffusion.inference.tiling import pad_to, tile_boxes
from sslsr_diffusion.models.family import Family
from sslsr_diffusion.models.networks import LatentNetworks

log = logging.getLogger(__name__)

R = TypeVar("R")
STEPS = 200  # of a model that names none, as published
_TILED = ("tile", "tile_overlap", "tile_batch_size", "vae_tile", "memory_budget", "tile_weights", "callback_on_step_end")
_SAMPLED = ("num_inference_steps", "strength", "sampler", "start", "eta")
_PROMPTED = ("prompt", "negative_prompt", "guidance_scale")


class Host(Protocol):
    """Where the networks live while they are called: a diffusers pipeline moves them by hooks."""

    @property
    def device(self) -> torch.device: ...
    def offload(self) -> Offload: ...
    def release(self) -> None:
        """Send networks that wait on the CPU back there."""

    def progress(self, total: int) -> contextlib.AbstractContextManager[Any]: ...


class Resident:
    """Networks that stay on their device."""

    def __init__(self, networks: LatentNetworks) -> None:
        self._networks = networks

    @property
    def device(self) -> torch.device:
        return self._networks.device

    def offload(self) -> Offload:
        return "none"

    def release(self) -> None:
        pass

    @contextlib.contextmanager
    def progress(self, total: int) -> Iterator[None]:
        yield None


class LatentRestorer:
    """A restorer around LatentNetworks, which may still be training."""

    def __init__(
        self,
        networks: LatentNetworks,
        *,
        scale: float | None = None,
        defaults: Mapping[str, Any] | None = None,
        host: Host | None = None,
        scheduler: Any = None,
    ) -> None:
        """
        Args:
            scale: the enlargement of a call that names none; None: the model's own.
            defaults: of options that a call does not name: num_inference_steps, detail, antiring.
            host: moves the networks; None: they stay where they are.
            scheduler: a diffusers scheduler that chooses the sampler of a call that names none.
        """
        self.networks = networks
        self.defaults: dict[str, Any] = {"scale": 4, "num_inference_steps": STEPS, **networks.call_defaults, **(defaults or {})}
        self.scale: float = self.defaults.pop("scale") if scale is None else scale
        self.defaults.pop("scale", None)
        self._host, self._scheduler = host or Resident(networks), scheduler
        self._memory: dict[Any, MemoryModel] = {}
        self._limits: dict[str, int] = {}  # sides above which memory ran out in this process
        self._notes: list[str] = []

    @classmethod
    def open(cls, family: Family, path: Path, placement: Placement) -> Restorer:
        """A model's files as a restorer on a device."""
        return cls(cast(LatentNetworks, family.read(path).to(placement.device, placement.dtype)))

    @property
    def options(self) -> frozenset[str]:
        own = {*_TILED, *_SAMPLED, *FINISHING, *(("fidelity",) if self.networks.codec.has_fidelity else ())}
        return frozenset(own | (set(_PROMPTED) if self.networks.takes_prompts else set()))

    @torch.no_grad()
    def __call__(
        self, image: Any, *, scale: float | None = None, generator: Generators = None, output_type: str = "pil", **call: Any
    ) -> LatentOutput:
        """See `Restorer`; `call` are fields of LatentOptions, the finishing and prompts."""
        scale = self.scale if scale is None else scale
        check_call(scale, output_type)
        self._notes = []
        given = {
            name: value
            for name, value in accepted(call, self.options, self._notes).items()
            if value is not None or name not in self.defaults
        }
        pictures = to_tensors(image)
        texts = tuple(per_picture(given.pop(name, None), len(pictures), name) for name in ("prompt", "negative_prompt"))
        given = {**self.defaults, **given}
        finishing = Finishing(**{name: given.pop(name) for name in FINISHING & given.keys()})
        if given.get("fidelity", DEFAULT_FIDELITY) is None:
            del given["fidelity"]
        options = LatentOptions(finishing, **given)
        options.check()
        restored: list[Tensor] = []
        plans: list[TilePlan] = []
        seeds = image_seeds(generator, len(pictures))
        try:
            for group in by_size(pictures):
                wanted, unwanted = ([side[k] for k in group] for side in texts)
                batch = torch.stack([pictures[k] for k in group])
                results, plan = self._upscale(batch, scale, [seeds[k] for k in group], (wanted, unwanted), options)
                restored.extend(results)
                plans.extend([plan] * len(group))
        finally:
            self._host.release()
        return LatentOutput(from_tensors(restored, output_type), self._notes, plans)

    def save(self, folder: Path) -> None:
        self.networks.save(folder, scale=self.scale, **self.defaults)

    def _upscale(
        self, pictures: Tensor, scale: float, seeds: list[int], prompts: tuple[list[str], list[str]], options: LatentOptions
    ) -> tuple[Tensor, TilePlan]:
        """Pictures of one size, [B, 3, h, w] -> [B, 3, H, W] in [0, 1]."""
        upsampled = enlarged(pictures.to(self._host.device), scale)
        height, width = upsampled.shape[-2:]
        plan = self._plan(height, width, len(seeds), options)
        restored, plan = self._restore(pad_to(upsampled, plan.height, plan.width), seeds, prompts, plan, options)
        return options.finishing(restored[..., :height, :width], upsampled, pictures), plan

    def _restore(
        self, padded: Tensor, seeds: list[int], prompts: tuple[list[str], list[str]], plan: TilePlan, options: LatentOptions
    ) -> tuple[Tensor, TilePlan]:
        """Encode, read the prompts, denoise, decode: no phase needs the others' networks on the device."""
        codec = self.networks.codec
        noise = ImageNoise(seeds, codec.noise_shape(padded)[1:], padded.device)

        def encode(plan: TilePlan) -> Tensor:
            return TiledCodec(codec, *plan.vae_cells, batch_size=plan.batch).encode(padded, noise("posterior"))

        z_lr, plan = self._within_memory("vae_tile", plan, encode)
        texts = self._texts(*prompts, guided=options.guidance_scale > 1, device=padded.device)
        self._host.release()

        def denoise(plan: TilePlan) -> Tensor:
            return self._denoise(z_lr, noise, seeds, texts, plan, options)

        latents, plan = self._within_memory("tile", plan, denoise)

        def decode(plan: TilePlan) -> Tensor:
            fused = padded if codec.has_fidelity else None
            return TiledCodec(codec, *plan.vae_cells, batch_size=plan.batch).decode(latents, fused, options.fidelity)

        return self._within_memory("vae_tile", plan, decode)

    def _within_memory(self, part: Part, plan: TilePlan, run: Callable[[TilePlan], R]) -> tuple[R, TilePlan]:
        """Run by the plan, or by smaller and smaller ones while memory runs out; what was found holds for later pictures too.

        Raises:
            NotEnoughMemory: the smallest tiles are too large.
        """
        while True:
            try:
                result = run(plan)
                self._host.release()
                return result, plan
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            # outside of the handler: there the traceback would keep the failed call's tensors
            release_cached(self._host.device)
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
        encode = self.networks.encode_prompts
        return encode(prompts, device), encode(negative, device) if guided else None

    def _denoise(
        self,
        z_lr: Tensor,
        noise: ImageNoise,
        seeds: Sequence[int],
        texts: tuple[Tensor, Tensor | None],
        plan: TilePlan,
        options: LatentOptions,
    ) -> Tensor:
        """Latents of the upsampled pictures -> latents of the restored ones, both [B, C, h, w] normalised float32."""
        tile, overlap = plan.tile_cells
        predict = TiledDenoiser(
            self.networks.denoiser,
            z_lr,
            texts[0],
            tile_boxes(z_lr.shape[-2], z_lr.shape[-1], tile, overlap),
            negative_text=texts[1],
            guidance_scale=options.guidance_scale,
            batch_size=plan.batch,
            overlap=overlap,
            weights=options.tile_weights,
        )
        sampler = build_sampler(
            options.sampler,
            self.networks.process,
            options.num_inference_steps,
            scheduler=self._scheduler,
            strength=options.strength,
            eta=options.eta,
            seeds=seeds,
            device=z_lr.device,
        )
        x = sampler.start(z_lr, noise("start"), from_lr=options.start == "lr")
        with self._host.progress(len(sampler.timesteps)) as progress:

            def on_step_end(index: int, t: float, latents: Tensor) -> Tensor:
                if progress is not None:
                    progress.update()
                called = options.callback_on_step_end
                replaced = called(index, t, {"latents": latents}) if called else None
                return replaced.get("latents", latents) if replaced else latents

            return sample(sampler, predict, x, lambda index: noise("step", index), on_step_end)

    def _plan(self, height: int, width: int, pictures: int, options: LatentOptions) -> TilePlan:
        return plan_tiles(
            height,
            width,
            size=self.networks.size(),
            vae_scale=self.networks.codec.scale,
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
        device, offload = self._host.device, self._host.offload()
        if budget is None:
            return Room(free_bytes(device), offload=offload)
        if device.type == "cpu":
            hand_freed_blocks_back()
        return Room(budget, strict=True, offload=offload)

    def memory_model(self) -> MemoryModel:
        """What a tile of these networks takes; measured on shapes alone, once per device and precision."""
        networks, device = self.networks, self._host.device
        key = (next(networks.denoiser.parameters()).dtype, next(networks.codec.parameters()).dtype, device.type)
        if key not in self._memory:
            self._memory[key] = MemoryModel(networks, device, text_parameters=networks.text_parameters())
        return self._memory[key]


class LatentOutput(Output):
    """
    Args:
        plans: how each picture was cut into tiles (sides in output pixels), in the order of `images`.
    """

    def __init__(self, images: Any, notes: list[str], plans: list[TilePlan]) -> None:
        super().__init__(images, notes)
        self.plans = plans
