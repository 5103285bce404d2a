"""Samplers over the respaced schedule: the original's DDPM and DDIM, and any diffusers scheduler, behind one small seam.

A sampler knows its model timesteps (descending), how the start is made, and one step; the network is called by `sample`.
All latents are scaled [B, 4, h, w] float32; noise comes in as an argument.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from sslsr_diffusion.errors import MissingDependency, UserError
from sslsr_diffusion.seeding import sample_generator

Predict = Callable[[Tensor, float], Tensor]  # (x_t as the network wants it, t) -> prediction
StepNoise = Callable[[int], Tensor]  # step index (0 is the first) -> standard normal like the latents


class Sampler(Protocol):
    """What `sample` needs; x lives in the sampler's own scale (sigma-space schedulers keep x / sqrt(alphas_cumprod))."""

    timesteps: Sequence[float]

    def start(self, z_lr: Tensor, noise: Tensor, *, from_lr: bool) -> Tensor: ...

    def model_input(self, x: Tensor, index: int) -> Tensor: ...

    def step(self, pred: Tensor, x: Tensor, index: int, noise: StepNoise) -> Tensor: ...


def sample(
    sampler: Sampler, predict: Predict, x: Tensor, noise: StepNoise, on_step_end: Callable[[int, float, Tensor], Tensor] | None = None
) -> Tensor:
    """Walk x from the sampler's first timestep to a clean latent.

    Args:
        sampler: timesteps and update rule.
        predict: (model input [B, 4, h, w], t) -> epsilon or v of the same shape, float32.
        x: what `sampler.start` made.
        noise: standard normal for the k-th step; asked for only where the step uses it.
        on_step_end: (k, t, x) -> x, called after each step.
    """
    for index, t in enumerate(sampler.timesteps):
        pred = predict(sampler.model_input(x, index), t)
        x = sampler.step(pred, x, index, noise)
        if on_step_end is not None:
            x = on_step_end(index, t, x)
    return x


def spaced_timesteps(num_steps: int, num_train_timesteps: int = 1000) -> list[int]:
    """`num_steps` timesteps, ascending, evenly over the whole schedule, both ends included.

    The position is accumulated and rounded half to even, as StableSR's `space_timesteps` does; a single step is the last timestep, where
    the start was noised (the original's 0 would skip the network's noise level altogether).
    """
    if not 1 <= num_steps <= num_train_timesteps:
        raise UserError(f"num_inference_steps: expected 1 to {num_train_timesteps}, got {num_steps}; choose a value in that range.")
    if num_steps == 1:
        return [num_train_timesteps - 1]
    stride = (num_train_timesteps - 1) / (num_steps - 1)
    position, steps = 0.0, set()
    for _ in range(num_steps):
        steps.add(round(position))
        position += stride
    return sorted(steps)


def clean_and_noise(pred: Tensor, x: Tensor, alpha: float, prediction_type: str) -> tuple[Tensor, Tensor]:
    """(x0, epsilon) that x = sqrt(a) x0 + sqrt(1-a) epsilon and the prediction imply.  a = alphas_cumprod at x's noise level."""
    signal, spread = math.sqrt(alpha), math.sqrt(1.0 - alpha)
    if prediction_type == "epsilon":
        return (x - spread * pred) / signal, pred
    if prediction_type == "v_prediction":
        return signal * x - spread * pred, signal * pred + spread * x
    if prediction_type == "sample":
        return pred, (x - signal * pred) / spread
    raise UserError(f"prediction_type: expected epsilon, v_prediction or sample, got {prediction_type!r}; mend the scheduler's config.")


