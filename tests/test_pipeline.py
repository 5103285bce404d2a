"""StableSRPipeline at toy width: sizes, batches, arguments, files, tiles. Random weights: the machinery, not the picture, is tested."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
from pathlib import Path

import forks
import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from sslsr_diffusion import StableSRPipeline
from sslsr_diffusion.errors import NotEnoughMemory, UserError
from sslsr_diffusion.images import resize_bicubic
from sslsr_diffusion.inference.antiring import antiring
from sslsr_diffusion.inference.back_projection import back_projection
from sslsr_diffusion.inference.options import LatentOptions
from sslsr_diffusion.inference.pipeline import StableSRRestorer
from sslsr_diffusion.models import AutoencoderKLCFW
from sslsr_diffusion.models.stablesr.build import build_networks
from sslsr_diffusion.models.stablesr.settings import StableSRSettings

STEPS = 2
# diffusers' schedulers convert their own tensors the way numpy 2 deprecates
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@functools.cache
def components() -> dict:
    parts = build_networks(StableSRSettings(init="random", preset="tiny"), train="all").components()
    parts["unet"].register_to_config(sample_size=16)  # pictures are padded to 64 x 64 output pixels at least
    # a freshly made encoder is silent in its residual branches; all weights should speak here
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in parts["structural_encoder"].parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)
    return parts


def make_pipeline(**replaced) -> StableSRPipeline:
    pipe = StableSRPipeline(**{**components(), **replaced})
    pipe.set_progress_bar_config(disable=True)
    return pipe


@functools.cache
def plain() -> StableSRPipeline:
    return make_pipeline()


@functools.cache
def with_cfw() -> StableSRPipeline:
    torch.manual_seed(0)
    return make_pipeline(vae=AutoencoderKLCFW.from_autoencoder(components()["vae"]).eval())


@functools.cache
def text_parts() -> dict:
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=12,
        bos_token_id=0,
        eos_token_id=1,
    )

    class Letters:
        """A tokenizer of the shape the pipeline uses."""

        def __call__(self, texts, *, padding, max_length, truncation, return_tensors):
            ids = [[0, *(ord(c) % 90 + 2 for c in text)][: max_length - 1] for text in texts]
            return type("Encoding", (), {"input_ids": torch.tensor([[*row, *[1] * (max_length - len(row))] for row in ids])})

    return {"text_encoder": CLIPTextModel(config).eval(), "tokenizer": Letters()}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def photo(height: int = 20, width: int = 28, seed: int = 0) -> torch.Tensor:
    """Smooth, coloured, [3, h, w] in [0, 1]."""
    coarse = torch.rand(1, 3, 5, 5, generator=seeded(seed))
    return torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=True)[0].clamp(0, 1)


def run(pipe: StableSRPipeline, image, **arguments):
    return pipe(image, **{"num_inference_steps": STEPS, "generator": seeded(), "output_type": "pt", **arguments}).images


@pytest.mark.parametrize("scale", [4, 2.5, 1])
@pytest.mark.parametrize("size", [(16, 16), (17, 16), (16, 61), (19, 33), (40, 16), (1, 3)])
def test_output_is_exactly_round_scale_times_size(size, scale):
    got = run(plain(), photo(*size), scale=scale)
    assert got.shape == (1, 3, *(max(1, round(scale * side)) for side in size))
    assert got.isfinite().all()
    assert got.min() >= 0
    assert got.max() <= 1


@pytest.mark.parametrize("size", [(16, 70), (33, 47), (65, 18)])
def test_tiled_output_has_the_exact_size_too(size):
    out = plain()(photo(*size), num_inference_steps=STEPS, generator=seeded(), output_type="pt", tile=64, vae_tile=64, tile_overlap=16)
    assert out.images.shape[-2:] == (4 * size[0], 4 * size[1])
    assert (out.plans[0].tile, out.plans[0].vae_tile) == (64, 64)


@pytest.mark.parametrize(("sampler", "tile"), [("ddpm", None), ("ddpm", 64), ("ddim", None), ("EulerAncestralDiscreteScheduler", None)])
def test_a_picture_does_not_depend_on_its_batch(sampler, tile):
    pictures = torch.stack([photo(seed=k) for k in range(3)])
    arguments = {"sampler": sampler, "tile": tile, "tile_overlap": 16, "eta": 0.7}
    together = run(plain(), pictures, generator=[seeded(k) for k in range(3)], tile_batch_size=4, **arguments)
    for k in range(3):
        alone = run(plain(), pictures[k], generator=seeded(k), tile_batch_size=1, **arguments)
        # convolutions add in another order for another batch size; a random network amplifies the last bit
        torch.testing.assert_close(together[k], alone[0], atol=2e-4, rtol=0)
    one_after_the_other = seeded(7)
    in_a_row = run(plain(), pictures[:2], generator=seeded(7), **arguments)
    for k in range(2):
        alone = run(plain(), pictures[k], generator=one_after_the_other, **arguments)
        torch.testing.assert_close(in_a_row[k], alone[0], atol=2e-4, rtol=0)


def test_the_same_call_gives_the_same_bits():
    assert torch.equal(run(plain(), photo()), run(plain(), photo()))
    assert not torch.equal(run(plain(), photo()), run(plain(), photo(), generator=seeded(1)))


def test_auto_takes_smaller_tiles_when_memory_is_short():
    def chosen(budget: int) -> tuple:
        plan = plain()(photo(40, 40), num_inference_steps=1, output_type="pt", memory_budget=budget).plans[0]
        return plan.tile, plan.vae_tile

    assert chosen(1 << 40) == (128, None)  # twice the training side at most
    memory = plain().memory_model()
    beside = memory.weight_bytes()[0] + memory.picture_bytes(160, 160)
    assert chosen(beside + memory.codec_bytes(32, 32, steady=True)) == (128, 128)
    with pytest.raises(NotEnoughMemory, match=r"memory_budget: 1\.0 MB is too little .* the least is \d+\.\d MB\.") as caught:
        chosen(10**6)
    assert chosen(caught.value.least)[1] == 128
    with pytest.raises(NotEnoughMemory, match=r"vae_tile 160 would take .*; 'auto' needs"):
        plain()(photo(40, 40), memory_budget=caught.value.least, vae_tile=None)


def test_pictures_of_different_sizes_run_one_by_one():
    pictures = [photo(20, 28), photo(16, 18, seed=1)]
    got = run(plain(), pictures, generator=[seeded(0), seeded(1)])
    assert [tuple(each.shape) for each in got] == [(3, 80, 112), (3, 64, 72)]
    assert torch.equal(got[1], run(plain(), pictures[1], generator=seeded(1))[0])


def test_every_kind_of_image_means_the_same_picture():
    array = (photo(16, 20).permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    wanted = run(plain(), torch.from_numpy(array).permute(2, 0, 1).float() / 255)
    for image in (
        PIL.Image.fromarray(array),
        [PIL.Image.fromarray(array)],
        array,
        array[None],
        array.astype(np.uint16) * 257,
        array.astype(np.float32) / 255,
        torch.from_numpy(array).permute(2, 0, 1),
        PIL.Image.fromarray(array).convert("RGBA"),
    ):
        torch.testing.assert_close(run(plain(), image), wanted, atol=1e-4, rtol=0)  # 1/255 in float32 has two spellings


def test_output_types_agree():
    tensor = run(plain(), [photo(), photo(seed=1)])
    array = run(plain(), [photo(), photo(seed=1)], output_type="np")
    pictures = run(plain(), [photo(), photo(seed=1)], output_type="pil")
    assert array.shape == (2, 80, 112, 3)
    np.testing.assert_array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    np.testing.assert_array_equal(np.asarray(pictures[1]), (array[1] * 255).round().astype(np.uint8))
    assert torch.equal(
        plain()(photo(), num_inference_steps=STEPS, generator=seeded(), output_type="pt", return_dict=False)[0][0], tensor[0]
    )


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_prediction_type_comes_from_the_scheduler(prediction_type):
    scheduler = type(components()["scheduler"]).from_config(components()["scheduler"].config, prediction_type=prediction_type)
    got = run(make_pipeline(scheduler=scheduler), photo(), color_fix="none")
    own = components()["scheduler"].config.prediction_type
    assert (prediction_type == own) == torch.equal(got, run(plain(), photo(), color_fix="none"))


def test_the_pipelines_own_scheduler_is_the_default_sampler():
    scheduler = UniPCMultistepScheduler.from_config(components()["scheduler"].config, timestep_spacing="linspace")
    torch.testing.assert_close(run(make_pipeline(scheduler=scheduler), photo()), run(plain(), photo(), sampler="unipc"), atol=0, rtol=0)


def test_a_scheduler_of_a_flow_is_refused_by_name():
    with pytest.raises(UserError, match="expected one of the DDPM family, got FlowMatchEulerDiscreteScheduler"):
        run(make_pipeline(scheduler=FlowMatchEulerDiscreteScheduler()), photo())


def test_no_colour_fix_is_none():
    torch.testing.assert_close(run(plain(), photo(), color_fix=None), run(plain(), photo(), color_fix="none"), atol=0, rtol=0)


def test_strength_runs_the_last_steps_and_stays_nearer_to_the_picture():
    seen: list[float] = []

    def note(pipe, step, t, values):
        seen.append(t)

    run(plain(), photo(), num_inference_steps=10, strength=0.3, callback_on_step_end=note)
    assert seen == [222, 111, 0]


def test_detail_lies_on_the_line_from_bicubic_to_the_models_picture(tmp_path) -> None:
    whole, bicubic = run(plain(), photo()), resize_bicubic(photo()[None], (80, 112)).clamp(0, 1)
    assert torch.equal(run(plain(), photo(), detail=1), whole)
    torch.testing.assert_close(run(plain(), photo(), detail=0), bicubic, atol=2e-4, rtol=0)
    torch.testing.assert_close(run(plain(), photo(), detail=0.25), 0.75 * bicubic + 0.25 * whole, atol=2e-4, rtol=0)
    assert (whole - bicubic).abs().max() > 0.01
    StableSRPipeline(**components(), default_detail=0.25).save_pretrained(tmp_path)
    pipe = StableSRPipeline.from_pretrained(tmp_path)
    torch.testing.assert_close(run(pipe, photo()), 0.75 * bicubic + 0.25 * whole, atol=2e-4, rtol=0)
    torch.testing.assert_close(run(pipe, photo(), detail=1), whole, atol=2e-4, rtol=0)


def test_antiring_is_applied_to_the_models_picture_and_travels_with_the_folder(tmp_path) -> None:
    low, whole = photo()[None], run(plain(), photo())
    calmed = antiring(whole.clone(), low, 0.7)
    assert (whole - calmed).abs().max() > 0.01
    torch.testing.assert_close(run(plain(), photo(), antiring=0.7), calmed, atol=0, rtol=0)
    bare = run(plain(), photo(), color_fix="none")
    torch.testing.assert_close(run(plain(), photo(), color_fix="none", antiring=0.7), antiring(bare, low, 0.7), atol=0, rtol=0)
    bicubic = resize_bicubic(low, (80, 112)).clamp(0, 1)
    torch.testing.assert_close(run(plain(), photo(), antiring=0.7, detail=0.5), (bicubic + calmed) / 2, atol=2e-4, rtol=0)
    StableSRPipeline(**components(), default_antiring=0.7).save_pretrained(tmp_path)
    pipe = StableSRPipeline.from_pretrained(tmp_path)
    torch.testing.assert_close(run(pipe, photo()), calmed, atol=2e-4, rtol=0)
    torch.testing.assert_close(run(pipe, photo(), antiring=0), whole, atol=2e-4, rtol=0)


def test_back_projection_is_applied_behind_the_colours_and_before_the_antiring(tmp_path) -> None:
    low, whole = photo()[None], run(plain(), photo())
    projected = back_projection(whole.clone(), low, 0.6).clamp_(0, 1)
    assert (whole - projected).abs().max() > 0.01
    torch.testing.assert_close(run(plain(), photo(), back_projection=0.6), projected, atol=0, rtol=0)
    both = antiring(projected.clone(), low, 0.7)
    torch.testing.assert_close(run(plain(), photo(), back_projection=0.6, antiring=0.7), both, atol=0, rtol=0)
    StableSRPipeline(**components(), default_back_projection=0.6).save_pretrained(tmp_path)
    torch.testing.assert_close(run(StableSRPipeline.from_pretrained(tmp_path), photo()), projected, atol=2e-4, rtol=0)


def test_the_default_number_of_steps_travels_with_the_folder(tmp_path) -> None:
    StableSRPipeline(**components(), default_num_inference_steps=3).save_pretrained(tmp_path)
    pipe = StableSRPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    seen = []
    pipe(photo(), generator=seeded(), callback_on_step_end=lambda pipe, index, t, latents: seen.append(t) or {})
    assert len(seen) == 3


def test_the_prompt_of_the_training_travels_with_the_model(tmp_path) -> None:
    asked = run(make_pipeline(**text_parts()), photo(), prompt="a cat")
    assert torch.equal(run(make_pipeline(**text_parts(), default_prompt="a cat"), photo()), asked)
    assert not torch.equal(run(make_pipeline(**text_parts(), default_prompt="a cat"), photo(), prompt=""), asked)
    networks = build_networks(StableSRSettings(init="random", preset="tiny"))
    networks.prompt = "a cat"
    StableSRRestorer(networks, scale=2).save(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert (index["default_prompt"], index["default_scale"]) == ("a cat", 2)


def test_components_make_the_same_upscaler() -> None:
    """diffusers' own way to a second pipeline; the defaults of a call are part of the model."""
    own = {"default_num_inference_steps": 3, "default_scale": 2, "default_detail": 0.5, "default_prompt": "a cat"}
    own |= {"default_back_projection": 0.75, "default_antiring": 0.25}
    first = StableSRPipeline(**components(), **own)
    again = StableSRPipeline(**first.components)
    assert {name: again.config[name] for name in own} == own
    assert again.unet is first.unet
    assert first.restorer is first.restorer


