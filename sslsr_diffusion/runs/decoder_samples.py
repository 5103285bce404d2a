"""Samples for task decoder, made once: crops, their low-resolution partners, and the latents that the upscaler makes of those.

hr/000000.png  lr/000000.png  latents/000000.safetensors (tensor `latents`, [c, h, w], scaled)  settings.json
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sslsr_diffusion.data import TrainingLoader, open_training_data
from sslsr_diffusion.errors import UserError
from sslsr_diffusion.files import atomic_write
from sslsr_diffusion.images import Image, to_array, to_tensor, write_image
from sslsr_diffusion.inference.sampling import sample_latents
from sslsr_diffusion.models.networks import LatentNetworks
from sslsr_diffusion.runs.recipe import Recipe
from sslsr_diffusion.runs.task import frame_of
from sslsr_diffusion.tasks.pixels import seen
from sslsr_diffusion.tasks.task import per_sample_noise
from sslsr_diffusion.types import Batch

logger = logging.getLogger(__name__)


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
    """Write the samples that are not in `output` yet, yielding the number of samples there after each batch.

    Sample i follows from (recipe.seed, i) alone, so a run that goes on, or asks for more, makes what one run would have made.

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
    _same_settings(output, _settings(recipe, steps, fingerprint))
    done = {path.stem for path in (output / "latents").glob("*.safetensors")}
    missing = [i for i in range(count) if _name(i) not in done]
    yield count - len(missing)
    if not missing:
        return
    settings = recipe.model.model_copy(update={"base": str(model), "init": "pretrained", "revision": None, "vae": None})
    networks = recipe.family.build(settings, seed=recipe.seed)
    assert isinstance(networks, LatentNetworks)
    frame_of(recipe).check_crop(networks)
    networks.requires_grad_(False).eval().to(device)
    loader = _open(recipe, missing[0] // batch_size, batch_size, device)
    try:
        present = count - len(missing)
        for batch in loader:
            wanted = sorted(set(batch.index.tolist()) & set(missing))
            if wanted:
                _write(output, *_stored(networks, _only(batch, wanted), recipe, steps, device))
                present += len(wanted)
                yield present
            if int(batch.index.max()) >= missing[-1]:
                return
    finally:
        for problem in loader.problems():
            logger.warning("training data: %s", problem)
        loader.close()


def _name(index: int) -> str:
    return f"{index:06d}"


def _settings(recipe: Recipe, steps: int, fingerprint: str) -> dict[str, Any]:
    """What a sample depends on."""
    chosen_by = {"sources", "degradation", "crop", "small_images"} | ({"mask"} if recipe.data.crop.kind == "edge_aware" else set())
    data = recipe.data.model_dump(mode="json", include=chosen_by)
    own = {
        "seed": recipe.seed,
        "scale": recipe.scale,
        "crop_size": recipe.training.crop_size,
        "prompt": getattr(recipe.model, "prompt", ""),
    }
    return {"model": fingerprint, "steps": steps, **own, **data}


def _same_settings(output: Path, settings: dict[str, Any]) -> None:
    path = output / "settings.json"
    if not any((output / "latents").glob("*.safetensors")):
        output.mkdir(parents=True, exist_ok=True)
        atomic_write(path, json.dumps(settings, indent=1).encode())
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{path} is missing or damaged, so what made the samples there is not known; give another --output.") from None
    for key, value in settings.items():
        if before.get(key) != value:
            raise UserError(f"{output} holds samples made with {key} {before.get(key)}, now it is {value}; give another --output.")


def _open(recipe: Recipe, first: int, batch_size: int, device: str) -> TrainingLoader:
    """The training's own samples, from a batch on; a stream can only be read from its beginning."""
    pool_free = recipe.data.degradation.model_copy(update={"pool_size": 0})
    streams = any(getattr(source, "streaming", False) for source in recipe.data.sources)
    return open_training_data(
        recipe.data.model_copy(update={"degradation": pool_free}),
        crop_size=recipe.training.crop_size,
        scale=recipe.scale,
        seed=recipe.seed,
        batch_size=batch_size,
        state=None if streams else {"batch": first},
        device=torch.device(device),
    )


def _only(batch: Batch, wanted: list[int]) -> Batch:
    keep = [place for place, index in enumerate(batch.index.tolist()) if index in wanted]
    return replace(batch, hr=batch.hr[keep], lr=batch.lr[keep], mask=batch.mask[keep], index=batch.index[keep])


@torch.no_grad()
def _stored(networks: LatentNetworks, batch: Batch, recipe: Recipe, steps: int, device: str) -> tuple[Batch, Tensor]:
    """The batch with the 8 bits that are stored, and its latents: what training would compute on the fly."""
    hr, lr = (torch.stack([to_tensor(to_array(picture)) for picture in side]) for side in (batch.hr, batch.lr))
    batch = replace(batch, hr=hr, lr=lr)
    indices = batch.index.tolist()
    noise = per_sample_noise(recipe.seed, indices, "posterior_lr", networks.seen_noise_shape(*batch.hr.shape[-2:]))
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
    kind = kinds.get(recipe.training.mixed_precision)
    with torch.autocast(torch.device(device).type, kind, enabled=kind is not None):
        condition = networks.see(seen(batch).to(device), noise.to(device))
        assert condition.z_lr is not None
        return batch, sample_latents(networks, condition.z_lr, condition, indices, steps, seed=recipe.seed)


def _write(output: Path, batch: Batch, latents: Tensor) -> None:
    from safetensors.torch import save

    for folder in ("hr", "lr", "latents"):
        (output / folder).mkdir(parents=True, exist_ok=True)
    for index, hr, lr, z in zip(batch.index.tolist(), batch.hr, batch.lr, latents):
        write_image(output / "hr" / f"{_name(index)}.png", Image(to_array(hr)), format="PNG")
        write_image(output / "lr" / f"{_name(index)}.png", Image(to_array(lr)), format="PNG")
        data = save({"latents": z.float().cpu().contiguous()})
        atomic_write(output / "latents" / f"{_name(index)}.safetensors", data)  # last: a sample with latents is whole
