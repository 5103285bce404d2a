"""Samples for task decoder, made once: crops, their low-resolution partners, and the latents that the upscaler makes of those.

hr/000000.png  lr/000000.png  latents/000000.safetensors (tensor `latents`, [c, h, w], scaled)  settings.json
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.images import to_array, to_tensor
from sslsr_diffusion.inference.sampling import sample_latents
from sslsr_diffusion.models.networks import LatentNetworks
from sslsr_diffusion.runs.pin import with_precision
from sslsr_diffusion.runs.recipe import Recipe
from sslsr_diffusion.runs.stored_samples import Make, Wanted, make_samples
from sslsr_diffusion.runs.task import frame_of
from sslsr_diffusion.tasks.pixels import seen
from sslsr_diffusion.tasks.task import per_sample_noise
from sslsr_diffusion.training.engines import HALF
from sslsr_diffusion.types import Batch


def make_cfw_data(
    recipe: Recipe,
    model: Path,
    output: Path,
    *,
    count: int,
    steps: int = 200,
    batch_size: int = 1,
    device: str = "cpu",
    fingerprint: str = "",
) -> Iterator[int]:
    """`make_samples` with the latents of an upscaler.

    Args:
        recipe: seed, scale, crop size, precision, and where the pictures and degradations come from.
        model: folder of the pipeline whose latents are wanted.
        count: samples in all.
        steps: of the sampler (StableSR: 200).
        fingerprint: of the model; `output` holds samples of one model only.
    Raises UserError: `output` was made with other settings, or the recipe has no pictures to begin with.
    """
    if "decoder" not in recipe.family.tasks:
        raise UserError(f"model.kind: expected a family that task decoder trains, such as stablesr, got {recipe.family.kind}.")
    if any(source.kind == "cfw" for source in recipe.data.sources):
        raise UserError("data.sources: expected pictures to make samples from, got kind cfw; give the recipe with the photographs.")

    def start() -> Make:
        settings = recipe.model.model_copy(update={"base": str(model), "init": "pretrained", "revision": None, "vae": None})
        networks = recipe.family.build(settings, seed=recipe.seed)
        assert isinstance(networks, LatentNetworks)
        frame_of(recipe).check_crop(networks)
        networks.requires_grad_(False).eval().to(device)
        return lambda batch: _stored(networks, batch, recipe, steps, device)

    wanted = Wanted(recipe.data, recipe.training.crop_size, recipe.scale, recipe.seed, count)
    made_with = {"model": fingerprint, "steps": steps, "prompt": getattr(recipe.model, "prompt", "")}
    yield from make_samples(wanted, output, start, last="latents", made_with=made_with, batch_size=batch_size, device=device)


@torch.no_grad()
def _stored(networks: LatentNetworks, batch: Batch, recipe: Recipe, steps: int, device: str) -> Mapping[str, Tensor]:
    """The batch with the 8 bits that are stored, and its latents: what training would compute on the fly."""
    hr, lr = (torch.stack([to_tensor(to_array(picture)) for picture in side]) for side in (batch.hr, batch.lr))
    batch = replace(batch, hr=hr, lr=lr)
    indices = batch.index.tolist()
    noise = per_sample_noise(recipe.seed, indices, "posterior_lr", networks.seen_noise_shape(*batch.hr.shape[-2:]))
    kind = HALF.get(with_precision(recipe, torch.device(device)).training.mixed_precision)
    with torch.autocast(torch.device(device).type, kind, enabled=kind is not None):
        condition = networks.see(seen(batch).to(device), noise.to(device))
        assert condition.z_lr is not None
        latents = sample_latents(networks, condition.z_lr, condition, indices, steps, seed=recipe.seed)
    return {"hr": hr, "lr": lr, "latents": latents}
