"""`--find-batch`: the largest batch whose steps fit this device, found by real steps before the run begins."""

import contextlib
import gc
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from sslsr_diffusion.devices import is_out_of_memory, release_cached, training_device
from sslsr_diffusion.errors import UserError
from sslsr_diffusion.runs.memory import GIB, one_sampling_step, step_bytes, with_values
from sslsr_diffusion.runs.recipe import Recipe, run_folder
from sslsr_diffusion.runs.start import build_job, check_stands_elsewhere, open_data
from sslsr_diffusion.training.processes import check_precision
from sslsr_diffusion.training.run_folder import RunFolder
from sslsr_diffusion.training.session import Session
from sslsr_diffusion.training.state import rng_state, set_rng_state

ROOM = 0.9  # of the memory that the steps tried here may fill: later ones have more edge pixels, and blocks break up in a long run
_RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def find_batch(recipe: Recipe, say: Callable[[str], None], *, memory_budget: int | None = None, restart: bool = False) -> Recipe:
    """The recipe with the largest micro-batch whose steps fit, and with so many of them that an optimizer step keeps its samples.

    Sizes that divide these samples are tried, smallest first: whole steps on the run's own data, weights and optimizer, in which every
    loss looks at every sample. Nothing is written, what was trained is thrown away, and random streams are put back.

    Args:
        say: gets a line per size, and at last one with what was found.
        memory_budget: bytes; on a GPU None is what the card has, a CPU needs it. There the peak is the whole process's.
        restart: whether the run that comes after it moves aside what its folder holds.
    Raises UserError: not one sample fits, or it cannot be found out here.
    """
    if restart:
        check_stands_elsewhere(recipe)
    else:
        RunFolder(run_folder(recipe)).check_free()
    device = training_device()
    memory = _memory(device, memory_budget)
    per_step, pool = recipe.training.batch_size * recipe.training.accumulate, recipe.data.degradation.pool_size
    sizes = [size for size in range(1, per_step + 1) if per_step % size == 0 and pool % size == 0]
    with _left_as_it_was(device):
        peaks = _peaks(_worst_case(recipe), sizes, device, int(ROOM * memory), say)
    if not peaks:
        raise UserError(
            f"find_batch: expected one sample to stay below {ROOM * memory / GIB:.1f} GiB, {ROOM:.0%} of the memory, got more; --dry-run "
            "tells what saves some."
        )
    batch = max(peaks)
    say(
        f"the largest batch that fits is {batch}, with {peaks[batch] / GIB:.1f} of {memory / GIB:.1f} GiB at its peak; "
        f"--set training.batch_size={batch} --set training.accumulate={per_step // batch} keeps it"
    )
    return with_values(recipe, {"training": {"batch_size": batch, "accumulate": per_step // batch}})


def _memory(device: torch.device, budget: int | None) -> int:
    """Bytes that the steps may take; UserError where their peak cannot be measured."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        raise UserError(f"find_batch: expected one process, got {processes}; run it with one, then give them all the --set that it says.")
    if device.type == "cuda":
        return budget or torch.cuda.get_device_properties(device).total_memory
    if device.type != "cpu" or not os.access(_RESET, os.W_OK):
        raise UserError(f"find_batch: expected a CUDA GPU, or a CPU under Linux, got {device.type}; see --dry-run for an estimate.")
    if budget is None:
        raise UserError("find_batch: expected --memory-budget on a CPU, for example 16GB, got none; give what the run may take.")
    return budget


def _worst_case(recipe: Recipe) -> Recipe:
    """The recipe's largest step: no loss leaves out noisy samples or waits for its first step; and nothing beside the steps."""
    always: dict[str, Any] = {"max_timestep": None, "min_snr": None, "start_step": 1, "learn_step": None}
    losses = [loss.model_copy(update={k: v for k, v in always.items() if hasattr(loss, k)}) for loss in recipe.losses]
    degradation = recipe.data.degradation.model_copy(update={"pool_size": 0})
    changes: dict[str, dict[str, Any]] = {"data": {"workers": 0, "degradation": degradation}, "validation": {"limit": 0}}
    return one_sampling_step(with_values(recipe, changes).model_copy(update={"losses": losses}))


def _peaks(recipe: Recipe, sizes: Sequence[int], device: torch.device, limit: int, say: Callable[[str], None]) -> dict[int, int]:
    """Micro-batch -> peak in bytes, up to the first that goes beyond the limit, or would by the estimate of what it adds."""
    peaks: dict[int, int] = {}
    per_step = recipe.training.batch_size * recipe.training.accumulate
    try:
        job = build_job(recipe)
        session = Session(job.task, job.losses, job.training, seed=job.seed, trackers=(), run=Path(job.output.dir))
        check_precision(job.training.mixed_precision, device)
        for size in sizes:
            expected = peaks[max(peaks)] + _added(recipe, max(peaks), size) if peaks else 0
            if expected > limit:
                say(f"batch_size {size}: not tried, it would take about {expected / GIB:.2f} GiB")
                break
            peak = _peak(session, recipe, size, min(2, per_step // size), device)
            say(f"batch_size {size}: {peak / GIB:.2f} GiB at its peak")
            if peak > limit:
                break
            peaks[size] = peak
        session.close()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        say(f"more than batch_size {max(peaks, default=0)}: out of memory")
    return peaks


def _added(recipe: Recipe, before: int, size: int) -> int:
    """What a larger micro-batch adds to the peak by the estimate; 0 where there is none."""
    try:
        first, second = (sum(step_bytes(with_values(recipe, {"training": {"batch_size": n}})).values()) for n in (before, size))
    except RuntimeError:
        return 0
    return second - first


def _peak(session: Session, recipe: Recipe, size: int, accumulate: int, device: torch.device) -> int:
    """The most bytes in use during steps of `accumulate` micro-batches, with the optimizers' states there from the second on."""
    loader = open_data(with_values(recipe, {"training": {"batch_size": size}}), 0, 1, None, device)
    _forget_peak(device)
    batches = iter(loader)
    for _ in range(2 if recipe.training.turns == "together" else 3):  # turns: networks, learners, networks again
        session.step([next(batches) for _ in range(accumulate)])
    loader.close()
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        outside = total - free - torch.cuda.memory_reserved(device)  # the context, CuPy's pool, other programs
        return outside + torch.cuda.max_memory_reserved(device)
    found = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())
    assert found is not None
    return int(found[1]) << 10


def _forget_peak(device: torch.device) -> None:
    gc.collect()
    release_cached(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        _RESET.write_text("5")


@contextlib.contextmanager
def _left_as_it_was(device: torch.device) -> Iterator[None]:
    """Random streams are put back, and memory is given back."""
    streams = rng_state(device)
    try:
        yield
    finally:
        set_rng_state(streams, device)
        gc.collect()
        release_cached(device)
