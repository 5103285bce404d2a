"""models/unet.py: golden predictions, features that travel with the call, and diffusers' own machinery on top."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from golden_models import golden_inputs, golden_outputs, golden_unet, original_state, random_like, relative_error
from torch import Tensor

from sslsr_diffusion.models import SFTUNet2DConditionModel
from sslsr_diffusion.models.stablesr.settings import load_preset
from sslsr_diffusion.models.stablesr.unet import Conditioning

Inputs = tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]


def tiny_config() -> dict[str, object]:
    return load_preset("tiny")["unet"]


def tiny(seed: int = 0) -> SFTUNet2DConditionModel:
    torch.manual_seed(seed)
    return SFTUNet2DConditionModel.from_config(tiny_config())


def tiny_inputs(seed: int, batch: int = 2, size: tuple[int, int] = (12, 20)) -> Inputs:
    h, w = size
    sizes = [(h, w)]
    for _ in range(2):
        sizes.append(((sizes[-1][0] + 1) // 2, (sizes[-1][1] + 1) // 2))
    features = tuple(random_like((batch, 32, *s), seed * 10 + i) for i, s in enumerate(sizes))
    t = torch.randint(0, 1000, (batch,), generator=torch.Generator().manual_seed(seed))
    return random_like((batch, 8, h, w), seed), t, random_like((batch, 3, 32), seed + 100), features


@torch.no_grad()
def test_prediction_is_the_originals() -> None:
    inputs, want = golden_inputs("stablesr/unet"), golden_outputs("stablesr/unet")
    features = [inputs[f"case0.struct.{width}"] for width in (24, 12, 6, 3)]
    got = golden_unet()(inputs["x_t"], inputs["timesteps.0"], inputs["context"], features=features).sample
    assert relative_error(got, want["case0.eps"]) < 1e-4  # the README's tolerance


@torch.no_grad()
def test_spade_is_the_originals() -> None:
    inputs, want = golden_inputs("stablesr/spade"), golden_outputs("stablesr/spade")
    spade = golden_unet().down_blocks[1].resnets[0].spade
    for n in (0, 1):
        assert relative_error(spade(inputs["x"] * inputs[f"scale{n}"], inputs["segmap"]), want[f"out{n}"]) < 2e-6


def gradients(model: torch.nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_features_survive_a_second_forward_under_gradient_checkpointing() -> None:
    """Forward A, forward B, backward A: a feature stored on the module would be B's when A's blocks run again."""
    plain, checkpointed = tiny(), tiny()
    checkpointed.enable_gradient_checkpointing()
    a, b = tiny_inputs(1), tiny_inputs(2, size=(16, 8))
    feature_grads = []
    for model in (plain, checkpointed):
        model.train()
        features = tuple(f.clone().requires_grad_() for f in a[3])
        out_a = model(*a[:3], features=features).sample
        model(*b[:3], features=b[3])
        (out_a * random_like(tuple(out_a.shape), seed=9)).sum().backward()
        feature_grads.append(torch.cat([f.grad.flatten() for f in features if f.grad is not None]))
    assert checkpointed.is_gradient_checkpointing
    want, got = gradients(plain), gradients(checkpointed)
    # the same float32 operations are run twice; only the order of accumulation may differ
    assert (got - want).norm() <= 1e-5 * want.norm()
    assert feature_grads[1].numel() == sum(f.numel() for f in a[3])
    assert (feature_grads[1] - feature_grads[0]).norm() <= 1e-5 * feature_grads[0].norm()


@torch.no_grad()
@pytest.mark.parametrize("size", [(9, 13), (16, 6), (5, 32), (4, 4)])
def test_any_height_and_width(size: tuple[int, int]) -> None:
    x, t, text, features = tiny_inputs(3, size=size)
    out = tiny().eval()(x, t, text, features=features).sample
    assert out.shape == x.shape
    assert out.isfinite().all()


@torch.no_grad()
def test_a_picture_does_not_depend_on_its_batch() -> None:
    model = tiny().eval()
    x, t, text, features = tiny_inputs(4, batch=3)
    together = model(x, t, text, features=features).sample
    alone = model(x[1:2], t[1:2], text[1:2], features=[f[1:2] for f in features]).sample
    assert torch.allclose(together[1:2], alone, atol=1e-5)  # another batch size may choose another algorithm


@torch.no_grad()
def test_guidance_doubles_the_features_for_several_images() -> None:
    """Features given once for a doubled batch equal features that the caller doubled, image by image."""
    model = tiny().eval()
    x, t, text, features = tiny_inputs(5)
    x2, t2, text2 = torch.cat([x, x]), torch.cat([t, t]), torch.cat([torch.zeros_like(text), text])
    explicit = model(x2, t2, text2, features=[torch.cat([f, f]) for f in features]).sample
    assert torch.allclose(model(x2, t2, text2, features=features).sample, explicit, atol=1e-6)
    assert not torch.allclose(explicit[:2], explicit[2:], atol=1e-4)


def test_missing_or_misfitting_features_say_so() -> None:
    model = tiny()
    x, t, text, features = tiny_inputs(6)
    with pytest.raises(ValueError, match="does not run without them"):
        model(x, t, text)
    with pytest.raises(ValueError, match="one per level, got 2"):
        model(x, t, text, features=features[:2])
    with pytest.raises(ValueError, match="must come from a latent of the denoised latent's size"):
        model(x[..., :10], t, text, features=features)
    with pytest.raises(ValueError, match="for 2 samples"):
        model(x, t, text, features=[f.repeat(2, 1, 1, 1)[:3] for f in features])


def test_another_family_is_refused() -> None:
    with pytest.raises(ValueError, match="addition_embed_type"):
        SFTUNet2DConditionModel.from_config(
            {**tiny_config(), "addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 64}
        )


def test_save_and_load_keep_every_bit_and_setting(tmp_path: Path) -> None:
    model = golden_unet()
    model.save_pretrained(tmp_path)
    again = SFTUNet2DConditionModel.from_pretrained(tmp_path)
    assert again.config.feature_channels == 32
    assert again.config.attention_head_dim == model.config.attention_head_dim
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not any(p.is_meta for p in again.parameters())


def test_a_plain_unet_lends_its_tensors(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = {k: v for k, v in tiny_config().items() if k not in ("feature_channels", "spade_hidden_channels")}
    UNet2DConditionModel.from_config(config).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = UNet2DConditionModel.from_pretrained(tmp_path)
        model = SFTUNet2DConditionModel.from_unet(plain, feature_channels=32, spade_hidden_channels=16)
    assert not caplog.records
    state = model.state_dict()
    assert all(state[name] is tensor or torch.equal(state[name], tensor) for name, tensor in plain.state_dict().items())
    fresh = set(state) - set(plain.state_dict())
    assert fresh
    assert all(".spade." in name for name in fresh)
    assert not any(p.is_meta for p in model.parameters())
    assert all(state[name].isfinite().all() for name in fresh)
    # nothing starts at zero: gamma and beta are drawn as any convolution
    assert all(state[name].abs().max() > 0 for name in fresh if "gamma" in name or "beta" in name)
    x, t, text, features = tiny_inputs(7)
    assert model(x, t, text, features=features).sample.isfinite().all()


@torch.no_grad()
def test_diffusers_attention_processors_work() -> None:
    model = tiny().eval()
    x, t, text, features = tiny_inputs(8)
    want = model(x, t, text, features=features).sample
    model.set_attn_processor(AttnProcessor())
    assert torch.allclose(model(x, t, text, features=features).sample, want, atol=1e-5)  # softmax written out
    model.enable_freeu(1.0, 1.0, 1.0, 1.0)
    model.set_attention_slice(1)
    assert torch.allclose(model(x, t, text, features=features).sample, want, atol=1e-4)  # FreeU goes through an FFT


def test_lora_can_be_added_trained_saved_and_loaded(tmp_path: Path) -> None:
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    model = tiny().eval()
    x, t, text, features = tiny_inputs(9)
    plain = model(x, t, text, features=features).sample
    config = LoraConfig(r=2, target_modules=["to_q", "to_v", "spade.gamma"], init_lora_weights=False)
    model.add_adapter(config, adapter_name="style")
    adapted = model(x, t, text, features=features).sample
    assert not torch.allclose(adapted, plain, atol=1e-4)
    adapted.square().mean().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_" in name)
    assert any("spade.gamma.lora" in name for name in get_peft_model_state_dict(model, adapter_name="style"))
    model.save_lora_adapter(tmp_path, adapter_name="style")
    model.disable_adapters()
    assert torch.allclose(model(x, t, text, features=features).sample, plain, atol=1e-6)

    other = tiny().eval()
    other.load_lora_adapter(tmp_path, weight_name="pytorch_lora_weights.safetensors", prefix=None, adapter_name="style")
    assert torch.allclose(other(x, t, text, features=features).sample, adapted, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("how", ["sequential", "model", "block_level", "leaf_level"])
def test_offload_hooks_move_the_features_with_the_call(how: str) -> None:
    """On the CPU nothing can move far, but every hook rewrites the arguments on their way to the blocks."""
    model = tiny().eval()
    x, t, text, features = tiny_inputs(10)
    want = copy.deepcopy(model)(x, t, text, features=features).sample
    if how == "sequential":
        from accelerate import cpu_offload

        cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)
    elif how == "model":
        from accelerate import cpu_offload_with_hook

        model, _ = cpu_offload_with_hook(model, execution_device=torch.device("cpu"))
    else:
        cpu = torch.device("cpu")
        groups = {"num_blocks_per_group": 1} if how == "block_level" else {}
        model.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type=how, **groups)
    assert torch.equal(model(x, t, text, features=features).sample, want)


def test_layers_move_and_change_type_together() -> None:
    model = tiny().double()
    x, t, text, features = tiny_inputs(11)
    out = model(x.double(), t, text.double(), features=[f.double() for f in features]).sample
    assert out.dtype == torch.float64
    assert all(p.is_meta for p in model.to("meta").parameters())


def test_weights_of_the_fixture_are_all_used() -> None:
    names = [n for n in original_state() if n.startswith("model.diffusion_model.")]
    assert len(names) == len(golden_unet().state_dict())


@torch.no_grad()
def test_layerwise_casting_halves_the_bytes_and_keeps_the_prediction() -> None:
    model = tiny().eval()
    x, t, text, features = tiny_inputs(12)
    want = model(x, t, text, features=features).sample
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    assert {p.dtype for name, p in model.named_parameters() if "conv1.weight" in name} == {torch.bfloat16}
    got = model(x, t, text, features=features).sample
    assert (got - want).norm() < 0.02 * want.norm()  # weights of 8 bits of mantissa


@torch.no_grad()
def test_torch_compile_sees_one_graph() -> None:
    """A block and its conditioning; the rest is diffusers' own."""
    block = tiny().eval().down_blocks[0]
    conditioning = Conditioning(random_like((2, 128), 1), tuple(random_like((2, 32, 8, 8), seed) for seed in (2, 3, 4)))
    h = random_like((2, 32, 8, 8), 5)
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    assert torch.equal(compiled(h, conditioning)[0], block(h, conditioning)[0])
