"""The commands as a user runs them: dry run, train, resume, export, init, and what mistakes get."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from typer.testing import CliRunner

from sslsr_diffusion.cli import app
from sslsr_diffusion.config import shipped_recipes
from sslsr_diffusion.errors import MissingDependency, UserError
from sslsr_diffusion.runs.recipe import load_recipe
from sslsr_diffusion.training.checkpoints import read_checkpoint

ROOT = Path(__file__).parent.parent
PHOTOS = ROOT / "examples/photos"
SMALL_GRAPH = ["losses.2.search_size=9", "losses.2.backend=torch"]  # no compilation for pictures this small


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    AcceleratorState._reset_state()  # one precision per process; here each test is a process of its own in spirit
    monkeypatch.chdir(tmp_path)


def sslsr(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def small(recipe: str, folder: str, *more: str) -> list[str]:
    """Arguments that make a tiny recipe a matter of seconds."""
    values = {
        "data.sources.0.path": PHOTOS / "train",
        "data.validation.0.path": PHOTOS / "validation",
        "data.workers": 0,
        "output.dir": folder,
        "output.trackers": "[]",
        "training.batch_size": 1,
        "training.crop_size": 32,
        "training.log_every": 1,
        "validation.limit": 1,
        "validation.size": 32,
        "checkpoints.every": 1,
    }
    return ["train", "--config", recipe, *(f"--set={k}={v}" for k, v in values.items()), *(f"--set={m}" for m in more)]


def test_init_lists_and_copies_with_what_it_extends(tmp_path):
    assert "sd_upscaler_ssl" in sslsr("init")
    sslsr("init", "sd_upscaler", "--output", "mine.yaml")
    assert (tmp_path / "mine.yaml").is_file()
    assert (tmp_path / "sd_upscaler_ssl.yaml").is_file()
    with pytest.raises(UserError, match="already there"):
        sslsr("init", "sd_upscaler", "--output", "mine.yaml")


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_can_be_copied_and_read(tmp_path, name):
    sslsr("init", name)
    assert load_recipe(str(tmp_path / f"{name}.yaml")) == load_recipe(name)


def test_dry_run_counts_parameters_and_memory_without_weights(monkeypatch):
    monkeypatch.setattr(
        "sslsr_diffusion.runs.memory.step_bytes", lambda recipe: {"weights": 2**30}
    )  # test_memory_estimate.py has the real one
    arguments = small("tiny", "runs/tiny", f"model.vae={PHOTOS}")
    result = CliRunner().invoke(app, [*arguments, "--dry-run"], catch_exceptions=False)
    assert result.exit_code == 2  # the photographs' folder holds no autoencoder
    assert re.search(r"model.vae +missing", result.output)
    assert re.search(r"data +ok +folder .*: \d+ pictures", result.output)
    assert re.search(r"all +[\d.]+ M +trained +[\d.]+ M", result.output)
    assert "gradient_checkpointing: true" in result.output
    assert not Path("runs").exists()


def test_dry_run_refuses_a_crop_that_the_networks_cannot_take():
    arguments = small("tiny", "runs/tiny", "model.vae=null", "training.crop_size=100")
    result = CliRunner().invoke(app, [*arguments, "--dry-run"], catch_exceptions=False)
    assert result.exit_code == 2
    assert re.search(r"task +refused +training.crop_size: this model needs a multiple of 16 pixels, got 100; 96 would do", result.output)
    assert result.output.endswith("parameters and memory cannot be counted\n")


def test_dry_run_finds_names_that_cannot_be_used(monkeypatch):
    monkeypatch.setattr("sslsr_diffusion.runs.memory.step_bytes", lambda recipe: {"weights": 2**30})
    odd = ["validation.metrics=[psnr,ssin]", "output.trackers=[tensrboard]", "validation.limit=1"]
    arguments = small("tiny_autoencoder", "runs/ae", *odd)
    result = CliRunner().invoke(app, [*arguments, "--dry-run", "--resume", "nothing"], catch_exceptions=False)
    assert result.exit_code == 2
    assert re.search(r"resume +missing +--resume nothing: no whole checkpoint", result.output)
    assert re.search(r"metrics +missing +validation.metrics: 'ssin'", result.output)
    assert re.search(r"validation +ok .* pictures, 1 of all are measured \(validation.limit\)", result.output)
    assert re.search(r"trackers +missing +output.trackers: 'tensrboard' is unknown", result.output)


@pytest.mark.slow
def test_dry_run_of_the_mission_finds_the_published_numbers(monkeypatch):
    """StableSR trains 53.02 M SPADE parameters and a structural encoder of 52.49 M."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("sslsr_diffusion.runs.presets.load_presets", lambda name, overrides: {})  # single savings in their place
    result = CliRunner().invoke(app, ["train", "--config", "sd_upscaler_ssl", "--dry-run", "--set", "training.crop_size=128"])
    assert result.exit_code == 2
    assert re.search(r"model +not reachable +sd2-community", result.output)
    assert re.search(r"unet +918.93 M +trained +53.02 M", result.output)
    assert re.search(r"structural encoder +52.49 M +trained +52.49 M", result.output)
    memory = [float(x) for x in re.findall(r"([\d.]+) GiB +(?:fits|too much)", result.output)]
    assert memory
    assert all(value <= memory[0] for value in memory[1:])


