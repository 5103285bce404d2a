"""Samplers over the respaced schedule: the original's DDPM and DDIM, and any diffusers scheduler, behind one small seam.

A sampler knows its model timesteps (descending), how the start is made, and one step; the network is called by `sample`.
All latents are scaled [B, 4, h, w] float32; noise comes in as an argument.
"""

import copy
import inspect
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from sslsr_diffusion.errors import MissingDependency, UserError
from sslsr_diffusion.inference.choices import SAMPLERS
from sslsr_diffusion.inference.progress import piece
from sslsr_diffusion.models.condition import Condition
from sslsr_diffusion.models.networks import LatentNetworks
from sslsr_diffusion.models.process import DDPM, Process
from sslsr_diffusion.seeding import derive_seed, sample_generator
from sslsr_diffusion.tables import named

Predict = Callable[[Tensor, float], Tensor]  # (x_t as the network wants it, t) -> prediction
StepNoise = Callable[[int], Tensor]  # step index (0 is the first) -> standard normal like the latents


class Sampler(Protocol):
    """What `sample` needs; x lives in the sampler's own scale (sigma-space schedulers keep x / sqrt(alphas_cumprod))."""

    timesteps: Sequence[float]

    def start(self, noise: Tensor, z_lr: Tensor | None = None) -> Tensor: ...

    def model_input(self, x: Tensor, index: int) -> Tensor: ...

    def step(self, pred: Tensor, x: Tensor, index: int, noise: StepNoise) -> Tensor: ...


def sample(
    sampler: Sampler, predict: Predict, x: Tensor, noise: StepNoise, on_step_end: Callable[[int, float, Tensor], Tensor] | None = None
) -> Tensor:
    """Walk x from the sampler's first timestep to a clean latent.

    Args:
        predict: (model input [B, 4, h, w], t) -> epsilon or v of the same shape, float32.
        x: what `sampler.start` made.
        noise: standard normal for the k-th step; asked for only where the step uses it.
        on_step_end: (k, t, x) -> x, called after each step.
    """
    for index, t in enumerate(sampler.timesteps):
        with piece(index, len(sampler.timesteps), "step"):
            pred = predict(sampler.model_input(x, index), t)
        x = sampler.step(pred, x, index, noise)
        if on_step_end is not None:
            x = on_step_end(index, t, x)
    return x


def spaced_timesteps(num_steps: int, num_train_timesteps: int = 1000) -> list[int]:
    """`num_steps` timesteps, ascending, evenly over the whole schedule, both ends included.

    The position is accumulated and rounded half to even, as published; a single step is the last timestep, where
    the start was noised (the original's 0 would skip the network's noise level altogether).
    """
    if not 1 <= num_steps <= num_train_timesteps:
        raise UserError(f"num_inference_steps: expected 1 to {num_train_timesteps}, got {num_steps}; choose a value in that range.")
    if num_steps == 1:
        return [num_train_timesteps - 1]
    stride = (num_train_timesteps - 1) / (num_steps - 1)
    return sorted({round(position) for position in itertools.accumulate([stride] * (num_steps - 1), initial=0.0)})


@dataclass(frozen=True)
class SamplerCall:
    """What a sampler is made from."""

    process: Process
    num_steps: int
    strength: float
    eta: float
    seeds: Sequence[int]
    device: torch.device

    def ddpm(self, name: str) -> DDPM:
        """The process, where a sampler is made for the DDPM family alone."""
        if not isinstance(self.process, DDPM):
            raise UserError(f"sampler: {name} is of the DDPM family and this model's process is {type(self.process).__name__}; use ddim.")
        return self.process


