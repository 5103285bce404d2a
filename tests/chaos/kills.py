"""Kills a run at random moments of its own progress and goes on with `latest`, until it is done; then compares every bit.

    PYTHONPATH=tests python -m chaos.kills [--kills 40] [--terms 12] [--real-kills 12] [--seed 0]

Each life is a fork of this process, so it starts in a fraction of a second. A life notes in shared memory where it is (in a
step, writing a checkpoint, ...); the parent waits for a drawn place, a drawn time more, and kills. After each kill, what
`--resume latest` would pick is compared with the undisturbed run's state at the same step, and the hub's newest commit is read.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hub_server import HubServer
from safetensors.torch import load_file
from toys import assert_same_checkpoint, toy_job, toy_losses, toy_validation

from sslsr_diffusion.training import loop as loop_module
from sslsr_diffusion.training import publisher as hub_module
from sslsr_diffusion.training.checkpoints import latest_checkpoint, read_checkpoint
from sslsr_diffusion.training.job import Job
from sslsr_diffusion.training.session import Session
from sslsr_diffusion.training.settings import CheckpointSettings, OutputSettings

REPO = "someone/chaos"
PLACES = ("start", "step", "checkpoint", "validation", "best", "upload", "end")
GRACE = 10.0
FORK = multiprocessing.get_context("fork")
MakeJob = Callable[[Path, int, Any], Job]  # run folder, steps, publisher


class Marks:
    """Where a life is: per place, whether it is inside and how often it came there. Shared with the parent."""

    def __init__(self) -> None:
        self._inside, self._entered = FORK.Array("i", len(PLACES), lock=False), FORK.Array("i", len(PLACES), lock=False)

    def reset(self) -> None:
        for cells in (self._inside, self._entered):
            cells[:] = [0] * len(PLACES)

    def entered(self, place: str) -> int:
        return self._entered[PLACES.index(place)]

    def where(self) -> str:
        """The innermost place; the upload has a thread of its own and counts only when nothing is being written."""
        for place in ("best", "checkpoint", "validation", "end", "upload", "step"):
            if self._inside[PLACES.index(place)]:
                return place
        return "step" if self.entered("step") else "start"

    def around(self, place: str, function: Callable[..., Any]) -> Callable[..., Any]:
        number = PLACES.index(place)

        def marked(*args: Any, **options: Any) -> Any:
            self._inside[number] = 1
            self._entered[number] += 1
            try:
                return function(*args, **options)
            finally:
                self._inside[number] = 0

        return marked


def toy(folder: Path, steps: int, publisher: Any) -> Job:
    """Networks of a few hundred numbers with everything that a resume must restore."""
    losses = toy_losses(max_timestep=600, weight="auto", auto_steps=9)
    job = toy_job(
        folder,
        losses=losses,
        steps=steps,
        batch_size=1,
        accumulate=2,
        ema={"decay": 0.9},
        log_every=1,
        strength=lambda: float(weights["trained.weight"].detach().std()),
    )
    weights = dict(job.task.module.named_parameters())
    return replace(
        job,
        checkpoints=CheckpointSettings(every=3, keep=2),
        output=OutputSettings(dir=str(folder), trackers=(), pipeline="best", push_to_hub=True, hub_id=REPO, push_state=True),
        validation=toy_validation(every=4),
        publisher=publisher,
    )


def real(folder: Path, steps: int, publisher: Any) -> Job:
    """The demo's denoiser on the shipped photographs, with two workers."""
    from sslsr_diffusion.runs.recipe import load_recipe
    from sslsr_diffusion.runs.start import build_job

    root = Path(__file__).parents[2]
    values = {
        "data.sources.0.path": root / "examples/photos/train",
        "data.validation.0.path": root / "examples/photos/validation",
        "data.workers": 2,
        "output.dir": folder,
        "output.trackers": "[]",
        "output.push_to_hub": "true",
        "output.push_state": "true",
        "output.hub_id": REPO,
        "training.steps": steps,
        "training.batch_size": 1,
        "training.crop_size": 32,
        "training.log_every": 1,
        "training.schedule.kind": "constant",
        "validation.limit": 1,
        "validation.size": 32,
        "validation.every": 4,
        "task.inference.steps": 1,
        "checkpoints.every": 3,
        "model.vae": "null",
        "losses.2.search_size": 9,
        "losses.2.backend": "torch",
        "task.decode_crop": 6,
    }
    recipe = load_recipe(str(root / "configs/tiny.yaml"), [f"{key}={value}" for key, value in values.items()])
    return build_job(recipe, publisher=publisher)


