"""convert/stablesr.py: every tensor of the released size by name and shape, and the exact way back."""

from __future__ import annotations

import json

import pytest
import torch
from golden_models import HEAD_CHANNELS, golden_encoder, golden_unet, golden_vae, open_clip, original_state
from goldens import GOLDEN
from torch import Tensor

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.models import AutoencoderKLCFW, SFTUNet2DConditionModel, StructuralEncoder
from sslsr_diffusion.models.stablesr.convert import convert, restore, shapes
from sslsr_diffusion.models.stablesr.convert.stablesr import ENCODER, TEXT, UNET, VAE
from sslsr_diffusion.models.stablesr.settings import load_preset


def released() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The released files' tensors on the meta device: diffusion checkpoint (with prefixes), CFW file (without)."""
    groups = json.loads((GOLDEN / "stablesr/full_size_keys.json").read_text())["groups"]
    checkpoint, cfw = {}, {}
    for prefix, tensors in groups.items():
        for name, shape in tensors.items():
            tensor = torch.empty(shape, device="meta")
            if prefix in (UNET, ENCODER, VAE):
                checkpoint[prefix + name] = tensor
            if prefix == VAE or prefix.startswith("cfw"):
                cfw[name] = tensor
    return checkpoint, cfw


def meta(cls: type, config: dict[str, object]) -> torch.nn.Module:
    with torch.device("meta"):
        return cls.from_config(config)  # type: ignore[attr-defined]


def shapes_of(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def test_every_released_tensor_finds_its_place() -> None:
    """862 UNet, 248 VAE, all encoder and all fusion tensors: equal names and shapes in both directions, nothing left over."""
    checkpoint, cfw = released()
    counts = {prefix: sum(name.startswith(prefix) for name in checkpoint) for prefix in (UNET, VAE)}
    assert counts == {UNET: 862, VAE: 248}
    preset = load_preset("sd21")
    unet = meta(SFTUNet2DConditionModel, preset["unet"])
    encoder = meta(StructuralEncoder, preset["structural_encoder"])
    vae = meta(AutoencoderKLCFW, preset["vae"])
    plain = [name for name in vae.state_dict() if not name.startswith("fusion_layers.")]
    cases = [
        ("unet", unet, unet.state_dict(), checkpoint, UNET),
        ("structural_encoder", encoder, encoder.state_dict(), checkpoint, ENCODER),
        ("vae", vae, {name: vae.state_dict()[name] for name in plain}, checkpoint, VAE),
        ("vae", vae, vae.state_dict(), cfw, ""),
    ]
    for name, model, ours, source, prefix in cases:
        part = convert(name, source, ours, model.config, prefix=prefix)
        assert shapes_of(part.tensors) == shapes_of(ours)
        assert part.unknown == []
        back = restore(name, part.tensors, model.config, prefix=prefix)
        assert shapes_of(back) == shapes_of({n: t for n, t in source.items() if n.startswith(prefix)})


def test_the_released_architecture_is_read_off_the_shapes() -> None:
    checkpoint, cfw = released()
    preset = load_preset("sd21")
    assert shapes.unet_config(checkpoint) == preset["unet"]
    assert shapes.encoder_config(checkpoint) == preset["structural_encoder"]
    assert shapes.vae_config(checkpoint, VAE) == preset["vae"]
    assert shapes.vae_config(cfw, "") == {**preset["vae"], "num_fuse_blocks": 2, "fuse_growth_channels": 32}


def test_round_trip_is_bit_equal() -> None:
    state, cfw = original_state(), original_state("cfw_weights")
    unet, encoder, vae = golden_unet(), golden_encoder(), golden_vae()
    restored = restore("unet", unet.state_dict(), unet.config) | restore("structural_encoder", encoder.state_dict(), encoder.config)
    assert restored.keys() == state.keys()
    assert all(torch.equal(tensor, restored[name]) for name, tensor in state.items())
    again = restore("vae", vae.state_dict(), vae.config, prefix="")
    assert again.keys() == cfw.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in cfw.items())


