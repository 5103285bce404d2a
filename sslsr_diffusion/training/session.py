"""The live objects of a run: accelerator, wrapped module, optimizer, schedule, average, loader. All processes call every method."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.losses import Loss
from sslsr_diffusion.seeding import derive_seed
from sslsr_diffusion.tasks.task import Task as Objective
from sslsr_diffusion.tasks.task import apply_losses
from sslsr_diffusion.training.checkpoints import Checkpoint
from sslsr_diffusion.training.optimizers import OPTIMIZERS, averaged, build_ema, build_schedule
from sslsr_diffusion.training.settings import TrainingSettings
from sslsr_diffusion.training.state import (
    AutoWeight,
    Progress,
    give_optimizer,
    give_rng,
    give_trained,
    take_optimizer,
    take_rng,
    trained_parameters,
    whole,
)
from sslsr_diffusion.training.zero2 import Zero2, deepspeed_plugin
from sslsr_diffusion.types import Batch

logger = logging.getLogger(__name__)

SPIKE_AFTER = 20  # steps before the running mean of the loss means anything


@dataclass
class StepReport:
    """One optimizer step in numbers: means over all micro-batches and processes."""

    loss: float
    raw: dict[str, float]
    grad_norm: float
    mask_density: float
    updated: bool
    names: tuple[str, ...] = field(default=(), repr=False)


class Session:
    """Built once, loaded perhaps, then stepped."""

    def __init__(
        self, objective: Objective, losses: Sequence[Loss], settings: TrainingSettings, *, seed: int, trackers: Sequence[str], run: Path
    ) -> None:
        self.objective, self.losses, self.settings, self.seed = objective, list(losses), settings, seed
        self.accelerator = make_accelerator(settings, trackers, run)
        self.device: torch.device = self.accelerator.device
        self.main: bool = self.accelerator.is_main_process
        self.rank: int = self.accelerator.process_index
        self.world_size: int = self.accelerator.num_processes
        self.sharded: bool = _kind(self.accelerator) == "FSDP"
        _seed_everything(derive_seed(seed, "global", self.rank))
        objective.to(self.device)
        objective.module.train()
        optimizer = OPTIMIZERS[settings.optimizer.kind](list(trained_parameters(objective.module).values()), settings.optimizer)
        self.model, self.optimizer = self.accelerator.prepare(objective.module, optimizer)
        self.zero2 = Zero2(self.model) if _kind(self.accelerator) == "DEEPSPEED" else None
        self.parameters: dict[str, nn.Parameter] = trained_parameters(self.accelerator.unwrap_model(self.model))
        self.schedule = build_schedule(settings.schedule, self._inner_optimizer(), settings.steps)
        self.ema = build_ema(settings.ema, self.parameters.values())
        self.progress = Progress()
        self.auto = {loss.name: AutoWeight(loss.settings.auto_steps) for loss in self.losses if getattr(loss, "auto", False)}  # type: ignore[attr-defined]
        self.learners: list[Any] = [loss for loss in self.losses if hasattr(loss, "learn")]  # with a network and optimizer of their own
        for learner in self.learners:
            learner.to(self.device)
        self.stop_asked = False

    def step(self, micro: Sequence[Batch], *, stop: bool = False) -> StepReport:
        """One optimizer step over all micro-batches; `stop` on any process sets `stop_asked` on all."""
        batches = [batch.to(self.device) for batch in micro]
        draws = [self.objective.draw(batch, self.losses) for batch in batches]
        counts = self._global_counts(draws, stop)
        scales = {name: auto.value for name, auto in self.auto.items()}
        sums: dict[str, Tensor] = {}
        for last, batch, draw in zip([*[False] * (len(batches) - 1), True], batches, draws):
            with contextlib.nullcontext() if last or self.zero2 else self.accelerator.no_sync(self.model):
                with self._autocast():
                    outputs = self.objective.run(self.model, batch, draw)
                result = apply_losses(outputs, self.losses, counts, scales)
                if self.zero2:
                    self.zero2.backward(result.loss, last=last)
                else:
                    self.accelerator.backward(result.loss)
            weighted = {f"weighted/{name}": value for name, value in result.weighted.items()}
            learned = {name: value for learner in self.learners for name, value in learner.learn(outputs, counts[learner.name]).items()}
            density = batch.mask.float().mean() / len(batches)
            for name, value in {"": result.loss.detach(), ".mask": density, **weighted, **result.raw, **learned}.items():
                sums[name] = sums.get(name, 0) + value.float()
        names = tuple(name for batch in micro for name in batch.names)
        return self._update(self._mean_over_processes(sums), names)

    def _update(self, terms: dict[str, float], names: tuple[str, ...]) -> StepReport:
        """Clip, decide whether the numbers can be trusted, and move the weights (one host sync per optimizer step: the decision)."""
        norm = self.zero2.step() if self.zero2 else self._clip()
        loss, density = terms.pop(""), terms.pop(".mask")
        weighted = {name.removeprefix("weighted/"): terms.pop(name) for name in list(terms) if name.startswith("weighted/")}
        sound = bool(np.isfinite(loss) and np.isfinite(norm))
        scaler = self.accelerator.scaler
        overflow = not sound and scaler is not None and scaler.get_scale() > 1  # fp16 finds its scale this way
        if not self.zero2:
            if sound or scaler is not None:
                self.optimizer.step()
            self.optimizer.zero_grad()
        if sound:
            self.schedule.step()
            if self.ema is not None:
                self.ema.step(self.parameters.values())
            for name, auto in self.auto.items():
                auto.observe(weighted[name], [value for other, value in weighted.items() if other != name])
        for learner in self.learners:
            self._average_gradients(learner.network)
            learner.update(sound=sound)
        self._count(loss, names, sound=sound, overflow=overflow)
        return StepReport(loss, terms, norm, density, sound, names)

    def _clip(self) -> float:
        limit = self.settings.max_grad_norm or float("inf")
        return float(whole(torch.as_tensor(self.accelerator.clip_grad_norm_(self.parameters.values(), limit))))

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.zero2 and self.settings.mixed_precision == "bf16":  # accelerate leaves precision to DeepSpeed's engine
            return torch.autocast(self.device.type, torch.bfloat16)
        return self.accelerator.autocast()

    def _count(self, loss: float, names: tuple[str, ...], *, sound: bool, overflow: bool) -> None:
        progress, settings = self.progress, self.settings
        progress.step += 1
        progress.samples += settings.batch_size * settings.accumulate * self.world_size
        if not sound:
            progress.skipped += 1
            progress.skipped_in_a_row += 0 if overflow else 1
            self._tell("step %d skipped: its loss or gradient is not a number (loss %g); batch: %s", progress.step, loss, names)
            return
        progress.skipped_in_a_row = 0
        if progress.mean_loss is not None and progress.step > SPIKE_AFTER and loss > settings.spike_factor * progress.mean_loss:
            self._tell("step %d: loss %.4g against a running mean of %.4g; batch: %s", progress.step, loss, progress.mean_loss, names)
        progress.mean_loss = loss if progress.mean_loss is None else 0.98 * progress.mean_loss + 0.02 * loss

    def _tell(self, text: str, *values: Any) -> None:
        """Warn, with the file names of all processes last: every process sees the same loss, so all come here together."""
        names = self.gather(values[-1])
        if self.main:
            logger.warning(text, *values[:-1], ", ".join(names))

    def _global_counts(self, draws: Sequence[Any], stop: bool) -> dict[str, Tensor]:
        """Per loss: units over all micro-batches and processes, divided by the number of processes (DDP averages gradients)."""
        own = [sum((loss.count(draw.given) for draw in draws), torch.zeros((), device=self.device)) for loss in self.losses]
        vector = torch.stack([*own, torch.tensor(float(stop), device=self.device)])  # float32 counts exactly up to 2^24 rows
        total = self.accelerator.reduce(vector, reduction="sum") if self.world_size > 1 else vector
        self.stop_asked = bool(total[-1] > 0) if self.world_size > 1 else stop
        return {loss.name: total[i] / self.world_size for i, loss in enumerate(self.losses)}

    def _mean_over_processes(self, sums: dict[str, Tensor]) -> dict[str, float]:
        vector = torch.stack(list(sums.values()))
        if self.world_size > 1:
            vector = self.accelerator.reduce(vector, reduction="mean")
        return dict(zip(sums, vector.tolist()))

    def _average_gradients(self, network: nn.Module) -> None:
        """What DDP does for the trained networks."""
        for parameter in network.parameters() if self.world_size > 1 else ():
            if parameter.grad is None:  # nothing to learn from on this process, perhaps on another
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad.copy_(self.accelerator.reduce(parameter.grad, reduction="mean"))

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the networks hold the weights that are validated and published."""
        return averaged(self.ema, self.parameters.values())

    def gather(self, value: Any) -> list[Any]:
        """Lists of all processes, joined."""
        if self.world_size == 1:
            return list(value)
        from accelerate.utils import gather_object

        return gather_object(list(value))

    def barrier(self) -> None:
        self.accelerator.wait_for_everyone()

    def close(self) -> None:
        """Let go of the wrapped module and with it of the connection to the other processes.

        Its threads end here and not in the interpreter's last moments, where they now and then abort a process that is done.
        """
        del self.model, self.optimizer, self.zero2
        self.accelerator.free_memory()

    def learning_rate(self) -> float:
        return float(self._inner_optimizer().param_groups[0]["lr"])

    def take(self, data: dict[str, Any]) -> Checkpoint:
        """Everything that a resume needs, as full CPU tensors and plain values."""
        if self.zero2:
            optimizer, plain = self.zero2.take_optimizer(self.parameters)
        else:
            optimizer, plain = take_optimizer(self._inner_optimizer(), list(self.parameters))
        streams = self.gather([(self.rank, take_rng(self.device))])
        tensors = {
            "trained": {name: whole(p).clone() for name, p in self.parameters.items()},
            "optimizer": optimizer,
            "rng": {f"{rank}/{name}": value for rank, found in streams for name, value in found.items()},
        }
        if self.ema is not None:
            tensors["ema"] = {name: whole(value).clone() for name, value in zip(self.parameters, self.ema.shadow_params)}
        state = {
            "progress": asdict(self.progress),
            "optimizer": plain,
            "schedule": {k: v for k, v in self.schedule.state_dict().items() if k != "lr_lambdas"},
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None,
            "ema": None if self.ema is None else {k: v for k, v in self.ema.state_dict().items() if k != "shadow_params"},
            "auto_weights": {name: asdict(auto) for name, auto in self.auto.items()},
            "data": self.gather([data]),  # one position per process
            "world_size": self.world_size,
        }
        for learner in self.learners:
            parameters = dict(learner.network.named_parameters())
            tensors[learner.name] = {name: whole(p).clone() for name, p in parameters.items()}
            tensors[f"{learner.name}_optimizer"], others = take_optimizer(learner.optimizer, list(parameters))
            state[learner.name] = {"step": learner.step, "optimizer": others}
        return Checkpoint(tensors, state)

    def give(self, checkpoint: Checkpoint, *, what: str) -> None:
        """Continue exactly where `take` was called; settings are the recipe's, which `check_same_recipe` has compared."""
        tensors, state = checkpoint
        give_trained(self.parameters, tensors["trained"], what=what)
        if self.zero2:
            self.zero2.give_optimizer(self.parameters, tensors["optimizer"], state["optimizer"])
        else:
            give_optimizer(self._inner_optimizer(), self.parameters, tensors["optimizer"], state["optimizer"])
        own = {key: self.schedule.state_dict()[key] for key in ("lr_lambdas", "base_lrs")}
        self.schedule.load_state_dict({**state["schedule"], **own})
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            shadows = dict(zip(self.parameters, (nn.Parameter(s, requires_grad=False) for s in self.ema.shadow_params)))
            give_trained(shadows, tensors.get("ema", tensors["trained"]), what=what)
            steps = {"optimization_step": state["ema"]["optimization_step"]} if state["ema"] else {}
            self.ema.load_state_dict({**self.ema.state_dict(), **steps, "shadow_params": [s.data for s in shadows.values()]})
        for learner in self.learners:
            if learner.name in state:  # not where the loss was added to the recipe afterwards
                parameters = dict(learner.network.named_parameters())
                give_trained(parameters, tensors[learner.name], what=what)
                give_optimizer(learner.optimizer, parameters, tensors[f"{learner.name}_optimizer"], state[learner.name]["optimizer"])
                learner.step = state[learner.name]["step"]
        known = {f.name for f in fields(Progress)}
        self.progress = Progress(**{k: v for k, v in state["progress"].items() if k in known})
        self.progress.skipped_in_a_row = 0
        self.auto = {name: AutoWeight(**{**state["auto_weights"].get(name, {}), "steps": auto.steps}) for name, auto in self.auto.items()}
        streams = {name.split("/", 1)[1]: value for name, value in tensors["rng"].items() if name.startswith(f"{self.rank}/")}
        if streams:
            give_rng(streams, self.device)
        else:  # more processes than before
            _seed_everything(derive_seed(self.seed, "global", self.rank, self.progress.step))

    def _inner_optimizer(self) -> torch.optim.Optimizer:
        return self.zero2.optimizer if self.zero2 else getattr(self.optimizer, "optimizer", self.optimizer)