def test_callback_may_replace_the_latents():
    got = run(plain(), photo(), callback_on_step_end=lambda pipe, step, t, values: {"latents": torch.zeros_like(values["latents"])})
    again = run(plain(), photo(), generator=seeded(3), start="noise", callback_on_step_end=lambda p, s, t, v: {"latents": v["latents"] * 0})
    assert torch.equal(got, again)


def test_guidance_moves_away_from_the_negative_prompt():
    pipe = make_pipeline(**text_parts())
    plainly = run(pipe, photo(), prompt="sharp")
    assert torch.equal(plainly, run(pipe, photo(), prompt="sharp", guidance_scale=1.0))
    assert not torch.equal(plainly, run(pipe, photo()))
    # c == u: nothing to move away from, whatever the scale
    same = run(pipe, photo(), prompt="sharp", negative_prompt="sharp", guidance_scale=5.0)
    torch.testing.assert_close(same, plainly, atol=2e-4, rtol=0)
    guided = run(pipe, photo(), prompt="sharp", negative_prompt="blurred", guidance_scale=5.0)
    assert not torch.allclose(guided, plainly, atol=1e-3)


def test_guidance_in_a_batch_of_tiles_with_a_prompt_per_picture():
    pipe = make_pipeline(**text_parts())
    pictures = torch.stack([photo(), photo(seed=1)])
    arguments = {"guidance_scale": 3.0, "tile": 64, "tile_overlap": 32, "negative_prompt": "blurred"}
    together = run(pipe, pictures, prompt=["sharp", "soft"], generator=[seeded(0), seeded(1)], tile_batch_size=3, **arguments)
    for k, prompt in enumerate(["sharp", "soft"]):
        alone = run(pipe, pictures[k], prompt=prompt, generator=seeded(k), **arguments)
        torch.testing.assert_close(together[k], alone[0], atol=2e-4, rtol=0)


