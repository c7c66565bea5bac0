r"""The minimax game: a generator against a discriminator, on logits.

With s = logit of D, sp(u) = log(1 + e^u), x ~ p and y = G(z), z ~ p_z, the value of the game is

    V(D, G) = E log D(x) + E log(1 − D(y)) = −E sp(−s(x)) − E sp(s(y)).

D* = p/(p + g) maximises it, V(D*, G) = 2 JSD(p, g) − log 4, and for any D at all

    L_D = log 2 + V(D, G)/2 <= JSD(p, g)                                        (nats),

so that a value on held-out data says something about the samples, whoever trained D. What the
players minimise need not be V. Each loss here is a pure function of the logits of a batch:

    loss            D minimises                  G minimises
    minimax         sp(−s(x)) + sp(s(y))         −sp(s(y))          the theory; dies when D wins
    non-saturating  the same                     sp(−s(y))          the default
    hinge           (1 − s(x))_+ + (1 + s(y))_+  −s(y)
    relativistic    sp(s(y) − s(x))              sp(s(x) − s(y))    pairs of one x and one y

The gradient penalties γ/2 |∇s|² at reals (R1) and fakes (R2) are per example, of what D sees, in
float32 or better. Nothing here uses statistics of a batch, so that rows stay independent.

References:
    Goodfellow et al. 2014, eq. 1, proposition 1, theorem 1; Mescheder et al. 2018 (R1, R2);
    Lim & Ye 2017 (hinge); Jolicoeur-Martineau 2019, Huang et al. 2024 (relativistic pairing).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nelbo.distributed import gather
from nelbo.jsd import plug_in
from nelbo.randomness import by_row

HALVINGS = 60
REMEMBERED = 16
"""Batches whose logits make the running value of the game."""


def value(real: Tensor, fake: Tensor) -> Tensor:
    """log D(x) + log(1 − D(y)) of pairs, (B,) nats in float64, from the logits (B,) of both."""
    return -F.softplus(-real.double()) - F.softplus(fake.double())


def best_offset(real: Tensor, fake: Tensor) -> float:
    """The b that maximises the value of the logits s + b over a batch.

    Relativistic pairing fixes s up to a constant; this is the constant. The derivative of the
    value in b, E σ(−s(x)−b) − E σ(s(y)+b), decreases, so that bisection finds its root.
    """
    a, b = real.detach().double(), fake.detach().double()
    top = float(torch.cat((a, b)).abs().max()) + 50.0
    low, high = -top, top
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        slope = torch.sigmoid(-a - middle).mean() - torch.sigmoid(b + middle).mean()
        low, high = (middle, high) if float(slope) > 0 else (low, middle)
    return (low + high) / 2


class Loss(ABC):
    """What the players minimise, from the logits of a batch; nats or, for hinge, no unit."""

    centred = False
    """Whether logits are fixed only up to a constant."""

    @abstractmethod
    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        """(B,), (B,) -> (B,)."""

    @abstractmethod
    def generator(self, real: Tensor, fake: Tensor) -> Tensor:
        """(B,), (B,) -> (B,)."""


class Minimax(Loss):
    """Goodfellow et al. 2014, eq. 1: both players move V. The gradient of G dies when D wins."""

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return F.softplus(-real) + F.softplus(fake)

    def generator(self, real: Tensor, fake: Tensor) -> Tensor:
        return -F.softplus(fake)


class NonSaturating(Loss):
    """Goodfellow et al. 2014, section 3: D moves V, G minimises −log D(G(z))."""

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return F.softplus(-real) + F.softplus(fake)

    def generator(self, real: Tensor, fake: Tensor) -> Tensor:
        return F.softplus(-fake)


class Hinge(Loss):
    """Lim & Ye 2017. Its D is no estimate of p/(p + g); the value stays a lower bound."""

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return F.relu(1 - real) + F.relu(1 + fake)

    def generator(self, real: Tensor, fake: Tensor) -> Tensor:
        return -fake


class Relativistic(Loss):
    """Each real against one fake: which of the two is real? Robust where modes are dropped."""

    centred = True

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return F.softplus(fake - real)

    def generator(self, real: Tensor, fake: Tensor) -> Tensor:
        return F.softplus(real - fake)


class Game(nn.Module):
    """A generator and a discriminator.

    Arguments:
        generator: (B, latent) -> (B, *shape) on the model's scale.
        discriminator: (B, *shape) -> (B,) logits of "real".
        latent: dimensions of z ~ N(0, I).
    """

    def __init__(self, generator: nn.Module, discriminator: nn.Module, latent: int) -> None:
        super().__init__()
        self.generator = generator
        self.discriminator = discriminator
        self.latent = latent

    def noise(self, count: int, like: Tensor | None = None) -> Tensor:
        """(count, latent) draws of z from the global generator, as `like` in device and dtype."""
        z = by_row(count, lambda n, g: torch.randn(n, self.latent, generator=g))
        return z if like is None else z.to(like)

    def value(self, x: Tensor, z: Tensor) -> Tensor:
        """log D(x) + log(1 − D(G(z))), (B,) nats in float64; its mean estimates V."""
        return value(self.discriminator(x), self.discriminator(self.generator(z)))


@dataclass(frozen=True)
class Rules:
    """How the players move.

    Arguments:
        loss: what they minimise.
        r1, r2: γ of the gradient penalties at reals and at fakes; 0 for none.
        relax: part of γ that is left at the end; it falls by a half cosine.
        prepare: what happens to reals alone before D sees them (levels become intervals).
        change: differentiable augmentation, of reals and fakes alike.
    """

    loss: Loss
    r1: float = 0.0
    r2: float = 0.0
    relax: float = 1.0
    prepare: Callable[[Tensor], Tensor] | None = None
    change: Callable[[Tensor], Tensor] | None = None

    def strength(self, progress: float) -> float:
        """Part of γ that is in force when a part of the updates, 0 to 1, is done."""
        return self.relax + (1 - self.relax) * 0.5 * (1 + math.cos(math.pi * progress))

    def seen(self, x: Tensor) -> Tensor:
        """What D sees of samples."""
        return x if self.change is None else self.change(x)

    def real(self, x_0: Tensor) -> Tensor:
        """What D sees of data."""
        return self.seen(x_0 if self.prepare is None else self.prepare(x_0))


class DiscriminatorLoss:
    """The discriminator's loss on a batch, as a `Player` wants it; remembers its last logits.

    Arguments:
        game: whose D is trained. rules: how.
        progress: gives the part of the updates that is done, 0 to 1.
    """

    def __init__(
        self, game: Game, rules: Rules, progress: Callable[[], float] = lambda: 0.0
    ) -> None:
        self.game = game
        self.rules = rules
        self.progress = progress
        self.last: deque[tuple[Tensor, Tensor]] = deque(maxlen=REMEMBERED)

    def __call__(self, x_0: Tensor) -> Tensor:
        """(B, *shape) -> (B,); z and augmentation come from the global generator."""
        rules, part = self.rules, self.rules.strength(self.progress())
        with torch.no_grad():
            fakes = self.game.generator(self.game.noise(len(x_0), x_0))
        x, y = rules.real(x_0).detach(), rules.seen(fakes).detach()
        real, steep_real = self._score(x, part * rules.r1)
        fake, steep_fake = self._score(y, part * rules.r2)
        self.last.append((real.detach(), fake.detach()))
        return rules.loss.discriminator(real, fake) + steep_real + steep_fake

    def _score(self, x: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
        """Logits (B,) and γ/2 |∇s|² (B,)."""
        if gamma == 0:
            logits = self.game.discriminator(x)
            return logits, torch.zeros_like(logits)
        # a penalty in half precision is noise
        with torch.autocast(x.device.type, enabled=False):
            x = (x if x.dtype == torch.float64 else x.float()).requires_grad_()
            logits = self.game.discriminator(x)
            (slope,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
        return logits, 0.5 * gamma * slope.flatten(1).square().sum(1)

    def plug_in(self, everywhere: bool = False) -> float:
        """log 2 + V/2 in nats over the last batches: of training D, on data that it was trained
        on, so that it certifies nothing. NaN before the first batch.

        Arguments:
            everywhere: of the rows of all ranks, which come here together.
        """
        if not self.last:
            return math.nan
        real, fake = (torch.cat(side) for side in zip(*self.last, strict=True))
        if everywhere:
            real, fake = (torch.cat(gather(side)) for side in (real, fake))
        offset = best_offset(real, fake) if self.rules.loss.centred else 0.0
        return plug_in(real + offset, fake + offset)[0]


class GeneratorLoss:
    """The generator's loss on a batch, as a `Player` wants it.

    Arguments:
        game: whose G is trained. rules: how.
    """

    def __init__(self, game: Game, rules: Rules) -> None:
        self.game = game
        self.rules = rules

    def __call__(self, x_0: Tensor) -> Tensor:
        """(B, *shape) -> (B,); z and augmentation come from the global generator."""
        game, loss = self.game, self.rules.loss
        with frozen(game.discriminator):
            fake = game.discriminator(self.rules.seen(game.generator(game.noise(len(x_0), x_0))))
            real = fake.detach()
            if loss.centred:
                with torch.no_grad():
                    real = game.discriminator(self.rules.real(x_0))
            return loss.generator(real, fake)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No gradients for the parameters of a module; gradients still pass through it."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
