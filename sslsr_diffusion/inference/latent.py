"""Pictures by a latent diffusion model of any family: the restorer around its networks."""

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from sslsr_diffusion.files import usual_modes
from sslsr_diffusion.images import resize_bicubic
from sslsr_diffusion.inference.latent_work import Host, LatentWork
from sslsr_diffusion.inference.memory import MemoryModel
from sslsr_diffusion.inference.noise import Generators, image_seeds
from sslsr_diffusion.inference.options import STEPS, LatentOptions, per_picture
from sslsr_diffusion.inference.pictures import from_tensors, to_tensors
from sslsr_diffusion.inference.placement import Placement
from sslsr_diffusion.inference.restorer import AroundNetworks, Described, Output, Restorer, by_size, enlarged, enlarged_size, settled
from sslsr_diffusion.inference.tile_plan import TilePlan
from sslsr_diffusion.inference.waiting import WaitingHost
from sslsr_diffusion.models.compiled import compile_parts
from sslsr_diffusion.models.family import Family
from sslsr_diffusion.models.networks import LatentNetworks

SCALE = 4  # of a model that names none
_FROM_LR = frozenset({"start", "strength"})  # which latents of the low-resolution picture they need
PROMPTED = frozenset({"prompt", "negative_prompt", "guidance_scale"})


@dataclass
class LatentOutput(Output):
    """`plans`: how each picture was cut into tiles (sides in output pixels), in the order of `images`."""

    plans: list[TilePlan] = field(default_factory=list)


@contextlib.contextmanager
def quiet_diffusers() -> Iterator[None]:
    """No bar for a pipeline's components, and no advice to load in half precision by an argument that its versions name differently."""
    from diffusers.utils import logging
    from transformers.utils import logging as of_text

    before = [(each, each.get_verbosity(), each.is_progress_bar_enabled()) for each in (logging, of_text)]
    for each, _, _ in before:
        each.set_verbosity_error()
        each.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch_dtype")  # its new name is unknown to the oldest diffusers we allow
            yield
    finally:
        for each, level, bar in before:
            each.set_verbosity(level)
            if bar:
                each.enable_progress_bar()


class LatentRestorer(AroundNetworks[LatentOptions]):
    """A restorer around LatentNetworks, which may still be training."""

    kind = LatentOptions
    work = LatentWork

    def __init__(
        self,
        networks: LatentNetworks,
        *,
        scale: float | None = None,
        defaults: Mapping[str, Any] | None = None,
        host: Host | None = None,
        scheduler: Any = None,
    ) -> None:
        """
        Args:
            scale, defaults: of calls that name none.
            host: moves the networks; None: they stay where they are.
            scheduler: a diffusers scheduler that chooses the sampler of a call that names none.
        """
        self.networks = networks
        super().__init__(networks, scale, defaults, {"scale": SCALE, "num_inference_steps": STEPS})
        self._host = host or Host(networks)
        self._work = self.work(networks, self._host, scheduler)

    @classmethod
    def open(cls, family: Family, path: Path, placement: Placement) -> Restorer:
        """A model's files as a restorer on a device. The process's tables stay float32."""
        with quiet_diffusers():
            networks = cast(LatentNetworks, family.read(path).eval().requires_grad_(False))
        networks.cast(placement.dtype)
        if placement.compile:
            compile_parts(networks.components(), placement.device, field="compile")
        if placement.offload == "none":
            return cls(networks.to(placement.device), defaults=placement.defaults)
        return cls(networks, defaults=placement.defaults, host=WaitingHost(networks, placement.device, placement.offload))

    @classmethod
    def describe(cls, family: Family, path: Path) -> Described:
        """From the shapes of its networks, which their configs tell."""
        shapes = cls(cast(LatentNetworks, family.read(path, meta=True)), defaults=family.call_defaults(path))
        return Described(shapes.options, shapes.defaults)

    @property
    def options(self) -> frozenset[str]:
        networks = self.networks
        lacking = frozenset() if networks.takes_prompts else PROMPTED
        lacking |= frozenset() if networks.codec.has_fidelity else {"fidelity"}
        lacking |= frozenset() if networks.max_noise_level else {"noise_level"}
        return super().options - lacking - (frozenset() if networks.zoom == 1 else _FROM_LR)

    def check(self, **call: Any) -> list[str]:
        options, notes = settled(self.kind, call, self.options, self.defaults)
        self._work.check(options)
        return notes

    @torch.no_grad()
    def __call__(
        self, image: Any, *, scale: float | None = None, generator: Generators = None, output_type: str = "pil", **call: Any
    ) -> LatentOutput:
        """See `Restorer`; `call` are fields of LatentOptions."""
        scale, options, notes = self._settled(call, scale, output_type)
        pictures = to_tensors(image)
        seeds = image_seeds(generator, len(pictures))
        texts = [per_picture(getattr(options, name), len(pictures), name) for name in ("prompt", "negative_prompt")]
        restored: list[Tensor] = []
        plans: list[TilePlan] = []
        try:
            for group in by_size(pictures):
                batch = torch.stack([pictures[k] for k in group])
                upsampled = enlarged(batch.to(self._host.device), scale)
                wanted, unwanted = ([side[k] for k in group] for side in texts)
                seen = upsampled if self.networks.zoom == 1 else batch.to(self._host.device)
                made, plan = self._work(seen, [seeds[k] for k in group], (wanted, unwanted), options, notes)
                restored.extend(options.finish(resize_bicubic(made, enlarged_size(batch, scale)), upsampled, batch))
                plans.extend([plan] * len(group))
        finally:
            self._host.release()
        return LatentOutput(from_tensors(restored, output_type), notes, plans)

    @torch.no_grad()
    def bands(self, picture: Tensor, *, scale: float, generator: Generators, **call: Any) -> Output:
        scale, options, notes = self._settled(call, scale, "pt")
        texts = per_picture(options.prompt, 1, "prompt"), per_picture(options.negative_prompt, 1, "negative_prompt")
        low = picture[None].to(self._host.device)
        seed = image_seeds(generator, 1)[0]
        try:
            return Output(self._work.bands(low, enlarged_size(low, scale), seed, texts, options, notes), notes)
        except Exception:
            self._host.release()  # else it is when the last band is made
            raise

    def save(self, folder: Path) -> None:
        with quiet_diffusers():
            self.networks.save(folder, scale=self.scale, **self.kept_defaults)
        usual_modes(folder)

    def memory_model(self) -> MemoryModel:
        """What a tile of these networks takes."""
        return self._work.memory_model()
