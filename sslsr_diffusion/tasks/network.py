"""Task `network`: a plain super-resolution network learns to enlarge pixels."""

import math
from typing import Any, ClassVar, Literal, Self

from pydantic import Field
from torch import nn

from sslsr_diffusion.inference.direct import check_scale
from sslsr_diffusion.inference.open import restorer_of
from sslsr_diffusion.inference.restorer import Restorer
from sslsr_diffusion.models.networks import PixelNetworks
from sslsr_diffusion.tasks.frame import Frame, TaskSettings
from sslsr_diffusion.tasks.graph import Graph
from sslsr_diffusion.tasks.task import Draws, TaskBase
from sslsr_diffusion.types import Batch, Outputs


class NetworkTaskSettings(TaskSettings):
    """A network that maps low-resolution pixels to high-resolution ones learns from pairs."""

    kind: Literal["network"] = "network"
    train: str | None = Field(None, description="What of the network trains, by the family's names; null: the family's first.")


class NetworkTask(TaskBase):
    """sr = network(lr), or (sr, branch) = network(lr) where a loss reads the branch"""

    networks: PixelNetworks
    settings: ClassVar[type[TaskSettings]] = NetworkTaskSettings
    gives: frozenset[str] = frozenset({"sr", "lr", "sr_ema", "branch"})

    def __init__(self, networks: PixelNetworks, *, restorer: Restorer | None = None) -> None:
        self.networks, self.restorer = networks, restorer
        self.module: nn.Module = networks
        if not networks.has_branch:
            self.gives = self.gives - {"branch"}

    @classmethod
    def build(cls, settings: NetworkTaskSettings, frame: Frame) -> Self:
        networks = frame.build(train=settings.train)
        assert isinstance(networks, PixelNetworks)
        check_scale(frame.scale, networks)
        return cls(networks, restorer=restorer_of(networks, frame.family, scale=frame.scale))

    def graph(self) -> Graph:
        size, scale = self.networks.size(), self.networks.scale
        unit = math.lcm(size.multiple_of, scale) // scale
        return Graph("upscaler", self.networks.float(), {"picture": (3, 1)}, unit, max(1, math.ceil(size.minimum / scale)))

    def run(self, module: Any, batch: Batch, draws: Draws) -> Outputs:
        if "branch" in draws.reads:
            sr, branch = module(batch.lr, branch=True)
            return Outputs(**vars(draws.given), sr=sr.float(), branch=branch.float())
        return Outputs(**vars(draws.given), sr=module(batch.lr).float())