@pytest.mark.slow
def test_train_resume_export_and_load(tmp_path):
    """Autoencoder, denoiser on top of it, resume, export: the exported pipeline is the run's own, and diffusers loads it."""
    sslsr(*small("tiny_autoencoder", "runs/ae", "training.steps=2"))
    assert (tmp_path / "runs/ae/pipeline/vae/config.json").is_file()
    tiny = ["model.vae=runs/ae/pipeline", "task.inference.steps=2", "task.decode_crop=6", *SMALL_GRAPH]
    with pytest.raises(UserError, match="no whole checkpoint"):
        sslsr(*small("tiny", "runs/tiny", *tiny, "training.steps=1"), "--resume", "latest")
    sslsr(*small("tiny", "runs/tiny", *tiny, "training.steps=1"))
    with pytest.raises(UserError, match="already holds a run"):
        sslsr(*small("tiny", "runs/tiny", *tiny, "training.steps=2"))
    out = sslsr(*small("tiny", "runs/tiny", *tiny, "training.steps=2"), "--resume", "latest")
    assert "Done: 2 steps" in out
    with pytest.raises(UserError, match=r"losses.1.weight: 0.1 -> 0.3"):
        sslsr(*small("tiny", "runs/tiny", *tiny, "training.steps=3", "losses.1.weight=0.3"), "--resume", "latest")

    sslsr("export", "runs/tiny", "--output", "exported")
    own, exported = (weights(tmp_path / folder / "unet") for folder in ("runs/tiny/pipeline", "exported"))
    assert own.keys() == exported.keys()
    assert all(torch.equal(own[k], exported[k]) for k in own)
    sslsr("export", "runs/tiny", "--half", "--output", "half")
    for part in ("unet", "vae", "structural_encoder"):
        small_files = weights(tmp_path / "half" / part)
        assert all(torch.equal(small_files[k], tensor.half()) for k, tensor in weights(tmp_path / "exported" / part).items()), part
    sslsr("export", "runs/ae", "--half", "--output", "half_ae")
    assert {tensor.dtype for tensor in weights(tmp_path / "half_ae/vae").values()} == {torch.float16}
    sslsr("export", "runs/tiny/best", "--output", "exported_best")
    with pytest.raises(UserError, match="new or empty folder"):
        sslsr("export", "runs/tiny", "--output", "exported")

    from sslsr_diffusion import StableSRPipeline

    pipe = StableSRPipeline.from_pretrained("exported")
    pipe.set_progress_bar_config(disable=True)
    restored = pipe(torch.rand(3, 9, 7), num_inference_steps=2, output_type="pt").images
    assert restored.shape[-2:] == (36, 28)
    names = set(read_checkpoint(tmp_path / "runs/tiny/checkpoint-2").tensors["trained"])
    assert any(name.startswith("structural_encoder.") for name in names)


NUMERICS = ["model.vae=null", "training.schedule.kind=constant", *SMALL_GRAPH, "validation.limit=0", "training.steps=2"]


