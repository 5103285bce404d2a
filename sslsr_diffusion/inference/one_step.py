"""Pictures in one call of a base with a LoRA: the latent restorer, with a sampler of one step."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.inference.bands import Enlarged, Rows
from sslsr_diffusion.inference.latent import PROMPTED, LatentRestorer
from sslsr_diffusion.inference.latent_work import Decode, LatentWork, Prompts
from sslsr_diffusion.inference.options import LatentOptions
from sslsr_diffusion.inference.restorer import Described
from sslsr_diffusion.inference.sampling import Sampler, StepNoise
from sslsr_diffusion.inference.shared_norm import SharedGroupNorm
from sslsr_diffusion.inference.tile_plan import Part, TilePlan
from sslsr_diffusion.inference.tiled import TiledCodec
from sslsr_diffusion.models.condition import Condition
from sslsr_diffusion.models.family import Family
from sslsr_diffusion.models.one_step.networks import OneStepNetworks
from sslsr_diffusion.models.one_step.result import read_told

_OF_WALKS = frozenset({"num_inference_steps", "strength", "sampler", "start", "eta"})  # options of samplers with many steps


@dataclass(frozen=True)
class OneStepOptions(LatentOptions):
    """What a one-step model has beside: how much of its LoRA is taken."""

    lora_scale: float = 1.0

    def check(self) -> None:
        super().check()
        if not 0 <= self.lora_scale <= 2:
            raise UserError(f"lora_scale: expected 0 (the base alone) to 2, 1 is as trained, got {self.lora_scale}.")


class OneCall:
    """The sampler: from the low-resolution latents, noised or not, to the clean ones."""

    def __init__(self, networks: OneStepNetworks) -> None:
        self._networks = networks
        self.timesteps: Sequence[float] = [networks.timestep]

    def start(self, noise: Tensor, z_lr: Tensor | None = None) -> Tensor:
        assert z_lr is not None
        self._z_lr = z_lr
        return self._networks.start(z_lr, noise)

    def model_input(self, x: Tensor, index: int) -> Tensor:
        return x

    def step(self, pred: Tensor, x: Tensor, index: int, noise: StepNoise) -> Tensor:
        return self._networks.clean(pred, x, self._z_lr)


class OneStepWork(LatentWork):
    """A batch of pictures through one call."""

    _networks: OneStepNetworks

    def _prepare(self, options: LatentOptions) -> None:
        assert isinstance(options, OneStepOptions)
        self._networks.scale_loras(options.lora_scale)

    def _by_rows(self, options: LatentOptions) -> bool:
        """Where tiles depend on nothing but their own pixels, networks need not wait for each other, and nobody asks for the latents."""
        codec = self._networks.codec
        depends = codec.draws or SharedGroupNorm(codec.vae).any or self._networks.starts_noised
        return not depends and self._host.offload() == "none" and options.callback_on_step_end is None

    def _decoding(
        self,
        seen: Tensor,
        source: Tensor | Enlarged,
        seed: int,
        prompts: Prompts,
        options: LatentOptions,
        plan: TilePlan,
        notes: list[str],
    ) -> tuple[Callable[[TilePlan], Decode], tuple[Part, ...], TilePlan]:
        networks = self._networks
        if isinstance(source, Tensor) or not self._by_rows(options):
            return super()._decoding(seen, source, seed, prompts, options, plan, notes)
        wanted, unwanted = self._read(prompts, options, seen.device)

        def decoding(plan: TilePlan) -> Decode:
            codec = TiledCodec(networks.codec, *plan.vae_cells, batch_size=plan.batch)
            predict = self._tiled(Condition(text=wanted), unwanted, plan, options)

            def decode() -> Iterator[Tensor]:
                z_lr = Rows(codec.encoded_once(source, plan.latent_size))
                x0 = Rows(predict.cleaned_once(z_lr, networks.timestep, lambda pred, z: networks.clean(pred, z, z)))
                return codec.decoded_once(x0, plan.latent_size)

            return decode

        return decoding, ("tile", "vae_tile"), plan

    def _sampler(self, options: LatentOptions, seeds: Sequence[int]) -> Sampler:
        return OneCall(self._networks)


class OneStepRestorer(LatentRestorer):
    """A restorer around OneStepNetworks, which may still be training."""

    kind = OneStepOptions
    work = OneStepWork
    networks: OneStepNetworks

    @property
    def options(self) -> frozenset[str]:
        return _options(super().options, self.networks.has_loras)

    @classmethod
    def describe(cls, family: Family, path: Path) -> Described:
        """Of a LoRA by what it says of itself: no option depends on its base, which need not be here."""
        if (path / "vae").is_dir():  # the whole model, whose configs can be checked
            return super().describe(family, path)
        settings, _, call = read_told(path)
        options = _options(cls.kind.names() - PROMPTED - {"fidelity", "noise_level"}, bool(settings.lora or settings.encoder_lora))
        return Described(options, {name: value for name, value in call.items() if name in options})


def _options(latent: frozenset[str], has_loras: bool) -> frozenset[str]:
    return latent - _OF_WALKS - (frozenset() if has_loras else {"lora_scale"})
