"""The family `network` from recipe to result: training, resume, export, blending, upscaling, the hub, the card."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import spandrel
import torch
from hub_server import HubServer, quick_client
from safetensors.torch import load_file, save_file
from tiny_runs import SMALL_SSL, save_upscaler, tiny
from toys import wave_photos
from typer.testing import CliRunner

import sslsr_diffusion.inference.open as opening
from sslsr_diffusion import hub, open_upscaler, train
from sslsr_diffusion.cli import app
from sslsr_diffusion.config import RecipeError, parse
from sslsr_diffusion.errors import UserError
from sslsr_diffusion.hub import split_file
from sslsr_diffusion.images import Image, read_image, write_image
from sslsr_diffusion.inference.direct import DirectRestorer
from sslsr_diffusion.models.network.family import FILE, find_file
from sslsr_diffusion.models.network.networks import SuperResolution, drawn
from sslsr_diffusion.models.network.settings import NetworkSettings
from sslsr_diffusion.runs.check import dry_run
from sslsr_diffusion.runs.model_card import model_card
from sslsr_diffusion.runs.pin import pinned
from sslsr_diffusion.runs.recipe import Recipe, resolved
from sslsr_diffusion.runs.task import export_checkpoint
from sslsr_diffusion.training.publisher import HubPublisher

RRDB = {"kind": "network", "architecture": "RRDBNet", "arguments": {"num_feat": 4, "num_block": 1}}
LOSSES = [{"kind": "pixel_l1", "weight": 1.0}, {**SMALL_SSL, "l1_weight": 10, "kl_weight": 0}]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wave_photos(tmp_path_factory.mktemp("photos"))


def recipe(photos: Path, run: Path, **sections: Any) -> Recipe:
    return tiny(photos, run, **{"model": RRDB, "task": {"kind": "network"}, "losses": LOSSES, "checkpoints": {"every": 1}, **sections})


@pytest.fixture(scope="module")
def done(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of two steps with a moving average."""
    run = tmp_path_factory.mktemp("runs") / "mine"
    training = {"steps": 2, "batch_size": 2, "crop_size": 32, "log_every": 1, "ema": {"decay": 0.9}, "optimizer": {"lr": 1e-3}}
    result = train(recipe(photos, run, training=training, validation={"every": 1, "limit": 1, "size": 32}))
    assert result.step == 2
    return run


def said(recipe: Recipe) -> tuple[bool, str]:
    lines: list[str] = []
    return dry_run(recipe, lines.append), "\n".join(lines)


def test_a_dry_run_counts_and_a_missing_base_is_named(photos, tmp_path):
    sound, text = said(recipe(photos, tmp_path / "run"))
    assert sound, text
    assert "architecture RRDBNet, weights drawn" in text
    assert re.search(r"RRDBNet +0\.20 M +trained +0\.20 M", text), text
    assert "GiB" in text
    sound, text = said(recipe(photos, tmp_path / "run", model={**RRDB, "base": "weights/RealESRGAN_x4plus.pth"}))
    assert not sound
    assert "model.base: weights/RealESRGAN_x4plus.pth is no file here" in text
    assert re.search(r"RRDBNet +0\.20 M", text)
    sound, text = said(recipe(photos, tmp_path / "run", model={"kind": "network", "base": "missing.pth"}))
    assert (sound, text.count("missing.pth is no file here")) == (False, 1)
    sound, text = said(recipe(photos, tmp_path / "run", scale=2))
    assert "these networks enlarge 4 times, got 2" in text
    swin = {"kind": "network", "architecture": "SwinIR", "arguments": {"upscale": 4, "window_size": 8, "upsampler": "pixelshuffle"}}
    training = {"steps": 2, "batch_size": 1, "crop_size": 40}
    sound, text = said(recipe(photos, tmp_path / "run", model=swin, training=training, losses=LOSSES[:1]))
    assert "training.crop_size: this model needs a multiple of 32 pixels, got 40; 32 would do." in text


def test_the_result_is_read_by_others_and_by_us(done):
    file = done / "pipeline" / FILE
    assert sorted(path.name for path in (done / "pipeline").iterdir()) == [FILE]
    found = spandrel.ModelLoader().load_from_file(file)
    assert (found.architecture.id, found.scale) == ("ESRGAN", 4)
    up = open_upscaler(done, dtype="float32")
    assert isinstance(up, DirectRestorer)
    picture = torch.linspace(0, 1, 3 * 12 * 10).view(1, 3, 12, 10)
    with torch.no_grad():
        torch.testing.assert_close(up(picture, output_type="pt").images, found(picture), atol=1e-5, rtol=0)


