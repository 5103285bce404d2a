"""A one-step LoRA for ComfyUI: tensors under the names that it knows, and a workflow of its own nodes that makes the one call."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, full, tensor, zeros

FILE, WORKFLOW, OFFSET = "comfyui_lora.safetensors", "comfyui_workflow.json", "comfyui_offset.latent"


def write_comfyui(
    folder: Path, part: str, layers: Mapping[str, tuple[Tensor, Tensor, float]], call: Mapping[str, Any] | None, channels: int
) -> list[str]:
    """Write LoRA and workflow, and where the workflow adds an offset to the latents, that.

    Args:
        part: "unet": kohya's names, `lora_unet_a_b.lora_down.weight`; "transformer": `transformer.a.b.lora_A.weight`.
        layers: name -> A, B, and alpha; every layer gets an `.alpha` tensor, because ComfyUI takes alpha = rank without it.
        call: what `workflow` takes; None: a call that it cannot make (`why_not`), so there is no workflow.
        channels: of the latents.
    Returns what the user has to know of the files.
    """
    tensors: dict[str, Tensor] = {}
    for name, (down, up, alpha) in layers.items():
        stem = f"lora_unet_{name.replace('.', '_')}" if part == "unet" else f"transformer.{name}"
        first, second = ("lora_down", "lora_up") if part == "unet" else ("lora_A", "lora_B")
        tensors |= {f"{stem}.{first}.weight": down, f"{stem}.{second}.weight": up, f"{stem}.alpha": tensor(float(alpha))}
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    save_file(plain, folder / FILE, metadata={"format": "pt"})
    if call is None:
        return []
    (folder / WORKFLOW).write_text(json.dumps(workflow(**call), indent=1) + "\n", encoding="utf-8")
    if not call["shift"]:
        return []
    # LatentAdd enlarges the smaller of its latents; the mark says that the numbers are to be taken as they are
    offset = full((1, channels, 1, 1), call["shift"] * (1 - call["gain"]))
    save_file({"latent_tensor": offset, "latent_format_version_0": zeros(0)}, folder / OFFSET)
    return [f"{OFFSET} belongs into ComfyUI's input/, where the workflow looks for it"]


def workflow(
    *,
    base: str,
    text: tuple[str, Mapping[str, str]] | None,
    prompt: str,
    sigma: float,
    gain: float,
    scale: float,
    shift: float,
) -> dict[str, Any]:
    """The one call in ComfyUI's API format: enlarge, encode, multiply by `gain`, one Euler step from `sigma` to 0 without noise, decode.

    ComfyUI scales what a sampler starts from: a DDPM's network sees x / sqrt(1 + sigma^2), a flow's start is (1 - sigma) x. `gain` is the
    inverse, so that the network sees the low-resolution latents as they are. Before that it takes away the autoencoder's `shift`, so
    what is multiplied is (x - shift), as gain x + shift (1 - gain).

    Args:
        base: name of the checkpoint, without folder.
        text: node and inputs that load the text encoders; None: they and the autoencoder are in the checkpoint.
        sigma: of the call as ComfyUI counts it: spread / signal for a DDPM.
    """
    loaded, sampled = ["lora", 0], {"noise": ["noise", 0], "guider": ["guider", 0], "sampler": ["sampler", 0], "sigmas": ["sigmas", 0]}
    one = {"model": ("CheckpointLoaderSimple", {"ckpt_name": base})}
    three = {
        "model": ("UNETLoader", {"unet_name": base, "weight_dtype": "default"}),
        "clip": text,
        "vae": ("VAELoader", {"vae_name": "the base's vae"}),
    }
    clip, vae = (["clip", 0], ["vae", 0]) if text else (["model", 1], ["model", 2])
    multiplied = ("LatentMultiply", {"samples": ["encoded", 0], "multiplier": gain})
    shifted = {
        "multiplied": multiplied,
        "offset": ("LoadLatent", {"latent": OFFSET}),
        "start": ("LatentAdd", {"samples1": ["multiplied", 0], "samples2": ["offset", 0]}),
    }
    nodes: dict[str, Any] = {
        **(three if text else one),
        "lora": ("LoraLoaderModelOnly", {"model": ["model", 0], "lora_name": FILE, "strength_model": 1.0}),
        "text": ("CLIPTextEncode", {"clip": clip, "text": prompt}),
        "picture": ("LoadImage", {"image": "small.png"}),
        "enlarged": ("ImageScaleBy", {"image": ["picture", 0], "upscale_method": "bicubic", "scale_by": scale}),
        "encoded": ("VAEEncode", {"pixels": ["enlarged", 0], "vae": vae}),
        **(shifted if shift else {"start": multiplied}),
        "noise": ("DisableNoise", {}),
        "guider": ("BasicGuider", {"model": loaded, "conditioning": ["text", 0]}),
        "sampler": ("KSamplerSelect", {"sampler_name": "euler"}),
        "sigmas": ("ManualSigmas", {"sigmas": f"{sigma:.6f}, 0.0"}),
        "sampled": ("SamplerCustomAdvanced", {**sampled, "latent_image": ["start", 0]}),
        "decoded": ("VAEDecode", {"samples": ["sampled", 0], "vae": vae}),
        "saved": ("SaveImage", {"images": ["decoded", 0], "filename_prefix": "one_step"}),
    }
    return {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in nodes.items()}


def why_not(*, noised: bool, residual: bool, signal: float, files: Sequence[str]) -> str | None:
    """What of a call ComfyUI's own nodes cannot make; None: nothing. `files`: what the call needs beside the LoRA."""
    if files:
        return f"it does not load {' or '.join(files)}"
    if noised:
        return "latents under noise of another level are not among its nodes"
    if residual:
        return "it knows noise processes, and model.x0: residual is none"
    return "at sigma 1 it would start from noise alone" if signal == 0 else None
