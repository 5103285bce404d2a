"""What an installation brings along and says: pyproject.toml, the Dockerfile, and nothing of other packages on the screen."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import typer
from forks import python

from sslsr_diffusion.cli import app
from sslsr_diffusion.cli.init import EXAMPLES

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
DOCKERFILE = (ROOT / "Dockerfile").read_text()
REQUIREMENTS = [
    *PYPROJECT["project"]["dependencies"],
    *(line for lines in PYPROJECT["project"]["optional-dependencies"].values() for line in lines),
]
SAYING = """
import logging
from bitsandbytes.backends.cpu.ops import logger
logger.warning("before")
from sslsr_diffusion import StableSRPipeline
logger.warning("after")
logging.getLogger("bitsandbytes.optim").warning("of others")
"""
DRY_RUN = """
import sys
from sslsr_diffusion.cli import main
sys.argv = ["sslsr", "train", "--config", "demo", "--dry-run", "--set", "output.dir=runs/never"]
main()
"""


def test_importing_says_nothing_of_kernels_that_nobody_uses(tmp_path):
    """bitsandbytes, which diffusers imports, tells on some processors at import that it lacks them."""
    pytest.importorskip("bitsandbytes", reason="the extra adam8bit is not installed")
    done = python("-c", SAYING, cwd=tmp_path, path=[ROOT])
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.split("\n") == ["before", "of others", ""]


def test_a_dry_run_says_nothing_of_other_packages():
    done = python("-c", DRY_RUN, cwd=ROOT, path=[ROOT])
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if "float32" in line or "Warning" in line or "kernels" in line] == []
    assert "memory per process" in done.stdout


def test_tensorboard_starts(tmp_path):
    """docs/training.md says `tensorboard --logdir runs`; the writer alone imports without what newer Pythons and setuptools lack."""
    done = python("-c", "import tensorboard.main", cwd=tmp_path, path=[ROOT])
    assert done.returncode == 0, done.stderr


def test_every_requirement_has_a_lower_bound_or_one_version():
    """What `make minimum` installs; without one it would install the oldest that ever was."""
    names = [line for line in REQUIREMENTS if not line.startswith("sslsr-diffusion[")]
    assert [line for line in names if not re.fullmatch(r"[\w.-]+(\[\w+\])?(>=|==)[\d.]+", line)] == []
    told = re.search(r"Python (3\.\d+) or newer, torch ([\d.]+) or newer", (ROOT / "README.md").read_text())
    assert told is not None
    assert PYPROJECT["project"]["requires-python"] == f">={told[1]}"
    assert f"torch>={told[2]}" in REQUIREMENTS


def test_the_wheel_finds_what_it_brings_along():
    brought = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert [source for source in brought if not (ROOT / source).exists()] == []
    assert {target for target in brought.values() if "/_examples/" in target} == {f"sslsr_diffusion/_examples/{name}" for name in EXAMPLES}


def test_the_dockerfile_runs_commands_that_exist():
    extras = re.search(r"/src\[([\w,]+)\]", DOCKERFILE)
    assert extras is not None
    assert set(extras[1].split(",")) <= PYPROJECT["project"]["optional-dependencies"].keys()
    assert re.search(r"^ENTRYPOINT \[\"sslsr\"\]$", DOCKERFILE, re.MULTILINE)
    runs = [shlex.split(line)[2:] for line in DOCKERFILE.splitlines() if line.startswith("#   docker run")]
    verbs = [words[words.index("sslsr") + 1 :] for words in runs]
    command = typer.main.get_command(app)
    for verb, *options in verbs:
        command.commands[verb].make_context(verb, options)  # type: ignore[attr-defined]
    assert [verb for verb, *_ in verbs] == ["train", "infer"]