def test_fidelity_is_the_weight_of_the_fusion_layers():
    whole = run(with_cfw(), photo(), fidelity=0.0)
    torch.testing.assert_close(whole, run(plain(), photo()), atol=1e-5, rtol=0)  # w = 0 is the plain decoder
    assert torch.equal(run(with_cfw(), photo()), run(with_cfw(), photo(), fidelity=0.5))
    assert not torch.allclose(run(with_cfw(), photo(), fidelity=1.0), whole, atol=1e-3)


def test_a_plain_autoencoder_refuses_fidelity_and_says_that_none_is_none():
    with pytest.raises(UserError, match=r"^fidelity: this model does not have it, got 0\.9 \(no CFW decoder\); leave it out"):
        run(plain(), photo(), fidelity=0.9)
    out = plain()(photo(), num_inference_steps=STEPS, generator=seeded(), output_type="pt", fidelity=0)
    assert torch.equal(out.images, run(plain(), photo()))
    assert out.notes == ["fidelity 0 has no effect: it is off, and this model has none"]


def test_the_defaults_of_the_signature_are_those_of_the_options_and_say_nothing():
    parameters = inspect.signature(StableSRPipeline.__call__).parameters
    own = LatentOptions.names() - {"noise_level"}  # of x4 upscalers alone
    assert own < parameters.keys()
    for field in dataclasses.fields(LatentOptions):
        assert field.name not in own or parameters[field.name].default in (field.default, None), field.name
    every = {name: parameters[name].default for name in own}
    assert plain()(photo(), **{**every, "num_inference_steps": 1}).notes == []
    assert plain().check() == []


