"""models/one_step/: every base against diffusers' own pipelines, from pixels to pixels: signs, times, shifts and scales."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from golden_models import random_like, relative_error
from one_step_cases import AT, NOISED, TOYS, Stock, save_pipeline, saved_bases, stock, toy, toy_settings, with_loras
from toys import smooth

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.models.condition import Condition, Text
from sslsr_diffusion.models.families import FAMILIES
from sslsr_diffusion.models.one_step.build import build_networks, check_base_folder
from sslsr_diffusion.models.one_step.networks import OneStepNetworks
from sslsr_diffusion.models.process import Flow
from sslsr_diffusion.tables import named

CLOSE = 1e-5  # float32 through the same layers in another order of sums
CASES = {**{kind: kind for kind in TOYS}, "sd epsilon": "sd"}  # the toy of Stable Diffusion predicts v; 1.5 and 2.1-base say epsilon
NAMES = pytest.mark.parametrize("name", CASES)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, OneStepNetworks, Stock]]:
    found = {}
    for name, kind in CASES.items():
        base = {} if name == kind else {"init": "pretrained", "base": str(saved_bases(tmp_path_factory.mktemp("bases"))(name))}
        networks = toy(kind, noise=NOISED[kind], **base)
        found[name] = kind, networks, stock(kind, networks)
    return found


def pictures() -> torch.Tensor:
    return torch.stack([smooth(seed, size=32)[..., :24] for seed in range(2)])  # higher than wide: axes cannot be mixed up


@NAMES
@torch.no_grad()
def test_encoding_and_noising_are_those_of_the_pipeline(name: str, cases) -> None:
    kind, networks, theirs = cases[name]
    pixels = pictures()
    want = theirs.encode(pixels * 2 - 1, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    shape = networks.codec.noise_shape(pixels)
    posterior = torch.zeros(shape) if kind == "flux2" else torch.randn(shape, generator=generator)  # its pipeline takes the mean
    noise = torch.randn(shape, generator=generator)
    got = networks.start(networks.codec.encode(pixels, posterior), noise)
    assert relative_error(got, want) < CLOSE


@NAMES
@torch.no_grad()
def test_one_call_from_given_latents_is_that_of_the_pipeline(name: str, cases) -> None:
    _, networks, theirs = cases[name]
    z = random_like((2, networks.codec.latent_channels, 8, 6), seed=5)
    t = torch.full((2,), networks.timestep)
    pred = networks.denoiser(z, t, Condition(z, networks.text))
    clean = networks.clean(pred, z, z)
    assert relative_error(clean, z) > 0.01, "the call must change something, or it would prove nothing"
    want = theirs.call(z)
    got = networks.codec.decode(clean).clamp(0, 1)
    assert ((want > 0) & (want < 1)).float().mean() > 0.3
    assert (got - want).abs().max() < CLOSE


@NAMES
def test_the_network_is_told_what_the_recipe_says(name: str, cases) -> None:
    kind, networks, _ = cases[name]
    assert networks.timestep == pytest.approx(AT[kind] if kind == "sd" else 1000 * AT[kind])
    assert isinstance(networks.process, Flow) == (kind != "sd")


@torch.no_grad()
def test_at_sigma_one_the_rules_of_process_and_residual_are_one() -> None:
    """TSD-SR feeds the low-resolution latents at sigma 1 and takes the prediction off them."""
    z, pred = random_like((1, 4, 8, 8), seed=0), random_like((1, 4, 8, 8), seed=1)
    made = [toy("sd3", sigma=1.0, x0=rule).clean(pred, z, z) for rule in ("process", "residual")]
    assert torch.equal(*made)
    other = toy("sd3", x0="residual")
    assert torch.equal(other.clean(pred, z, z), z - pred)


def asked(pipeline: str, kind: str, base: Path, prompt: str) -> Text:
    """What the base's stock pipeline says of a prompt, by its public function."""
    precision = torch.float32 if kind == "sd" else torch.bfloat16
    pipe = named(f"diffusers:{pipeline}").from_pretrained(base, torch_dtype=precision)
    if kind == "sd":
        return Text(pipe.encode_prompt(prompt, "cpu", 1, do_classifier_free_guidance=False)[0])
    if kind == "sd3":
        sequence, _, pooled, _ = pipe.encode_prompt(prompt, prompt, prompt, do_classifier_free_guidance=False)
        return Text(sequence.float(), pooled.float())
    if kind == "flux2":
        return Text(pipe.encode_prompt(prompt)[0].float())
    return Text(pipe.encode_prompt(prompt, do_classifier_free_guidance=False)[0][0][None].float())


@pytest.mark.parametrize("kind", TOYS)
def test_the_prompt_is_encoded_as_the_pipeline_does(kind: str, tmp_path: Path) -> None:
    base = save_pipeline(kind, tmp_path / "base")
    networks = with_loras(kind, base, drawn=False, prompt="a sharp photo", text=True)
    with torch.no_grad():
        want = asked(networks.denoiser.pipeline_class, kind, base, "a sharp photo")
    assert (networks.text.pooled is None) == (want.pooled is None) == (kind != "sd3")
    for part, wanted in zip(networks.text, want):
        if part is not None:
            assert torch.equal(part, wanted)
            assert part.abs().max() > 0.01
    prior = networks.prior(rank=1, negative_prompt="blurry", seed=0)
    z = random_like((1, networks.codec.latent_channels, 4, 4), seed=1)
    predicted = [prior.predict(z, torch.tensor([500]), guidance=guidance, learned=False) for guidance in (1.0, 3.0)]
    assert not torch.equal(*predicted)

    networks.save(tmp_path / "lora")
    shutil.rmtree(base / "text_encoder")  # whoever upscales does without
    opened = FAMILIES["one_step"].read(tmp_path / "lora")
    assert isinstance(opened, OneStepNetworks)
    assert torch.equal(opened.text.sequence, networks.text.sequence)
    with pytest.raises(UserError, match="lacks its text_encoder/"):
        with_loras(kind, base)


def test_each_text_encoder_is_looked_for_before_a_run(tmp_path: Path) -> None:
    base = save_pipeline("sd3", tmp_path / "base")
    settings = toy_settings("sd3", init="pretrained", base=str(base))
    assert check_base_folder(settings).endswith("found transformer, vae, scheduler, text_encoder, text_encoder_2, text_encoder_3")
    for part in ("tokenizer_3", "text_encoder_2"):
        (base / part).rename(tmp_path / part)
        for door in (check_base_folder, build_networks):
            with pytest.raises(UserError, match=rf"^model\.base: .*base lacks its {part}/.*; fetch the whole model\.$"):
                door(settings)
        (tmp_path / part).rename(base / part)
    (base / "text_encoder_3" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"^model\.base: text_encoder_3 of .*base: expected .*\.safetensors, got config\.json; "):
        check_base_folder(settings)
