"""One step of `sslsr check-gpu` in this process:  python -m sslsr_diffusion.checkup.play MODULE:FUNCTION [ARGUMENTS] [RESULT]

ARGUMENTS are JSON; RESULT is the file that says how it went, without one it is printed.
"""

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sslsr_diffusion.checkup.steps import NotHere
from sslsr_diffusion.errors import MissingDependency
from sslsr_diffusion.tables import named


def play(function: Callable[..., dict[str, Any]], arguments: dict[str, Any]) -> dict[str, Any]:
    """`outcome` (ok, failed, not run), `reason`, `numbers`: what an error says is kept, its traceback goes to stderr."""
    try:
        return {"outcome": "ok", "reason": "", "numbers": function(**arguments)}
    except (NotHere, MissingDependency) as error:
        return {"outcome": "not run", "reason": str(error), "numbers": {}}
    except Exception as error:
        traceback.print_exc()
        lines = f"{type(error).__name__}: {error}".strip().splitlines()
        return {"outcome": "failed", "reason": lines[0][:300], "numbers": {}}


def main(where: str, arguments: str = "{}", result: str = "") -> None:
    said = json.dumps(play(lambda **given: named(where)(**given), json.loads(arguments)), default=str)
    if result:
        Path(result).write_text(said, encoding="utf-8")
    else:
        sys.stdout.write(said + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
