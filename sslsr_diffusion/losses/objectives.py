"""What a discriminator and the network that it judges want, over logits: means run over all elements of a call's logits."""

from collections.abc import Callable, Iterator
from typing import Protocol

from torch import Tensor
from torch.nn import functional as F

Discriminator = Callable[[Tensor], Tensor]


class Objective(Protocol):
    """Both sides of a game. A discriminator may change with each call (batch norm, spectral norm), so their order is part of it."""

    def generator(self, network: Discriminator, real: Tensor, fake: Tensor) -> Tensor:
        """0-dim; the gradient goes to `fake`."""

    def discriminator(self, network: Discriminator, real: Tensor, fake: Tensor) -> Iterator[Tensor]:
        """Terms, each to go backward from before the next is asked for; they add up to the discriminator's loss."""


def _true(logits: Tensor) -> Tensor:
    """Cross entropy to the label 1."""
    return F.softplus(-logits).mean()


def _false(logits: Tensor) -> Tensor:
    """Cross entropy to the label 0."""
    return F.softplus(logits).mean()


class Vanilla:
    """G: -mean ln p(fake).   D: -mean ln p(real) - mean ln (1 - p(fake)), p = sigmoid(D)   (Goodfellow et al., 2014, not saturating)"""

    def generator(self, network: Discriminator, real: Tensor, fake: Tensor) -> Tensor:
        return _true(network(fake))

    def discriminator(self, network: Discriminator, real: Tensor, fake: Tensor) -> Iterator[Tensor]:
        yield _true(network(real))
        yield _false(network(fake))


class Relativistic:
    """Relativistic average: each side against the mean of the other; half of both terms, as in the code of ESRGAN.

    G: (bce(r - mean f, 0) + bce(f - mean r, 1)) / 2, r without gradient.
    D: bce(r - mean f, 1) / 2 + bce(f - mean r, 0) / 2, means without gradient; f is computed once for its mean and once for itself.
    (Jolicoeur-Martineau, ICLR 2019; Wang et al., ECCVW 2018, equations 1 and 2)
    """

    def generator(self, network: Discriminator, real: Tensor, fake: Tensor) -> Tensor:
        r = network(real).detach()
        f = network(fake)
        return (_false(r - f.mean()) + _true(f - r.mean())) / 2

    def discriminator(self, network: Discriminator, real: Tensor, fake: Tensor) -> Iterator[Tensor]:
        f = network(fake).detach()
        r = network(real)
        yield _true(r - f.mean()) / 2
        yield _false(network(fake) - r.detach().mean()) / 2


class LeastSquares:
    """G: mean (f - 1)^2.   D: mean (r - 1)^2 + mean f^2   (Mao et al., ICCV 2017)"""

    def generator(self, network: Discriminator, real: Tensor, fake: Tensor) -> Tensor:
        return (network(fake) - 1).square().mean()

    def discriminator(self, network: Discriminator, real: Tensor, fake: Tensor) -> Iterator[Tensor]:
        yield (network(real) - 1).square().mean()
        yield network(fake).square().mean()


class Hinge:
    """G: -mean f.   D: (mean relu(1 - r) + mean relu(1 + f)) / 2   (as in the code of StableSR)"""

    def generator(self, network: Discriminator, real: Tensor, fake: Tensor) -> Tensor:
        return -network(fake).mean()

    def discriminator(self, network: Discriminator, real: Tensor, fake: Tensor) -> Iterator[Tensor]:
        yield F.relu(1 - network(real)).mean() / 2
        yield F.relu(1 + network(fake)).mean() / 2


OBJECTIVES: dict[str, Objective] = {"vanilla": Vanilla(), "relativistic": Relativistic(), "lsgan": LeastSquares(), "hinge": Hinge()}
