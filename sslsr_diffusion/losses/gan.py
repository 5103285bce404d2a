"""The adversarial loss: a discriminator that learns beside the trained networks, on the same batches."""

from collections.abc import Iterator
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from sslsr_diffusion.errors import MissingDependency
from sslsr_diffusion.losses.base import Means, NoiseGate, PixelLoss, chosen, decoded_active, latents, pixels, share
from sslsr_diffusion.losses.convnext import ConvNextSettings, check_convnext, convnext_discriminator
from sslsr_diffusion.losses.discriminators import LEAST_SIDE, PatchDiscriminator, UNetDiscriminator, VGGDiscriminator, start_orthogonally
from sslsr_diffusion.losses.files import load_into, read_tensors
from sslsr_diffusion.losses.learning import LearnerSettings, LearningLoss
from sslsr_diffusion.losses.local import flat_areas, gradient_map
from sslsr_diffusion.losses.objectives import OBJECTIVES, Objective, Vanilla, levels
from sslsr_diffusion.seeding import derive_seed, sample_generator, seeded
from sslsr_diffusion.types import Given, Outputs

PATCH_LAYERS = 3


class GANSettings(LearnerSettings, NoiseGate):
    """A discriminator learns to tell predictions from ground truth, the trained networks learn to deceive it."""

    kind: Literal["gan"] = "gan"
    objective: Literal["vanilla", "relativistic", "lsgan", "hinge"] = Field(
        "vanilla", description="vanilla (Real-ESRGAN); relativistic: average, against the mean of the other side (ESRGAN); lsgan; hinge."
    )
    real_label: float = Field(1.0, gt=0, le=1, description="Of `vanilla`: what the discriminator is told of the ground truth (HYPIR: 0.8).")
    space: Literal["pixels", "latent"] = Field(
        "pixels",
        description="latent: the discriminator sees the predicted clean latents and those of the ground truth; nothing is decoded.",
    )
    discriminator: Literal["vgg", "unet_sn", "patch", "convnext"] = Field(
        "unet_sn",
        description="unet_sn: a logit per pixel, spectral norm (Real-ESRGAN); vgg: one per picture, batch norm (SRGAN, ESRGAN); patch: "
        "one per patch (PatchGAN); convnext: heads on the stages of a frozen ConvNeXt of open_clip, terms added over the stages (HYPIR, "
        "StrSR; extra `open-clip-torch`).",
    )
    convnext: ConvNextSettings | None = Field(None, description="Of `convnext`: which network; null: the published one.")
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
    r1_weight: float = Field(0.0, ge=0, description="gamma of the R1 penalty gamma / 2 |d D(hr) / d hr|^2; 0: none, as published.")
    r1_noise: float | None = Field(
        None,
        gt=0,
        description="In place of R1's slope: r1_weight times the mean squared change of the logits under uniform noise of up to so much "
        "(StrSR: 0.005 on [-1, 1], so 0.0025 here), which needs no second derivative.",
    )
    width: int = Field(64, ge=1, description="Channels of the discriminator's first layer; of `convnext`: inside its heads.")
    layers: int | None = Field(
        None, ge=1, le=5, description="Of `patch`: layers between the first and the last; null: 3, which judge patches of 70 pixels."
    )
    init: Literal["default", "orthogonal"] = Field("default", description="orthogonal: times 0.2, as BSRGAN's trainer draws it.")
    file: str | None = Field(None, description="Weights that the discriminator starts with, by the published names; null: drawn.")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for key, own in (("layers", "patch"), ("convnext", "convnext")):
            if getattr(self, key) is not None and self.discriminator != own:
                raise ValueError(f"{key}: is of discriminator {own}, here it is {self.discriminator}; leave it out.")
        if self.init != "default" and self.file is not None:
            raise ValueError(f"init: {self.init} has no effect on weights that come from a file; leave one of them out.")
        if self.real_label != 1 and self.objective != "vanilla":
            raise ValueError(f"real_label: is of objective vanilla, here it is {self.objective}; leave it out.")
        if self.r1_noise is not None and not self.r1_weight:
            raise ValueError("r1_noise: has no effect where r1_weight is 0; set that, too, or leave it out.")
        if self.discriminator == "convnext" and self.file is not None:
            raise ValueError("file: the heads of convnext are always drawn; leave it out (convnext.file is what they stand on).")
        self._fits_latents()
        return self

    def _fits_latents(self) -> None:
        pictures = {"discriminator": ("convnext",), "sees": ("gradient",), "mask": ("flat",)}
        for key, values in pictures.items() if self.space == "latent" else ():
            if getattr(self, key) in values:
                raise ValueError(f"{key}: {getattr(self, key)} is of pictures, and the discriminator sees latents; leave it or space out.")

    def misfits(self, *, side: int, alone: bool) -> Iterator[tuple[str, str]]:
        layers, seen = self.layers or PATCH_LAYERS, "latents" if self.space == "latent" else "pictures"
        if self.discriminator == "patch" and side < 3 * 2**layers:
            yield "layers", f"{layers} are too many for {seen} of {side} pixels a side."
        if self.discriminator == "vgg" and side < LEAST_SIDE:
            yield "discriminator", f"vgg needs {seen} of at least {LEAST_SIDE} pixels a side, these have {side}."
        if self.discriminator == "unet_sn" and side % 8:
            yield "discriminator", f"unet_sn needs {seen} of a multiple of 8 pixels a side, these have {side}."
        if self.discriminator == "convnext" and side < 32:
            yield "discriminator", f"convnext needs {seen} of at least 32 pixels a side, these have {side}."


