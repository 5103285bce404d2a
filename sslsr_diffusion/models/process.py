"""The noise process z_t = signal_t z_0 + spread_t n, and what a prediction says about z_0 and n: one truth for training and sampling.

A base model names its process by its diffusers scheduler; `Process.of` reads that, or refuses it by name.
"""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.tables import named

DDPM_KEYS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type", "rescale_betas_zero_snr")
FLOW_KEYS = ("num_train_timesteps", "shift", "use_dynamic_shifting", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")
OTHER_LEVELS = ("invert_sigmas", "shift_terminal", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")  # of a flow


class Process(nn.Module):
    """Noise levels by timestep index t = 0 (nearly clean) .. `last`. Tables are float32 buffers, so they move with the networks.

    All functions take t as [B] int64 and broadcast over [B, C, h, w].
    """

    signal: Tensor  # [T] float32
    spread: Tensor  # [T] float32

    def __init__(self, signal: Tensor, spread: Tensor, scheduler_config: Mapping[str, Any]) -> None:
        """`signal`, `spread`: [T] float64; `scheduler_config`: of the diffusers scheduler that a saved pipeline gets."""
        super().__init__()
        self.scheduler_config = dict(scheduler_config)
        self.register_buffer("signal", signal.float(), persistent=False)
        self.register_buffer("spread", spread.float(), persistent=False)
        self._levels = list(zip(signal.tolist(), spread.tolist()))
        # whether the last timestep still shows the picture: sampling then starts from the low-resolution one, not from next to nothing
        self.starts_from_lr = bool(signal[-1] ** 2 > spread[-1] ** 2)

    @classmethod
    def of(cls, config: Mapping[str, Any], name: str | None = None) -> "Process":
        """The process that scheduler_config.json's content stands for; `name`: the scheduler's class, None: what the config says.

        UserError for a scheduler class, prediction type or setting that is not known here; nothing is guessed.
        """
        name = name or config.get("_class_name")
        if name not in PROCESSES:
            raise UserError(f"scheduler: expected one of {', '.join(PROCESSES)}, got {name}; its noise process is not known here.")
        kind: type[Process] = named(f"sslsr_diffusion.models.{PROCESSES[name]}")
        return kind.from_config({**config, "_class_name": name})

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Process":
        raise NotImplementedError

    @property
    def last(self) -> int:
        """The last timestep: the most noise."""
        return len(self.signal) - 1

    def level(self, t: int) -> tuple[float, float]:
        """signal_t and spread_t as plain numbers."""
        return self._levels[t]

    def levels(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """signal_t and spread_t, float32 (at least), shaped to broadcast over `like`: half precision latents lose nothing here."""
        shape, dtype = (-1, *(1,) * (like.ndim - 1)), torch.promote_types(like.dtype, torch.float32)
        t = t.to(self.signal.device)
        return tuple(table[t].reshape(shape).to(like.device, dtype) for table in (self.signal, self.spread))  # type: ignore[return-value]

    def add_noise(self, z0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """z_t = signal z_0 + spread n."""
        signal, spread = self.levels(t, z0)
        return signal * z0 + spread * noise

    def noise_to(self, z0: Tensor, other: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The noise that leads from z0 to where `noise` leads from `other`: n + signal / spread (other - z_0)."""
        signal, spread = self.levels(t, z0)
        return noise + signal / spread * (other - z0)

    def noise_level(self, t: Tensor) -> Tensor:
        """spread / signal, [B] float32: 0 clean, infinite pure noise. Its inverse square is the signal-to-noise ratio."""
        t = t.to(self.signal.device)
        return self.spread[t] / self.signal[t]

    def timestep(self, t: Tensor) -> Tensor:
        """What the network is told for timestep index t, [B]: t itself, unless a process says otherwise."""
        return t

    def timestep_of(self, t: int) -> float:
        """The same for one plain number."""
        return t

    def target(self, z0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should say."""
        raise NotImplementedError

    def clean_and_noise(self, pred: Tensor, zt: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """z_0 and n that z_t and the prediction imply. No clipping."""
        raise NotImplementedError

    def clean_gain(self, t: Tensor) -> Tensor:
        """|d z_0 / d prediction|, [B] float32: turns an error of the prediction into one of z_0."""
        raise NotImplementedError

    def until(self, last: int) -> Self:
        """The same process with the timesteps 0 .. `last` only; timesteps keep their meaning. UserError where it ends before."""
        raise NotImplementedError

    def scheduler(self) -> Any:
        """The diffusers scheduler of a saved pipeline."""
        raise NotImplementedError


class DDPM(Process):
    """signal = sqrt(abar_t), spread = sqrt(1 - abar_t)   (Ho et al., NeurIPS 2020); predicts n, v (Salimans and Ho, ICLR 2022) or z_0.

    StableSR neither clips z_0 nor learns the variance, whatever the base model's own scheduler did.
    """

    def __init__(self, alphas_cumprod: Tensor, scheduler_config: Mapping[str, Any]) -> None:
        """`alphas_cumprod`: [T], decreasing."""
        alphas = alphas_cumprod.double().cpu()
        super().__init__(alphas.sqrt(), (1 - alphas).sqrt(), scheduler_config)
        self.alphas_cumprod: list[float] = alphas.tolist()
        self.prediction_type = str(scheduler_config.get("prediction_type", "epsilon"))
        if self.prediction_type not in ("epsilon", "v_prediction", "sample"):
            raise UserError(f"scheduler: expected prediction_type epsilon, v_prediction or sample, got {self.prediction_type!r}.")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "DDPM":
        if config.get("use_flow_sigmas"):
            raise UserError(
                f"scheduler: {config.get('_class_name')} with use_flow_sigmas is a flow process; expected use_flow_sigmas: false."
            )
        kept = {key: config[key] for key in DDPM_KEYS if key in config}
        return cls(_ddpm_scheduler(kept).alphas_cumprod, kept)

    def target(self, z0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """n for epsilon, v = sqrt(abar_t) n - sqrt(1 - abar_t) z_0 for v_prediction, z_0 for sample."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return z0
        signal, spread = self.levels(t, z0)
        return signal * noise - spread * z0

    def clean_and_noise(self, pred: Tensor, zt: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        signal, spread = self.levels(t, zt)
        if self.prediction_type == "epsilon":
            return (zt - spread * pred) / signal, pred
        if self.prediction_type == "sample":
            return pred, (zt - signal * pred) / spread
        return signal * zt - spread * pred, signal * pred + spread * zt

    def clean_gain(self, t: Tensor) -> Tensor:
        if self.prediction_type == "epsilon":
            return self.noise_level(t)
        return self.spread[t.to(self.spread.device)] if self.prediction_type == "v_prediction" else torch.ones_like(self.noise_level(t))

    def until(self, last: int) -> "DDPM":
        if last > self.last:
            raise UserError(f"expected a timestep of at most {self.last}, the last of this process; got {last}.")
        betas = _ddpm_scheduler(self.scheduler_config).betas
        config = {"num_train_timesteps": last + 1, "trained_betas": betas[: last + 1].tolist(), "prediction_type": self.prediction_type}
        return DDPM(torch.tensor(self.alphas_cumprod[: last + 1], dtype=torch.float64), config)

    def scheduler(self) -> Any:
        return _ddpm_scheduler(self.scheduler_config)


class Flow(Process):
    """signal = 1 - sigma_t, spread = sigma_t; predicts the velocity n - z_0   (Lipman et al., ICLR 2023; Liu et al., ICLR 2023).

    sigma of index t is (t + 1) / T, shifted as the scheduler's `shift` s says: s x / (1 + (s - 1) x)   (Esser et al., ICML 2024, eq. 23).
    A scheduler that shifts by the picture's size (use_dynamic_shifting) has its unshifted levels here.
    """

    def __init__(self, sigmas: Tensor, scheduler_config: Mapping[str, Any]) -> None:
        """`sigmas`: [T] in (0, 1], increasing."""
        sigmas = sigmas.double().cpu()
        super().__init__(1 - sigmas, sigmas, scheduler_config)
        self.num_train_timesteps = int(scheduler_config.get("num_train_timesteps", 1000))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Flow":
        odd = [key for key in OTHER_LEVELS if config.get(key)]
        if odd:
            raise UserError(f"scheduler: expected a flow without {odd[0]}, got {config[odd[0]]!r}; its noise levels are not known here.")
        kept = {key: config[key] for key in FLOW_KEYS if key in config}
        steps, shift = int(kept.get("num_train_timesteps", 1000)), float(kept.get("shift", 1.0))
        sigmas = torch.arange(1, steps + 1, dtype=torch.float64) / steps
        if not kept.get("use_dynamic_shifting", False):
            sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
        return cls(sigmas, kept)

    def at(self, *sigmas: float) -> "Flow":
        """The same process with these levels alone, as index 0, 1, ...; networks are told any sigma, not those of a scheduler's steps."""
        return Flow(torch.tensor(sigmas, dtype=torch.float64), self.scheduler_config)

    def timestep(self, t: Tensor) -> Tensor:
        """T sigma_t, as diffusers' flow pipelines tell their networks."""
        return self.num_train_timesteps * self.spread[t.to(self.spread.device)]

    def timestep_of(self, t: int) -> float:
        return self.num_train_timesteps * self.level(t)[1]

    def target(self, z0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return noise - z0

    def clean_and_noise(self, pred: Tensor, zt: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        signal, spread = self.levels(t, zt)
        return zt - spread * pred, zt + signal * pred

    def clean_gain(self, t: Tensor) -> Tensor:
        return self.spread[t.to(self.spread.device)]

    def until(self, last: int) -> "Flow":
        raise UserError("expected a process with betas, got a flow, whose scheduler cannot say where it ends; leave start_timestep out.")

    def scheduler(self) -> Any:
        from diffusers import FlowMatchEulerDiscreteScheduler

        return FlowMatchEulerDiscreteScheduler(**self.scheduler_config)


def _ddpm_scheduler(kept: Mapping[str, Any]) -> Any:
    from diffusers import DDPMScheduler

    return DDPMScheduler(**kept, clip_sample=False, variance_type="fixed_small")


_OF_DDPM = (
    "DDPM DDIM PNDM EulerDiscrete EulerAncestralDiscrete DPMSolverMultistep DPMSolverSinglestep UniPCMultistep DEISMultistep "
    "HeunDiscrete LMSDiscrete KDPM2Discrete KDPM2AncestralDiscrete LCM TCD SASolver DDIMParallel DDPMParallel"
)
# scheduler class in a base's folder -> the process that it stands for
PROCESSES: dict[str, str] = {
    **{f"{name}Scheduler": "process:DDPM" for name in _OF_DDPM.split()},
    "FlowMatchEulerDiscreteScheduler": "process:Flow",
    "FlowMatchHeunDiscreteScheduler": "process:Flow",
}