class _Spaced:
    """Respaced timesteps of a process and their noise levels; strength keeps the last part of them."""

    def __init__(self, process: Process, num_steps: int, *, strength: float = 1.0) -> None:
        self.process = process
        steps = spaced_timesteps(num_steps, process.last + 1)
        kept = kept_steps(len(steps), strength)
        self._at = self._levels_at(steps)[:kept][::-1]  # index into the process's levels, step by step
        self.timesteps: Sequence[float] = [process.timestep_of(t) for t in steps[:kept][::-1]]
        self._first = steps[kept - 1]

    def _levels_at(self, steps: list[int]) -> list[int]:
        return steps

    def start(self, noise: Tensor, z_lr: Tensor | None = None) -> Tensor:
        """z_lr noised to the first timestep, or the noise alone."""
        return noise if z_lr is None else self.process.add_noise(z_lr, noise, torch.tensor([self._first]))

    def model_input(self, x: Tensor, index: int) -> Tensor:
        return x

    def _clean_and_noise(self, pred: Tensor, x: Tensor, index: int) -> tuple[Tensor, Tensor]:
        return self.process.clean_and_noise(pred, x, torch.tensor([self._at[index]]))

    def _is_last(self, index: int) -> bool:
        return index == len(self._at) - 1


class SpacedDDPM(_Spaced):
    """StableSR's sampler: posterior of the respaced chain (Nichol and Dhariwal, ICML 2021), no clipping, fixed small variance."""

    process: DDPM

    @classmethod
    def build(cls, call: SamplerCall) -> Self:
        return cls(call.ddpm("ddpm"), call.num_steps, strength=call.strength)

    def coefficients(self, index: int) -> tuple[float, float, float]:
        """(c1, c2, log variance): x <- c1 x0 + c2 x + exp(log variance / 2) noise."""
        alphas = self.process.alphas_cumprod
        alpha, prev = alphas[self._at[index]], 1.0 if self._is_last(index) else alphas[self._at[index + 1]]
        beta = 1.0 - alpha / prev
        variance = beta * (1.0 - prev) / (1.0 - alpha)
        return beta * math.sqrt(prev) / (1.0 - alpha), (1.0 - prev) * math.sqrt(1.0 - beta) / (1.0 - alpha), math.log(max(variance, 1e-20))

    def step(self, pred: Tensor, x: Tensor, index: int, noise: StepNoise) -> Tensor:
        x0, _ = self._clean_and_noise(pred, x, index)
        c1, c2, log_variance = self.coefficients(index)
        x = c1 * x0 + c2 * x
        return x if self._is_last(index) else x + math.exp(0.5 * log_variance) * noise(index)


class SpacedDDIM(_Spaced):
    """x <- signal' x0 + sqrt(spread'^2 - s^2) epsilon + s noise, signal' and spread' those of the next timestep, at the end 1 and 0.

    s = eta sqrt((1 - a') / (1 - a) (1 - a / a')) is DDIM's share of fresh noise (Song et al., ICLR 2021, eq. 16).
    With eta = 0 the step holds for every process; for a flow it is Euler's.
    """

    def __init__(self, process: Process, num_steps: int, *, strength: float = 1.0, eta: float = 0.0) -> None:
        super().__init__(process, num_steps, strength=strength)
        if eta and not isinstance(process, DDPM):
            raise UserError(f"eta: expected 0 for a flow, which has no fresh noise on its way, got {eta}.")
        self.eta = eta

    @classmethod
    def build(cls, call: SamplerCall) -> Self:
        return cls(call.process, call.num_steps, strength=call.strength, eta=call.eta)

    def sigma(self, index: int) -> float:
        if not self.eta or not isinstance(self.process, DDPM):
            return 0.0
        alpha, prev = self.process.alphas_cumprod[self._at[index]], self._next(index)[0] ** 2
        return self.eta * math.sqrt((1.0 - prev) / (1.0 - alpha) * (1.0 - alpha / prev))

    def _next(self, index: int) -> tuple[float, float]:
        """signal and spread after the step."""
        return (1.0, 0.0) if self._is_last(index) else self.process.level(self._at[index + 1])

    def step(self, pred: Tensor, x: Tensor, index: int, noise: StepNoise) -> Tensor:
        x0, epsilon = self._clean_and_noise(pred, x, index)
        (signal, spread), sigma = self._next(index), self.sigma(index)
        x = signal * x0 + math.sqrt(max(0.0, spread * spread - sigma * sigma)) * epsilon
        return x + sigma * noise(index) if sigma > 0 else x


