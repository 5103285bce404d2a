"""Task `one_step`: one call of a base with a LoRA, from the low-resolution latents to a picture that the losses see."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from sslsr_diffusion.inference.open import restorer_of
from sslsr_diffusion.inference.restorer import Restorer
from sslsr_diffusion.losses import Look
from sslsr_diffusion.models.codec import Codec
from sslsr_diffusion.models.one_step.networks import ENCODER, OneStepNetworks
from sslsr_diffusion.tasks.frame import CallSettings, Frame, TaskSettings, WindowSettings
from sslsr_diffusion.tasks.graph import Graph
from sslsr_diffusion.tasks.pixels import all_samples, choose_pixels, decoded, seen
from sslsr_diffusion.tasks.task import Draws, TaskBase, per_sample_noise, reads_of
from sslsr_diffusion.types import Batch, Outputs


class OneStepTaskSettings(WindowSettings):
    """A base learns to enlarge in one call; which call that is, the model section says."""

    kind: Literal["one_step"] = "one_step"
    train: str | None = Field(
        None,
        description="What trains: lora (model.lora, model.encoder_lora and model.full) or whole (every weight of encoder, network and "
        "decoder, for small models; model.lora: null). null: lora.",
    )
    inference: CallSettings = Field(CallSettings(), description="How the upscaler is called in validation and by default.")


class OneStepTask(TaskBase):
    """z_lr = encode(bicubic(lr));  z = z_lr, or noised;  x0 = rule(denoiser(z, t));  sr = decode(x0)"""

    networks: OneStepNetworks
    settings: ClassVar[type[TaskSettings]] = OneStepTaskSettings
    gives: frozenset[str] = frozenset({"sr", "sr_ema", "z0", "z0_hr", "prior"})

    def __init__(self, networks: OneStepNetworks, *, seed: int, decode_crop: int | None = None, restorer: Restorer | None = None) -> None:
        self.networks, self.restorer = networks, restorer
        self.module: nn.Module = Generator(networks)
        if networks.whole:
            self.gives = self.gives - {"z0_hr", "prior"}  # of frozen networks
        self.seed, self.decode_crop = seed, decode_crop

    @classmethod
    def build(cls, settings: OneStepTaskSettings, frame: Frame) -> Self:
        networks = frame.build(train=settings.train)
        assert isinstance(networks, OneStepNetworks)
        restorer = restorer_of(networks, frame.family, scale=frame.scale, **settings.inference.named)
        return cls(networks, seed=frame.seed, decode_crop=settings.decode_crop, restorer=restorer)

    def draw(self, batch: Batch, losses: Sequence[Look]) -> Draws:
        codec, device = self.networks.codec, batch.hr.device
        shape = codec.noise_shape(batch.hr)[1:]
        reads = reads_of(losses)
        purposes = ["posterior_lr", *(["noise"] if self.networks.starts_noised else []), *(["posterior_hr"] if "z0_hr" in reads else [])]
        noise = {purpose: per_sample_noise(self.seed, batch.index.tolist(), purpose, shape).to(device) for purpose in purposes}
        given, windows = choose_pixels(all_samples(batch), batch, losses, scale=codec.scale, decode_crop=self.decode_crop, seed=self.seed)
        return Draws(given, noise, windows, reads)

    def graph(self) -> Graph:
        networks = self.networks
        if networks.has_loras:
            networks.merge("onnx")
        networks.cast(torch.float32)
        codec, noise = networks.codec, (networks.codec.latent_channels, networks.codec.scale)
        inputs = {"picture": (3, 1), "posterior_noise": noise, **({"start_noise": noise} if networks.starts_noised else {})}
        size = networks.size()
        return Graph("upscaler", OneCall(self.module, codec), inputs, size.multiple_of, most=size.maximum)

    def run(self, module: Any, batch: Batch, draws: Draws) -> Outputs:
        decode = partial(decoded, self.networks.codec, given=draws.given, windows=draws.windows)
        hr = (batch.hr, draws.noise["posterior_hr"]) if "z0_hr" in draws.reads else None
        x0, sr, z0_hr = module(seen(batch), draws.noise["posterior_lr"], draws.noise.get("noise"), decode, hr)
        return Outputs(**vars(draws.given), sr=sr, z0=x0, z0_hr=z0_hr)


class Generator(nn.Module):
    """All that trains in one forward, as DDP and sharding want it; what is frozen of the autoencoder stays outside."""

    def __init__(self, networks: OneStepNetworks) -> None:
        super().__init__()
        self.denoiser = networks.denoiser
        if networks.whole:
            self.vae = networks.codec.vae
        elif networks.settings.encoder_lora is not None:
            for name in ENCODER:
                setattr(self, name, getattr(networks.codec.vae, name))
        self._networks = (networks,)  # no part of it: the decoder would be wrapped, too

    def forward(
        self,
        picture: Tensor,
        posterior: Tensor,
        noise: Tensor | None,
        decode: Callable[[Tensor], Tensor | None],
        hr: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """[B, 3, H, W] in [0, 1] and standard normal noises [B, C, h, w] -> clean latents [B, C, h, w] float32, and what `decode` makes.

        `hr`: the ground truth and its noise, for its latents as the third; here, because a divided encoder is whole only within a forward.
        """
        (networks,) = self._networks
        condition = networks.see(picture, posterior)
        assert condition.z_lr is not None
        start = networks.start(condition.z_lr, noise)
        t = torch.full((len(start),), networks.timestep, device=start.device)
        x0 = networks.clean(self.denoiser(start, t, condition).float(), start, condition.z_lr)
        return x0, decode(x0), networks.truth(*hr) if hr else None


class OneCall(nn.Module):
    """Encoder, denoiser and decoder, for a graph."""

    def __init__(self, generator: nn.Module, codec: Codec) -> None:
        super().__init__()
        self.generator, self.codec = generator, codec

    def forward(self, picture: Tensor, posterior: Tensor, noise: Tensor | None = None) -> Any:
        """As Generator's -> the picture [B, 3, H, W], about [0, 1]."""
        return self.generator(picture, posterior, noise, self.codec.decode)[1]
