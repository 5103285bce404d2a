"""What losses have in common that bring a network along which learns beside the trained ones, on the same batches."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from sslsr_diffusion.config import Settings
from sslsr_diffusion.losses.base import LatentLoss, share

_Beta = Annotated[float, Field(ge=0, lt=1)]


class LearnerSettings(Settings):
    """How the network learns."""

    lr: float = Field(1e-4, gt=0, description="Learning rate of the learning network's Adam.")
    lr_schedule: Literal["run", "constant"] = Field(
        "run", description="run: the rate falls as that of the trained networks; constant: it stays."
    )
    betas: tuple[_Beta, _Beta] = Field((0.9, 0.99), description="Decay of its moments.")


class LearningLoss(LatentLoss):
    """A loss that is a `Learner` as well: per micro-batch `learn`, per optimizer step `update`.

    `trained` are the parameters that learn; what else `network` holds is frozen.
    """

    network: nn.Module
    optimizer: torch.optim.Optimizer
    trained: list[nn.Parameter]
    step: int

    def teach(self, network: nn.Module) -> None:
        """Take the network whose parameters with gradient shall learn."""
        self.network, self.step = network, 1  # the optimizer step that is going on
        self.trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.Adam(self.trained, lr=self.settings.lr, betas=self.settings.betas)

    def hold(self, still: bool) -> None:
        """Whether gradients pass through and leave nothing behind (the loss's own turn)."""
        for parameter in self.trained:
            parameter.requires_grad_(not still)

    def learn_from(self, mean: Tensor, samples: int, count: Tensor | None, own: Tensor) -> Tensor:
        """Go backward from a mean over the micro-batch's samples, as its share of the whole batch; that share, detached."""
        value = share(mean * samples, count, own)
        value.backward()
        return value.detach()

    def update(self, *, sound: bool, pace: float = 1.0) -> None:
        """End an optimizer step; gradients that cannot be trusted are thrown away, and without any there is no step."""
        gradients = [parameter.grad.norm() for parameter in self.trained if parameter.grad is not None]
        if sound and gradients and 0 < float(torch.stack(gradients).norm()) < float("inf"):
            for group in self.optimizer.param_groups:
                group["lr"] = self.settings.lr * (pace if self.settings.lr_schedule == "run" else 1.0)
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