def diffusion_losses(folder: Path, *more: str) -> list[float]:
    AcceleratorState._reset_state()
    sslsr(*small("tiny", str(folder), *NUMERICS, *more))
    return [json.loads(row)["loss/diffusion"] for row in (folder / "history.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def plain_losses(tmp_path_factory) -> list[float]:
    return diffusion_losses(tmp_path_factory.mktemp("runs") / "plain")


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting", ["training.mixed_precision=bf16", "training.gradient_checkpointing=true", "losses.2.weight=auto", "losses.0.min_snr_gamma=5"]
)
def test_numerics_options_train(tmp_path, plain_losses, setting):
    """Each option changes the numbers a little or not at all, and never the course."""
    losses = diffusion_losses(tmp_path / "option", setting)
    assert losses[0] == pytest.approx(plain_losses[0], rel=0.02)  # bf16 has 8 bits
    if "checkpointing" in setting:
        assert losses == pytest.approx(plain_losses, rel=1e-5)


@pytest.mark.slow
def test_resume_with_the_real_parts_is_bit_for_bit(tmp_path):
    """Workers that run ahead, moving average, accumulation and the real networks: 2 + 2 steps equal 4."""
    more = ["model.vae=null", "data.workers=2", "training.accumulate=2", "training.schedule.kind=constant", *SMALL_GRAPH]
    more += ["task.decode_crop=6", "validation.limit=0", "checkpoints.every=2"]
    sslsr(*small("tiny", "runs/whole", *more, "training.steps=4"))
    sslsr(*small("tiny", "runs/parts", *more, "training.steps=2"))
    sslsr(*small("tiny", "runs/parts", *more, "training.steps=4"), "--resume", "latest")
    whole, parts = (read_checkpoint(tmp_path / "runs" / name / "checkpoint-4").tensors for name in ("whole", "parts"))
    assert {"trained", "ema", "optimizer", "rng"} == whole.keys() == parts.keys()
    for stem, group in whole.items():
        for name, value in group.items():
            assert torch.equal(torch.nan_to_num(value.double()), torch.nan_to_num(parts[stem][name].double())), (stem, name)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    (file,) = folder.glob("*.safetensors")
    return load_file(file)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.stepps=3"], "training.stepps: unknown key (value 3); did you mean training.steps?"),
        (["training.optimizer.kind=adam"], "training.optimizer.kind: 'adam' is not allowed"),
        (["data.sources.0.path=nowhere"], "nowhere"),
        (["data.sources.0.path=empty"], "empty"),
        (["training.crop_size=36"], "multiple of"),
        (["model.vae=nowhere"], "model.vae"),
        (["validation.metrics=[psnr, psnrr]"], "psnrr"),
        (["output.dir=/proc/nothing"], "/proc/nothing"),
        (["output.trackers=[tensrboard]"], "output.trackers: 'tensrboard' is unknown; expected some of"),
    ],
)
def test_mistakes_get_one_sentence(tmp_path, overrides, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as caught:
        sslsr(*small("tiny", "runs/tiny", "model.vae=null", *overrides))
    assert message in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can train in fp16")
def test_fp16_without_a_gpu_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match=r"training\.mixed_precision: fp16 needs a GPU .* use bf16 or no\.$"):
        sslsr(*small("tiny", "runs/tiny", "model.vae=null", "training.mixed_precision=fp16"))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ("output.trackers=[nothing]", "'nothing' is unknown"),
        ("model.vae=nothing", "nothing"),
        ("data.sources.0.path=nothing", "nothing"),
        ("data.teacher=nothing", "nothing"),
        (
            "model.vae=runs/tiny/vae",
            r"^--restart: model\.vae is runs/tiny/vae, in the run that would be moved aside; choose another output\.dir",
        ),
        *([] if torch.cuda.is_available() else [("training.mixed_precision=fp16", "needs a GPU")]),
    ],
)
def test_a_mistake_in_the_recipe_leaves_the_earlier_run_where_it_is(tmp_path, mistake, said):
    earlier = tmp_path / "runs/tiny/recipe.yaml"
    earlier.parent.mkdir(parents=True)
    earlier.write_text("of an earlier run\n")
    (earlier.parent / "vae").mkdir()
    with pytest.raises(UserError, match=said):
        sslsr(*small("tiny", "runs/tiny", "model.vae=null", mistake), "--restart")
    assert list((tmp_path / "runs").iterdir()) == [earlier.parent]
    assert earlier.read_text() == "of an earlier run\n"


def test_no_batch_is_looked_for_before_a_run_that_would_be_refused(tmp_path):
    (tmp_path / "runs/tiny/vae").mkdir(parents=True)
    with pytest.raises(UserError, match=r"^--restart: model\.vae is runs/tiny/vae, in the run that would be moved aside"):
        sslsr(*small("tiny", "runs/tiny", "model.vae=runs/tiny/vae"), "--restart", "--find-batch", "--memory-budget", "8GB")


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch):
    from accelerate import tracking

    from sslsr_diffusion.training.processes import check_trackers

    monkeypatch.setattr(tracking, "get_available_trackers", lambda: ["tensorboard"])
    check_trackers(["tensorboard"])
    with pytest.raises(MissingDependency, match="pip install comet-ml"):
        check_trackers(["tensorboard", "comet_ml"])


def test_the_best_weights_are_no_state_to_go_on_from(tmp_path):
    sslsr(*small("tiny_autoencoder", "runs/ae", "training.steps=1"))
    with pytest.raises(UserError, match=r"runs/ae/best holds weights alone"):
        sslsr(*small("tiny_autoencoder", "runs/ae", "training.steps=2"), "--resume", "runs/ae/best")


def test_export_and_init_say_where_they_cannot_write(tmp_path):
    Path("file").write_text("x")
    with pytest.raises(UserError, match="new or empty folder"):
        sslsr("export", "runs/ae", "--output", "file")
    with pytest.raises(UserError, match="nothing: expected a checkpoint folder"):
        sslsr("export", "nothing", "--output", "exported")
    with pytest.raises(UserError, match=r"file/mine\.yaml cannot be written"):
        sslsr("init", "tiny", "--output", "file/mine.yaml")


def test_restart_and_resume_exclude_each_other():
    with pytest.raises(UserError, match="choose one"):
        sslsr("train", "--config", "tiny", "--restart", "--resume", "latest")
