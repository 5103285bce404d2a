"""Parameters and memory of a recipe, counted on shapes alone: one training step is played through on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from sslsr_diffusion.evaluation.perceptual import PerceptualDistance
from sslsr_diffusion.inference.memory import LivePeak
from sslsr_diffusion.models import AutoencoderKLCFW, Codec, Networks, build_autoencoder, build_networks
from sslsr_diffusion.runs.recipe import Recipe
from sslsr_diffusion.tasks.objective import TrainedDecoder
from sslsr_diffusion.training.settings import TrainingSettings
from sslsr_diffusion.tasks.decode_window import MARGIN

GIB = 2**30
_SHARE = 0.9  # of a device that a step may fill: workspaces and fragmentation are not in the estimate
_SDPA = "torch.nn.functional.scaled_dot_product_attention"  # a function mode would not reach checkpointed recomputation


def describe_parameters(recipe: Recipe) -> list[str]:
    """One line per part: how many parameters, how many of them train."""
    if recipe.stage == "autoencoder":
        vae = build_autoencoder(recipe.model, meta=True).vae
        parts = {"vae": (_count(vae.parameters()), _count(vae.parameters()))}
    elif recipe.stage in ("cfw", "decoder"):
        networks, decoder = _trained_decoder(recipe)
        parts = {name: (total, 0) for name, (total, _) in networks.parameters_per_part().items()}
        parts["vae"] = (_count(decoder.parameters()), _count(p for p in decoder.parameters() if p.requires_grad))
    else:
        parts = build_networks(recipe.model, plain=recipe.stage == "base", meta=True).parameters_per_part()
    rows = [*parts.items(), ("all", (sum(p[0] for p in parts.values()), sum(p[1] for p in parts.values())))]
    return ["parameters"] + [
        f"  {name:<20} {_millions(total)}   trained {_millions(trained)}   frozen {_millions(total - trained)}"
        for name, (total, trained) in rows
    ]


def describe_memory(recipe: Recipe, available: int | None = None) -> list[str]:
    """One line per way to run the recipe: its own settings first, then what would save memory, then all of that together.

    Args:
        available: bytes that the device has; each line then says whether it fits.
    """
    lines = [
        "memory per process, estimated (on top: kernels' workspaces, a quarter of it on a CPU, and the framework, about half a GiB)"
        + ("" if available is None else f"; this device has {available / GIB:.1f} GiB")
    ]
    for name, variant in _variants(recipe).items():
        try:
            parts = step_bytes(recipe.model_copy(update={"training": variant}))
        except CheckpointError:  # seen with the oldest versions that we allow: recomputed tensors leave the meta device
            lines.append(f"  {name:<34} cannot be estimated with the libraries here (torch {torch.__version__})")
            continue
        total = sum(parts.values())
        verdict = "" if available is None else "   fits" if total <= _SHARE * available else "   too much"
        detail = "  ".join(f"{k} {v / GIB:.2f}" for k, v in parts.items())
        lines.append(f"  {name:<34} {total / GIB:6.2f} GiB{verdict}   {detail}")
    return lines


def _variants(recipe: Recipe) -> dict[str, TrainingSettings]:
    """Names of savings, and the training settings with them; more accumulation keeps the samples of an optimizer step."""
    training = recipe.training
    savings: dict[str, dict[str, Any]] = {}
    if not training.gradient_checkpointing:
        savings["gradient_checkpointing: true"] = {"gradient_checkpointing": True}
    if recipe.stage == "diffusion" and any(loss.kind != "diffusion" for loss in recipe.losses):
        smaller = 32 if training.decode_crop is None else training.decode_crop // 2
        if smaller >= 16:
            savings[f"decode_crop: {smaller}"] = {"decode_crop": smaller}
    if training.batch_size > 1:
        more = training.batch_size * training.accumulate
        savings[f"batch_size: 1, accumulate: {more}"] = {"batch_size": 1, "accumulate": more}
    if training.mixed_precision == "no":
        savings["mixed_precision: bf16"] = {"mixed_precision": "bf16"}
    if training.optimizer.kind == "adamw":
        savings["optimizer.kind: adamw8bit (CUDA)"] = {"optimizer": training.optimizer.model_copy(update={"kind": "adamw8bit"})}
    variants = {"as it is": training, **{name: training.model_copy(update=values) for name, values in savings.items()}}
    if len(savings) > 1:
        together: dict[str, Any] = {}
        for values in savings.values():
            together.update(values)
        variants["all of these"] = training.model_copy(update=together)
    return variants


def step_bytes(recipe: Recipe) -> dict[str, int]:
    """Bytes of one process in a training step, by what holds them."""
    training = recipe.training
    half = training.mixed_precision != "no"
    module, run = _STEPS[recipe.stage](recipe, torch.bfloat16 if half else torch.float32)
    every, trained = _count(module.parameters()), _count(p for p in module.parameters() if p.requires_grad)
    peak = LivePeak(module.parameters())
    # on one thread, or the backward pass would run outside of these modes
    with torch.autograd.set_multithreading_enabled(False), torch.device("meta"), patch(_SDPA, _fused_attention), peak:
        run()
    per_state = 2 if training.optimizer.kind == "adamw8bit" else 8
    # autocast's half-precision copies: of trained weights for the whole step, of frozen ones as long as the graph holds them
    copies = 2 * (trained if training.gradient_checkpointing else every) if half else 0
    return {
        "weights": every * 4 + copies,
        "optimizer": trained * per_state,
        "average": trained * 4 if training.ema else 0,
        "activations and gradients": peak.peak + (trained * 2 if half else 0),
    }


def _autoencoder_step(recipe: Recipe, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    samples, side = recipe.training.batch_size, recipe.training.crop_size
    codec = build_autoencoder(recipe.model, meta=True)
    if recipe.training.gradient_checkpointing:
        codec.vae.enable_gradient_checkpointing()
    vae = nn.Module.to(codec.vae, dtype).train()  # not diffusers' own to(), which warns
    compare = _comparison(recipe)

    def autoencode() -> None:
        pixels = torch.empty(samples, 3, side, side, device="meta")
        restored, _ = codec.autoencode(pixels, torch.empty(codec.noise_shape(pixels), device="meta"))
        compare(restored).backward()

    return vae, autoencode


def _denoiser_step(recipe: Recipe, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    training = recipe.training
    samples, side = training.batch_size, training.crop_size
    networks = build_networks(recipe.model, plain=recipe.stage == "base", meta=True)
    if training.gradient_checkpointing:
        networks.denoiser.enable_gradient_checkpointing()
        networks.codec.vae.enable_gradient_checkpointing()
    _cast(networks.denoiser, networks.codec.vae, dtype)
    networks.denoiser.train()
    compare = _comparison(recipe)

    def step() -> None:
        latent = side // networks.codec.scale
        z = _encoded(networks.codec, samples, side).to(dtype)
        t = torch.zeros(samples, dtype=torch.int64, device="meta")
        pred = networks.denoiser(z, t, z, _text(recipe, networks, dtype))
        loss = pred.float().square().mean()
        if any(entry.kind != "diffusion" for entry in recipe.losses):
            window = latent if training.decode_crop is None else min(latent, training.decode_crop + 2 * MARGIN)
            loss = loss + compare(networks.codec.decode(pred[..., :window, :window]))
        loss.backward()

    return nn.ModuleList([networks.denoiser, networks.codec.vae]), step


def _decoder_step(recipe: Recipe, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    samples, side = recipe.training.batch_size, recipe.training.crop_size
    networks, decoder = _trained_decoder(recipe)
    vae = decoder.vae
    if recipe.training.gradient_checkpointing:
        vae.enable_gradient_checkpointing()
    networks.denoiser.requires_grad_(False)
    _cast(networks.denoiser, vae, dtype)
    codec = Codec(vae.train())
    stored = any(source.kind == "cfw" for source in recipe.data.sources)  # samples made before: no denoiser runs
    compare = _comparison(recipe)

    def step() -> None:
        pixels = torch.empty(samples, 3, side, side, device="meta")
        features = None
        with torch.no_grad():
            noise = torch.empty(codec.noise_shape(pixels), device="meta")
            if recipe.stage == "cfw":
                z, features = codec.encode_with_features(pixels, noise)
            else:
                z = codec.encode(pixels, noise)
            if not stored:
                t = torch.zeros(samples, dtype=torch.int64, device="meta")
                networks.denoiser(z.to(dtype), t, z.to(dtype), _text(recipe, networks, dtype))
        compare(decoder(z, features)).backward()

    return nn.ModuleList([networks.denoiser, vae]), step


def _trained_decoder(recipe: Recipe) -> tuple[Networks, TrainedDecoder]:
    networks = build_networks(recipe.model, meta=True)
    codec = networks.codec
    if recipe.stage == "cfw" and not codec.has_fidelity:
        with torch.device("meta"):
            codec = Codec(AutoencoderKLCFW.from_autoencoder(codec.vae))
    return networks, TrainedDecoder(codec, fused=recipe.stage == "cfw")


def _cast(denoiser: Any, vae: nn.Module, dtype: torch.dtype) -> None:
    for part in (denoiser.unet, denoiser.structural_encoder, vae):
        if part is not None:
            nn.Module.to(part, dtype)


@torch.no_grad()
def _encoded(codec: Codec, samples: int, side: int) -> Tensor:
    pixels = torch.empty(samples, 3, side, side, device="meta")
    return codec.encode(pixels, torch.empty(codec.noise_shape(pixels), device="meta"))


def _text(recipe: Recipe, networks: Any, dtype: torch.dtype) -> Tensor:
    length = 77 if networks.text.shape[1] == 1 and recipe.model.init == "pretrained" else networks.text.shape[1]
    return torch.empty(1, length, networks.text.shape[2], device="meta", dtype=dtype)


def _comparison(recipe: Recipe) -> Callable[[Tensor], Tensor]:
    """A scalar of the decoded pixels, with LPIPS's network in it where the recipe lists that loss."""
    distance = None
    if any(loss.kind == "lpips" for loss in recipe.losses):
        try:
            from torchvision.models import vgg16
        except Exception:  # torchvision fails in many ways when it does not fit the installed torch; training says so
            return lambda pixels: pixels.float().mean()
        with torch.device("meta"):
            features = vgg16(weights=None).features
            distance = PerceptualDistance(features, [torch.empty(channels) for channels in (64, 128, 256, 512, 512)])

    def compare(pixels: Tensor) -> Tensor:
        loss = pixels.float().mean()
        return loss if distance is None else loss + distance(pixels, torch.empty_like(pixels)).mean()

    return compare


_STEPS = {
    "autoencoder": _autoencoder_step,
    "diffusion": _denoiser_step,
    "base": _denoiser_step,
    "cfw": _decoder_step,
    "decoder": _decoder_step,
}


class _FusedAttentionShape(torch.autograd.Function):
    """What a fused attention kernel keeps for its backward: q, k, v and the output, never the score matrix."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _fused_attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return _FusedAttentionShape.apply(query, key, value)


def _count(parameters: Any) -> int:
    return sum(p.numel() for p in parameters)


def _millions(count: int) -> str:
    return f"{count / 1e6:8.2f} M"
