"""A batch of pictures through latent networks, within memory: encode, read the prompts, denoise in tiles, decode."""

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sslsr_diffusion.devices import free_bytes, hand_freed_blocks_back
from sslsr_diffusion.errors import NotEnoughMemory, UserError
from sslsr_diffusion.images import pad_to
from sslsr_diffusion.inference.bands import Enlarged, finished, rows_beside
from sslsr_diffusion.inference.memory import MemoryModel, Offload
from sslsr_diffusion.inference.noise import ImageNoise
from sslsr_diffusion.inference.options import LatentOptions
from sslsr_diffusion.inference.progress import piece
from sslsr_diffusion.inference.sampling import Sampler, build_sampler, sample
from sslsr_diffusion.inference.tile_plan import InBands, Part, Room, TilePlan, check_tile, plan_tiles, vae_tiles, within_memory
from sslsr_diffusion.inference.tiled import TiledCodec, TiledDenoiser
from sslsr_diffusion.inference.tiling import tile_boxes
from sslsr_diffusion.models.condition import Condition, Text
from sslsr_diffusion.models.networks import LatentNetworks, working_dtype

log = logging.getLogger(__name__)

R = TypeVar("R")
_HELD = 6  # bytes per value of a low-resolution picture: its float32, and what it is made from, of 8 or 16 bits
Decode = Callable[[], Iterator[Tensor]]  # bands of the decoded picture, from the top down, as often as it is called
Prompts = tuple[list[str], list[str]]  # wanted and not wanted, one per picture


class Host:
    """Networks that stay on their device, and no bar for the steps."""

    def __init__(self, networks: Any) -> None:
        self._networks = networks

    @property
    def device(self) -> torch.device:
        return self._networks.device

    def offload(self) -> Offload:
        return "none"

    def bring(self, part: nn.Module) -> None:
        """Have one of the networks on the device, before it is called."""

    def release(self) -> None:
        """Send networks that wait on the CPU back there."""

    def progress(self, total: int) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()