class _Spaced:
    """Respaced timesteps and their noise levels; strength keeps the last part of them."""

    def __init__(self, alphas_cumprod: Tensor, prediction_type: str, num_steps: int, *, strength: float = 1.0):
        full = alphas_cumprod.double().tolist()
        self.prediction_type = prediction_type
        steps = spaced_timesteps(num_steps, len(full))
        self._alphas, self._alphas_prev = self._noise_levels(full, steps)
        kept = kept_steps(len(steps), strength)
        self._kept = kept
        self.timesteps: Sequence[float] = steps[:kept][::-1]
        self._start_alpha = full[steps[kept - 1]]

    def _noise_levels(self, full: list[float], steps: list[int]) -> tuple[list[float], list[float]]:
        levels = [full[s] for s in steps]
        return levels, [1.0, *levels[:-1]]

    def start(self, z_lr: Tensor, noise: Tensor, *, from_lr: bool) -> Tensor:
        """x_T = sqrt(a) z_lr + sqrt(1-a) noise with a of the full schedule at the first timestep, or the noise alone."""
        if not from_lr:
            return noise
        return math.sqrt(self._start_alpha) * z_lr + math.sqrt(1.0 - self._start_alpha) * noise

    def model_input(self, x: Tensor, index: int) -> Tensor:
        return x

    def _level(self, index: int) -> tuple[int, float, float]:
        k = self._kept - 1 - index
        return k, self._alphas[k], self._alphas_prev[k]


class SpacedDDPM(_Spaced):
    """StableSR's sampler: posterior of the respaced chain (Ho et al., NeurIPS 2020), x0 not clipped, fixed small variance."""

    def coefficients(self, index: int) -> tuple[float, float, float]:
        """(c1, c2, log variance): x <- c1 x0 + c2 x + exp(log variance / 2) noise."""
        _, alpha, prev = self._level(index)
        beta = 1.0 - alpha / prev
        variance = beta * (1.0 - prev) / (1.0 - alpha)
        return beta * math.sqrt(prev) / (1.0 - alpha), (1.0 - prev) * math.sqrt(1.0 - beta) / (1.0 - alpha), math.log(max(variance, 1e-20))

    def step(self, pred: Tensor, x: Tensor, index: int, noise: StepNoise) -> Tensor:
        k, alpha, _ = self._level(index)
        x0, _ = clean_and_noise(pred, x, alpha, self.prediction_type)
        c1, c2, log_variance = self.coefficients(index)
        x = c1 * x0 + c2 * x
        return x + math.exp(0.5 * log_variance) * noise(index) if k > 0 else x


class SpacedDDIM(_Spaced):
    """DDIM on the respaced timesteps: every step uses the noise level of the timestep the network sees, down to none.

    x <- sqrt(a_prev) x0 + sqrt(1 - a_prev - sigma^2) epsilon + sigma noise,
    sigma = eta sqrt((1 - a_prev) / (1 - a) (1 - a / a_prev))          (Song et al., ICLR 2021)
    """

    def __init__(self, alphas_cumprod: Tensor, prediction_type: str, num_steps: int, *, strength: float = 1.0, eta: float = 0.0):
        super().__init__(alphas_cumprod, prediction_type, num_steps, strength=strength)
        self.eta = eta

    def sigma(self, index: int) -> float:
        _, alpha, prev = self._level(index)
        return self.eta * math.sqrt((1.0 - prev) / (1.0 - alpha) * (1.0 - alpha / prev))

    def step(self, pred: Tensor, x: Tensor, index: int, noise: StepNoise) -> Tensor:
        _, alpha, prev = self._level(index)
        x0, epsilon = clean_and_noise(pred, x, alpha, self.prediction_type)
        sigma = self.sigma(index)
        x = math.sqrt(prev) * x0 + math.sqrt(max(0.0, 1.0 - prev - sigma * sigma)) * epsilon
        return x + sigma * noise(index) if sigma > 0 else x


