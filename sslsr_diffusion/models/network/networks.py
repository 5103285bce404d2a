"""The family's networks: any super-resolution network, called and saved alike."""

from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.models.network.files import read_tensors, write_tensors
from sslsr_diffusion.models.network.known import Known, build, recognise
from sslsr_diffusion.models.network.settings import FILE, NetworkSettings
from sslsr_diffusion.models.networks import PixelNetworks
from sslsr_diffusion.models.size import SizeRequirements

# Low-resolution pixels. Networks that see no further than a quarter of NEAR get tiles that are the whole picture's to the last bit.
# Real-ESRGAN's pixels could see 350 others to each side: what far-sighted networks lack in a tile changes pixels in the middle of an
# overlap of 16, 24, 32 by 3.2, 2.7, 2.1 8-bit steps on the mean (tiles of 100); the ramp between tiles leaves no step of it.
NEAR, FAR = 64, 16


class SuperResolution(PixelNetworks):
    """One network. Its tensors keep the names under which it is published."""

    def __init__(
        self, network: nn.Module, known: Known, *, base: str, revision: str | None = None, call: dict[str, Any] | None = None
    ) -> None:
        """`call`: what a call takes where it names nothing, as the base brought it along."""
        super().__init__(base, revision)
        self.network, self.known = network, known
        self.scale, self.has_branch = known.scale, known.has_branch
        unit = known.multiple_of
        self.far_sighted = known.sees is None or 4 * known.sees > NEAR
        self.overlap = -(-(FAR if self.far_sighted else 4 * (known.sees or 0)) // unit) * unit
        self._call = dict(call or {})
        self._learnable = frozenset(name for name, parameter in self.named_parameters() if parameter.requires_grad)

    def forward(self, lr: Tensor, *, branch: bool = False) -> Any:
        if branch:
            return self.network(lr, branch=True)
        return self.known.call(self.network, lr)

    def train(self, mode: bool = True) -> Self:
        """Batch norms keep the statistics that they came with: these are no parameters, so no checkpoint would hold others."""
        super().train(mode)
        for part in self.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.eval()
        return self

    def size(self) -> SizeRequirements:
        return SizeRequirements(self.known.multiple_of * self.scale, self.known.minimum * self.scale)

    def taken(self, dtype: torch.dtype) -> torch.dtype:
        if dtype == torch.float16 and not self.known.takes_half:
            dtype = torch.bfloat16
        return torch.float32 if dtype == torch.bfloat16 and not self.known.takes_bfloat16 else dtype

    @property
    def call_defaults(self) -> dict[str, Any]:
        return self._call

    def components(self) -> dict[str, Any]:
        return {self.known.architecture: self.network}

    def set_trainable(self, which: str) -> list[str]:
        """Everything but what the network itself holds fast, such as its shift of the mean colour."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in self._learnable)
        return [name for name, _ in self.named_parameters() if name in self._learnable]

    def blend(self, other: PixelNetworks, alpha: float) -> None:
        mine, theirs = self.known, other.known if isinstance(other, SuperResolution) else None
        if theirs is None or (mine.architecture, mine.arguments) != (theirs.architecture, theirs.arguments):
            others = "another kind of model" if theirs is None else _different(mine, theirs)
            raise UserError(f"blend: expected the same network as {mine.architecture} of {self.base}, got {others}.")
        super().blend(other, alpha)

    def save(self, folder: Path, **call: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / FILE, self.network.state_dict(), self.known.architecture, self.known.arguments, call)


def _different(mine: Known, theirs: Known) -> str:
    if theirs.architecture != mine.architecture:
        return theirs.architecture
    key = next(key for key in {**mine.arguments, **theirs.arguments} if mine.arguments.get(key) != theirs.arguments.get(key))
    return f"one whose {key} is {theirs.arguments.get(key)} instead of {mine.arguments.get(key)}"


def drawn(settings: NetworkSettings, *, meta: bool = False, seed: int = 0) -> SuperResolution:
    """A network of the recipe's architecture with drawn weights, or its shapes."""
    if settings.architecture is None:
        raise UserError("model.architecture: a network without model.base needs one, for example RRDBNet; got null.")
    network, known = build(settings.architecture, settings.arguments, meta=meta, seed=seed)
    networks = SuperResolution(network, known, base=settings.base or f"random:{known.architecture}")
    return networks.shapes() if meta else networks


def opened(
    path: Path, *, base: str, revision: str | None = None, settings: NetworkSettings | None = None, meta: bool = False
) -> SuperResolution:
    """The network in a file; UserError where the recipe's `settings` speak of another one."""
    weights, what = read_tensors(path), f"model {base}"
    told = {**weights.arguments, **(settings.arguments if settings else {})}
    network, known = recognise(weights.tensors, what, told=told)
    wanted = settings.architecture if settings else None
    if wanted not in (None, known.architecture) and (wanted, known.architecture) != ("ESRGAN", "RRDBNet"):
        raise UserError(f"model.architecture: {base} holds {known.architecture}, got {wanted}; set it to null, or choose another file.")
    networks = SuperResolution(network, known, base=base, revision=revision, call=weights.call)
    return networks.shapes() if meta else networks
