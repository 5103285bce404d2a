"""Variational score distillation: the base teaches its own one-step child, and a second LoRA learns how the child's pictures look."""

from typing import Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from sslsr_diffusion.losses.base import LossSettings, Means, Prior, share
from sslsr_diffusion.losses.learning import LearnerSettings, LearningLoss
from sslsr_diffusion.seeding import derive_seed, sample_generator
from sslsr_diffusion.types import Outputs

LOW, HIGH = 0.02, 0.98  # of the process: where the teacher is asked   (DMD, OSEDiff)


class VSDSettings(LearnerSettings, LossSettings):
    """The latents shall be as likely under the base as under a LoRA of it that learns their distribution (OSEDiff)."""

    kind: Literal["vsd"] = "vsd"
    weight: float = Field(1.0, ge=0, description="Factor of this term in the sum (OSEDiff: 1).")
    guidance: float = Field(7.5, ge=1, description="Classifier-free guidance of the teacher (OSEDiff: 7.5); 1: none.")
    negative_prompt: str = Field("", description="What guidance leads away from.")
    rank: int = Field(4, ge=1, description="Rank of the score network's LoRA, on the same layers as the model's own (OSEDiff: 4).")
    lr: float = Field(5e-5, gt=0, description="Learning rate of the score network's Adam (OSEDiff: 5e-5).")
    betas: tuple[float, float] = Field((0.9, 0.999), description="Decay of its moments.")


class VSDLoss(LearningLoss):
    """mean |z - stop(z - g)|^2,  g = (x_s - x_b) / mean |z - x_b|,  z the predicted clean latents: so the gradient is 2 g / numbers of z

    x_b and x_s are the clean latents that the guided base and the score network see in z_t = add_noise(z, n, t), t uniform in the middle
    96 % of the process. The score network, the base with a LoRA, learns the base's own objective on z without gradient, t uniform.
    (Wang et al., NeurIPS 2023, ProlificDreamer; the weight of g: Yin et al., CVPR 2024, equation 8; Wu et al., NeurIPS 2024, OSEDiff)
    """

    settings_class = VSDSettings
    reads = frozenset({"z0", "prior"})

    def __init__(self, settings: VSDSettings, prior: Prior, means: Means = Means()) -> None:  # noqa: B008 - it is frozen
        super().__init__(settings)
        self.prior, self.seed, self.half = prior, means.seed, means.half
        self.teach(prior.network)

    @classmethod
    def build(cls, settings: VSDSettings, means: Means) -> Self:
        assert means.prior is not None  # of a task that gives "prior"
        asked = {"rank": settings.rank, "negative_prompt": settings.negative_prompt}
        return cls(settings, means.prior(seed=derive_seed(means.seed, settings.called), **asked), means)

    def to(self, device: torch.device) -> None:
        self.prior.to(device)

    def __call__(self, outputs: Outputs, count: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        z0 = _latents(outputs)
        last = self.prior.process.last
        with torch.no_grad():
            t, noise = self._drawn(outputs, "teacher", round(LOW * last), round(HIGH * last))
            zt = self.prior.process.add_noise(z0, noise, t)
            base = self._clean(zt, t, guidance=self.settings.guidance, learned=False)
            score = self._clean(zt, t, guidance=1.0, learned=True)
            distance = (z0 - base).abs().mean(dim=(1, 2, 3), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
            aim = z0 - (score - base) / distance
        errors = (z0 - aim).square().flatten(1).mean(dim=1)  # [B]
        value = share(errors.sum(), count, self.count(outputs))
        return self.settings.weight * value, {self.name: value.detach()}

    def learn(self, outputs: Outputs, count: Tensor | None = None) -> dict[str, Tensor]:
        """Add this micro-batch to the gradient of the score network's LoRA; its raw loss."""
        z0, process = _latents(outputs).detach(), self.prior.process
        t, noise = self._drawn(outputs, "score", 0, process.last)
        pred = self._predict(process.add_noise(z0, noise, t), t, guidance=1.0, learned=True)
        mean = (pred - process.target(z0, noise, t)).square().mean()
        return {f"{self.name}/score": self.learn_from(mean, len(z0), count, self.count(outputs))}

    def _clean(self, zt: Tensor, t: Tensor, *, guidance: float, learned: bool) -> Tensor:
        pred = self._predict(zt, t, guidance=guidance, learned=learned)
        clean: Tensor = self.prior.process.clean_and_noise(pred, zt, t)[0]
        return clean

    def _predict(self, zt: Tensor, t: Tensor, *, guidance: float, learned: bool) -> Tensor:
        with torch.autocast(zt.device.type, self.half, enabled=self.half is not None):
            return self.prior.predict(zt, t, guidance=guidance, learned=learned).float()

    def _drawn(self, outputs: Outputs, purpose: str, low: int, high: int) -> tuple[Tensor, Tensor]:
        """A timestep in low..high and a noise per sample, [B] and [B, C, h, w], from (seed, global sample index) alone."""
        assert outputs.z0 is not None
        assert outputs.index is not None
        times, noises = [], []
        for index in outputs.index.tolist():
            generator = sample_generator(self.seed, index, self.name, purpose)
            times.append(torch.randint(low, high + 1, (), generator=generator, device="cpu"))
            noises.append(torch.randn(outputs.z0.shape[1:], generator=generator, device="cpu"))
        return torch.stack(times).to(outputs.z0.device), torch.stack(noises).to(outputs.z0.device)


def _latents(outputs: Outputs) -> Tensor:
    if outputs.z0 is None:
        raise ValueError("the vsd loss needs Outputs.z0, which this step did not compute")
    return outputs.z0.float()