class OriginalDDIM(SpacedDDIM):
    """The pairing of StableSR's DDIM script, for parity only.

    The network sees the respaced timesteps (0 to 999), the noise levels come from 0, 1000//N, 2 (1000//N), ...: they do
    not match, and the last step ends at the noise level of timestep 0 instead of none.
    """

    def _noise_levels(self, full: list[float], steps: list[int]) -> tuple[list[float], list[float]]:
        uniform = list(range(0, len(full), len(full) // len(steps)))[: len(steps)]
        levels = [full[u] for u in uniform]
        return levels, [levels[0], *levels[:-1]]


class DiffusersSampler:
    """Any diffusers scheduler with a variance-preserving schedule behind the same seam and from the same starting latent."""

    def __init__(self, scheduler: Any, num_steps: int, *, strength: float, eta: float, seeds: Sequence[int], device: torch.device):
        scheduler.set_timesteps(num_steps, device=device)
        first = len(scheduler.timesteps) - kept_steps(len(scheduler.timesteps), strength)
        order = getattr(scheduler, "order", 1)
        first -= first % order  # a second-order scheduler lists each timestep twice; begin at a whole step
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first)
        self._scheduler = scheduler
        self._timesteps = scheduler.timesteps[first:]
        self.timesteps: Sequence[float] = self._timesteps.tolist()
        accepted = inspect.signature(scheduler.step).parameters
        # a stochastic scheduler draws through generators of its own, one per image
        generators = [sample_generator(seed, "scheduler") for seed in seeds]
        self._extra = {name: value for name, value in {"eta": eta, "generator": generators}.items() if name in accepted}

    def start(self, z_lr: Tensor, noise: Tensor, *, from_lr: bool) -> Tensor:
        t = self._timesteps[:1]
        if from_lr:
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
    scheduler: Any,
    num_steps: int,
    *,
    strength: float = 1.0,
    eta: float = 0.0,
    seeds: Sequence[int] = (),
    device: torch.device | str = "cpu",
) -> Sampler:
    """The sampler asked for by name; None takes the one the pipeline's scheduler stands for.

    Args:
        name: ddpm, ddim, ddim-original, dpm++, unipc, euler, the class name of a diffusers scheduler, or None.
        scheduler: the pipeline's diffusers scheduler: betas and prediction_type come from it.
        num_steps: steps over the full schedule; `strength` keeps the last part of them.
        eta: DDIM's share of fresh noise, 0 to 1.
        seeds: one per image, for schedulers that draw noise themselves.
    Raises:
        UserError: an unknown name, or a schedule that is not variance preserving.
    """
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if alphas is None:
        raise UserError(f"scheduler: {type(scheduler).__name__} has no alphas_cumprod; use one of the DDPM family ({', '.join(SAMPLERS)}).")
    name = name or OWN.get(type(scheduler).__name__)
    kind = scheduler.config.prediction_type
    if name == "ddpm":
        return SpacedDDPM(alphas, kind, num_steps, strength=strength)
    if name == "ddim":
        return SpacedDDIM(alphas, kind, num_steps, strength=strength, eta=eta)
    if name == "ddim-original":
        return OriginalDDIM(alphas, kind, num_steps, strength=strength, eta=eta)
    spaced_timesteps(num_steps, len(alphas))
    own = type(scheduler).from_config(scheduler.config) if name is None else _by_name(name, scheduler, num_steps)
    return DiffusersSampler(own, num_steps, strength=strength, eta=eta, seeds=seeds, device=torch.device(device))


def _by_name(name: str, scheduler: Any, num_steps: int) -> Any:
    import diffusers

    cls = getattr(diffusers, SAMPLERS.get(name, name), None) if SAMPLERS.get(name, name).endswith("Scheduler") else None
    if cls is None:
        raise UserError(f"sampler: {name!r} is unknown; expected one of {', '.join(SAMPLERS)} or the name of a diffusers scheduler class.")
    try:
        # "linspace" begins at the last timestep, where the published start is noised; the others begin lower, but not with one step
        made = cls.from_config(scheduler.config, timestep_spacing="linspace" if num_steps > 1 else "trailing")
    except ImportError as error:
        raise MissingDependency(f"sampler: {name} needs a package that is not installed: {' '.join(str(error).split())}") from None
    if not hasattr(made, "add_noise") or not hasattr(made, "alphas_cumprod"):
        raise UserError(f"sampler: {name} is not of the DDPM family, which this model was trained for; use one of {', '.join(SAMPLERS)}.")
    return made


OWN = {"DDPMScheduler": "ddpm", "DDIMScheduler": "ddim"}
SAMPLERS = {
    "ddpm": "",
    "ddim": "",
    "ddim-original": "",
    "dpm++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
}