def test_half_precision_runs_and_stays_near():
    half = StableSRPipeline(**build_networks(StableSRSettings(init="random", preset="tiny")).components()).to(torch.bfloat16)
    got = run(half, photo())
    assert got.dtype == torch.float32
    assert got.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"output_type": "jpg"}, "output_type"),
        ({"color_fix": "wavlet"}, "color_fix"),
        ({"scale": 0}, "scale"),
        ({"strength": 0}, "strength"),
        ({"start": "noise", "strength": 0.5}, "strength 1"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"tile": 7}, "tile"),
        ({"tile": 64, "tile_overlap": 64}, "tile_overlap"),
        ({"tile_batch_size": 0}, "tile_batch_size"),
        ({"sampler": "dpm"}, "sampler"),
        ({"eta": 2}, "eta"),
        ({"antiring": -0.1}, "antiring"),
        ({"detail": 1.5}, "detail"),
        ({"detail": float("nan")}, "detail"),
        ({"prompt": "a cat"}, "no text encoder"),
        ({"prompt": ["", ""]}, "prompt"),
        ({"generator": [seeded(), seeded()]}, "generator"),
    ],
)
def test_impossible_arguments_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        run(plain(), photo(), **arguments)


@pytest.mark.parametrize(
    "image",
    [[], "photo.png", torch.zeros(1, 8, 8), torch.full((3, 8, 8), 2.0), torch.full((3, 8, 8), torch.nan), np.zeros((8, 8, 4)), 3],
)
def test_impossible_images_are_named(image):
    with pytest.raises(UserError, match="image"):
        run(plain(), image)


