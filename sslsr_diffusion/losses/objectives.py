"""What a discriminator and the network that it judges want, over logits: means run over all elements of a call's logits."""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from torch import Tensor
from torch.nn import functional as F

Discriminator = Callable[[Tensor], "Tensor | Sequence[Tensor]"]  # logits, or those of several levels, whose terms are added


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


def levels(logits: "Tensor | Sequence[Tensor]") -> Sequence[Tensor]:
    """What a discriminator says, level by level."""
    return (logits,) if isinstance(logits, Tensor) else logits


def _sum(term: Callable[..., Tensor], *sides: "Tensor | Sequence[Tensor]") -> Tensor:
    """The terms of all levels, added; `sides` are what the discriminator said of one or two sides."""
    terms = [term(*level) for level in zip(*map(levels, sides))]
    return sum(terms[1:], terms[0])


class Vanilla:
    """G: -mean ln p(fake).   D: -mean ln p(real) - mean ln (1 - p(fake)), p = sigmoid(D)   (Goodfellow et al., 2014, not saturating)

    With `real_label` a below 1, D is told of the truth: a -ln p - (1 - a) ln (1 - p)   (Salimans et al., NeurIPS 2016, section 3.4).
    """

    def __init__(self, real_label: float = 1.0) -> None:
        self.real_label = real_label

    def generator(self, network: Discriminator, real: Tensor, fake: Tensor) -> Tensor:
        return _sum(_true, network(fake))

    def discriminator(self, network: Discriminator, real: Tensor, fake: Tensor) -> Iterator[Tensor]:
        yield _sum(lambda r: self.real_label * _true(r) + (1 - self.real_label) * _false(r), network(real))
        yield _sum(_false, network(fake))


class Relativistic:
    """Relativistic average: each side against the mean of the other; half of both terms, as in the code of ESRGAN.

    G: (bce(r - mean f, 0) + bce(f - mean r, 1)) / 2, r without gradient.
    D: bce(r - mean f, 1) / 2 + bce(f - mean r, 0) / 2, means without gradient; f is computed once for its mean and once for itself.
    (Jolicoeur-Martineau, ICLR 2019; Wang et al., ECCVW 2018, equations 1 and 2)
    """

    def generator(self, network: Discriminator, real: Tensor, fake: Tensor) -> Tensor:
        r = [level.detach() for level in levels(network(real))]
        f = network(fake)
        return _sum(lambda r, f: (_false(r - f.mean()) + _true(f - r.mean())) / 2, r, f)

    def discriminator(self, network: Discriminator, real: Tensor, fake: Tensor) -> Iterator[Tensor]:
        f = [level.detach() for level in levels(network(fake))]
        r = network(real)
        yield _sum(lambda r, f: _true(r - f.mean()) / 2, r, f)
        r = [level.detach() for level in levels(r)]
        yield _sum(lambda r, f: _false(f - r.mean()) / 2, r, network(fake))


class LeastSquares:
    """G: mean (f - 1)^2.   D: mean (r - 1)^2 + mean f^2   (Mao et al., ICCV 2017)"""

    def generator(self, network: Discriminator, real: Tensor, fake: Tensor) -> Tensor:
        return _sum(lambda f: (f - 1).square().mean(), network(fake))

    def discriminator(self, network: Discriminator, real: Tensor, fake: Tensor) -> Iterator[Tensor]:
        yield _sum(lambda r: (r - 1).square().mean(), network(real))
        yield _sum(lambda f: f.square().mean(), network(fake))


class Hinge:
    """G: -mean f.   D: (mean relu(1 - r) + mean relu(1 + f)) / 2   (as in the code of StableSR)"""

    def generator(self, network: Discriminator, real: Tensor, fake: Tensor) -> Tensor:
        return _sum(lambda f: -f.mean(), network(fake))

    def discriminator(self, network: Discriminator, real: Tensor, fake: Tensor) -> Iterator[Tensor]:
        yield _sum(lambda r: F.relu(1 - r).mean() / 2, network(real))
        yield _sum(lambda f: F.relu(1 + f).mean() / 2, network(fake))


OBJECTIVES: dict[str, Objective] = {"vanilla": Vanilla(), "relativistic": Relativistic(), "lsgan": LeastSquares(), "hinge": Hinge()}
