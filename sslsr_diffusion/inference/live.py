"""The networks that a recipe trains, used: latents sampled, pictures upscaled, the pipeline written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.inference.sampling import build_sampler, sample
from sslsr_diffusion.models import make_scheduler
from sslsr_diffusion.seeding import derive_seed, sample_generator


@torch.no_grad()
def sample_latents(
    networks: Any, z: Tensor, indices: list[int], steps: int, *, seed: int, strength: float = 1.0, conditional: bool = True
) -> Tensor:
    """What the denoiser makes of noised latents [B, c, h, w], which it also sees clean if `conditional`; noise from (seed, index) alone."""

    def noise(purpose: str) -> Tensor:
        drawn = [torch.randn(z.shape[1:], generator=sample_generator(seed, i, purpose)) for i in indices]
        return torch.stack(drawn).to(z)

    def predict(x: Tensor, t: float) -> Tensor:
        return networks.denoiser(x, torch.full((len(x),), int(t), device=x.device), z if conditional else None, networks.text)

    scheduler = make_scheduler(networks.scheduler_config)
    seeds = [derive_seed(seed, i, "sampler") for i in indices]
    sampler = build_sampler(None, scheduler, steps, strength=strength, eta=0.0, seeds=seeds, device=z.device)
    start = sampler.start(z, noise("start"), from_lr=True)
    return sample(sampler, predict, start, lambda index: noise(f"step {index}"))


class Upscaler:
    """The pipeline around the live networks, as a callable; the recipe's text context, encoded once, stands in for the text encoder."""

    def __init__(self, networks: Callable[[], Any], scale: int, **call: Any) -> None:
        """`call`: what the pipeline is called with, such as num_inference_steps."""
        self._networks, self._scale, self._call = networks, scale, call
        self._pipe: Any = None

    def __call__(self, lr: Tensor, seed: int) -> Tensor:
        """[1, 3, h, w] in [0, 1] -> [1, 3, scale * h, scale * w] in [0, 1]; the pipeline takes smaller tiles where memory runs out."""
        if self._pipe is None:
            self._pipe = self._build()
        generator = torch.Generator().manual_seed(seed)
        return self._pipe(lr, scale=self._scale, generator=generator, output_type="pt", **self._call).images

    def _build(self) -> Any:
        from sslsr_diffusion.inference import StableSRPipeline

        networks = self._networks()
        pipe = StableSRPipeline(
            vae=networks.codec.vae,
            unet=networks.denoiser.unet,
            structural_encoder=networks.denoiser.structural_encoder,
            scheduler=make_scheduler(networks.scheduler_config),
            text_encoder=CachedText(networks.text),
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe


class CachedText(nn.Module):
    """Answers every prompt with the context that training uses."""

    def __init__(self, text: Tensor) -> None:
        super().__init__()
        self.register_buffer("text", text)
        self.config = SimpleNamespace(max_position_embeddings=text.shape[1] if text.shape[1] > 2 else 77)

    @property
    def device(self) -> torch.device:
        return self.get_buffer("text").device

    @property
    def dtype(self) -> torch.dtype:
        return self.get_buffer("text").dtype

    def forward(self, ids: Tensor) -> tuple[Tensor]:
        return (self.get_buffer("text").expand(ids.shape[0], -1, -1),)


def save_pipeline(networks: Any, folder: Path, **defaults: Any) -> None:
    """A complete diffusers folder; `defaults` are the pipeline's own, such as default_num_inference_steps."""
    from sslsr_diffusion.inference import StableSRPipeline

    pipe = StableSRPipeline(**networks.components(), **defaults)
    pipe.save_pretrained(folder, safe_serialization=True)


def halve(folder: Path) -> None:
    """Rewrite the weights below `folder` in float16; UserError for one that float16 cannot hold."""
    for file in folder.rglob("*.safetensors"):
        tensors = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in load_file(file).items()}
        broken = next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None)
        if broken is not None:
            raise UserError(f"--half: {broken} has values that float16 cannot hold (above 65504); export without --half.")
        save_file(tensors, file, metadata={"format": "pt"})