def test_saved_pipeline_loads_elsewhere_and_gives_the_same_picture(tmp_path):
    pipe = with_cfw()
    pipe.save_pretrained(tmp_path / "pipeline")
    index = json.loads((tmp_path / "pipeline" / "model_index.json").read_text())
    assert index["_class_name"] == "StableSRPipeline"
    assert index["unet"] == ["sslsr_diffusion.models", "SFTUNet2DConditionModel"]
    assert index["structural_encoder"] == ["sslsr_diffusion.models", "StructuralEncoder"]
    assert index["vae"] == ["sslsr_diffusion.models", "AutoencoderKLCFW"]
    assert index["text_encoder"] == [None, None]
    assert not [path for path in (tmp_path / "pipeline").rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]
    (tmp_path / "elsewhere").mkdir()
    torch.save(photo(), tmp_path / "photo.pt")
    code = (
        "import torch, warnings\n"
        "warnings.simplefilter('error', FutureWarning)\n"
        "from sslsr_diffusion import StableSRPipeline\n"
        "pipe = StableSRPipeline.from_pretrained('../pipeline')\n"
        "out = pipe(torch.load('../photo.pt'), num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type='pt')\n"
        "torch.save(out.images, '../result.pt')\n"
    )
    done = forks.python("-c", code, cwd=tmp_path / "elsewhere", path=[Path(__file__).parent.parent])
    assert done.returncode == 0, done.stderr
    # 1e-5: another process may have another thread count, and sums in another order
    torch.testing.assert_close(torch.load(tmp_path / "result.pt"), run(pipe, photo()), atol=1e-5, rtol=0)


@pytest.mark.cuda
def test_model_offload_moves_every_component_and_gives_the_same_picture():
    pipe = make_pipeline(
        **build_networks(StableSRSettings(init="random", preset="tiny")).components(), text_encoder=text_parts()["text_encoder"]
    )
    want = run(pipe, photo())
    visited: set[str] = set()
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    for name, part in modules.items():
        leaf = next(m for m in part.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear))
        leaf.register_forward_hook(lambda m, args, out, name=name: visited.add(name) if out.is_cuda else None)
    pipe.enable_model_cpu_offload()
    got = run(pipe, photo())
    assert visited == set(modules)
    assert all(next(part.parameters()).device.type == "cpu" for part in modules.values())
    torch.testing.assert_close(got.cpu(), want, atol=2e-2, rtol=0)  # another device's convolutions through a random network
