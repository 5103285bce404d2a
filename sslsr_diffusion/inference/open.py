"""Which model to upscale with: the newest finished run, the shipped model, a folder, or a hub id."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.hub import PIPELINE_FILES, fetch
from sslsr_diffusion.shipped_model import SMALL, local_folder

log = logging.getLogger(__name__)

PIPELINE_CLASS = "StableSRPipeline"


def default_model(runs: Path) -> tuple[str, str]:
    """What is used where nobody chose, and why: the pipeline of the run in `runs` that finished last, else the shipped small model."""
    found = [index.parent for index in runs.glob("*/pipeline/model_index.json") if _is_upscaler(index)]
    if not found:
        return SMALL, f"the small model that comes with sslsr-diffusion; there is no finished run in {runs}/"
    return str(max(found, key=lambda folder: (folder / "model_index.json").stat().st_mtime_ns)), "the newest finished run"


def _is_upscaler(index: Path) -> bool:
    try:
        return json.loads(index.read_text(encoding="utf-8")).get("_class_name") == PIPELINE_CLASS
    except (OSError, ValueError, AttributeError):
        return False


def find_model(model: str, revision: str | None = None) -> tuple[Path, str]:
    """The local folder of a model, downloaded first if it is a hub id, and a fingerprint that changes with its weights.

    Raises:
        UserError: there is no such folder or repository, or it holds no upscaler.
    """
    folder = local_folder(model)
    if (folder / "pipeline" / "model_index.json").is_file():  # a run folder
        folder = folder / "pipeline"
    if not folder.exists():
        advice = f"The shipped model is {SMALL}."
        folder = fetch(model, revision, patterns=PIPELINE_FILES, field="--model", advice={"invalid": advice})
        if not _is_upscaler(folder / "model_index.json"):
            raise UserError(
                f"--model {model}: that repository holds no {PIPELINE_CLASS} (its model_index.json names another class, or is missing)."
            )
        return folder, f"{model}@{folder.name}"
    if revision is not None:
        raise UserError(f"--revision {revision}: is for a hub id, and --model {model} is a folder here; leave it out.")
    if not _is_upscaler(folder / "model_index.json"):
        raise UserError(
            f"--model {model}: expected a folder with a model_index.json of {PIPELINE_CLASS}; a run folder has it in pipeline/ "
            "once the run is finished, and `sslsr export` makes one from a checkpoint."
        )
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    states = [(str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return folder, hashlib.sha256(repr(states).encode()).hexdigest()[:16]


def refuse_code(folder: Path) -> None:
    """Raises UserError for a pipeline folder with Python files: older releases of diffusers would run them."""
    found = next((file for pattern in ("*.py", "*/*.py") for file in folder.glob(pattern)), None)
    if found is not None:
        raise UserError(f"{folder}: holds the Python file {found.relative_to(folder)}, which a pipeline never needs; remove it.")


def forget_folder(component: Any) -> None:
    """diffusers and transformers write down where a model was loaded from, a user's home folder for example; hub ids stay."""

    def local(name: object) -> bool:
        return bool(name) and (Path(str(name)).is_absolute() or Path(str(name)).is_dir())

    config = getattr(component, "config", None)
    remembered = config.get("_name_or_path") if isinstance(config, dict) else getattr(config, "_name_or_path", None)
    if local(remembered):
        if hasattr(component, "register_to_config"):
            component.register_to_config(_name_or_path="")
        else:
            component.config._name_or_path = ""
    if hasattr(component, "init_kwargs") and local(getattr(component, "name_or_path", "")):
        component.name_or_path = component.init_kwargs["name_or_path"] = ""  # a tokenizer


def load_pipeline(folder: Path, *, device: str = "auto", dtype: str = "auto", memory_budget: int | None = None, tile: Any = "auto") -> Any:
    """The pipeline of a folder on a device, ready to be called.

    Args:
        device: "auto" (the first GPU, else the CPU) or a torch device.
        dtype: "auto" (float16 on a GPU, float32 on the CPU), "float32", "float16" or "bfloat16".
        memory_budget: bytes; dtype "auto" and offload then follow from it (`placement.place`).
        tile: what the pipeline will be called with.
    Raises:
        UserError: the device is not there, or the folder's files are incomplete or damaged.
        NotEnoughMemory: nothing fits the budget.
    """
    from sslsr_diffusion.devices import find_device
    from sslsr_diffusion.inference.pipeline import StableSRPipeline
    from sslsr_diffusion.inference.placement import place

    try:
        with _quiet_diffusers():
            placement = place(folder, find_device(device), dtype, memory_budget, tile)
            # in the wanted precision at once: both copies together would be the peak
            pipe = StableSRPipeline.from_pretrained(folder, local_files_only=True, torch_dtype=placement.dtype)
            if placement.offload == "model":
                pipe.enable_model_cpu_offload(device=placement.device)
            elif placement.offload == "sequential":
                pipe.enable_sequential_cpu_offload(device=placement.device)
            else:
                pipe.to(placement.device)
    except UserError:
        raise
    except Exception as error:  # diffusers and safetensors raise many kinds on incomplete folders
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"--model {folder}: cannot be loaded ({reason[:200]}).") from error
    pipe.set_progress_bar_config(disable=True)
    log.info("%s", placement)
    return pipe


@contextlib.contextmanager
def _quiet_diffusers() -> Iterator[None]:
    """No bar for the four components, and no advice to load in half precision by an argument that its versions name differently."""
    from diffusers.utils import logging

    level, bar = logging.get_verbosity(), getattr(logging, "is_progress_bar_enabled", lambda: True)()  # newer than 0.35
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch_dtype")  # its new name is unknown to the oldest diffusers we allow
            yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