class LatentWork:
    """What was found out about memory holds for later pictures, too."""

    def __init__(self, networks: LatentNetworks, host: Host, scheduler: Any = None) -> None:
        """`scheduler`: a diffusers scheduler that chooses the sampler where the options name none."""
        self._networks, self._host, self._scheduler = networks, host, scheduler
        self._memory: dict[Any, MemoryModel] = {}
        self._limits: dict[str, int] = {}  # sides above which memory ran out

    def check(self, options: LatentOptions) -> None:
        """Raises UserError for tiles and samplers that these networks cannot have."""
        check_tile("tile", options.tile, self._networks.size())
        check_tile("vae_tile", options.vae_tile, vae_tiles(self._networks.codec.scale))
        self._noise_levels(options, 1)
        self._sampler(options, [0])

    def __call__(
        self, seen: Tensor, seeds: list[int], prompts: Prompts, options: LatentOptions, notes: list[str]
    ) -> tuple[Tensor, TilePlan]:
        """Pictures as they are seen, [B, 3, H / zoom, W / zoom] in [0, 1] -> restored ones [B, 3, H, W], about [0, 1]; and their tiles.

        No phase needs the others' networks on the device. `notes` gets a sentence for each time that memory ran out.
        """
        zoom, codec = self._networks.zoom, self._networks.codec
        height, width = (zoom * side for side in seen.shape[-2:])
        plan = self._plan(height, width, len(seeds), options)
        padded = pad_to(seen, plan.height // zoom, plan.width // zoom)
        latents, plan = self._latents(padded, padded, seeds, prompts, options, plan, notes)

        def decode(plan: TilePlan) -> Tensor:
            self._host.bring(codec)
            fused = padded if codec.has_fidelity else None
            return TiledCodec(codec, *plan.vae_cells, batch_size=plan.batch).decode(latents, fused, options.fidelity)

        with piece(2, 3):
            restored, plan = self._within_memory(["vae_tile"], plan, decode, notes)
        return restored[..., :height, :width], plan

    def bands(
        self, low: Tensor, size: tuple[int, int], seed: int, prompts: Prompts, options: LatentOptions, notes: list[str]
    ) -> Iterator[Tensor]:
        """One low-resolution picture [1, 3, h, w] -> the restored one of `size`, finished, in bands [3, n, W] from the top down.

        With the same tiles, the pixels are those of one piece. All but the last step is done before this returns.
        """
        zoom, codec = self._networks.zoom, self._networks.codec
        height, width = size if zoom == 1 else (zoom * side for side in low.shape[-2:])
        beside = InBands(rows_beside(options, size[0] / low.shape[-2]), _HELD * low.numel(), "rows" if self._by_rows(options) else "whole")
        plan = self._plan(height, width, 1, options, beside)
        source: Tensor | Enlarged
        if zoom == 1:
            seen, source = low, Enlarged(low, size, (plan.height, plan.width))  # what these networks see, they only hand on to be encoded
        else:
            seen = source = pad_to(low, plan.height // zoom, plan.width // zoom)
        decoding, parts, plan = self._decoding(seen, source, seed, prompts, options, plan, notes)

        def start(plan: TilePlan) -> tuple[Decode, list[Iterator[Tensor]]]:
            """With its first row of tiles, where memory runs out if it does."""
            self._host.bring(codec)
            decode = decoding(plan)
            made = decode()
            return decode, [itertools.chain([next(made)], made)]

        with piece(2, 3), piece(0, 2):
            (decode, started), plan = self._within_memory(parts, plan, start, notes)
        return self._finished(finished(options, low, size, lambda: started.pop() if started else decode(), (height, width)))

    def _by_rows(self, options: LatentOptions) -> bool:
        """Whether latents, too, are never whole where a picture is made in bands."""
        return False

    def _decoding(
        self,
        seen: Tensor,
        source: Tensor | Enlarged,
        seed: int,
        prompts: Prompts,
        options: LatentOptions,
        plan: TilePlan,
        notes: list[str],
    ) -> tuple[Callable[[TilePlan], Decode], tuple[Part, ...], TilePlan]:
        """By which plan the restored picture is decoded in what bands, and whose tiles that takes."""
        codec = self._networks.codec
        latents, plan = self._latents(seen, source, [seed], prompts, options, plan, notes)

        def decoding(plan: TilePlan) -> Decode:
            fused = source if codec.has_fidelity else None
            return TiledCodec(codec, *plan.vae_cells, batch_size=plan.batch).decoded(latents, fused, options.fidelity)

        return decoding, ("vae_tile",), plan

    def _finished(self, bands: Iterator[Tensor]) -> Iterator[Tensor]:
        try:
            while True:
                self._host.bring(self._networks.codec)  # a run within memory has released it
                with torch.no_grad(), piece(2, 3), piece(1, 2):
                    band = next(bands, None)
                if band is None:
                    return
                yield band
        finally:
            self._host.release()

    def _latents(
        self,
        seen: Tensor,
        source: Tensor | Enlarged,
        seeds: list[int],
        prompts: Prompts,
        options: LatentOptions,
        plan: TilePlan,
        notes: list[str],
    ) -> tuple[Tensor, TilePlan]:
        """Latents of the restored pictures, whole; `source` is what is encoded, where the networks see an encoded picture."""
        networks, device = self._networks, seen.device
        wanted, unwanted = self._read(prompts, options, device)
        levels = self._noise_levels(options, len(seeds))

        def look(plan: TilePlan) -> Condition:
            noise = ImageNoise(seeds, networks.seen_noise_shape(plan.height, plan.width), device)("posterior")
            codec = TiledCodec(networks.codec, *plan.vae_cells, batch_size=plan.batch)

            def encode(_: Tensor, noise: Tensor) -> Tensor:
                self._host.bring(networks.codec)
                return codec.encode(source, noise)

            return networks.see(seen, noise, level=levels, text=wanted, encode=encode)

        with piece(0, 3):
            condition, plan = self._within_memory(["vae_tile"], plan, look, notes)

        def denoise(plan: TilePlan) -> Tensor:
            return self._denoise(condition, unwanted, seeds, plan, options)

        with piece(1, 3):
            return self._within_memory(["tile"], plan, denoise, notes)

    def _read(self, prompts: Prompts, options: LatentOptions, device: torch.device) -> tuple[Text, Text | None]:
        """What is wanted, and with guidance what is not."""
        networks = self._networks
        self._prepare(options)
        if networks.text_network is not None:
            self._host.bring(networks.text_network)
        wanted = networks.encode_prompts(prompts[0], device)
        unwanted = networks.encode_prompts(prompts[1], device) if options.guided else None
        self._host.release()
        return wanted, unwanted

    def _prepare(self, options: LatentOptions) -> None:
        """Set the networks as a call wants them."""

    def _within_memory(self, parts: Sequence[Part], plan: TilePlan, run: Callable[[TilePlan], R], notes: list[str]) -> tuple[R, TilePlan]:
        def released(plan: TilePlan) -> R:
            result = run(plan)
            self._host.release()
            return result

        def smaller(plan: TilePlan) -> TilePlan:
            tried = sorted(parts, key=plan.side, reverse=True)
            part, found = next(((part, found) for part in tried if (found := plan.smaller(part))), (tried[0], None))
            if found is None:
                raise NotEnoughMemory(
                    f"out of memory even with {part} {plan.side(part)}, the smallest; a picture of {plan.width} x {plan.height} pixels is "
                    "too large here: lower the scale, use a half-precision dtype, or another device."
                )
            self._limits.update({part: found.side(part), "batch": found.batch})
            what = f"{part} {plan.side(part)} -> {found.side(part)}" if found.batch == plan.batch else "one sample per network call"
            notes.append(f"out of memory: {what}")
            log.warning("out of memory with %s %d: going on with %s", part, plan.side(part), what)
            return found

        return within_memory(released, plan, smaller, self._host.device)

    def _denoise(
        self, condition: Condition, negative_text: Text | None, seeds: Sequence[int], plan: TilePlan, options: LatentOptions
    ) -> Tensor:
        """Latents of the restored pictures, [B, C, h, w] normalised float32."""
        self._host.bring(self._networks.denoiser)
        noise = ImageNoise(seeds, (self._networks.codec.latent_channels, *plan.latent_size), self._host.device)
        predict = self._tiled(condition, negative_text, plan, options)
        sampler = self._sampler(options, seeds)
        x = sampler.start(noise("start"), condition.z_lr if options.start == "lr" else None)
        with self._host.progress(len(sampler.timesteps)) as progress:

            def on_step_end(index: int, t: float, latents: Tensor) -> Tensor:
                if progress is not None:
                    progress.update()
                called = options.callback_on_step_end
                replaced = called(index, t, {"latents": latents}) if called else None
                return replaced.get("latents", latents) if replaced else latents

            return sample(sampler, predict, x, lambda index: noise("step", index), on_step_end)

    def _tiled(self, condition: Condition, negative_text: Text | None, plan: TilePlan, options: LatentOptions) -> TiledDenoiser:
        tile, overlap = plan.tile_cells
        return TiledDenoiser(
            self._networks.denoiser,
            condition,
            tile_boxes(*plan.latent_size, tile, overlap),
            negative_text=negative_text,
            guidance_scale=options.guidance_scale,
            batch_size=plan.batch,
            overlap=overlap,
            weights=options.tile_weights,
        )

    def _noise_levels(self, options: LatentOptions, pictures: int) -> Tensor | None:
        """[B] of the noise that the pictures get before they are seen; None where they get none. UserError for one too high."""
        most = self._networks.max_noise_level
        if not isinstance(options.noise_level, int) or not 0 <= options.noise_level <= most:
            raise UserError(f"noise_level: expected a whole number from 0 to {most}, got {options.noise_level}.")
        return torch.full((pictures,), options.noise_level, device=self._host.device) if most else None

    def _sampler(self, options: LatentOptions, seeds: Sequence[int]) -> Sampler:
        return build_sampler(
            options.sampler,
            self._networks.process,
            options.num_inference_steps,
            scheduler=self._scheduler or self._networks.sampling_scheduler,
            as_it_is=self._networks.sampling_scheduler is not None,
            strength=options.strength,
            eta=options.eta,
            seeds=seeds,
            device=self._host.device,
        )

    def _plan(self, height: int, width: int, pictures: int, options: LatentOptions, beside: InBands | None = None) -> TilePlan:
        return plan_tiles(
            height,
            width,
            size=self._networks.size(),
            vae_scale=self._networks.codec.scale,
            memory=self.memory_model,
            room=self._room(options.memory_budget),
            tile=options.tile,
            overlap=options.tile_overlap,
            vae_tile=options.vae_tile,
            pictures=pictures,
            batch=options.tile_batch_size,
            guided=options.guided,
            limits=self._limits,
            beside=beside,
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
        networks, device = self._networks, self._host.device
        key = (working_dtype(networks.denoiser), working_dtype(networks.codec), device.type)
        if key not in self._memory:
            self._memory[key] = MemoryModel(networks, device, text_parameters=networks.text_parameters())
        return self._memory[key]
