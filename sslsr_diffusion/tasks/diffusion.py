"""Task `diffusion`: a denoiser that is steered by the low-resolution picture, with pixel losses on its decoded x0."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.inference.open import restorer_of
from sslsr_diffusion.inference.restorer import Restorer
from sslsr_diffusion.inference.sampling import spaced_timesteps
from sslsr_diffusion.losses import Look
from sslsr_diffusion.models.condition import Text
from sslsr_diffusion.models.networks import LatentNetworks
from sslsr_diffusion.seeding import sample_generator
from sslsr_diffusion.tasks.frame import Frame, SampledCallSettings, TaskSettings, WindowSettings
from sslsr_diffusion.tasks.pixels import choose_pixels, decoded, seen
from sslsr_diffusion.tasks.task import Draws, TaskBase, per_sample_noise, reads_of
from sslsr_diffusion.types import Batch, Given, Outputs


class DiffusionTaskSettings(WindowSettings):
    """A denoiser learns to enlarge (Wang et al., IJCV 2024), its decoded x0 seen by pixel losses (Chen et al., ACM MM 2024)."""

    kind: Literal["diffusion"] = "diffusion"
    train: str | None = Field(
        None,
        description="What of the networks trains; stablesr: sft (structural encoder and SFT layers, as published) or all (the whole "
        "denoiser); x4: all, attention (the weights of all attention layers) or lora (model.lora). null: the family's first.",
    )
    sampler_steps: int | None = Field(
        None,
        ge=1,
        le=1000,
        description="Train only the timesteps above 0 that a sampler of so many steps visits (few-step models); null: all.",
    )
    start_timestep: int | None = Field(
        None,
        ge=1,
        le=999,
        description="One-step models (sampler_steps: 1): start at this timestep instead of the last, from the noised latents of the "
        "low-resolution picture, in training as in sampling; null: train on the noised ground truth, as published.",
    )
    prompt_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the samples that are trained with the empty text in the place of model.prompt, so that guidance has "
        "something to lead away from (0.1 is usual); x4 alone.",
    )
    inference: SampledCallSettings = Field(SampledCallSettings(), description="How the upscaler is called in validation and by default.")

    @model_validator(mode="after")
    def _one_step(self) -> Self:
        if self.start_timestep is not None and self.sampler_steps != 1:
            raise ValueError(f"start_timestep: is for one-step models, with sampler_steps: 1; here sampler_steps is {self.sampler_steps}.")
        if self.start_timestep is not None and self.inference.steps != 1:
            raise ValueError(
                f"inference.steps: expected 1 for a one-step model (it is what its pipeline will take, too), got {self.inference.steps}."
            )
        return self


class DiffusionTask(TaskBase):
    """z0, condition = encode(hr), see(lr);  zt = add_noise(z0, n, t)
    pred = denoiser(zt, t, condition);  sr = decode(x0 of pred)

    What the denoiser sees is the networks' own: StableSR's the latent of bicubic(lr), a base's nothing. With `from_lr` the sampler's own
    start is trained: zt = add_noise(z_lr, n, t), and the noise that would lead there from z0 takes n's place in the target.
    """

    networks: LatentNetworks
    settings: ClassVar[type[TaskSettings]] = DiffusionTaskSettings
    gives: ClassVar[frozenset[str]] = frozenset({"pred", "sr", "sr_ema", "z0", "z0_hr"})

    def __init__(
        self,
        networks: LatentNetworks,
        *,
        seed: int,
        decode_crop: int | None = None,
        timesteps: Sequence[int] | None = None,
        from_lr: bool = False,
        prompt_dropout: float = 0.0,
        restorer: Restorer | None = None,
    ) -> None:
        """`timesteps`: the noise levels to train, each drawn equally often; None: all."""
        self.networks = networks
        self.module: nn.Module = networks.denoiser
        self.seed, self.decode_crop, self.from_lr, self.prompt_dropout = seed, decode_crop, from_lr, prompt_dropout
        self.timesteps = timesteps or range(networks.process.last + 1)
        self.restorer = restorer

    @classmethod
    def build(cls, settings: DiffusionTaskSettings, frame: Frame) -> Self:
        networks = frame.build(train=settings.train)
        assert isinstance(networks, LatentNetworks)
        _check_fit(settings, networks, frame)
        start = settings.start_timestep
        if start is not None:
            try:
                networks.start_at(start)
            except UserError as error:
                raise UserError(f"task.start_timestep: {networks.base}: {error}") from None
        elif networks.process.starts_from_lr:
            last = networks.process.last
            raise UserError(
                f"model.base: {networks.base} starts its one step at timestep {last}, from the low-resolution picture; to train it on, set "
                f"task.sampler_steps: 1, task.start_timestep: {last} and task.inference.steps: 1."
            )
        timesteps = None
        if settings.sampler_steps is not None:  # not 0, where next to no noise is left to be learned from
            timesteps = [t for t in spaced_timesteps(settings.sampler_steps, networks.process.last + 1) if t > 0]
        return cls(
            networks,
            seed=frame.seed,
            decode_crop=settings.decode_crop,
            timesteps=timesteps,
            from_lr=start is not None,
            prompt_dropout=settings.prompt_dropout,
            restorer=restorer_of(networks, frame.family, scale=frame.scale, **settings.inference.named),
        )

    def draw(self, batch: Batch, losses: Sequence[Look]) -> Draws:
        indices, device = batch.index.tolist(), batch.hr.device
        process, codec = self.networks.process, self.networks.codec
        places = [int(torch.randint(len(self.timesteps), (), generator=sample_generator(self.seed, i, "timestep"))) for i in indices]
        t = torch.tensor([self.timesteps[place] for place in places])
        given = Given(t=t.to(device), index=batch.index.to(device), noise_level=process.noise_level(t).to(device))
        latent, height, width = codec.noise_shape(batch.hr)[1:], *batch.hr.shape[-2:]
        shapes = {"posterior_hr": latent, "posterior_lr": self.networks.seen_noise_shape(height, width), "noise": latent}
        noise = {purpose: per_sample_noise(self.seed, indices, purpose, shape).to(device) for purpose, shape in shapes.items()}
        if most := self.networks.max_noise_level:
            levels = [torch.randint(most, (), generator=sample_generator(self.seed, i, "noise_level")) for i in indices]
            noise["level"] = torch.stack(levels).to(device)
        if self.prompt_dropout:
            kept = [torch.rand((), generator=sample_generator(self.seed, i, "prompt")) >= self.prompt_dropout for i in indices]
            noise["prompted"] = torch.stack(kept).to(device)
        given, windows = choose_pixels(given, batch, losses, scale=codec.scale, decode_crop=self.decode_crop, seed=self.seed)
        return Draws(given, noise, windows, reads_of(losses))

    def run(self, module: Any, batch: Batch, draws: Draws) -> Outputs:
        nets, t = self.networks, draws.given.t
        with torch.no_grad():
            z0 = nets.codec.encode(batch.hr, draws.noise["posterior_hr"]).float()  # [B, 3, H, W] -> [B, C, h, w], normalised
            text = self._texts(draws.noise["prompted"]) if self.prompt_dropout else None
            condition = nets.see(seen(batch, nets.zoom), draws.noise["posterior_lr"], level=draws.noise.get("level"), text=text)
        noise = draws.noise["noise"]
        if self.from_lr and condition.z_lr is not None:
            noise = nets.process.noise_to(z0, condition.z_lr, noise, t)
        zt = nets.process.add_noise(z0, noise, t)
        target = nets.process.target(z0, noise, t)
        pred = module(zt, nets.process.timestep(t), condition).float()  # epsilon, v, velocity: only the process knows which
        clean, _ = nets.process.clean_and_noise(pred, zt, t)
        gain = nets.process.clean_gain(t).to(pred.device)
        sr = decoded(nets.codec, clean, draws.given, draws.windows)
        return Outputs(**vars(draws.given), pred=pred, target=target, clean_gain=gain, sr=sr, z0=clean, z0_hr=z0)

    def _texts(self, prompted: Tensor) -> Text:
        """[B] bool -> one text per sample: the recipe's prompt or the empty one."""
        assert self.networks.blank is not None
        both = self.networks.blank.followed_by(self.networks.text)
        return both.each(lambda part: part[prompted.long()])


def _check_fit(settings: DiffusionTaskSettings, networks: LatentNetworks, frame: Frame) -> None:
    """Raises UserError where a recipe asks for what these networks do not have."""
    if networks.zoom not in (1, frame.scale):
        raise UserError(f"scale: these networks enlarge {networks.zoom} times, got {frame.scale}; set scale: {networks.zoom}.")
    if settings.start_timestep is not None and networks.zoom != 1:
        raise UserError(
            f"task.start_timestep: expected none for {networks.base}, which samples from noise alone, got {settings.start_timestep}; "
            "leave it out."
        )
    if settings.prompt_dropout and (networks.blank is None or not frame.model.prompt):
        lacks = "trains with one text alone" if networks.blank is None else "has no model.prompt to drop"
        raise UserError(f"task.prompt_dropout: expected 0 for a model that {lacks}, got {settings.prompt_dropout}; leave it out.")
