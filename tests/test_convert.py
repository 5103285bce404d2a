"""convert/folder.py and `sslsr convert stablesr`: whole files to pipeline folders and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from golden_models import HEAD_CHANNELS, golden_inputs, golden_outputs, open_clip, original_state, random_like, relative_error, write_base
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny_runs import save_upscaler
from torch import Tensor
from typer.testing import CliRunner

from sslsr_diffusion.cli import app, convert
from sslsr_diffusion.errors import UserError
from sslsr_diffusion.models import AutoencoderKLCFW
from sslsr_diffusion.models.condition import Condition, Text
from sslsr_diffusion.models.stablesr.convert import components_from_checkpoint, original_from_folder
from sslsr_diffusion.models.stablesr.convert.folder import guess_variant
from sslsr_diffusion.models.stablesr.denoiser import Denoiser

EXTRA = {"betas": torch.zeros(1000), "mask_stride": torch.zeros(2, 2), "model_ema.decay": torch.tensor(0.9)}


def checkpoint_state() -> dict[str, Tensor]:
    """A StableSR checkpoint in miniature: UNet, encoder, plain autoencoder, OpenCLIP."""
    vae = {f"first_stage_model.{k}": v for k, v in original_state("cfw_weights").items() if "fusion_layer" not in k}
    return {**original_state(), **vae, **open_clip(width=32)}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("released")
    torch.save({"state_dict": {**checkpoint_state(), **EXTRA}, "global_step": 117}, folder / "stablesr_000117.ckpt")
    cfw = {**original_state("cfw_weights"), "loss.logvar": torch.zeros(())}
    torch.save({"state_dict": cfw}, folder / "vqgan_cfw_00011.ckpt")
    return folder / "stablesr_000117.ckpt", folder / "vqgan_cfw_00011.ckpt"


@torch.no_grad()
def test_the_converted_networks_predict_what_the_original_does(files: tuple[Path, Path]) -> None:
    result = components_from_checkpoint(files[0], vqgan=files[1], head_channels=HEAD_CHANNELS)
    parts = result.components
    inputs, want = golden_inputs("stablesr/composed"), golden_outputs("stablesr/composed")
    denoiser = Denoiser(parts["unet"], parts["structural_encoder"])
    got = denoiser(inputs["x_t"], inputs["timesteps.0"], Condition(inputs["latent"], Text(inputs["context"])))
    assert relative_error(got, want["case0.eps"]) < 1e-4  # the README's tolerance
    assert isinstance(parts["vae"], AutoencoderKLCFW)
    assert parts["scheduler"].config.prediction_type == "epsilon"
    assert parts["text_encoder"].config.num_hidden_layers == 2
    assert set(EXTRA) <= set(result.unknown)
    assert "cond_stage_model.model.text_projection" in result.unknown
    assert not any(p.is_meta for part in (parts["unet"], parts["text_encoder"], parts["vae"]) for p in part.parameters())


def test_command_writes_a_pipeline_and_the_original_back_bit_by_bit(files: tuple[Path, Path], tmp_path: Path) -> None:
    from sslsr_diffusion import StableSRPipeline

    run = CliRunner().invoke
    folder = tmp_path / "pipeline"
    shown = run(app, ["convert", "stablesr", "--checkpoint", str(files[0]), "--vqgan", str(files[1]), "--output", str(folder)])
    assert shown.exit_code == 0, shown.output
    assert "StableSR 512 (epsilon)" in shown.output
    assert "\n  mask_stride\n" in shown.output
    index = json.loads((folder / "model_index.json").read_text())
    assert index["unet"] == ["sslsr_diffusion.models", "SFTUNet2DConditionModel"]
    assert index["structural_encoder"] == ["sslsr_diffusion.models", "StructuralEncoder"]
    assert index["vae"] == ["sslsr_diffusion.models", "AutoencoderKLCFW"]
    assert not [p for p in folder.rglob("*") if p.suffix in (".bin", ".ckpt", ".pt")]
    pipe = StableSRPipeline.from_pretrained(folder)
    assert pipe.vae.config.num_fuse_blocks == 1
    assert pipe.text_encoder is not None
    assert pipe.tokenizer is None

    back = tmp_path / "back.safetensors"
    shown = run(app, ["convert", "stablesr", "--to-original", "--checkpoint", str(folder), "--output", str(back)])
    assert shown.exit_code == 0, shown.output
    state, dropped = load_file(back), {"text_projection", "logit_scale"}
    for name, tensor in checkpoint_state().items():
        short = name.removeprefix("cond_stage_model.model.")
        if short in dropped or short.startswith("transformer.resblocks.2."):
            assert name not in state
        else:
            assert torch.equal(state.pop(name), tensor), name
    assert not state
    cfw = load_file(tmp_path / "back_vqgan_cfw.safetensors")
    assert cfw.keys() == original_state("cfw_weights").keys()
    assert all(torch.equal(tensor, cfw[name]) for name, tensor in original_state("cfw_weights").items())

    # and once more: what was written back converts to the same tensors, from a .ckpt too
    shown = run(app, ["convert", "stablesr", "--to-original", "--checkpoint", str(folder), "--output", str(tmp_path / "back.ckpt")])
    again = components_from_checkpoint(tmp_path / "back.ckpt", vqgan=tmp_path / "back_vqgan_cfw.ckpt").components
    for part in ("unet", "structural_encoder", "vae", "text_encoder"):
        saved = getattr(pipe, part).state_dict()
        assert all(torch.equal(tensor, saved[name]) for name, tensor in again[part].state_dict().items()), part


@pytest.mark.parametrize(("suffix", "saver"), [("safetensors", "safetensors.torch.save_file"), ("ckpt", "torch.save")])
def test_a_write_that_is_cut_off_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, suffix, saver) -> None:
    path = tmp_path / f"{'long' * 60}.{suffix}"  # a name that has no room for an addition
    convert._write({"a": torch.ones(3)}, path)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise RuntimeError("unexpected pos 64 vs 0") if saver == "torch.save" else SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(saver, full)
    with pytest.raises(UserError, match=r"cannot be written \(.*(disk full|No space left).*\); name a file in a folder of yours"):
        convert._write({"a": torch.zeros(3)}, path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_text_encoder_and_vae_come_from_the_base_where_the_checkpoint_has_none(tmp_path: Path) -> None:
    save_file(original_state(), tmp_path / "stablesr_768v_000139.safetensors")
    base = write_base(tmp_path / "base")
    result = components_from_checkpoint(tmp_path / "stablesr_768v_000139.safetensors", base=str(base))
    assert result.variant == "768v"
    assert result.components["scheduler"].config.prediction_type == "v_prediction"
    assert result.components["unet"].config.upcast_attention
    assert result.components["unet"].config.sample_size == 96
    assert [note for note in result.notes if note.startswith(("autoencoder from", "text encoder from"))]
    with pytest.raises(UserError, match="holds no autoencoder; give --vqgan"):
        components_from_checkpoint(tmp_path / "stablesr_768v_000139.safetensors")
    no_text = write_base(tmp_path / "no_text", text=False)
    with pytest.raises(UserError, match="holds no text encoder; give --base"):
        components_from_checkpoint(tmp_path / "stablesr_768v_000139.safetensors", base=str(no_text))


@pytest.mark.parametrize(
    ("name", "variant"),
    [("stablesr_000117.ckpt", "512"), ("stablesr_768v_000139.ckpt", "768v"), ("stablesr_turbo.ckpt", "turbo"), ("face_co.ckpt", "face")],
)
def test_released_files_are_known_by_name(name: str, variant: str) -> None:
    assert guess_variant(Path("/some/768v/folder") / name) == variant


def test_mistakes_get_one_sentence(files: tuple[Path, Path], tmp_path: Path) -> None:
    state = checkpoint_state()
    torch.save({"weights": random_like((2,), 0)}, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match="is it a complete StableSR checkpoint"):
        components_from_checkpoint(tmp_path / "other.ckpt")
    del state["model.diffusion_model.out.0.bias"]
    torch.save(state, tmp_path / "cut.ckpt")
    with pytest.raises(UserError, match=r"lacks 1 of the .*out\.0\.bias"):
        components_from_checkpoint(tmp_path / "cut.ckpt", head_channels=HEAD_CHANNELS)
    state["model.diffusion_model.out.0.bias"] = torch.zeros(7)
    torch.save(state, tmp_path / "odd.ckpt")
    with pytest.raises(UserError, match=r"do not fit: conv_norm_out\.bias"):
        components_from_checkpoint(tmp_path / "odd.ckpt", head_channels=HEAD_CHANNELS)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    command = ["convert", "stablesr", "--checkpoint", str(files[0])]
    for arguments, expected in (
        (["--output", str(tmp_path / "full")], "already exists"),
        (["--output", str(tmp_path / "new"), "--variant", "1024"], "expected one of auto"),
        (["--output", str(tmp_path / "new.pt"), "--to-original"], "neither an existing folder"),
    ):
        result = CliRunner().invoke(app, [*command, *arguments])
        assert isinstance(result.exception, UserError)
        assert expected in str(result.exception)
    with pytest.raises(UserError, match="has no structural_encoder"):
        original_from_folder(write_base(tmp_path / "base", text=False))


@pytest.mark.parametrize("heads", [1, 2, 8])
def test_another_number_of_heads_cannot_go_back(tmp_path: Path, heads: int) -> None:
    """The original keeps q, k and v together per head: its code would read these weights in another order, without a word."""
    save_upscaler(tmp_path / "model")
    path = tmp_path / "model/structural_encoder/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_attention_heads": heads}))
    sentence = rf"model: expected a structural encoder with 4 attention heads, which .* has, got {heads}; its code would read"
    with pytest.raises(UserError, match=sentence):
        original_from_folder(tmp_path / "model")
    command = ["convert", "stablesr", "--to-original", "--checkpoint", str(tmp_path / "model"), "--output", str(tmp_path / "x.ckpt")]
    result = CliRunner().invoke(app, command)
    assert isinstance(result.exception, UserError)
    assert not list(tmp_path.glob("x*"))
