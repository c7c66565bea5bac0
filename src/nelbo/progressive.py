r"""Rate and distortion of progressive coding, from a few network calls per example.

A receiver who has been sent x_N, ..., x_t has paid for the prior term and for the divergences of
all pairs above t, and guesses x̂_0(x_t):

    rate(t) = KL(q(x_N|x_0) ‖ p(x_N)) + Σ_{pairs above t} E KL(q(x_s|x_t, x_0) ‖ p_θ(x_s|x_t)),
    distortion(t) = √(E ‖x_0 − x̂_0(x_t)‖²/d).

At t_1 the rate is complete; what the decoder still costs, −log p_θ(x_0|x_1), is the bound's other
part. The pairs are cut into K strata. Of each stratum one pair is drawn per example and stands for
all its members, and x̂_0 is measured at each cut: 2K + 1 calls, and every point of the curve is
unbiased for the model's own grid (no chain of K steps is measured in its place).

References:
    Ho, Jain, Abbeel 2020, section 4.3, figure 5.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nelbo.bound import decoder_term, prior_term
from nelbo.distributions import per_example
from nelbo.drawing import Drawer
from nelbo.errors import NumericalFailure
from nelbo.estimate import Estimate
from nelbo.reverse import Reverse


@dataclass(frozen=True)
class Progressive:
    """The curve, per example, from noise (first column) to data (last one).

    Arguments:
        times: (K+1,) decreasing: the cuts, from t_N to t_1.
        rate: (n, K+1) nats sent before the receiver has x_t.
        error: (n, K+1) ‖x_0 − x̂_0(x_t)‖² on the model's scale, summed over dimensions.
        decoder: (n,) −log p_θ(x_0|x_1), nats, one draw.
        dims: d. calls: network calls per example.
    """

    times: Tensor
    rate: Tensor
    error: Tensor
    decoder: Tensor
    dims: int
    calls: int

    def rates(self) -> list[Estimate]:
        """Nats per example at every cut."""
        return [Estimate.of(column) for column in self.rate.T]

    def distortions(self, unit: float = 1.0) -> list[tuple[float, float]]:
        """Root mean squared error and its standard error at every cut.

        Arguments:
            unit: how many units are 1 on the model's scale: (levels − 1)/2 for grey levels.
        """
        return [root_mean(Estimate.of(column / self.dims), unit) for column in self.error.T]


def root_mean(square: Estimate, unit: float) -> tuple[float, float]:
    """√mean and its standard error, se/(2√mean), from an estimate of a mean square."""
    root = math.sqrt(square.mean)
    return unit * root, unit * square.se / (2 * root) if root > 0 else 0.0


def cuts(latents: int, calls: int) -> Tensor:
    """(K+1,) increasing places in a grid, 0 and N − 1 among them, for 2K + 1 ≤ calls."""
    pieces = max(1, min((calls - 1) // 2, latents - 1))
    return torch.linspace(0, latents - 1, pieces + 1).round().long()


def measure(
    model: Reverse,
    data: Tensor,
    times: Tensor,
    calls: int,
    *,
    encode: Callable[[Tensor], Tensor] = lambda y: y,
    batch: int = 512,
    seed: int = 0,
    device: str | torch.device = "cpu",
    track: Callable[[int, int], None] = lambda done, total: None,
) -> Progressive:
    """Measure the curve.

    Arguments:
        data: (n, *shape) stored examples; `encode` turns rows into the model's scale.
        times: (N,) the grid, N ≥ 2. calls: at most so many network calls per example, at least 3.
        batch: examples per network call; changes no figure.
        track: told the number of calls done and planned, in examples.
    Raises:
        NumericalFailure: a value is not finite.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            drawer = Drawer(model, data, encode, times, batch, seed, device, track)
            result = _measure(drawer, cuts(len(times), calls))
    finally:
        model.train(was_training)
    for what in ("rate", "error", "decoder"):
        if not bool(torch.isfinite(getattr(result, what)).all()):
            raise NumericalFailure(f"the {what} of an example is not finite")
    return result


def _measure(drawer: Drawer, places: Tensor) -> Progressive:
    calls = 2 * len(places) - 1
    parts = [_batch(drawer, x_0, rows, places, calls) for rows, x_0 in drawer.batches()]
    widths: list[tuple[int, ...]] = [(), (len(places) - 1,), (len(places),), ()]
    prior, strata, error, decoder = (
        drawer.collect([p[k] for p in parts], widths[k]) for k in range(4)
    )
    # from noise to data: nothing but the prior is sent before x_N is there
    rate = torch.cat([prior[:, None], strata.flip(1)], 1).cumsum(1)
    dims = drawer.encode(drawer.data[:1])[0].numel()
    at = drawer.times[places].flip(0)
    return Progressive(at, rate, error.flip(1), decoder, dims, calls)


def _batch(
    drawer: Drawer, x_0: Tensor, rows: Tensor, places: Tensor, calls: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Prior (B,), strata (B, K), errors (B, K+1) and decoder term (B,), by increasing time."""
    strata, errors = [], []
    for k, (low, high) in enumerate(zip(places[:-1], places[1:], strict=True)):
        size = int(high - low)
        u = drawer.uniform(rows, 1, "progressive", "pair", k)[:, 0]
        index = int(low) + 1 + (u * size).long().clamp(max=size - 1)
        strata.append(size * drawer.term(x_0, rows, index, "progressive", "term", k)[0])
        drawer.tick(calls)
    decoder = torch.empty(0)
    for k, place in enumerate(places):
        t = drawer.times[place]
        at = drawer.model.at(drawer.latent(x_0, rows, t, "progressive", "error", k), t)
        errors.append(per_example((x_0 - at.x_0) ** 2).cpu())
        decoder = decoder_term(at, x_0).cpu() if k == 0 else decoder
        drawer.done += len(rows)
        drawer.tick(calls)
    prior = prior_term(drawer.model, x_0, drawer.times).cpu()
    return prior, torch.stack(strata, 1), torch.stack(errors, 1), decoder