class GANLoss(LearningLoss, PixelLoss):
    """weight * objective of D(sr), and of D(hr) where that is relative; the discriminator D learns from sr without gradient.

    With `space: latent` these are the clean latents. Means run over all logits of a micro-batch, relativistic ones and batch statistics
    too. D stays in training mode. Besides being a loss it is a learner.
    """

    settings_class = GANSettings

    def __init__(self, settings: GANSettings, means: Means = Means()) -> None:  # noqa: B008 - it is frozen
        super().__init__(settings)
        self.seed, self.reads = means.seed, self.reads_of(settings)
        with seeded(derive_seed(means.seed, self.name), meta=means.shapes):
            network = _discriminator(settings, means)
            if settings.init == "orthogonal":
                start_orthogonally(network)
        self.teach(network)
        self.objective: Objective = Vanilla(settings.real_label) if settings.objective == "vanilla" else OBJECTIVES[settings.objective]

    @classmethod
    def reads_of(cls, settings: GANSettings) -> frozenset[str]:
        return frozenset({"z0", "z0_hr"}) if settings.space == "latent" else cls.reads

    @classmethod
    def build(cls, settings: GANSettings, means: Means) -> Self | None:
        try:
            built = cls(settings, means)
        except MissingDependency:
            if means.shapes:  # whose estimate then lacks it; the dry run and training say what to install
                return None
            raise
        if settings.file is not None and not means.shapes:
            key = f"losses: {settings.called}.file"
            load_into(built.network, read_tensors(settings.file, key), path=settings.file, key=key)
        return built

    @classmethod
    def check(cls, settings: GANSettings) -> str | None:
        if settings.discriminator == "convnext":
            said = check_convnext(settings.convnext or ConvNextSettings(), f"{settings.called}.convnext")
            return f"{settings.called}: {said}"
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
        return PixelLoss.active(self, given) & (self.learns or self.counts)

    def count(self, given: Given) -> Tensor:
        return self._active(given).sum().float()

    def play(self, outputs: Outputs) -> Tensor:
        return self.objective.generator(self.network, *self._seen(outputs))

    def __call__(self, outputs: Outputs, count: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        real, fake = self._seen(outputs)
        self.hold(still=True)
        samples = len(fake) if self.counts else 0
        total = self.objective.generator(self.network, real, fake) * samples if samples else 0 * fake.sum()
        value = share(total, count, self.count(outputs))
        return self.settings.weight * value, {self.name: value.detach()}

    def learn(self, outputs: Outputs, count: Tensor | None = None) -> dict[str, Tensor]:
        """Add this micro-batch to the discriminator's gradient; its raw loss."""
        real, fake = (side.detach() for side in self._seen(outputs))
        self.hold(still=False)
        samples, own = len(fake) if self.learns else 0, self.count(outputs)
        value = torch.zeros((), device=fake.device)
        if samples:
            for half in self.objective.discriminator(self.network, real, fake):
                value = value + self.learn_from(half, samples, count, own)
            if self.settings.r1_weight:
                penalty = self._penalty(real) if self.settings.r1_noise is None else self._change(real, self._indices(outputs))
                self.learn_from(penalty, samples, count, own)
        return {f"{self.name}/discriminator": value}

    def _active(self, given: Given) -> Tensor:
        """Which of the samples that the discriminator could see count: [B] of latents, [K] of decoded pixels."""
        return self.active(given) if self.settings.space == "latent" else decoded_active(self, given)

    def _seen(self, outputs: Outputs) -> tuple[Tensor, Tensor]:
        """Ground truth and prediction of the samples that count, as the discriminator sees them, [K, C, h, w] each."""
        if self.settings.space == "latent":
            keep = self._active(outputs) if self.settings.gated else slice(None)
            fake, real = latents(outputs)
            return real[keep], fake[keep]
        sr, hr = pixels(chosen(self, outputs))
        seen = [gradient_map(hr), gradient_map(sr)] if self.settings.sees == "gradient" else [hr, sr]
        if self.settings.mask == "flat":
            textured = ~flat_areas(hr)
            seen = [side * textured for side in seen]
        return seen[0], seen[1]

    def _indices(self, outputs: Outputs) -> list[int]:
        """The global sample indices of what `_seen` gives."""
        assert outputs.index is not None
        index = outputs.index
        if self.settings.space == "pixels" and outputs.decoded is not None:
            index = index[outputs.decoded]
        return list(map(int, index[self._active(outputs)] if self.settings.gated else index))

    def _penalty(self, real: Tensor) -> Tensor:
        """gamma / 2 * mean |d D(x) / d x|^2 at ground truth   (Mescheder et al., ICML 2018)"""
        real = real.requires_grad_()
        logits = sum((level.sum() for level in levels(self.network(real))), real.new_zeros(()))
        (slope,) = torch.autograd.grad(logits, real, create_graph=True)
        return self.settings.r1_weight / 2 * slope.square().flatten(1).sum(dim=1).mean()

    def _change(self, real: Tensor, indices: list[int]) -> Tensor:
        """gamma * mean (D(x + u) - D(x))^2 at ground truth, u uniform in +-r1_noise

        R1 by differences   (Lin et al., ICML 2025, "Diffusion Adversarial Post-Training", with Gaussian noise; StrSR: uniform).
        """
        drawn = [torch.rand(real.shape[1:], generator=sample_generator(self.seed, i, self.name, "r1"), device="cpu") for i in indices]
        noise = self.settings.r1_noise * (2 * torch.stack(drawn) - 1).to(real)
        pairs = zip(levels(self.network(real + noise)), levels(self.network(real)))
        change = sum(((moved - still).square().mean() for moved, still in pairs), real.new_zeros(()))
        weighted: Tensor = self.settings.r1_weight * change
        return weighted


def _discriminator(settings: GANSettings, means: Means) -> nn.Module:
    if settings.discriminator == "convnext":
        key = f"losses: {settings.called}.convnext"
        return convnext_discriminator(settings.convnext or ConvNextSettings(), settings.width, key, shapes=means.shapes)
    pictures = settings.space == "pixels"
    channels, side = (3, means.side) if pictures else means.latent
    kinds: dict[str, Any] = {
        "vgg": lambda: VGGDiscriminator(settings.width, side, channels=channels),
        "unet_sn": lambda: UNetDiscriminator(settings.width, channels=channels),
        "patch": lambda: PatchDiscriminator(settings.width, settings.layers or PATCH_LAYERS, channels=channels, pictures=pictures),
    }
    network: nn.Module = kinds[settings.discriminator]()
    return network
