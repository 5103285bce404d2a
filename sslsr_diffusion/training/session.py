"""The live objects of a run: accelerator, engine, schedule, average, counters. All processes call every method."""

import contextlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.losses import Loss
from sslsr_diffusion.losses.base import Learner
from sslsr_diffusion.models.compiled import compile_parts
from sslsr_diffusion.seeding import derive_seed
from sslsr_diffusion.tasks.task import Draws, Task, apply_losses
from sslsr_diffusion.training.checkpoints import Checkpoint
from sslsr_diffusion.training.engines import Engine, Update, Zero2Engine, distribution, make_accelerator
from sslsr_diffusion.training.looks import Looks
from sslsr_diffusion.training.optimizers import averaged, build_ema, build_optimizer, build_schedule
from sslsr_diffusion.training.settings import TrainingSettings
from sslsr_diffusion.training.state import (
    AutoWeight,
    Progress,
    full_tensor,
    learned_parameters,
    learned_state,
    load_optimizer_state_dict,
    load_trained,
    optimizer_state_dict,
    rng_state,
    seed_everything,
    set_rng_state,
    trained_parameters,
)
from sslsr_diffusion.types import Batch, Outputs

logger = logging.getLogger(__name__)
T = TypeVar("T")

SPIKE_AFTER = 20  # steps before the running mean of the loss means anything


@dataclass
class StepReport:
    """One optimizer step in numbers: means over all micro-batches and processes."""

    loss: float
    raw: dict[str, float]
    grad_norm: float | None  # None: it was the learners' turn
    mask_density: float
    updated: bool

    def values(self) -> dict[str, float]:
        """By the names of history and trackers."""
        terms = {f"loss/{name}": value for name, value in self.raw.items()}
        norm = {} if self.grad_norm is None else {"train/grad_norm": self.grad_norm}
        return {**terms, "loss/total": self.loss, **norm, "train/mask_density": self.mask_density}


