"""LoRA layers: which get them, what trains, what is saved, and what diffusers makes of the file."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from toys import smooth

from sslsr_diffusion.errors import MissingDependency, UserError
from sslsr_diffusion.models.lora import FILE, LoRASettings, add_lora, load_lora, merged, resolve_targets, save_lora

CONFIG = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 16,
    "attention_head_dim": 4,
    "sample_size": 8,
}


def unet(seed: int = 0) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    return UNet2DConditionModel(**CONFIG).eval()


def said(model: nn.Module) -> torch.Tensor:
    z = smooth(1, 4, 8)[None]
    return model(z, torch.tensor([300]), torch.linspace(-1, 1, 32).reshape(1, 2, 16), return_dict=False)[0]


def trained(settings: LoRASettings, *, seed: int = 0) -> UNet2DConditionModel:
    """A model whose LoRA layers have moved."""
    model = unet()
    add_lora(model, settings, seed=seed)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def test_new_layers_change_nothing_and_only_they_train():
    model, plain = unet(), unet()
    names = add_lora(model, LoRASettings(rank=3, targets="unet"), seed=1)
    assert all(".lora_A." in name or ".lora_B." in name for name in names)
    assert names == [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    with torch.no_grad():
        torch.testing.assert_close(said(model), said(plain), rtol=0, atol=0)


def test_the_matrices_follow_from_the_seed_alone():
    def first(seed: int, **values) -> torch.Tensor:
        model = unet()
        add_lora(model, LoRASettings(rank=4, **values), seed=seed)
        return next(parameter.detach() for name, parameter in model.named_parameters() if "lora_A" in name)

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))
    assert abs(float(first(1).std()) - 1 / 4) < 0.05  # gaussian: deviation 1 / rank
    assert float(first(1, init="kaiming").abs().max()) <= 1 / 4  # uniform, bound sqrt(6 / (1 + 5) / 16)
    model, before = unet(), torch.random.get_rng_state()
    add_lora(model, LoRASettings(), seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)  # the caller's stream is his


class Odd(nn.Module):
    """FLUX.2's trap: one `to_out` is a layer, the other a container."""

    def __init__(self) -> None:
        super().__init__()
        self.double = nn.ModuleDict({"to_q": nn.Linear(4, 4), "to_out": nn.ModuleList([nn.Linear(4, 4), nn.Dropout()])})
        self.single = nn.ModuleDict(
            {"to_q": nn.Linear(4, 4), "to_out": nn.Linear(4, 4), "norm": nn.LayerNorm(4), "conv": nn.Conv2d(4, 4, 1)}
        )
        self.conv = nn.Conv1d(4, 4, 1)


def test_patterns_find_layers_by_their_full_names():
    assert resolve_targets(Odd(), ["to_out"]) == ["single.to_out"]
    assert resolve_targets(Odd(), ["to_out.0", "single.*"]) == ["double.to_out.0", "single.to_q", "single.to_out", "single.conv"]
    assert resolve_targets(Odd(), "attention") == ["double.to_q", "double.to_out.0", "single.to_q"]
    assert resolve_targets(Odd(), ["conv"]) == ["single.conv"]


@pytest.mark.parametrize("targets", [["to_q", "to_z"], ["norm"], ["q"]])
def test_a_pattern_without_a_layer_is_refused(targets):
    with pytest.raises(UserError, match=r"model\.lora\.targets: .* there are conv, .*to_q"):
        resolve_targets(Odd(), targets)


@pytest.mark.parametrize("values", [{"targets": "everything"}, {"targets": []}, {"rank": 0}, {"alpha": 0}, {"init": "pissa"}])
def test_impossible_settings_are_refused(values):
    with pytest.raises(ValidationError):
        LoRASettings(**values)


class Pipeline(StableDiffusionLoraLoaderMixin):
    """Of a pipeline, what diffusers' own loader needs."""

    def __init__(self, model: UNet2DConditionModel) -> None:
        self.unet, self.text_encoder, self.components, self.hf_device_map = model, None, {"unet": model}, None


@pytest.mark.parametrize("alpha", [None, 9.0])
def test_the_file_says_to_diffusers_what_the_model_said(tmp_path, alpha):
    """With another alpha than the rank, too: a loader that does not find it would scale by 1."""
    model, plain = trained(LoRASettings(rank=3, alpha=alpha, targets="unet")), unet()
    save_lora({"unet": model}, tmp_path)
    Pipeline(plain).load_lora_weights(tmp_path)
    with torch.no_grad():
        want = said(model)
        torch.testing.assert_close(said(plain), want, rtol=0, atol=0)
        assert (want - said(unet())).norm() > 0.05 * want.norm()
        again = unet()
        load_lora(again, tmp_path / FILE, "unet", LoRASettings(rank=3, alpha=alpha, targets="unet"))
        torch.testing.assert_close(said(again), want, rtol=0, atol=0)
    with safe_open(tmp_path / FILE, framework="pt") as stream:
        known = json.loads(stream.metadata()["lora_adapter_metadata"])
    assert (known["unet.r"], known["unet.lora_alpha"]) == (3, alpha or 3)


def test_merging_gives_a_plain_model_and_leaves_the_other_as_it_was():
    model = trained(LoRASettings(rank=3, alpha=5, targets="unet"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = merged(model)
    assert plain.state_dict().keys() == unet().state_dict().keys()
    with torch.no_grad():
        torch.testing.assert_close(said(plain), said(model), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_checkpointing_gives_the_same_gradients_through_frozen_layers():
    grads = []
    for checkpointing in (False, True):
        model = trained(LoRASettings(rank=2)).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        (said(model) * smooth(3, 4, 8)).sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    assert grads[0].norm() > 0
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-5, atol=1e-7)


def test_shapes_alone_have_as_many_parameters():
    with torch.device("meta"):
        shapes = UNet2DConditionModel(**CONFIG)
    real = unet()
    names = add_lora(shapes, LoRASettings(targets="unet"), seed=0)
    assert names == add_lora(real, LoRASettings(targets="unet"), seed=0)
    assert all(parameter.is_meta for parameter in shapes.parameters())
    assert [p.shape for p in shapes.parameters()] == [p.shape for p in real.parameters()]


def test_files_that_do_not_fit_are_refused(tmp_path):
    (tmp_path / "broken.safetensors").write_bytes(b"not a file of tensors")
    save_file({"unet.conv_in.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    for file, prefix in (("broken", "unet"), ("missing", "unet"), ("other", "transformer")):
        with pytest.raises(UserError, match=f"{file}.safetensors: "):
            load_lora(unet(), tmp_path / f"{file}.safetensors", prefix, LoRASettings())


def test_without_peft_the_pip_line_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingDependency, match=r"pip install 'sslsr-diffusion\[lora\]'"):
        add_lora(unet(), LoRASettings(), seed=0)