def test_unknown_tensors_are_listed_and_missing_ones_are_an_error() -> None:
    state = {**original_state(), f"{UNET}extra.weight": torch.zeros(1)}
    unet = golden_unet()
    assert convert("unet", state, unet.state_dict(), unet.config).unknown == [f"{UNET}extra.weight"]
    del state[f"{UNET}middle_block.0.spade.mlp_gamma.bias"]
    with pytest.raises(UserError, match=r"lacks 1 of the \d+ tensors .*middle_block.0.spade.mlp_gamma.bias"):
        convert("unet", state, unet.state_dict(), unet.config)


def test_text_encoder_computes_what_open_clip_computes() -> None:
    """Against attention written out on the original tensors: the penultimate block's output after the final norm."""
    from transformers import CLIPTextConfig, CLIPTextModel

    state = open_clip()
    config = shapes.text_config(state)
    assert config["num_hidden_layers"] == 2
    model = CLIPTextModel(CLIPTextConfig(**config)).eval()
    part = convert("text_encoder", state, model.state_dict(), model.config)
    model.load_state_dict(part.tensors)
    ids = torch.tensor([[49406, 320, 1125, 49407, *[0] * 73]])
    with torch.no_grad():
        got = model(ids)[0]
    assert torch.allclose(got, written_out(state, ids, blocks=2), atol=1e-5)
    assert {name.removeprefix(TEXT) for name in part.unknown} >= {"text_projection", "logit_scale", "transformer.resblocks.2.ln_1.weight"}
    restored = restore("text_encoder", model.state_dict(), model.config)
    assert set(restored) == set(state) - set(part.unknown)
    assert all(torch.equal(tensor, state[name]) for name, tensor in restored.items())
    # what was restored converts again, although the dropped block is not there to be dropped
    assert shapes.text_config(restored)["num_hidden_layers"] == 2


def written_out(state: dict[str, Tensor], ids: Tensor, blocks: int) -> Tensor:
    from torch.nn import functional as F

    get = lambda name: state[TEXT + name]  # noqa: E731
    x = F.embedding(ids, get("token_embedding.weight")) + get("positional_embedding")
    width = x.shape[-1]
    for n in range(blocks):
        block = lambda name, n=n: get(f"transformer.resblocks.{n}.{name}")  # noqa: E731
        h = F.layer_norm(x, (width,), block("ln_1.weight"), block("ln_1.bias"))
        q, k, v = F.linear(h, block("attn.in_proj_weight"), block("attn.in_proj_bias")).chunk(3, dim=-1)  # one head of 64
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + F.linear(h, block("attn.out_proj.weight"), block("attn.out_proj.bias"))
        h = F.layer_norm(x, (width,), block("ln_2.weight"), block("ln_2.bias"))
        h = F.gelu(F.linear(h, block("mlp.c_fc.weight"), block("mlp.c_fc.bias")))
        x = x + F.linear(h, block("mlp.c_proj.weight"), block("mlp.c_proj.bias"))
    return F.layer_norm(x, (width,), get("ln_final.weight"), get("ln_final.bias"))


def test_released_text_tower_keeps_23_blocks() -> None:
    state = {name: torch.empty((), device="meta") for name in ()}
    for n in range(24):
        state[f"{TEXT}transformer.resblocks.{n}.mlp.c_fc.weight"] = torch.empty(4096, 1024, device="meta")
    state[f"{TEXT}token_embedding.weight"] = torch.empty(49408, 1024, device="meta")
    state[f"{TEXT}positional_embedding"] = torch.empty(77, 1024, device="meta")
    state[f"{TEXT}text_projection"] = torch.empty(1024, 1024, device="meta")
    assert shapes.text_config(state) == load_preset("sd21")["text_encoder"]


def test_head_width_decides_the_number_of_heads() -> None:
    assert shapes.unet_config(original_state(), HEAD_CHANNELS)["attention_head_dim"] == [2, 4, 2, 2]
