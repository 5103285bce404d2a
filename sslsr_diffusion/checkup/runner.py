"""Runs steps one after the other, each in a process of its own: one that crashes, hangs or is killed is a row of the report."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sslsr_diffusion.checkup.steps import PACKAGE, Step
from sslsr_diffusion.files import atomic_write

Row = dict[str, Any]  # step, outcome (ok, failed, not run), reason, numbers, seconds
RESULT, TABLE = "check_gpu.json", "check_gpu.md"


def command(step: Step, *result: str) -> list[str]:
    """What runs a step; without the file of its result it prints it."""
    return [sys.executable, *step.launcher, "-m", "sslsr_diffusion.checkup.play", step.run, json.dumps(dict(step.arguments)), *result]


def check(steps: Sequence[Step], folder: Path, minutes: float, about: dict[str, str], say: Callable[[str], None]) -> list[Row]:
    """Every step within `minutes` in all. After each one the result in `folder` is whole: a JSON file with `about` and all rows so far;
    what a step prints is in the folder, too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    end, rows = time.monotonic() + 60 * minutes, list[Row]()
    for number, step in enumerate(steps):
        left = end - time.monotonic()
        began = time.monotonic()
        if lacking := step.missing():
            found = _not_run(lacking)
        elif left < step.seconds:
            found = _not_run(f"it may take {step.seconds} s, {max(0, left):.0f} s were left; give more --minutes")
        else:
            say(f"{step.name}: {step.about}")
            found = _run(step, folder / f"{number:02d}.log", step.seconds)
        rows.append({"step": step.name, **found, "seconds": round(time.monotonic() - began, 1)})
        say(f"{step.name}: {rows[-1]['outcome']} {rows[-1]['reason']}".rstrip())
        atomic_write(folder / RESULT, json.dumps({**about, "steps": rows}, indent=1).encode())
    return rows


def _not_run(reason: str) -> Row:
    return {"outcome": "not run", "reason": reason, "numbers": {}}


def _run(step: Step, log: Path, limit: float) -> Row:
    """The row of one step, whatever becomes of its process; everything that the process has started ends with it."""
    result = log.with_suffix(".result")
    result.unlink(missing_ok=True)
    paths = [str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    with log.open("wb") as said:
        process = subprocess.Popen(
            command(step, str(result)),
            stdout=said,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"},
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
            reason = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code} without a result"
        except subprocess.TimeoutExpired:
            reason = f"not done after {limit:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)  # a launcher ends its workers, which have sessions of their own
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    try:
        found: Row = json.loads(result.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {"outcome": "failed", "reason": f"{reason}; see {log.name}", "numbers": {}}
    result.unlink()
    return found


def table(about: dict[str, str], rows: Sequence[Row]) -> str:
    """The report as Markdown."""
    lines = ["### " + about.get("package", "check-gpu"), "", ", ".join(f"{k} {v}" for k, v in about.items() if k != "package"), ""]
    lines += ["| step | result | s | found |", "|---|---|---|---|"]
    for row in rows:
        found = ", ".join(f"{name} {_shown(value)}" for name, value in row["numbers"].items())
        said = "; ".join(filter(None, [row["reason"], found])).replace("|", "\\|")
        lines.append(f"| {row['step']} | {row['outcome']} | {row['seconds']:.0f} | {said} |")
    return "\n".join(lines) + "\n"


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
