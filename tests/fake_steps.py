"""Steps that end in every way a step can; `test_checkup.py` runs them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from sslsr_diffusion.checkup.steps import NotHere


def fine(value: int) -> dict[str, Any]:
    return {"value": value}


def raises() -> dict[str, Any]:
    raise ValueError("expected 1, got 2 | 3\nand more that nobody asked for")


def hangs(pid: str) -> dict[str, Any]:
    Path(pid).write_text(str(subprocess.Popen(["sleep", "600"]).pid))
    time.sleep(600)
    return {}


def dies() -> dict[str, Any]:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def elsewhere() -> dict[str, Any]:
    raise NotHere("needs the moon.")


def rows_so_far(file: str) -> dict[str, Any]:
    return {"rows": len(json.loads(Path(file).read_text())["steps"])}
