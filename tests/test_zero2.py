"""DeepSpeed ZeRO-2: its settings, and (where deepspeed is installed) its engine on two CPU processes against a run without it."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_two_processes import LINEAR, environment
from toys import namespace

from sslsr_diffusion.errors import MissingDependency, UserError
from sslsr_diffusion.training.checkpoints import Checkpoint, read_checkpoint
from sslsr_diffusion.training.engines import Zero2Engine, deepspeed_plugin
from sslsr_diffusion.training.settings import TrainingSettings

HERE = Path(__file__).parent
CONFIG = HERE.parent / "configs/accelerate/deepspeed_zero2.yaml"
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")


def launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment that accelerate's own launcher makes of the configuration file."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env

    arguments = ["--config_file", str(CONFIG), "--num_processes", "2", "--main_process_port", "0", "train.py"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    assert args.use_deepspeed
    args.deepspeed_fields_from_accelerate_config = "zero_stage"
    _, found = prepare_deepspeed_cmd_env(args)
    for name, value in found.items():
        if name.startswith("ACCELERATE_"):
            monkeypatch.setenv(name, value)


def pretend_installed(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    import accelerate.utils

    monkeypatch.setattr(accelerate.utils, "is_deepspeed_available", lambda: True)
    monkeypatch.setattr(accelerate.utils, "compare_versions", lambda name, operation, wanted: version < wanted)


def test_without_the_configuration_there_is_no_plugin(monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED", raising=False)
    assert deepspeed_plugin(TrainingSettings()) is None


def test_configuration_file_gives_zero2_with_the_recipes_values(monkeypatch):
    """Through accelerate's own launcher and plugin; DeepSpeed itself reads the outcome in the tests of the engine."""
    launched(monkeypatch)
    pretend_installed(monkeypatch, "0.19.8")
    plugin = deepspeed_plugin(TrainingSettings(batch_size=3, accumulate=8, max_grad_norm=0.5, mixed_precision="bf16"))
    config = plugin.deepspeed_config
    assert config["zero_optimization"]["stage"] == 2
    assert (config["gradient_accumulation_steps"], config["gradient_clipping"], config["train_micro_batch_size_per_gpu"]) == (1, 0.5, 3)
    assert config["torch_autocast"] == {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    assert not any(config.get(kind, {}).get("enabled") for kind in ("fp16", "bf16"))
    assert deepspeed_plugin(TrainingSettings(max_grad_norm=None)).deepspeed_config["gradient_clipping"] == 0


@pytest.mark.parametrize(
    ("recipe", "variables", "message"),
    [
        ({"mixed_precision": "fp16"}, {}, "expected no or bf16"),
        ({"optimizer": {"kind": "adamw8bit"}}, {}, "expected adamw"),
        ({}, {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "got zero_stage 3"),
        ({}, {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, "cpu"),
        ({}, {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds.json"}, "deepspeed_config_file"),
    ],
)
def test_what_was_never_tried_is_refused(monkeypatch, recipe, variables, message):
    launched(monkeypatch)
    pretend_installed(monkeypatch, "0.19.8")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        deepspeed_plugin(TrainingSettings.model_validate(recipe))


def test_missing_or_old_deepspeed_is_named(monkeypatch):
    launched(monkeypatch)
    pretend_installed(monkeypatch, "0.18.0")
    with pytest.raises(MissingDependency, match="pip install 'deepspeed>="):
        deepspeed_plugin(TrainingSettings())


def test_a_loss_that_is_no_number_spoils_its_gradient():
    """An infinite loss may have a finite gradient; the engine looks at gradients only. A sound one stays exactly what it was."""
    calls: list[bool] = []
    wrapped = namespace(
        set_gradient_accumulation_boundary=calls.append,
        backward=lambda loss: loss.backward(),
        optimizer=namespace(optimizer=None),
    )
    module = torch.nn.Linear(1, 1)
    accelerator = namespace(prepare=lambda *_: (wrapped, wrapped), unwrap_model=lambda _: module, device=torch.device("cpu"))
    engine = Zero2Engine(accelerator, module, None, TrainingSettings())
    sound, unsound = (torch.full((), 0.3, requires_grad=True) for _ in range(2))
    engine.backward(sound.exp(), last=False)
    engine.backward(unsound.exp() + float("inf"), last=True)
    assert sound.grad is not None
    assert sound.grad.item() == sound.exp().item()
    assert unsound.grad is not None
    assert unsound.grad.isnan()
    assert calls == [False, True]


def run(folder: Path, options: dict, *extra: str, zero2: bool) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(HERE / "zero2_run.py")]
    command = [sys.executable, *(launcher if zero2 else [str(HERE / "toy_run.py")]), str(folder), json.dumps(options), *extra]
    variables = {**environment(), **({"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"} if zero2 else {})}
    if zero2:
        del variables["ACCELERATE_USE_CPU"]  # accelerate would leave DeepSpeed out
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


def assert_same(one: Checkpoint, two: Checkpoint, tolerance: float) -> None:
    """Trained tensors, moving averages, optimizer states, learning rate and counters."""
    for stem in ("trained", "ema", "optimizer"):
        assert set(one.tensors[stem]) == set(two.tensors[stem])
        for name, value in one.tensors[stem].items():
            assert (two.tensors[stem][name] - value).norm() <= tolerance * value.norm(), f"{stem}: {name}"
    assert one.state["optimizer"]["groups"] == two.state["optimizer"]["groups"]
    for key in ("step", "samples", "skipped"):
        assert one.state["progress"][key] == two.state["progress"][key]
    assert two.state["progress"]["mean_loss"] == pytest.approx(one.state["progress"]["mean_loss"], rel=10 * tolerance)


@needs_deepspeed
@pytest.mark.slow
def test_two_processes_equal_one_without_deepspeed(tmp_path):
    """Steps 4 to 6 under ZeRO-2, between steps without: clipping, accumulation, gates, warm-up, moving average, a step that is skipped.

    1e-5 of the norm: float32's sum in another order, over six steps.
    """
    options = {
        **LINEAR,
        "batch_size": 4,
        "max_grad_norm": 0.2,
        "max_timestep": 800,
        "decode_crop": 4,
        "ema": {"decay": 0.9},
        "schedule": {"kind": "constant_with_warmup", "warmup_steps": 6},
        "checkpoints": {"every": 3, "keep": 9},
    }
    run(tmp_path / "one", {**options, "steps": 9, "poison": [16]}, zero2=False)
    shutil.copytree(tmp_path / "one/checkpoint-3", tmp_path / "two/checkpoint-3")
    divided = {**options, "steps": 6, "batch_size": 1, "accumulate": 2, "poison": [17]}
    run(tmp_path / "two", divided, "--resume", zero2=True)  # the poison meets one process, the other skips too
    one, two = (read_checkpoint(tmp_path / name / "checkpoint-6") for name in ("one", "two"))
    assert two.state["world_size"] == 2
    assert two.state["progress"]["skipped"] == 1
    assert_same(one, two, 1e-5)
    run(tmp_path / "two", {**options, "steps": 9}, "--resume", zero2=False)
    assert_same(*(read_checkpoint(tmp_path / name / "checkpoint-9") for name in ("one", "two")), 1e-5)


@needs_deepspeed
@pytest.mark.slow
def test_bf16_from_the_first_step(tmp_path):
    """Without clipping; 2e-2 of the norm: autocast sums a weight's gradient over the batch in bf16 (2^-8), as DDP does."""
    options = {**LINEAR, "steps": 2, "batch_size": 2, "mixed_precision": "bf16", "ema": {"decay": 0.9}}
    run(tmp_path / "one", {**options, "batch_size": 4}, zero2=False)
    run(tmp_path / "two", options, zero2=True)
    one, two = (read_checkpoint(tmp_path / name / "checkpoint-2") for name in ("one", "two"))
    assert all(value.dtype == torch.float32 for value in two.tensors["trained"].values())
    assert_same(one, two, 2e-2)
