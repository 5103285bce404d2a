"""The steps of `sslsr check-gpu`, in order: what has to hold first comes first, and the rest from small to large."""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[1]
PIP = {"yaml": "pyyaml", "PIL": "pillow", "cupy": "cupy-cuda13x"}  # where a package has another name on the index
OPERATOR = ("torch", "numpy", "cupy")
NETWORKS = ("diffusers", "transformers", "accelerate", "safetensors", "huggingface_hub", "pydantic", "yaml", "PIL", "scipy", "psutil")


class NotHere(Exception):
    """A step that cannot run on this machine, and that is nobody's mistake; the message says what it would need."""


@dataclass(frozen=True)
class Step:
    """One step: a function that returns what it measured, by name, and raises where something is wrong."""

    name: str
    about: str
    run: str  # module:function, in a process of its own
    seconds: int  # that it may take; it begins only while so much time is left
    arguments: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = OPERATOR  # packages, by the names they are imported by
    launcher: tuple[str, ...] = ()  # what starts the process in Python's place: `-m module ...`

    def missing(self) -> str | None:
        """What to install before it can run; None: all is there."""
        lacking = [name for name in self.needs if importlib.util.find_spec(name) is None]
        if not lacking:
            return None
        other = " (cupy-cuda12x with a torch of CUDA 12)" if "cupy" in lacking else ""
        return f"needs {', '.join(lacking)}: pip install {' '.join(PIP.get(name, name) for name in lacking)}{other}"


def _operator(name: str, about: str) -> Step:
    return Step(name, about, f"sslsr_diffusion.checkup.operator:{name}", 90)


def _small(name: str, about: str, *overrides: str, needs: tuple[str, ...] = (), launcher: tuple[str, ...] = ()) -> Step:
    arguments = {"recipe": "tiny_x4", "overrides": overrides}
    return Step(name, about, f"{_TRAINING}:small_steps", 90, arguments, (*OPERATOR, *NETWORKS, *needs), launcher)


def _full(recipe: str, about: str, seconds: int, *overrides: str, without: tuple[str, ...] = (), needs: tuple[str, ...] = ()) -> Step:
    """`without`: losses of the recipe whose networks would have to be downloaded."""
    arguments = {"recipe": recipe, "overrides": overrides, "without": without}
    told = f"{about}, without {' and '.join(without)}" if without else about
    return Step(f"train {recipe}", told, f"{_TRAINING}:full_step", seconds, arguments, (*OPERATOR, *NETWORKS, *needs))


def _one_step(recipe: str, seconds: int, *without: str) -> Step:
    about = "one training step of the recipe's LoRA at full size, random weights"
    return _full(f"one_step/{recipe}", about, seconds, "training.turns=together", without=without, needs=("peft",))


def _network(recipe: str, architecture: str, seconds: int) -> Step:
    model = f"model={{kind: network, architecture: {architecture}, base: null}}"
    return _full(recipe, _FULL, seconds, model, without=("perceptual",), needs=("spandrel",))


def _fsdp2() -> tuple[str, ...]:
    folder = next((f for f in (PACKAGE / "_configs", PACKAGE.parent / "configs") if f.is_dir()), PACKAGE)
    return ("-m", "accelerate.commands.launch", "--config_file", str(folder / "accelerate/fsdp2.yaml"), "--num_processes", "1")


_FULL = "one training step at full size, random weights"
_TRAINING = "sslsr_diffusion.checkup.training"

STEPS = (
    _operator("machine", "driver, CuPy, NVRTC, compute capability; the kernels are compiled"),
    _operator("agreement", "loss, graph and gradients in `cuda` against the definition in float64, and against `torch`"),
    Step(
        "own tests", "tests/test_ssg_cuda.py, with its goldens", "sslsr_diffusion.checkup.own_tests:own_tests", 180,
        needs=(*OPERATOR, "pytest"),
    ),
    _operator("speed", "forward and backward at 512 pixels against `torch` and the direct kernel"),
    _small("float32", "five steps of a tiny network, its first loss against float32 on the CPU"),
    _small("fp16", "the same in fp16", "training.mixed_precision=fp16"),
    _small("bf16", "the same in bf16", "training.mixed_precision=bf16"),
    _small("8-bit AdamW", "the same with optimizer states in 8 bit", "training.optimizer.kind=adamw8bit", needs=("bitsandbytes",)),
    _small("FSDP2", "the same with FSDP2 on one GPU", "training.ema=null", launcher=_fsdp2()),
    _network("network_ssl", "RRDBNet", 60),
    _full("x4_upscaler_ssl", _FULL, 90),
    _full("sd_upscaler_ssl", _FULL, 120),
    Step(
        "infer sd_upscaler_ssl", "128 to 512 pixels with the recipe's 50 steps, random weights", f"{_TRAINING}:restore", 90,
        {"recipe": "sd_upscaler_ssl", "side": 128}, (*OPERATOR, *NETWORKS),
    ),
    _one_step("sd21_hypir_ssl", 120, "lpips", "gan"),
    _full("cfw_ssl", f"{_FULL}, 2 sampling steps in place of 20", 120, "task.synthesis_steps=2", without=("lpips",)),
    _one_step("sd35_medium_ssl", 180, "lpips"),
    _one_step("flux2_klein_ssl", 240, "lpips", "gan"),
    _one_step("zimage_ssl", 300, "lpips", "gan"),
    # what is left of the main recipes, on bases that were tried above; gan/swinir_ssl and network_ssl stand for the others of gan/
    _network("gan/swinir_ssl", "SwinIR", 90),
    _one_step("sd21_osediff_ssl", 120, "lpips"),
    _one_step("sd21_omgsr_ssl", 120, "dists", "gan"),
    _full("sd_upscaler_768v_ssl", _FULL, 180),
)  # fmt: skip