class Session:
    """Built once, loaded perhaps, then stepped."""

    def __init__(
        self, task: Task, losses: Sequence[Loss], settings: TrainingSettings, *, seed: int, trackers: Sequence[str], run: Path
    ) -> None:
        self.task, self.losses, self.settings, self.seed = task, list(losses), settings, seed
        self.accelerator = make_accelerator(settings, trackers, run)
        self.device: torch.device = self.accelerator.device
        self.main: bool = self.accelerator.is_main_process
        self.rank: int = self.accelerator.process_index
        self.world_size: int = self.accelerator.num_processes
        kind = distribution(self.accelerator)
        self.sharded = kind == "FSDP"
        seed_everything(derive_seed(seed, "global", self.rank))
        task.to(self.device)
        task.module.train()
        if settings.compile:  # graphs of their own for every size, so that numbers do not depend on where a run was resumed
            compile_parts(task.networks.components(), self.device, field="training.compile", dynamic=False)
        optimizer = build_optimizer(settings.optimizer, trained_parameters(task.module).values())
        engine = Zero2Engine if kind == "DEEPSPEED" else Engine
        self.engine = engine(self.accelerator, task.module, optimizer, settings)
        self.parameters = self.engine.parameters
        self.schedule = build_schedule(settings.schedule, self.engine.optimizer, settings.steps)
        self.ema = build_ema(settings.ema, self.parameters.values())
        self.progress = Progress()
        self.auto = {loss.name: AutoWeight(loss.settings.auto_steps) for loss in self.losses if getattr(loss, "auto", False)}  # type: ignore[attr-defined]
        self.learners: list[Learner] = [loss for loss in self.losses if isinstance(loss, Learner)]
        for loss in self.losses:
            loss.to(self.device)
        self.compares = [loss.name for loss in self.losses if "sr_ema" in loss.reads]
        if self.compares and (self.ema is None or self.sharded):
            why = "FSDP divides it; use another way to run" if self.sharded else "there is none; set training.ema"
            raise UserError(f"losses: {self.compares[0]} compares with the picture by the averaged weights, and {why}.")
        self.stop_asked = False

    def _turn(self) -> tuple[bool, bool]:
        """Whether this step moves the trained networks, and whether it moves the learners."""
        first = self.progress.step % 2 == 0
        return (True, True) if self.settings.turns == "together" else (first, not first)

    def step(self, micro: Sequence[Batch], *, stop: bool = False) -> StepReport:
        """One optimizer step over all micro-batches; `stop` on any process sets `stop_asked` on all."""
        trains, learns = self._turn()
        batches = [batch.to(self.device) for batch in micro]
        draws = [self.task.draw(batch, self.losses) for batch in batches]
        counts = self._global_counts(draws, stop)
        scales = {name: auto.value for name, auto in self.auto.items()}
        sums: dict[str, Tensor] = {}
        for last, batch, draw in zip([*[False] * (len(batches) - 1), True], batches, draws):
            with self.engine.accumulating(last=last), torch.set_grad_enabled(trains):
                with self.engine.autocast():
                    outputs = self.task.run(self.engine.model, batch, draw)
                    if self.compares:
                        outputs = replace(outputs, sr_ema=self._by_averaged_weights(batch, draw))
                result = apply_losses(outputs, self.losses, counts, scales)
                if trains:
                    self.engine.backward(result.loss, last=last)
            weighted = {f"weighted/{name}": value for name, value in result.weighted.items()}
            learners = self.learners if learns else []
            learned = {name: value for learner in learners for name, value in learner.learn(outputs, counts[learner.name]).items()}
            density = batch.mask.float().mean() / len(batches)
            for name, value in {"": result.loss.detach(), ".mask": density, **weighted, **result.raw, **learned}.items():
                sums[name] = sums.get(name, 0) + value.float()
        means = self.accelerator.reduce(torch.stack(list(sums.values())), reduction="mean")  # over the processes
        names = tuple(name for batch in micro for name in batch.names)
        return self._update(dict(zip(sums, means.tolist())), names)

    @torch.no_grad()
    def _by_averaged_weights(self, batch: Batch, draws: Draws) -> Tensor | None:
        """What the task's networks make of the same draws with the moving average of what trains, in evaluation mode."""
        assert self.ema is not None
        module, average = self.task.module, dict(zip(self.parameters, self.ema.shadow_params))
        module.eval()
        outputs: Outputs = self.task.run(lambda *args, **kwargs: functional_call(module, average, args, kwargs), batch, draws)
        module.train()
        return outputs.sr

    def _update(self, terms: dict[str, float], names: tuple[str, ...]) -> StepReport:
        """Move the weights if the numbers can be trusted (one host sync per optimizer step: the decision), and all that follows them."""
        loss, density = terms.pop(""), terms.pop(".mask")
        weighted = {name.removeprefix("weighted/"): terms.pop(name) for name in list(terms) if name.startswith("weighted/")}
        pace = self.learning_rate() / self.settings.optimizer.lr
        trains, learns = self._turn()
        norm, sound, overflow = self.engine.update(loss) if trains else Update(0.0, isfinite(loss))
        if sound:
            self.schedule.step()
        if sound and trains:
            if self.ema is not None:
                self.ema.step(self.parameters.values())
            for name, auto in self.auto.items():
                auto.observe(weighted[name], [value for other, value in weighted.items() if other != name])
        for learner in self.learners:
            if learns:
                self._average_gradients(learned_parameters(learner).values())
            learner.update(sound=sound, pace=pace)
        self._count(loss, names, sound=sound, overflow=overflow)
        return StepReport(loss, terms, norm if trains else None, density, sound)

    def _count(self, loss: float, names: tuple[str, ...], *, sound: bool, overflow: bool) -> None:
        progress, settings = self.progress, self.settings
        progress.step += 1
        progress.samples += settings.batch_size * settings.accumulate * self.world_size
        if not sound:
            progress.skipped += 1
            progress.skipped_in_a_row += 0 if overflow else 1
            self._warn("step %d skipped: its loss or gradient is not a number (loss %g); batch: %s", progress.step, loss, names)
            return
        progress.skipped_in_a_row = 0
        if progress.mean_loss is not None and progress.step > SPIKE_AFTER and loss > settings.spike_factor * progress.mean_loss:
            self._warn("step %d: loss %.4g against a running mean of %.4g; batch: %s", progress.step, loss, progress.mean_loss, names)
        progress.mean_loss = loss if progress.mean_loss is None else 0.98 * progress.mean_loss + 0.02 * loss

    def _warn(self, text: str, *values: Any) -> None:
        """Warn, with the file names of all processes last: every process sees the same loss, so all come here together."""
        names = self.gather(values[-1])
        if self.main:
            logger.warning(text, *values[:-1], ", ".join(names))

    def _global_counts(self, draws: Sequence[Draws], stop: bool) -> dict[str, Tensor]:
        """Per loss: units over all micro-batches and processes, divided by the number of processes (DDP averages gradients)."""
        own = [sum((loss.count(draw.given) for draw in draws), torch.zeros((), device=self.device)) for loss in self.losses]
        vector = torch.stack([*own, torch.tensor(float(stop), device=self.device)])  # float32 counts exactly up to 2^24 rows
        total = self.accelerator.reduce(vector, reduction="sum")
        self.stop_asked = bool(total[-1] > 0) if self.world_size > 1 else stop
        return {loss.name: total[i] / self.world_size for i, loss in enumerate(self.losses)}

    def _average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """What DDP does for the trained networks."""
        for parameter in parameters if self.world_size > 1 else ():
            if parameter.grad is None:  # nothing to learn from on this process, perhaps on another
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad.copy_(self.accelerator.reduce(parameter.grad, reduction="mean"))

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        return averaged(self.ema, self.parameters.values())

    def gather(self, value: Sequence[T]) -> list[T]:
        """Lists of all processes, joined."""
        from accelerate.utils import gather_object

        return gather_object(list(value))

    def barrier(self) -> None:
        self.accelerator.wait_for_everyone()

    def close(self) -> None:
        """Let go of the wrapped module, the trackers and the connection to the other processes, in this order: DeepSpeed needs it so.

        The connection's threads end here and not in the interpreter's last moments, where they now and then abort a process that is done.
        """
        del self.engine
        self.accelerator.free_memory()
        self.accelerator.end_training()

    def learning_rate(self) -> float:
        return float(self.engine.optimizer.param_groups[0]["lr"])

    def state_dict(self, data: dict[str, Any]) -> Checkpoint:
        """Everything that a resume needs, as whole CPU tensors and plain values; `data` is where this process's loader stands."""
        optimizer, engine = self.engine.state_dict()
        streams = self.gather([(self.rank, rng_state(self.device))])
        tensors = {
            "trained": {name: full_tensor(p).clone() for name, p in self.parameters.items()},
            "optimizer": optimizer,
            "rng": {f"{rank}/{name}": value for rank, found in streams for name, value in found.items()},
        }
        if self.ema is not None:
            tensors["ema"] = {name: full_tensor(value).clone() for name, value in zip(self.parameters, self.ema.shadow_params)}
        state = {
            **engine,
            "progress": asdict(self.progress),
            "schedule": {k: v for k, v in self.schedule.state_dict().items() if k != "lr_lambdas"},
            "ema": None if self.ema is None else {k: v for k, v in self.ema.state_dict().items() if k != "shadow_params"},
            "auto_weights": {name: asdict(auto) for name, auto in self.auto.items()},
            "learners": {},
            "data": self.gather([data]),  # one position per process
            "world_size": self.world_size,
        }
        for learner in self.learners:
            tensors[f"learner-{learner.name}"] = {name: full_tensor(value).clone() for name, value in learned_state(learner).items()}
            tensors[f"learner-{learner.name}-optimizer"], others = optimizer_state_dict(
                learner.optimizer, list(learned_parameters(learner))
            )
            state["learners"][learner.name] = {"step": learner.step, "optimizer": others}
        return Checkpoint(tensors, state)

    def load_state_dict(self, checkpoint: Checkpoint, *, what: str) -> None:
        """Continue exactly where `state_dict` was called; settings are the recipe's, which `check_same_recipe` has compared."""
        tensors, state = checkpoint
        load_trained(self.parameters, tensors["trained"], what=what)
        self.engine.load_state_dict(tensors["optimizer"], state)
        own = {key: self.schedule.state_dict()[key] for key in ("lr_lambdas", "base_lrs")}
        self.schedule.load_state_dict({**state["schedule"], **own})
        if self.ema is not None:
            shadows = dict(zip(self.parameters, (nn.Parameter(s, requires_grad=False) for s in self.ema.shadow_params)))
            load_trained(shadows, tensors.get("ema", tensors["trained"]), what=what)
            steps = {"optimization_step": state["ema"]["optimization_step"]} if state["ema"] else {}
            self.ema.load_state_dict({**self.ema.state_dict(), **steps, "shadow_params": [s.data for s in shadows.values()]})
        for learner in self.learners:
            if learner.name in state["learners"]:  # not where the loss was added to the recipe afterwards
                known, file = state["learners"][learner.name], f"learner-{learner.name}"
                load_trained(learned_state(learner), tensors[file], what=what)
                load_optimizer_state_dict(learner.optimizer, learned_parameters(learner), tensors[f"{file}-optimizer"], known["optimizer"])
                learner.step = known["step"]
        progress = state["progress"]
        self.progress = Progress(**{**progress, "skipped_in_a_row": 0, "looks": Looks(**progress["looks"])})
        self.auto = {name: AutoWeight(**{**state["auto_weights"].get(name, {}), "steps": auto.steps}) for name, auto in self.auto.items()}
        streams = {name.split("/", 1)[1]: value for name, value in tensors["rng"].items() if name.startswith(f"{self.rank}/")}
        if streams:
            set_rng_state(streams, self.device)
        else:  # more processes than before
            seed_everything(derive_seed(self.seed, "global", self.rank, self.progress.step))