def make_accelerator(settings: TrainingSettings, trackers: Sequence[str], run: Path) -> Any:
    """accelerate's view of the machine. Accumulation is ours (its means would be means of means), so it is told 1.

    Raises:
        UserError: the machine cannot do what the recipe asks for.
    """
    from accelerate import Accelerator

    if settings.cpu_threads is not None:
        torch.set_num_threads(settings.cpu_threads)
    torch.backends.cuda.matmul.allow_tf32 = settings.tf32
    torch.backends.cudnn.allow_tf32 = settings.tf32
    plugin = deepspeed_plugin(settings)
    importlib.import_module("torch.distributed.nn.functional")  # imported later (by DDP), its default arguments hold the group for ever
    try:
        accelerator = Accelerator(
            mixed_precision="no" if plugin else settings.mixed_precision,
            deepspeed_plugin=plugin,
            log_with=list(trackers) or None,
            project_dir=str(run),
        )
    except (ValueError, ImportError, RuntimeError) as error:
        raise UserError(f"training: this machine cannot run the recipe as it is: {error}") from error
    accelerator.gradient_accumulation_steps = 1
    kind = _kind(accelerator)
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" and not accelerator.is_fsdp2:
        reason = "asks for FSDP 1" if kind == "FSDP" else f"is not followed on this machine (accelerate chose {kind})"
        raise UserError(f"training: expected FSDP2 (fsdp_version: 2) on GPUs, the accelerate configuration {reason}.")
    if kind in ("MEGATRON_LM", "TP"):
        raise UserError(f"training: {kind} is not supported; configs/accelerate/fsdp2.yaml divides the same states among GPUs.")
    return accelerator


def _kind(accelerator: Any) -> str:
    """MULTI_GPU, FSDP, DEEPSPEED ... by accelerate's names."""
    return str(accelerator.distributed_type).rpartition(".")[2]


def _seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries that draw from the global stream
