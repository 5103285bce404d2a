"""Task `base`: a latent diffusion model that sees no low-resolution picture, the start of task `diffusion`."""

from pathlib import Path
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from sslsr_diffusion.inference.sampling import sample_latents
from sslsr_diffusion.models.networks import LatentNetworks
from sslsr_diffusion.tasks.diffusion import DiffusionTask
from sslsr_diffusion.tasks.frame import Frame, TaskSettings

STRENGTH = 0.5  # validation noises to the middle of the process


class BaseTaskSettings(TaskSettings):
    """A latent diffusion model of photographs, in the place that Stable Diffusion has in the published recipes."""

    kind: Literal["base"] = "base"
    sampling_steps: int = Field(20, ge=1, description="Steps in which validation samples the noised held-out pictures back.")


class BaseTask(DiffusionTask):
    """Task `diffusion` without a low-resolution picture; all of the denoiser trains, and no pixels are decoded."""

    settings: ClassVar[type[TaskSettings]] = BaseTaskSettings
    makes_upscaler: ClassVar[bool] = False
    gives: ClassVar[frozenset[str]] = frozenset({"pred"})
    label: ClassVar[str] = "denoised"

    def __init__(self, networks: LatentNetworks, *, seed: int, sampling_steps: int = 20) -> None:
        super().__init__(networks, seed=seed)
        self.sampling_steps = sampling_steps

    @classmethod
    def build(cls, settings: BaseTaskSettings, frame: Frame) -> Self:  # type: ignore[override]  # settings of its own
        networks = frame.build("base")
        assert isinstance(networks, LatentNetworks)
        return cls(networks, seed=frame.seed, sampling_steps=settings.sampling_steps)

    def restore(self, lr: Tensor, hr: Tensor, seed: int) -> Tensor:
        """The held-out picture, noised to the middle of the process and sampled back."""
        nets, unit = self.networks, self.networks.size().multiple_of
        hr = hr.to(nets.device)
        height, width = hr.shape[-2:]
        padded = F.pad(hr, (0, -width % unit, 0, -height % unit), mode="replicate")
        noise = torch.randn(nets.codec.noise_shape(padded), generator=torch.Generator().manual_seed(seed)).to(hr)
        with torch.no_grad():
            latents = nets.codec.encode(padded, noise)
            sampled = sample_latents(nets, latents, nets.see(padded, noise), [seed], self.sampling_steps, seed=seed, strength=STRENGTH)
            return nets.codec.decode(sampled)[..., :height, :width]

    def save(self, folder: Path) -> None:
        self.networks.save(folder)
