"""The whole check: what it would do where there is no GPU, else all steps and their report."""

import importlib.util
import platform
import shlex
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from sslsr_diffusion import __version__
from sslsr_diffusion.checkup.runner import RESULT, TABLE, check, command, table
from sslsr_diffusion.checkup.steps import STEPS
from sslsr_diffusion.errors import UserError
from sslsr_diffusion.files import atomic_write

OUTPUT = Path("runs/check_gpu")
_TOLD = ("torch", "numpy", "cupy-cuda12x", "cupy-cuda13x", "diffusers", "transformers", "accelerate", "peft", "bitsandbytes")


def check_gpu(minutes: float, output: Path, say: Callable[[str], None]) -> int:
    """The exit status: 0 where nothing failed, 1 where a step did, 2 without a GPU: each step is then said with its command, not run.

    Args:
        minutes: for all steps together; what may not fit is listed as not run.
        output: folder of the JSON file, the Markdown table and what each step printed.
    Raises UserError: no positive number of minutes, or `output` cannot be a folder.
    """
    if not 0 < minutes < 1e6:
        raise UserError(f"--minutes: expected a positive number, got {minutes:g}.")
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output}: expected a folder, got a file; give another name.")
    if problem := no_gpu():
        say(f"No check: {problem} With one, these steps would run, each in a process of its own, {minutes:g} minutes in all:")
        for step in STEPS:
            say(
                f"\n{step.name} (at most {step.seconds} s): {step.about}"
                + "".join(f"; not run: {lacking}" for lacking in [step.missing()] if lacking)
            )
            say(f"  {shlex.join(command(step))}")
        return 2
    began = time.strftime("%Y-%m-%d %H:%M:%S")
    about = {"package": f"sslsr-diffusion {__version__} on a GPU", "began": began, "minutes": f"{minutes:g}", **_versions()}
    rows = check(STEPS, output, minutes, about, say)
    report = table(about, rows)
    atomic_write(output / TABLE, report.encode())
    say(f"\n{report}\n{output / TABLE} can be pasted into an issue; {output / RESULT} has the same numbers.")
    return int(any(row["outcome"] == "failed" for row in rows))


def no_gpu() -> str | None:
    """Why nothing can run; None: torch sees an NVIDIA GPU."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed: pip install torch."
    try:
        import torch
    except (ImportError, OSError) as error:  # a broken installation
        return f"torch cannot be imported ({str(error).splitlines()[0]})."
    return None if torch.cuda.is_available() and torch.version.hip is None else "torch sees no NVIDIA GPU here."


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _TOLD:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
