"""The adversarial loss: a discriminator that learns beside the trained networks, on the same batches."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from sslsr_diffusion.losses.base import Means, NoiseGate, PixelLoss, chosen, pixels, share
from sslsr_diffusion.losses.discriminators import LEAST_SIDE, PatchDiscriminator, UNetDiscriminator, VGGDiscriminator, start_orthogonally
from sslsr_diffusion.losses.files import load_into, read_tensors
from sslsr_diffusion.losses.local import flat_areas, gradient_map
from sslsr_diffusion.losses.objectives import OBJECTIVES, Objective
from sslsr_diffusion.seeding import derive_seed
from sslsr_diffusion.types import Given, Outputs

_Beta = Annotated[float, Field(ge=0, lt=1)]
PATCH_LAYERS = 3


class GANSettings(NoiseGate):
    """A discriminator learns to tell predictions from ground truth, the trained networks learn to deceive it."""

    kind: Literal["gan"] = "gan"
    objective: Literal["vanilla", "relativistic", "lsgan", "hinge"] = Field(
        "vanilla", description="vanilla (Real-ESRGAN); relativistic: average, against the mean of the other side (ESRGAN); lsgan; hinge."
    )
    discriminator: Literal["vgg", "unet_sn", "patch"] = Field(
        "unet_sn",
        description="unet_sn: a logit per pixel, spectral norm (Real-ESRGAN); vgg: one per picture, batch norm (SRGAN, ESRGAN); patch: "
        "one per patch (PatchGAN).",
    )
    weight: float = Field(0.1, ge=0, description="Factor of the generator's term (Real-ESRGAN: 0.1; ESRGAN: 0.005; StableSR: 0.025).")
    start_step: int = Field(1, ge=1, description="First optimizer step that has the generator's term.")
    learn_step: int | None = Field(
        None,
        ge=1,
        description="First optimizer step in which the discriminator learns; null: start_step. Before both, nothing is computed.",
    )
    sees: Literal["pixels", "gradient"] = Field(
        "pixels", description="What the discriminator sees: pictures, or their gradient maps (SPSR)."
    )
    mask: Literal["none", "flat"] = Field("none", description="flat: flat areas of the ground truth are black on both sides (BebyGAN).")
    lr: float = Field(1e-4, gt=0, description="Learning rate of the discriminator's Adam.")
    lr_schedule: Literal["run", "constant"] = Field(
        "run", description="run: the rate falls as that of the trained networks; constant: it stays."
    )
    betas: tuple[_Beta, _Beta] = Field((0.9, 0.99), description="Decay of its moments.")
    r1_weight: float = Field(0.0, ge=0, description="gamma of the R1 penalty gamma / 2 |d D(hr) / d hr|^2; 0: none, as published.")
    width: int = Field(64, ge=1, description="Channels of the discriminator's first layer.")
    layers: int | None = Field(
        None, ge=1, le=5, description="Of `patch`: layers between the first and the last; null: 3, which judge patches of 70 pixels."
    )
    init: Literal["default", "orthogonal"] = Field("default", description="orthogonal: times 0.2, as BSRGAN's trainer draws it.")
    file: str | None = Field(None, description="Weights that the discriminator starts with, by the published names; null: drawn.")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.layers is not None and self.discriminator != "patch":
            raise ValueError(f"layers: is of discriminator patch, here it is {self.discriminator}; leave it out.")
        if self.init != "default" and self.file is not None:
            raise ValueError(f"init: {self.init} has no effect on weights that come from a file; leave one of them out.")
        return self

    def misfits(self, *, side: int, alone: bool) -> Iterator[tuple[str, str]]:
        layers = self.layers or PATCH_LAYERS
        if self.discriminator == "patch" and side < 3 * 2**layers:
            yield "layers", f"{layers} are too many for pictures of {side} pixels a side."
        if self.discriminator == "vgg" and side < LEAST_SIDE:
            yield "discriminator", f"vgg needs pictures of at least {LEAST_SIDE} pixels a side, these have {side}."
        if self.discriminator == "unet_sn" and side % 8:
            yield "discriminator", f"unet_sn needs pictures of a multiple of 8 pixels a side, these have {side}."


class GANLoss(PixelLoss):
    """weight * objective of D(sr), and of D(hr) where that is relative; the discriminator D learns from sr without gradient.

    Means run over all logits of a micro-batch, relativistic ones and batch statistics too. D stays in training mode.
    Besides being a loss it is a learner: per micro-batch `learn`, per optimizer step `update`; `network`, `optimizer` and `step` are
    what a checkpoint keeps.
    """

    settings_class = GANSettings

    def __init__(self, settings: GANSettings, means: Means = Means()) -> None:  # noqa: B008 - it is frozen
        super().__init__(settings)
        self.step = 1  # the optimizer step that is going on
        with torch.random.fork_rng(devices=[]), torch.device("meta" if means.shapes else "cpu"):
            torch.manual_seed(derive_seed(means.seed, self.name))
            self.network: nn.Module = _discriminator(settings, means.side)
            if settings.init == "orthogonal":
                start_orthogonally(self.network)
        self.objective: Objective = OBJECTIVES[settings.objective]
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=settings.lr, betas=settings.betas)

    @classmethod
    def build(cls, settings: GANSettings, means: Means) -> Self:
        built = cls(settings, means)
        if settings.file is not None and not means.shapes:
            key = f"losses: {settings.called}.file"
            load_into(built.network, read_tensors(settings.file, key), path=settings.file, key=key)
        return built

    @classmethod
    def check(cls, settings: GANSettings) -> str | None:
        if settings.file is None:
            return None
        return f"{settings.called}: {len(read_tensors(settings.file, f'{settings.called}.file'))} tensors in {settings.file}"

    @property
    def learns(self) -> bool:
        return self.step >= (self.settings.start_step if self.settings.learn_step is None else self.settings.learn_step)

    @property
    def counts(self) -> bool:
        return self.step >= self.settings.start_step

    def active(self, given: Given) -> Tensor:
        return super().active(given) & (self.learns or self.counts)

    def play(self, outputs: Outputs) -> Tensor:
        return self._generator(outputs)

    def __call__(self, outputs: Outputs, count: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        kept = chosen(self, outputs)
        assert kept.sr is not None
        self.network.requires_grad_(False)  # the generator's gradient passes through and leaves nothing behind
        samples = len(kept.sr) if self.counts else 0
        total = self._generator(kept) * samples if samples else 0 * kept.sr.sum()
        value = share(total, count, self.count(outputs))
        return self.settings.weight * value, {self.name: value.detach()}

    def learn(self, outputs: Outputs, count: Tensor | None = None) -> dict[str, Tensor]:
        """Add this micro-batch to the discriminator's gradient; its raw loss."""
        kept = chosen(self, outputs)
        assert kept.sr is not None
        self.network.requires_grad_(True)
        samples = len(kept.sr) if self.learns else 0
        value = torch.zeros((), device=kept.sr.device)
        if samples:
            real, fake = self._seen(kept)
            for half in self.objective.discriminator(self.network, real, fake.detach()):
                value = value + self._learn(half, samples, count, outputs)
            if self.settings.r1_weight:
                self._learn(self._penalty(real), samples, count, outputs)
        return {f"{self.name}/discriminator": value}

    def _learn(self, mean: Tensor, samples: int, count: Tensor | None, outputs: Outputs) -> Tensor:
        """Go backward from a mean over the micro-batch's samples, as its share of the whole batch."""
        value = share(mean * samples, count, self.count(outputs))
        value.backward()
        return value.detach()

    def _generator(self, outputs: Outputs) -> Tensor:
        return self.objective.generator(self.network, *self._seen(outputs))

    def _seen(self, outputs: Outputs) -> tuple[Tensor, Tensor]:
        """Ground truth and prediction as the discriminator sees them, [K, 3, H, W] each."""
        sr, hr = pixels(outputs)
        seen = [gradient_map(hr), gradient_map(sr)] if self.settings.sees == "gradient" else [hr, sr]
        if self.settings.mask == "flat":
            textured = ~flat_areas(hr)
            seen = [side * textured for side in seen]
        return seen[0], seen[1]

    def _penalty(self, real: Tensor) -> Tensor:
        """gamma / 2 * mean |d D(x) / d x|^2 at ground truth   (Mescheder et al., ICML 2018)"""
        real = real.detach().requires_grad_()
        (slope,) = torch.autograd.grad(self.network(real).sum(), real, create_graph=True)
        return self.settings.r1_weight / 2 * slope.square().flatten(1).sum(dim=1).mean()

    def update(self, *, sound: bool, pace: float = 1.0) -> None:
        """End an optimizer step; gradients that cannot be trusted are thrown away, and without any there is no step."""
        gradients = [parameter.grad.norm() for parameter in self.network.parameters() if parameter.grad is not None]
        if sound and gradients and 0 < float(torch.stack(gradients).norm()) < float("inf"):
            for group in self.optimizer.param_groups:
                group["lr"] = self.settings.lr * (pace if self.settings.lr_schedule == "run" else 1.0)
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1


def _discriminator(settings: GANSettings, side: int) -> nn.Module:
    kinds: dict[str, Any] = {
        "vgg": lambda: VGGDiscriminator(settings.width, side),
        "unet_sn": lambda: UNetDiscriminator(settings.width),
        "patch": lambda: PatchDiscriminator(settings.width, settings.layers or PATCH_LAYERS),
    }
    network: nn.Module = kinds[settings.discriminator]()
    return network
