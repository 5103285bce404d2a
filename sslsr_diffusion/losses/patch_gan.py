"""The adversarial loss: a discriminator of patches that learns beside the trained networks, on the same batches."""

from collections.abc import Iterator
from typing import Annotated, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from sslsr_diffusion.losses.base import Means, NoiseGate, PixelLoss, decoded_active, pixels, share
from sslsr_diffusion.seeding import derive_seed
from sslsr_diffusion.types import Given, Outputs

_Beta = Annotated[float, Field(ge=0, lt=1)]


class PatchGANSettings(NoiseGate):
    """PatchGAN with hinge loss (StableSR stage 2)."""

    kind: Literal["patch_gan"] = "patch_gan"
    weight: float = Field(0.025, ge=0, description="Factor of the generator's term (StableSR: 0.025).")
    start_step: int = Field(501, ge=1, description="First optimizer step that has it; before, the discriminator does not learn either.")
    lr: float = Field(5e-5, gt=0, description="Learning rate of the discriminator's Adam (StableSR: 5e-5).")
    betas: tuple[_Beta, _Beta] = Field((0.5, 0.9), description="Decay of its moments (StableSR: 0.5, 0.9).")
    layers: int = Field(3, ge=1, le=5, description="Layers between the first and the last; 3 judge patches of 70 pixels (StableSR: 3).")
    width: int = Field(64, ge=1, description="Channels of the first layer (StableSR: 64).")

    def misfits(self, *, side: int, alone: bool) -> Iterator[tuple[str, str]]:
        if side < 3 * 2**self.layers:
            yield "layers", f"{self.layers} are too many for pictures of {side} pixels a side."


class PatchDiscriminator(nn.Sequential):
    """Isola et al., CVPR 2017: 4x4 convolutions, `layers` of them (the first included) with stride 2, one logit per patch.

    Normalised per picture: the published batch norm at its batch of 1, and no picture's logits depend on its neighbours.
    """

    def __init__(self, layers: int, width: int) -> None:
        parts: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        channels = width
        for layer in range(1, layers + 1):
            wider = width * min(2**layer, 8)
            parts.append(nn.Conv2d(channels, wider, 4, 2 if layer < layers else 1, 1, bias=False))
            parts += [nn.InstanceNorm2d(wider, affine=True), nn.LeakyReLU(0.2)]
            channels = wider
        super().__init__(*parts, nn.Conv2d(channels, 1, 4, 1, 1))
        for part in self:
            if isinstance(part, nn.Conv2d):
                nn.init.normal_(part.weight, 0.0, 0.02)
            elif isinstance(part, nn.InstanceNorm2d):
                nn.init.normal_(part.weight, 1.0, 0.02)


class PatchGANLoss(PixelLoss):
    """Generator: -mean D(sr).  Discriminator: (mean relu(1 - D(hr)) + mean relu(1 + D(sr))) / 2, sr without gradient.

    Besides being a loss it is a learner: per micro-batch `learn`, per optimizer step `update`; `network`, `optimizer` and `step` are
    what a checkpoint keeps.
    """

    settings_class = PatchGANSettings

    def __init__(self, settings: PatchGANSettings, *, seed: int = 0) -> None:
        super().__init__(settings)
        self.step = 1  # the optimizer step that is going on
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, self.name))
            self.network = PatchDiscriminator(settings.layers, settings.width)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=settings.lr, betas=settings.betas)

    @classmethod
    def build(cls, settings: PatchGANSettings, means: Means) -> Self:
        return cls(settings, seed=means.seed)

    def play(self, sr: Tensor, hr: Tensor) -> Tensor:
        return self.network.to(sr.device)(sr).mean()

    def to(self, device: torch.device) -> None:
        self.network.to(device)

    def active(self, given: Given) -> Tensor:
        return super().active(given) & (self.step >= self.settings.start_step)

    def __call__(self, outputs: Outputs, count: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        sr, _ = pixels(outputs)
        keep = decoded_active(self, outputs)
        self.network.requires_grad_(False)  # the generator's gradient passes through and leaves nothing behind
        total = -self._logits(sr[keep]).sum() if bool(keep.any()) else 0 * sr.sum()
        value = share(total, count, self.count(outputs))
        return self.settings.weight * value, {self.name: value.detach()}

    def learn(self, outputs: Outputs, count: Tensor | None = None) -> dict[str, Tensor]:
        """Add this micro-batch to the discriminator's gradient; its raw loss."""
        sr, hr = pixels(outputs)
        keep = decoded_active(self, outputs)
        self.network.requires_grad_(True)
        value = torch.zeros((), device=sr.device)
        if bool(keep.any()):
            real, fake = self._hinge(hr[keep], -1.0), self._hinge(sr[keep].detach(), 1.0)
            value = share(0.5 * (real + fake).sum(), count, self.count(outputs))
            value.backward()
        return {f"{self.name}/discriminator": value.detach()}

    def update(self, *, sound: bool) -> None:
        """End an optimizer step; gradients that cannot be trusted are thrown away, and without any there is no step."""
        gradients = [parameter.grad.norm() for parameter in self.network.parameters() if parameter.grad is not None]
        if sound and gradients and 0 < float(torch.stack(gradients).norm()) < float("inf"):
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1

    def _logits(self, pictures: Tensor) -> Tensor:
        """[K], the mean over a picture's patches."""
        return self.network(pictures * 2 - 1).flatten(1).mean(dim=1)

    def _hinge(self, pictures: Tensor, sign: float) -> Tensor:
        return torch.relu(1 + sign * self.network(pictures * 2 - 1)).flatten(1).mean(dim=1)