def test_a_run_goes_on_to_the_same_bits(photos, done, tmp_path):
    """Two steps at once, or one and then the other."""
    training = {"steps": 1, "batch_size": 2, "crop_size": 32, "log_every": 1, "ema": {"decay": 0.9}, "optimizer": {"lr": 1e-3}}
    sections: dict[str, Any] = {"validation": {"every": 1, "limit": 1, "size": 32}}
    train(recipe(photos, tmp_path / "run", training=training, **sections))
    train(recipe(photos, tmp_path / "run", training={**training, "steps": 2}, **sections), resume="latest")
    one, two = (load_file(run / "pipeline" / FILE) for run in (done, tmp_path / "run"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_export_and_blending(done, tmp_path):
    raw, blended, swapped = (tmp_path / name for name in ("raw", "blended", "swapped"))
    export_checkpoint(done / "checkpoint-2", tmp_path / "whole")
    whole, result = (load_file(folder / FILE) for folder in (tmp_path / "whole", done / "pipeline"))
    assert all(torch.equal(whole[name], result[name]) for name in result)
    export_checkpoint(done / "checkpoint-2", raw, averaged=False, half=True)
    assert {tensor.dtype for tensor in load_file(raw / FILE).values()} == {torch.float16}
    drawn(NetworkSettings(**RRDB), seed=7).save(tmp_path / "other")
    other = str(tmp_path / "other" / FILE)
    export_checkpoint(done / "checkpoint-2", blended, blend=(other, 0.8))
    export_checkpoint(done / "checkpoint-2", swapped, blend=(other, 0.0))
    mine, theirs, mixed = (load_file(folder / FILE) for folder in (tmp_path / "whole", tmp_path / "other", blended))
    for name in mine:
        torch.testing.assert_close(mixed[name], 0.8 * mine[name] + 0.2 * theirs[name])
        assert torch.equal(load_file(swapped / FILE)[name], theirs[name])


def command(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_what_cannot_be_blended_is_one_sentence(done, tmp_path):
    drawn(NetworkSettings(architecture="SRResNet", arguments={"nf": 4, "nb": 1})).save(tmp_path / "net")
    save_upscaler(tmp_path / "latent")
    export = ("export", done, "--output", tmp_path / "out")
    for more, message in (
        (("--blend", tmp_path / "net", "--alpha", 0.5), "--blend: expected the same network as RRDBNet of random:RRDBNet, got SRResNet."),
        (("--blend", tmp_path / "latent", "--alpha", 0.5), "--blend: expected a plain network, "),
        (("--blend", tmp_path / "net", "--alpha", 1.5), "--alpha: expected 0 (all of the other network) to 1 (all of this one), got 1.5."),
        (("--blend", tmp_path / "net"), "--blend and --alpha belong together"),
        (("--blend", "nothing.pth", "--alpha", 0.5), "'nothing.pth' is neither"),
    ):
        result = command(*export, *more)
        assert isinstance(result.exception, UserError), result.output
        assert message in str(result.exception)
        assert "\n" not in str(result.exception)
        assert not (tmp_path / "out").exists()


def test_training_goes_on_from_a_file_and_keeps_its_call_defaults(photos, done, tmp_path):
    torch.save({"params": load_file(done / "pipeline" / FILE)}, tmp_path / "net.pth")
    train(recipe(photos, tmp_path / "a", model={"kind": "network", "base": str(tmp_path / "net.pth")}))
    assert open_upscaler(tmp_path / "a").networks.known.architecture == "RRDBNet"  # type: ignore[attr-defined]
    drawn(NetworkSettings(**RRDB)).save(tmp_path / "own", scale=4, detail=0.5, antiring=0.25)
    train(recipe(photos, tmp_path / "b", model={"kind": "network", "base": str(tmp_path / "own")}))
    defaults = open_upscaler(tmp_path / "b").defaults
    assert (defaults["detail"], defaults["antiring"]) == (0.5, 0.25)


@pytest.mark.parametrize(
    ("architecture", "arguments", "crop"),
    [
        ("SPSRNet", {"nf": 4, "nb": 20, "gc": 2}, 32),
        ("ELAN", {"m_elan": 2, "c_elan": 12, "window_sizes": [2, 4, 8]}, 32),
        ("SwinIR", {"upscale": 4, "img_size": 16, "window_size": 8, "depths": [2], "num_heads": [2], "embed_dim": 8}, 32),
        ("Compact", {"num_feat": 8, "num_conv": 2, "upscale": 4}, 32),
    ],
)
def test_the_others_train_too(photos, tmp_path, architecture, arguments, crop):
    if architecture == "SwinIR":
        arguments = {**arguments, "upsampler": "pixelshuffle"}
    model = {"kind": "network", "architecture": architecture, "arguments": arguments}
    training = {"steps": 1, "batch_size": 1, "crop_size": crop, "log_every": 1, "gradient_checkpointing": True}
    made = recipe(photos, tmp_path / "run", model=model, training=training, losses=LOSSES[:1], checkpoints={"every": 0})
    if architecture in ("SwinIR", "Compact"):  # one that looks at its windows, one that is spandrel's alone
        sound, text = said(made)
        assert sound, text
    train(made)
    up = open_upscaler(tmp_path / "run")
    assert up(np.zeros((9, 7, 3), np.uint8), scale=4).images[0].size == (28, 36)


def test_infer_takes_a_file_of_any_network(done, tmp_path, monkeypatch):
    """Exact sizes at any scale, tiles, 16 bits with alpha, a memory budget; options of other models are refused by name."""
    monkeypatch.chdir(tmp_path)
    torch.save({"params_ema": load_file(done / "pipeline" / FILE)}, tmp_path / "net.pth")
    rng = np.random.default_rng(0)
    deep = Image(rng.integers(0, 65536, (21, 17, 3), dtype=np.uint16), alpha=rng.integers(0, 65536, (21, 17), dtype=np.uint16))
    (tmp_path / "lr").mkdir()
    write_image(tmp_path / "lr" / "a.png", deep)
    result = command("infer", "--model", "net.pth", "--input", "lr", "--tile", 64, "--scale", 2.5)
    assert result.exit_code == 0, result.output
    made = read_image(tmp_path / "results" / "a.png")
    assert (made.size, made.rgb.dtype) == ((52, 42), np.uint16)
    assert made.alpha is not None
    result = command("infer", "--model", "net.pth", "--input", "lr", "--output", "b", "--memory-budget", "2GB", "--tile", "none")
    assert result.exit_code == 0, result.output
    whole = read_image(tmp_path / "b" / "a.png")
    assert whole.size == (84, 68)
    refused = command("infer", "--model", "net.pth", "--input", "lr", "--output", "c", "--fidelity", 0.5)
    assert "--fidelity: this model does not have it" in str(refused.exception)
    assert "of no network" in str(command("infer", "--model", odd(tmp_path), "--input", "lr", "--output", "d").exception)


def odd(folder: Path) -> Path:
    save_file({"segmentation.weight": torch.zeros(2)}, folder / "odd.safetensors")
    return folder / "odd.safetensors"


def test_tiles_of_a_network_that_sees_less_than_they_share_leave_no_seam():
    restorer = DirectRestorer(drawn(NetworkSettings(architecture="SRResNet", arguments={"nf": 4, "nb": 1})).eval())
    y, x = torch.meshgrid(torch.arange(70), torch.arange(90), indexing="ij")
    picture = torch.stack([0.5 + 0.4 * torch.sin((x * (1 + c) + y * 2) / 7) for c in range(3)])[None]
    whole, tiles = (restorer(picture, tile=tile, output_type="pt").images for tile in (None, 256))
    torch.testing.assert_close(tiles, whole, atol=5e-5, rtol=0)  # the ramp leaves a trace of what lies a pixel too near
    assert isinstance(restorer.networks, SuperResolution)
    assert restorer.networks.overlap == 28


def test_a_file_of_the_hub(tmp_path, monkeypatch):
    asked = []

    def fetch(name: str, revision: str | None = None, **options: Any) -> Path:
        asked.append((name, revision, [*options["patterns"]]))
        return tmp_path / ("c" * 40)

    drawn(NetworkSettings(**RRDB)).save(tmp_path / ("c" * 40) / "x4")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(opening, "fetch", fetch)
    monkeypatch.setattr("sslsr_diffusion.hub.fetch", fetch)
    assert split_file(f"you/nets#x4/{FILE}") == ("you/nets", f"x4/{FILE}")
    assert split_file("you/nets") == ("you/nets", None)
    found = opening.find_model(f"you/nets#x4/{FILE}", "main")
    assert (found.family.kind, found.path.name) == ("network", FILE)
    assert found.fingerprint == f"you/nets#x4/{FILE}@{'c' * 40}"
    assert find_file(f"you/nets#x4/{FILE}", "main") == (found.path, "c" * 40)
    assert asked == [("you/nets", "main", [f"x4/{FILE}"])] * 2
    for wrong in ("you/nets#../x.pth", "you/nets#", "you/nets#*.pth"):
        with pytest.raises(UserError, match="expected owner/name#file with the path of a file"):
            find_file(wrong, None)
    with pytest.raises(UserError, match=r"that repository holds no file other\.pth"):
        opening.find_model("you/nets#other.pth")
    with pytest.raises(UserError, match=f"the repository you/nets holds no {FILE}; name the file"):
        find_file("you/nets", None)


def test_a_hub_file_is_looked_up_and_pinned(photos, tmp_path, monkeypatch):
    model = {**RRDB, "base": "you/nets#net.pth"}
    made = recipe(photos, tmp_path / "run", model=model)
    monkeypatch.setattr("sslsr_diffusion.runs.pin.commit_of", lambda name, kind, revision: "d" * 40 if name == "you/nets" else None)
    assert pinned(made).model.revision == "d" * 40
    monkeypatch.setattr("sslsr_diffusion.hub.fetch", lambda *_, local_files_only=False, **__: None if local_files_only else 1 / 0)
    monkeypatch.setattr(hub, "look_up", lambda name, *_: hub.Found("e" * 40, ("net.pth", "README.md")))
    unknown = said(recipe(photos, tmp_path / "run", model={"kind": "network", "base": "you/nets#net.pth"}))[1]
    assert "give model.architecture, too, so that it can be counted before its download" in unknown
    assert "you/nets#net.pth on the hub, commit eeeeeeeeeeee" in said(made)[1]
    monkeypatch.setattr(hub, "look_up", lambda name, *_: hub.Found("e" * 40, ("README.md",)))
    assert "you/nets on the hub holds no file net.pth" in said(made)[1]


def test_publication_and_back(tmp_path, monkeypatch):
    """What a run publishes is found by its id alone."""
    quick_client(monkeypatch)
    monkeypatch.setenv("HF_XET_CACHE", str(tmp_path / "xet"))
    drawn(NetworkSettings(**RRDB)).save(tmp_path / "pipeline", scale=4)
    with HubServer() as server:
        publisher = HubPublisher("someone/net", token="hf_writetoken", endpoint=server.url)
        publisher.publish(tmp_path / "pipeline", "Step 1")
        assert publisher.close(attempts=1), publisher.failures
        where: dict[str, Any] = {"endpoint": server.url, "cache_dir": tmp_path / "cache"}
        patterns = [pattern for family in opening.FAMILIES.values() for pattern in family.files]
        fetched = hub.fetch("someone/net", patterns=patterns, **where)
    assert opening.family_of(fetched) is opening.FAMILIES["network"]
    assert (fetched / FILE).read_bytes() == (tmp_path / "pipeline" / FILE).read_bytes()


def test_the_card_speaks_of_a_network(photos, tmp_path):
    text = model_card("you/net", resolved(recipe(photos, tmp_path)), base="xinntao/nets#RealESRGAN_x4plus.pth")
    assert "An upscaler for real photographs: a super-resolution network, trained with the pixel l1 loss" in text
    assert 'upscale = open_upscaler("you/net")' in text
    assert "StableSR" not in text
    assert "base_model: xinntao/nets\n" in text
    assert "library_name: spandrel\n" in text
    assert "ComfyUI" in text


def test_a_model_without_its_kind_is_one_sentence(photos, tmp_path):
    raw = resolved(recipe(photos, tmp_path))
    del raw["model"]["kind"]
    with pytest.raises(RecipeError, match=r"^model: the key 'kind' is missing; expected one of stablesr, network, one_step, x4\.$"):
        parse(Recipe, raw)
    with pytest.raises(RecipeError, match=r"task\.kind: diffusion is impossible with model.kind network; possible are network"):
        parse(Recipe, {**resolved(recipe(photos, tmp_path)), "task": {"kind": "diffusion"}, "losses": [{"kind": "diffusion"}]})