def warm() -> None:
    """Import here what every life would import again."""
    for name in (
        "accelerate",
        "diffusers.optimization",
        "diffusers.training_utils",
        "hf_xet",
        "huggingface_hub.hf_api",
        "matplotlib.pyplot",
        "sslsr_diffusion.runs.start",
        "torch._dynamo",
        "torch.distributed.nn.functional",
    ):
        importlib.import_module(name)
    torch.set_num_threads(1)


def live(make: MakeJob, folder: Path, steps: int, marks: Marks | None, endpoint: str | None, every: int | None = None) -> None:
    """One life, in a process of its own: from `latest` if there is one."""
    from accelerate.state import AcceleratorState
    from huggingface_hub import constants

    torch.set_num_threads(1)
    os.environ["ACCELERATE_USE_CPU"] = "1"
    AcceleratorState._reset_state(reset_partial_state=True)
    constants.HF_HUB_OFFLINE = False
    quiet = os.open(folder.with_name(f"{folder.name}.txt"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    if marks is not None:
        loop_module.save_checkpoint = marks.around("checkpoint", loop_module.save_checkpoint)
        loop_module._validate = marks.around("validation", loop_module._validate)
        loop_module.keep_best = marks.around("best", loop_module.keep_best)
        loop_module.write_result = marks.around("end", loop_module.write_result)
        Session.step = marks.around("step", Session.step)
        hub_module.HubPublisher._commit = marks.around("upload", hub_module.HubPublisher._commit)
    publisher = hub_module.HubPublisher(REPO, token="hf_writetoken", endpoint=endpoint) if endpoint else None
    job = make(folder, steps, publisher)
    if every is not None:
        job = replace(job, checkpoints=CheckpointSettings(every=every, keep=10**6))
    loop_module.train_job(job, resume="latest" if latest_checkpoint(folder) else None)


def start(*arguments: Any, **options: Any) -> Any:
    process = FORK.Process(target=live, args=arguments, kwargs=options)
    process.start()
    return process


def wait(process: Any, condition: Callable[[], bool], seconds: float = 120) -> bool:
    """Until the condition holds; False when the life ended before."""
    end = time.monotonic() + seconds
    while process.is_alive():
        if condition():
            return True
        assert time.monotonic() < end, "a life that does not get anywhere"
        time.sleep(0.0005)
    return False


def strike(process: Any, marks: Marks, number: int, draw: random.Random) -> tuple[str, str]:
    """Send a signal at a drawn place; (where it hit, how the life ended)."""
    place = draw.choice(("start", "step", "step", "checkpoint", "checkpoint", "validation", "best", "upload"))
    times = draw.randint(1, 2 if place in ("checkpoint", "validation") else 6) if place not in ("start", "best", "upload") else 1
    reached = place == "start" or wait(process, lambda: marks.entered(place) >= times or marks.entered("step") > 12)
    assert reached, "the run was done before the planned kills: give it more steps"
    time.sleep(draw.random() * (0.3 if place == "start" else 0.03))
    where = marks.where()
    os.kill(process.pid, number)
    if number == signal.SIGKILL:
        process.join()
        return where, "killed"
    process.join(GRACE)
    if process.is_alive():
        process.kill()
        process.join()
        return where, "killed after the grace"
    return where, "left with a checkpoint" if process.exitcode == 0 else "ended at once"


NEWER = ("seconds", "best", "best_step")  # best/ may be newer than the checkpoint; it is compared at the end


def check_hub(hub: HubServer) -> None:
    """The newest commit is whole: every listed file is there, the state's files as its manifest says."""
    repository = hub.repositories.get(REPO)
    files = repository.files if repository else {}
    if not files:
        return

    listed = json.loads(files[hub_module.MANIFEST].data)["files"]
    assert {path for paths in listed.values() for path in paths} <= set(files)
    assert all(file.data is not None or hub.xet.by_sha256[file.oid] in hub.xet.files for file in files.values())
    for path in (path for path in files if path.endswith("/manifest.json")):
        for name, entry in json.loads(files[path].data)["files"].items():
            stored = files[path.replace("manifest.json", name)]
            digest = stored.oid if stored.data is None else hashlib.sha256(stored.data).hexdigest()
            assert (stored.size, digest) == (entry["bytes"], entry["sha256"]), f"{path}: {name}"


def check_end(folder: Path, reference: Path, steps: int) -> None:
    """The whole run folder against the undisturbed run's."""
    assert_same_checkpoint(folder / f"checkpoint-{steps}", reference / f"checkpoint-{steps}", apart=NEWER)
    progress, best = read_checkpoint(folder / f"checkpoint-{steps}").state["progress"], read_checkpoint(folder / "best")
    assert (progress["best"], progress["best_step"]) == (best.state["progress"]["best"], best.state["progress"]["step"])
    for part in ("best", "pipeline"):
        for path in sorted((reference / part).rglob("*.safetensors")):
            got, want = load_file(folder / path.relative_to(reference)), load_file(path)
            assert all(torch.equal(got[name], value) for name, value in want.items()), path
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss/total" in row] == list(range(1, steps + 1))  # each step once, in order
    left = [path.name for path in folder.iterdir() if path.name.startswith((".tmp", ".publishing"))]
    assert not left, left


def torment(make: MakeJob, root: Path, strikes: list[int], seed: int, steps: int) -> Iterator[tuple[int, str, str]]:
    """(signal, where it hit, how the life ended) per strike; raises when anything was lost."""
    warm()
    draw, marks, folder, reference = random.Random(seed), Marks(), root / "run", root / "whole"
    whole = start(make, reference, steps, None, None, every=1)
    whole.join()
    assert whole.exitcode == 0, (root / "whole.txt").read_text()[-2000:]
    with HubServer() as hub:
        for number in strikes:
            marks.reset()
            process = start(make, folder, steps, marks, hub.url)
            found = strike(process, marks, number, draw)
            latest = latest_checkpoint(folder)
            if latest is not None and latest.name != "checkpoint-0":  # asked to stop while it measured what it starts from
                assert_same_checkpoint(latest, reference / latest.name, apart=NEWER)
            check_hub(hub)
            yield number, *found
        for turn in range(3):  # the last life, killed twice while it writes the pipeline and waits for the hub
            marks.reset()
            process = start(make, folder, steps, marks, hub.url)
            if turn < 2 and wait(process, lambda: marks.entered("end") > 0):
                time.sleep(draw.random() * 0.2)
                where = marks.where()
                process.kill()
                process.join()
                check_hub(hub)
                yield signal.SIGKILL, where, "killed"
        process.join()
        assert process.exitcode == 0, (root / "run.txt").read_text()[-2000:]
        check_hub(hub)
        assert f"state/checkpoint-{steps}/manifest.json" in hub.repositories[REPO].files
    check_end(folder, reference, steps)


def table(title: str, found: list[tuple[int, str, str]], seconds: float) -> str:
    """Where the strikes hit, by signal."""
    lines = [f"{title}: {len(found)} strikes, all survived, {seconds:.0f} s"]
    for number in dict.fromkeys(entry[0] for entry in found):
        places = Counter(where for sent, where, _ in found if sent == number)
        ends = Counter(end for sent, _, end in found if sent == number)
        lines.append(f"  {signal.Signals(number).name}: " + ", ".join(f"{places[place]} in {place}" for place in PLACES if places[place]))
        lines.append("    " + ", ".join(f"{count} {end}" for end, count in ends.items()))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("kills", 40), ("terms", 12), ("real-kills", 12), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    plans = {
        "toy networks": (toy, [signal.SIGKILL] * given.kills + [signal.SIGTERM] * given.terms),
        "recipe tiny, two workers": (real, [signal.SIGKILL] * given.real_kills + [signal.SIGTERM] * (given.real_kills // 3)),
    }
    for title, (make, strikes) in plans.items():
        random.Random(given.seed).shuffle(strikes)
        begin = time.monotonic()
        found = []
        with tempfile.TemporaryDirectory() as root:
            for entry in torment(make, Path(root), strikes, given.seed, steps=9 * len(strikes) + 10):
                found.append(entry)
                print(f"{len(found):3d}  {signal.Signals(entry[0]).name}  {entry[1]:<10}  {entry[2]}", file=sys.stderr, flush=True)
        print(table(title, found, time.monotonic() - begin), flush=True)


if __name__ == "__main__":
    main()
