"""New processes that need not import the libraries again: forks of one that has torch and diffusers loaded, and nothing of ours.

An interpreter that imports diffusers takes ten seconds of processor time; a fork of one that did takes a few milliseconds. Of the
package itself nothing is loaded before the fork, so each process takes it from where its own PYTHONPATH says.
"""

from __future__ import annotations

import gc
import importlib
import json
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import huggingface_hub.constants
import huggingface_hub.hf_api

HERE = Path(__file__).parent
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "torch._dynamo",
        "torch.distributed.fsdp",
        "accelerate",
        "datasets",
        "diffusers.models.autoencoders.autoencoder_kl",
        "diffusers.models.unets.unet_2d_condition",
        "diffusers.optimization",
        "diffusers.pipelines.pipeline_utils",
        "diffusers.training_utils",
        "cv2",
        "matplotlib.pyplot",
        "numba",
        "pydantic",
        "scipy.io",
        "scipy.stats",
        "typer",
    ]
)
OURS = dict(os.environ)  # before any test changes it: the libraries read some variables when they are imported


@dataclass(frozen=True)
class Ended:
    returncode: int
    stdout: str
    stderr: str


def python(*arguments: str, cwd: Path, path: Sequence[Path], environment: dict[str, str] | None = None, timeout: float = 300) -> Ended:
    """`python ARGUMENTS`, which are `-c CODE ...` or `FILE ...`; `path`: its PYTHONPATH; `environment`: beside ours."""
    return together([arguments], cwd=cwd, path=path, environments=[environment or {}], timeout=timeout)[0]


def ranks(count: int, *arguments: str, cwd: Path, path: Sequence[Path], environment: dict[str, str] | None = None) -> list[Ended]:
    """The same in `count` processes that find each other as those of `torchrun` do."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    size = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), **meeting, **(environment or {})}
    places = [{**size, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    return together([arguments] * count, cwd=cwd, path=path, environments=places)


def script(processes: int, folder: Path, name: str, *arguments: str) -> list[Ended]:
    """Runs a file beside this one on the CPU in so many processes, on gloo if there are two."""
    where: dict[str, Any] = {"cwd": folder, "path": [HERE, HERE.parent], "environment": {"ACCELERATE_USE_CPU": "1"}}
    command = (str(HERE / name), *arguments)
    done = ranks(processes, *command, **where) if processes > 1 else [python(*command, **where)]
    for one in done:
        assert one.returncode == 0, one.stderr[-4000:]
    return done


def toy(folder: Path, processes: int, options: dict[str, Any], *extra: str) -> list[Ended]:
    """`toy_run.py` of a run folder."""
    return script(processes, folder.parent, "toy_run.py", str(folder), json.dumps(options), *extra)


def together(
    commands: Sequence[Sequence[str]], *, cwd: Path, path: Sequence[Path], environments: Sequence[dict[str, str]], timeout: float = 300
) -> list[Ended]:
    with tempfile.TemporaryDirectory() as said:
        processes = [
            begin(*command, cwd=cwd, path=path, environment=environment, said=f"{said}/{number}")
            for number, (command, environment) in enumerate(zip(commands, environments, strict=True))
        ]
        end = time.monotonic() + timeout
        for process in processes:
            process.join(max(0.1, end - time.monotonic()))
        late = [process.pid for process in processes if process.is_alive()]
        for process in processes:
            process.kill()
            process.join()
        streams = [[Path(f"{said}/{number}.{stream}").read_text() for stream in ("out", "err")] for number in range(len(processes))]
    assert not late, f"not done after {timeout:.0f} s: {streams}"
    return [Ended(int(process.exitcode or 0), *both) for process, both in zip(processes, streams, strict=True)]


def begin(*command: str, cwd: Path, path: Sequence[Path], environment: dict[str, str], said: str) -> BaseProcess:
    """The process of one command, begun; what it prints goes to the files `said`.out and `said`.err."""
    with mock.patch.dict(os.environ, {**OURS, "HF_HUB_OFFLINE": "0"}, clear=True):  # diffusers keeps its own copy of it
        forkserver.ensure_running()
    process = SERVER.Process(target=_become, args=(command, str(cwd), [str(folder) for folder in path], {**OURS, **environment}, said))
    process.start()
    return process


def _become(command: Sequence[str], cwd: str, path: list[str], environment: dict[str, str], said: str) -> None:
    """What a new interpreter does before the first line of its script."""
    gc.freeze()  # what it was born with is most of a million objects, which every collection of garbage would look at: half a second
    for number, stream in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{said}.{stream}", os.O_CREAT | os.O_WRONLY), number)
    os.environ.clear()
    os.environ.update({**environment, "PYTHONPATH": os.pathsep.join(path)})
    importlib.reload(huggingface_hub.constants)  # they and the client's default are what is read of the environment once
    huggingface_hub.hf_api.api.endpoint = huggingface_hub.constants.ENDPOINT
    os.chdir(cwd)
    assert "sslsr_diffusion" not in sys.modules
    rest = [entry for entry in sys.path if entry not in (str(HERE), "", *path)]
    if command[0] == "-c":
        sys.argv, sys.path[:] = ["-c", *command[2:]], [cwd, *path, *rest]
        exec(compile(command[1], "<string>", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})
    else:
        sys.argv, sys.path[:] = list(command), [str(Path(command[0]).parent), *path, *rest]
        runpy.run_path(command[0], run_name="__main__")
