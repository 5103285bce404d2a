"""A one-step upscaler's networks: the base's autoencoder and network, frozen, LoRAs on them, and the rule of the one call."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.models.base import Base
from sslsr_diffusion.models.codec import Codec
from sslsr_diffusion.models.condition import Text
from sslsr_diffusion.models.lora import FILE as LORA
from sslsr_diffusion.models.lora import (
    LoRASettings,
    add_lora,
    has_lora,
    load_lora,
    lora_layers,
    merged,
    resolve_targets,
    save_lora,
    scale_lora,
)
from sslsr_diffusion.models.networks import LatentNetworks
from sslsr_diffusion.models.one_step.backbone import Backbone
from sslsr_diffusion.models.one_step.comfyui import why_not, write_comfyui
from sslsr_diffusion.models.one_step.prior import BasePrior, base_prior
from sslsr_diffusion.models.one_step.quantised import BYTES, saved_bytes
from sslsr_diffusion.models.one_step.result import (
    FULL,
    PROMPT,
    VAE_LORA,
    Told,
    copy_tensors,
    write_tensors,
    write_text,
    write_told,
    write_whole,
)
from sslsr_diffusion.models.one_step.settings import RESULT, OneStepSettings
from sslsr_diffusion.models.process import Flow, Process
from sslsr_diffusion.models.size import SizeRequirements

ENCODER = ("encoder", "quant_conv")  # what encodes, of an autoencoder


class OneStepNetworks(LatentNetworks):
    """z = z_lr, or add_noise(z_lr, n) at level `noise`;  pred = denoiser(z, t);  x0 = the process's rule, or z_lr - pred."""

    denoiser: Backbone

    def __init__(
        self,
        codec: Codec,
        denoiser: Backbone,
        process: Process,
        text: Text,
        settings: OneStepSettings,
        *,
        base: str,
        source: Base | None = None,
        seed: int = 0,
    ) -> None:
        """
        Args:
            settings: of the model, with level, rule and LoRAs.
            source: where the base lies; None: it was drawn from `seed`.
        """
        levels = _levels(process, settings, base)
        super().__init__(codec, denoiser, levels[0], text, base=base, revision=source.revision if source else None)
        self.settings, self.source, self.seed, self.base_process = settings, source, seed, process
        self.whole = False  # whether a result is the whole model: LoRAs are merged, or all of it trains
        self.call: dict[str, Any] = {}  # defaults of a call, as a result brought them along
        self._at, self._noised_at = levels[1:]

    @property
    def timestep(self) -> float:
        """What the denoiser is told of the call."""
        return self.process.timestep_of(self._at)

    @property
    def starts_noised(self) -> bool:
        return self._noised_at is not None

    def start(self, z_lr: Tensor, noise: Tensor | None) -> Tensor:
        """What the call begins with, [B, C, h, w] like the low-resolution latents; `noise` is standard normal, read if `starts_noised`."""
        if self._noised_at is None:
            return z_lr
        assert noise is not None
        return self.process.add_noise(z_lr, noise, torch.tensor([self._noised_at]))

    def clean(self, pred: Tensor, start: Tensor, z_lr: Tensor) -> Tensor:
        """The clean latents that a prediction means, [B, C, h, w]."""
        if self.settings.x0 == "residual":
            return z_lr - pred
        return self.process.clean_and_noise(pred, start, torch.tensor([self._at]))[0]

    def size(self) -> SizeRequirements:
        scale = self.codec.scale
        unit = SizeRequirements(scale * self.denoiser.unit)
        trained = unit.rounded_up(self.denoiser.trained_side * scale)
        return SizeRequirements(unit.multiple_of, maximum=self.denoiser.longest_side * scale, trained=trained)

    def components(self) -> dict[str, Any]:
        return {self.denoiser.part: self.denoiser.network, "vae": self.codec.vae, "scheduler": self.process.scheduler()}

    def check_fit(self) -> None:
        """Raises UserError unless the base's network and autoencoder belong together."""
        if self.codec.latent_channels != self.denoiser.channels:
            raise UserError(
                f"model.base: the network of {self.base} works on {self.denoiser.channels} latent channels, its autoencoder gives "
                f"{self.codec.latent_channels}."
            )

    def train_whole(self) -> None:
        """Let every weight of encoder, network and decoder train; a result is then the whole model.

        Encoding becomes the posterior's mean: what both sides of the latents learn together needs no noise in between.
        """
        if self.settings.init == "random" and self.settings.x0 == "residual":
            self.denoiser.start_at_zero()
        self._become_whole()
        if self.codec.draws:
            self.codec = self.codec.without_variance()
        self.denoiser.network.requires_grad_(True)
        self.codec.requires_grad_(True)

    def add_trained(self, seed: int) -> None:
        """Put the settings' LoRAs beside the frozen layers, and choose the layers that train whole.
        UserError for a layer that the network does not have, or that has a LoRA.
        """
        network, vae, settings = self.denoiser.network, self.codec.vae, self.settings
        if settings.lora is not None:
            add_lora(network, settings.lora, seed=seed)
        if settings.encoder_lora is not None:
            add_lora(vae, self._within_encoder(settings.encoder_lora), seed=seed + 1)
        self._check_full()
        for tensor in self.full_tensors().values():
            tensor.requires_grad_(True)

    def _within_encoder(self, lora: LoRASettings) -> LoRASettings:
        """A LoRA on those layers of the autoencoder alone that encode."""
        names = resolve_targets(self.codec.vae, lora.targets, within=ENCODER, key="model.encoder_lora.targets")
        return lora.model_copy(update={"targets": names})

    @property
    def _with_lora(self) -> dict[str, Any]:
        """Networks that have a LoRA, by the names of their files' prefixes."""
        return {name: part for name, part in ((self.denoiser.part, self.denoiser.network), ("vae", self.codec.vae)) if has_lora(part)}

    @property
    def has_loras(self) -> bool:
        return bool(self._with_lora)

    def scale_loras(self, scale: float) -> None:
        """How much of the LoRAs is taken: 1 as trained, 0 the base alone."""
        for part in self._with_lora.values():
            scale_lora(part, scale)

    @torch.no_grad()
    def truth(self, pixels: Tensor, noise: Tensor) -> Tensor:
        """The ground truth's latents, [B, 3, H, W] in [0, 1] -> [B, C, h, w] float32: by the encoder as the base has it."""
        trained = has_lora(self.codec.vae)
        if trained:
            scale_lora(self.codec.vae, 0)
        latents = self.codec.encode(pixels, noise)
        if trained:
            scale_lora(self.codec.vae, 1)
        return latents

    def prior(self, *, rank: int, negative_prompt: str, seed: int) -> BasePrior:
        """The frozen base with a LoRA of its own on the same layers; UserError for a negative prompt that nothing can encode."""
        negative = None
        if negative_prompt != self.settings.prompt and not self.text_sequence.is_meta:
            if self.source is None or not self.source.has("text_encoder"):
                raise UserError(f"losses: vsd.negative_prompt: {self.base} has no text encoder, got {negative_prompt!r}; leave it empty.")
            negative = self.denoiser.encode(self.source, negative_prompt)
        lora = (self.settings.lora or LoRASettings()).model_copy(update={"rank": rank, "alpha": None})
        return base_prior(self.denoiser, self.base_process, (self.text, negative), lora, seed=seed)

    def load(self, folder: Path) -> None:
        """The trained tensors of a result into the frozen base; UserError where they are of another base, or of another run."""
        lora, encoder_lora = self.settings.lora, self.settings.encoder_lora
        if lora is not None:
            load_lora(self.denoiser.network, folder / LORA, self.denoiser.part, lora)
        if encoder_lora is not None:
            load_lora(self.codec.vae, folder / VAE_LORA, "vae", self._within_encoder(encoder_lora))
        if self.settings.full:
            copy_tensors(folder / FULL, self.full_tensors())

    def set_trainable(self, which: str) -> list[str]:
        return [name for name, parameter in self.named_parameters() if parameter.requires_grad]

    def saved_bytes(self) -> int:
        return saved_bytes(self.denoiser.network, self.settings.weights) if self.settings.weights in BYTES else 0

    @property
    def can_wait(self) -> bool:
        """What bitsandbytes holds stays where it was quantised."""
        return self.settings.weights not in BYTES

    def cast(self, dtype: torch.dtype) -> None:
        """Flow transformers leave the range of float16; what bitsandbytes holds stays as it is."""
        dtype = torch.bfloat16 if self.denoiser.flow and dtype == torch.float16 else dtype
        if self.settings.weights in BYTES:
            self.codec.to(dtype)
        else:
            super().cast(dtype)

    def _check_full(self) -> None:
        for layer in self.settings.full:
            named = [name for name, _ in self.denoiser.network.named_parameters() if name.startswith(f"{layer}.")]
            if not named:
                raise UserError(f"model.full: expected names of layers of {self.denoiser.network_class}, got {layer!r}, which it lacks.")
            if any(".lora_" in name for name in named):
                raise UserError(f"model.full: {layer} has a LoRA; leave it out here, or in model.lora.targets.")

    def full_tensors(self) -> dict[str, Tensor]:
        """Name -> tensor of the layers of the base's network that train whole."""
        named = self.denoiser.network.named_parameters()
        return {name: value for name, value in named if any(name.startswith(f"{layer}.") for layer in self.settings.full)}

    @property
    def call_defaults(self) -> dict[str, Any]:
        return self.call

    def merge(self, asked: str = "merge") -> None:
        """Add the LoRAs to the base's weights, in float32; UserError, which begins with what `asked` for it, for a base in integers."""
        if self.settings.weights in BYTES:
            raise UserError(
                f"{asked}: a LoRA cannot be added to weights in {self.settings.weights}; open the result of this run with model.weights: "
                f"bfloat16 in its {RESULT}, or export without it."
            )
        self.scale_loras(1)  # whatever the last call took of them
        for part, network in self._with_lora.items():
            if part == "vae":
                self.codec.vae = merged(network.float())
            else:
                self.denoiser.network = merged(network.float())
        self._become_whole()

    def _become_whole(self) -> None:
        plain = {"base": self.base, "init": "pretrained", "lora": None, "encoder_lora": None, "full": (), "weights": "float32"}
        self.settings = self.settings.model_copy(update=plain)
        self.whole = True

    def for_comfyui(self, folder: Path, scale: float) -> list[str]:
        if self.settings.lora is None:
            return super().for_comfyui(folder, scale)
        signal, spread = self.process.level(self._at)
        why = why_not(noised=self.starts_noised, residual=self.settings.x0 == "residual", signal=signal, files=self._beside_lora)
        call = {
            "base": Path(self.base).name,
            "text": self.denoiser.comfyui_text,
            "prompt": self.settings.prompt,
            "sigma": spread if self.denoiser.flow else spread / signal,
            "scale": scale,
            "shift": self.codec.vae.config.get("shift_factor") or 0.0,
        }
        layers, part = lora_layers(self.denoiser.network), self.denoiser.part
        notes = write_comfyui(folder, part, layers, None if why else {**call, "gain": 1 / signal}, self.codec.latent_channels)
        return [f"there is no workflow for ComfyUI, but the LoRA alone: {why}"] if why else notes

    @property
    def _beside_lora(self) -> list[str]:
        """Files of a result that hold trained tensors and that nobody else loads."""
        said = {VAE_LORA: self.settings.encoder_lora is not None, FULL: bool(self.settings.full)}
        return [name for name, there in said.items() if there]

    def left_out(self) -> list[str]:
        files = " and ".join(self._beside_lora)
        start = f"stock diffusers does not start from a picture's latents as {RESULT} says; sslsr infer and open_upscaler do"
        return [start, *([f"stock diffusers does not load {files}; --merge writes a whole model with all of it"] if files else [])]

    def save(self, folder: Path, **call: Any) -> None:
        """LoRA files that diffusers loads, beside what else a call needs, or the whole model; see `result.py`."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.whole:
            write_whole(folder, {self.denoiser.part: self.denoiser.network, "vae": self.codec.vae}, self.process, self.source)
        settings = self.settings.model_copy(update={"revision": self.revision or self.settings.revision})
        write_told(folder, Told(settings, self.seed, call))
        write_text(self.text, folder / PROMPT)
        if self.settings.lora is not None:
            save_lora({self.denoiser.part: self.denoiser.network}, folder)
        if self.settings.encoder_lora is not None:
            save_lora({"vae": self.codec.vae}, folder, VAE_LORA)
        if self.settings.full:
            write_tensors(self.full_tensors(), folder / FULL)


def _levels(process: Process, settings: OneStepSettings, base: str) -> tuple[Process, int, int | None]:
    """The process, and the index of the call's level and of the noise's in it; UserError for a level that it does not have."""
    flow = isinstance(process, Flow)
    if (settings.sigma if flow else settings.timestep) is None:
        want, other = ("sigma", "timestep") if flow else ("timestep", "sigma")
        kind, value = "a flow" if flow else "a process with betas", getattr(settings, other)
        got = "neither timestep nor sigma; give it" if value is None else f"{other} {value}"
        raise UserError(f"model.{want}: {base} is {kind}; expected model.{want}, got {got}.")
    if isinstance(process, Flow) and settings.sigma is not None:
        noise = settings.noise
        return (process.at(settings.sigma), 0, None) if noise is None else (process.at(settings.sigma, noise), 0, 1)
    at = settings.timestep
    noised_at = None if settings.noise is None else int(settings.noise)
    assert at is not None
    if max(at, noised_at or 0) > process.last:
        raise UserError(f"model.timestep: expected at most {process.last}, the last of {base}, got {max(at, noised_at or 0)}.")
    return process, at, noised_at
