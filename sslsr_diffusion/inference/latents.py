"""Latents sampled for training: what a denoiser makes of a low-resolution picture, or of a noised one."""

import torch
from torch import Tensor

from sslsr_diffusion.inference.sampling import build_sampler, sample
from sslsr_diffusion.models.networks import LatentNetworks
from sslsr_diffusion.seeding import derive_seed, sample_generator


@torch.no_grad()
def sample_latents(networks: LatentNetworks, z: Tensor, indices: list[int], steps: int, *, seed: int, strength: float = 1.0) -> Tensor:
    """What the denoiser makes of noised latents [B, C, h, w], which it also sees clean unless it is a base; noise is from (seed, index)."""

    def noise(purpose: str) -> Tensor:
        drawn = [torch.randn(z.shape[1:], generator=sample_generator(seed, i, purpose)) for i in indices]
        return torch.stack(drawn).to(z)

    condition = networks.condition(z if networks.conditional else None)

    def predict(x: Tensor, t: float) -> Tensor:
        kind = torch.long if float(t).is_integer() else torch.float32
        return networks.denoiser(x, torch.full((len(x),), t, device=x.device, dtype=kind), condition)

    seeds = [derive_seed(seed, i, "sampler") for i in indices]
    sampler = build_sampler(None, networks.process, steps, strength=strength, seeds=seeds, device=z.device)
    start = sampler.start(z, noise("start"), from_lr=True)
    return sample(sampler, predict, start, lambda index: noise(f"step {index}"))
