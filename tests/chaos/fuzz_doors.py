"""New recipes for a minute, then new pictures for a minute: `python tests/chaos/fuzz_doors.py [--seconds 60] [--seed N]`.

Prints the seed first, so that a failure can be repeated; ends with an AssertionError and the smallest case found if there is one.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fuzz_cases import broken_picture, check_picture, check_recipe, overrides, recipe_files, run_for

DOORS = {"recipes": (check_recipe, (recipe_files, overrides)), "pictures": (check_picture, (broken_picture(),))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="per door")
    parser.add_argument("--seed", type=int, default=time.time_ns() // 10**9)
    given = parser.parse_args()
    print(f"seed {given.seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, (check, strategies) in DOORS.items():
            tried, accepted = run_for(given.seconds, partial(check, Path(folder)), *strategies, first_seed=given.seed)
            print(f"{name}: {tried} tried, {accepted} accepted, {tried - accepted} refused in plain sentences, 0 failures", flush=True)


if __name__ == "__main__":
    main()