class OriginalDDIM(SpacedDDIM):
    """The published DDIM script's pairing, for parity only.

    The network sees the respaced timesteps (0 to 999), the noise levels come from 0, 1000//N, 2 (1000//N), ...: they do
    not match, and the last step ends at the noise level of timestep 0 instead of none.
    """

    @classmethod
    def build(cls, call: SamplerCall) -> Self:
        return cls(call.ddpm("ddim-original"), call.num_steps, strength=call.strength, eta=call.eta)

    def _levels_at(self, steps: list[int]) -> list[int]:
        total = self.process.last + 1
        return list(range(0, total, total // len(steps)))[: len(steps)]

    def _next(self, index: int) -> tuple[float, float]:
        return self.process.level(0 if self._is_last(index) else self._at[index + 1])


class DiffusersSampler:
    """Any diffusers scheduler with a variance-preserving schedule behind the same seam and from the same starting latent."""

    def __init__(self, scheduler: Any, call: SamplerCall) -> None:
        scheduler.set_timesteps(call.num_steps, device=call.device)
        first = len(scheduler.timesteps) - kept_steps(len(scheduler.timesteps), call.strength)
        order = getattr(scheduler, "order", 1)
        first -= first % order  # a second-order scheduler lists each timestep twice; begin at a whole step
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first)
        self._scheduler = scheduler
        self._timesteps = scheduler.timesteps[first:]
        self.timesteps: Sequence[float] = self._timesteps.tolist()
        accepted = inspect.signature(scheduler.step).parameters
        # a stochastic scheduler draws through generators of its own, one per image
        generators = [sample_generator(seed, "scheduler") for seed in call.seeds]
        self._extra = {name: value for name, value in {"eta": call.eta, "generator": generators}.items() if name in accepted}

    def start(self, noise: Tensor, z_lr: Tensor | None = None) -> Tensor:
        t = self._timesteps[:1]
        if z_lr is not None:
            return self._scheduler.add_noise(z_lr, noise, t.expand(len(z_lr)))
        # sigma-space schedulers divide their input by sqrt(1 + sigma^2): the same latent in their scale is the noise times that
        shrink = self._scheduler.scale_model_input(torch.ones_like(noise[:1, :1, :1, :1]), t[0])
        return noise / shrink

    def model_input(self, x: Tensor, index: int) -> Tensor:
        return self._scheduler.scale_model_input(x, self._timesteps[index])

    def step(self, pred: Tensor, x: Tensor, index: int, noise: StepNoise) -> Tensor:
        return self._scheduler.step(pred, self._timesteps[index], x, return_dict=False, **self._extra)[0]


def kept_steps(num_steps: int, strength: float) -> int:
    """How many of the last steps run at this strength; 1.0 keeps all, and at least one runs."""
    if not 0.0 < strength <= 1.0:
        raise UserError(f"strength: expected a value above 0 and up to 1, got {strength}; 1 starts from the fully noised latent.")
    return max(1, min(num_steps, int(num_steps * strength)))


def build_sampler(
    name: str | None,
    process: Process,
    num_steps: int,
    *,
    scheduler: Any = None,
    as_it_is: bool = False,
    strength: float = 1.0,
    eta: float = 0.0,
    seeds: Sequence[int] = (),
    device: torch.device | str = "cpu",
) -> Sampler:
    """The sampler asked for by name; UserError for an unknown one, or one that does not fit the process.

    Args:
        name: a key of SAMPLERS, the class name of a diffusers scheduler of the process, or None: what `scheduler` stands for, else the
            process's own (ddpm; for a flow the straight way).
        num_steps: steps over the full process; `strength` keeps the last part of them.
        scheduler: a diffusers scheduler that the caller's pipeline has.
        as_it_is: by the scheduler's own steps, also where a sampler of ours stands for it.
        eta: DDIM's share of fresh noise, 0 to 1.
        seeds: one per image, for schedulers that draw noise themselves.
    """
    spaced_timesteps(num_steps, process.last + 1)
    call = SamplerCall(process, num_steps, strength, eta, seeds, torch.device(device))
    if name is None and scheduler is not None and (as_it_is or type(scheduler).__name__ not in OWN):
        return _rehearsed(type(scheduler).from_config(scheduler.config), call)
    name = name or OWN.get(type(scheduler).__name__) or ("ddpm" if isinstance(process, DDPM) else "ddim")
    where = SAMPLERS.get(name, f"diffusers:{name}")
    if where.startswith("diffusers:"):
        return _by_class(where.removeprefix("diffusers:"), call)
    made: Sampler = named(f"sslsr_diffusion.inference.{where}").build(call)
    return made


def _by_class(name: str, call: SamplerCall) -> Sampler:
    import diffusers

    cls = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    if cls is None:
        raise UserError(f"sampler: {name!r} is unknown; expected one of {', '.join(SAMPLERS)} or the name of a diffusers scheduler class.")
    try:
        # "linspace" begins at the last timestep, where the published start is noised; the others begin lower, but not with one step
        spacing = "linspace" if call.num_steps > 1 else "trailing"
        made = cls.from_config(call.ddpm(name).scheduler().config, timestep_spacing=spacing)
    except ImportError as error:
        raise MissingDependency(f"sampler: {name} needs a package that is not installed: {' '.join(str(error).split())}") from None
    except (TypeError, NotImplementedError) as error:  # another family's: it wants arguments of its own
        raise UserError(f"sampler: {name} cannot be made from this model's process ({error}); use one of {', '.join(SAMPLERS)}.") from None
    if not hasattr(made, "add_noise") or not hasattr(made, "alphas_cumprod"):
        raise UserError(f"sampler: {name} is not of the DDPM family, which this model was trained for; use one of {', '.join(SAMPLERS)}.")
    return _rehearsed(made, call)


def _rehearsed(scheduler: Any, call: SamplerCall) -> DiffusersSampler:
    """The sampler, once a copy of its scheduler has walked to the end with a latent of one pixel; UserError where it cannot."""
    try:
        trial = DiffusersSampler(copy.deepcopy(scheduler), replace(call, seeds=call.seeds[:1] or [0]))
        pixel = torch.zeros(1, 1, 1, 1, device=call.device)
        sample(trial, lambda x, t: torch.zeros_like(x), trial.start(pixel, pixel), lambda index: pixel)
    except Exception as error:  # schedulers raise nearly everything
        name, said = type(scheduler).__name__, str(error) or type(error).__name__
        wish = f"num_inference_steps {call.num_steps} and strength {call.strength:g}"
        raise UserError(f"sampler: {name} cannot run with {wish} ({said}); use others, or one of {', '.join(SAMPLERS)}.") from None
    return DiffusersSampler(scheduler, call)


OWN = {"DDPMScheduler": "ddpm", "DDIMScheduler": "ddim"}  # schedulers that stand for samplers of ours


@torch.no_grad()
def sample_latents(
    networks: LatentNetworks, z: Tensor, condition: Condition, indices: list[int], steps: int, *, seed: int, strength: float = 1.0
) -> Tensor:
    """What the denoiser makes of noised latents [B, C, h, w]; noise is from (seed, index)."""

    def noise(purpose: str) -> Tensor:
        drawn = [torch.randn(z.shape[1:], generator=sample_generator(seed, i, purpose)) for i in indices]
        return torch.stack(drawn).to(z)

    def predict(x: Tensor, t: float) -> Tensor:
        kind = torch.long if float(t).is_integer() else torch.float32
        return networks.denoiser(x, torch.full((len(x),), t, device=x.device, dtype=kind), condition)

    seeds = [derive_seed(seed, i, "sampler") for i in indices]
    sampler = build_sampler(None, networks.process, steps, strength=strength, seeds=seeds, device=z.device)
    return sample(sampler, predict, sampler.start(noise("start"), z), lambda index: noise(f"step {index}"))
