"""Parameters and memory of a recipe, counted on shapes alone: one training step is played through on the meta device."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from sslsr_diffusion.inference.memory import LivePeak
from sslsr_diffusion.models import AutoencoderKLCFW, build_autoencoder, build_networks
from sslsr_diffusion.recipe import Recipe
from sslsr_diffusion.training.windows import MARGIN

GIB = 2**30
_SDPA = "torch.nn.functional.scaled_dot_product_attention"  # a function mode would not reach checkpointed recomputation


def describe_parameters(recipe: Recipe) -> list[str]:
    """One line per part: how many parameters, how many of them train."""
    if recipe.stage == "autoencoder":
        vae = build_autoencoder(recipe.model, meta=True).vae
        parts = {"vae": (_count(vae.parameters()), _count(vae.parameters()))}
    elif recipe.stage == "cfw":
        networks = build_networks(recipe.model, meta=True)
        with torch.device("meta"):
            vae = networks.codec.vae if networks.codec.has_fidelity else AutoencoderKLCFW.from_autoencoder(networks.codec.vae)
        parts = {name: (total, 0) for name, (total, _) in networks.parameters_per_part().items()}
        parts["vae"] = (_count(vae.parameters()), _count(vae.fusion_layers.parameters()))
    else:
        parts = build_networks(recipe.model, plain=recipe.stage == "base", meta=True).parameters_per_part()
    rows = [*parts.items(), ("all", (sum(p[0] for p in parts.values()), sum(p[1] for p in parts.values())))]
    return ["parameters"] + [
        f"  {name:<20} {_millions(total)}   trained {_millions(trained)}   frozen {_millions(total - trained)}"
        for name, (total, trained) in rows
    ]


def describe_memory(recipe: Recipe) -> list[str]:
    """One line per way to run the recipe: its own settings first, then what would save memory."""
    if recipe.stage == "cfw":
        return []
    training = recipe.training
    variants = {"as it is": training}
    if not training.gradient_checkpointing:
        variants["gradient_checkpointing: true"] = training.model_copy(update={"gradient_checkpointing": True})
    if recipe.stage == "diffusion" and training.decode_crop is None and any(loss.kind != "diffusion" for loss in recipe.losses):
        variants["decode_crop: 32"] = training.model_copy(update={"decode_crop": 32})
    if training.batch_size > 1:
        variants["batch_size: 1"] = training.model_copy(update={"batch_size": 1})
    if training.optimizer.kind == "adamw":
        variants["optimizer.kind: adamw8bit"] = training.model_copy(
            update={"optimizer": training.optimizer.model_copy(update={"kind": "adamw8bit"})}
        )
    lines = ["memory per process, estimated (kernels' workspaces and the framework itself come on top)"]
    for name, variant in variants.items():
        parts = step_bytes(recipe.model_copy(update={"training": variant}))
        lines.append(f"  {name:<30} {sum(parts.values()) / GIB:6.2f} GiB   " + "  ".join(f"{k} {v / GIB:.2f}" for k, v in parts.items()))
    return lines


def step_bytes(recipe: Recipe) -> dict[str, int]:
    """Bytes of one process in a training step, by what holds them."""
    training = recipe.training
    half = training.mixed_precision != "no"
    module, run = _step(recipe, torch.bfloat16 if half else torch.float32)
    every, trained = _count(module.parameters()), _count(p for p in module.parameters() if p.requires_grad)
    peak = LivePeak(module.parameters())
    # on one thread, or the backward pass would run outside of these modes
    with torch.autograd.set_multithreading_enabled(False), torch.device("meta"), patch(_SDPA, _fused_attention), peak:
        run()
    per_state = 2 if training.optimizer.kind == "adamw8bit" else 8
    return {
        "weights": every * (6 if half else 4),  # float32, and the copies that autocast keeps
        "optimizer": trained * per_state,
        "average": trained * 4 if training.ema else 0,
        "activations and gradients": peak.peak + (trained * 2 if half else 0),
    }


def _step(recipe: Recipe, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    training = recipe.training
    samples, side = training.batch_size, training.crop_size
    if recipe.stage == "autoencoder":
        codec = build_autoencoder(recipe.model, meta=True)
        if training.gradient_checkpointing:
            codec.vae.enable_gradient_checkpointing()
        vae = nn.Module.to(codec.vae, dtype).train()  # not diffusers' own to(), which warns

        def autoencode() -> None:
            pixels = torch.empty(samples, 3, side, side, device="meta")
            codec.autoencode(pixels, torch.empty(codec.noise_shape(pixels), device="meta"))[0].float().mean().backward()

        return vae, autoencode
    networks = build_networks(recipe.model, plain=recipe.stage == "base", meta=True)
    if training.gradient_checkpointing:
        networks.denoiser.enable_gradient_checkpointing()
        networks.codec.vae.enable_gradient_checkpointing()
    for part in (networks.denoiser, networks.codec.vae):
        nn.Module.to(part, dtype)
    networks.denoiser.train()

    def step() -> None:
        latent = side // networks.codec.scale
        z = torch.empty(samples, networks.codec.latent_channels, latent, latent, device="meta", dtype=dtype)
        t = torch.zeros(samples, dtype=torch.int64, device="meta")
        length = 77 if networks.text.shape[1] == 1 and recipe.model.init == "pretrained" else networks.text.shape[1]
        text = torch.empty(1, length, networks.text.shape[2], device="meta", dtype=dtype)
        pred = networks.denoiser(z, t, z, text)
        loss = pred.float().square().mean()
        if any(entry.kind != "diffusion" for entry in recipe.losses):
            window = latent if training.decode_crop is None else min(latent, training.decode_crop + 2 * MARGIN)
            loss = loss + networks.codec.decode(pred[..., :window, :window]).mean()
        loss.backward()

    return nn.ModuleList([networks.denoiser, networks.codec.vae]), step


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
