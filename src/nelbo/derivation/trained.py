r"""A trained model before its own data, as a setting of the derivation.

Latents, schedules and log-probabilities are float64; the network computes as it was trained, in
float32, and what it says is taken as exact. So every identity that holds pointwise holds to
rounding, whatever the network learned. A network is asked once for each latent of a trajectory.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from nelbo.bound import Bound, bound, decoder_term, pair_term, prior_term
from nelbo.data.mixture import GaussianMixture
from nelbo.derivation.identity import DEVIATIONS, Line, Side, mean_se
from nelbo.derivation.rows import (
    Rows,
    forward_steps,
    marginals,
    posterior_steps,
    reverse_steps,
)
from nelbo.derivation.settings import Sampled, Setting
from nelbo.objectives import Objective
from nelbo.processes.gaussian import Gaussian
from nelbo.randomness import seeded
from nelbo.reverse import Prediction, Reverse

FEWEST = 16
"""Examples, below which a standard error says too little."""
ROUNDING = 1e-11
"""Of a sum of log-probabilities, relative to the largest of them."""


Values = tuple[str, Tensor, str]
"""What a side is, its values, and what computed them."""


class Asked(nn.Module):
    """A network that computes as it was trained; it remembers its answer at each time of a grid.

    Arguments:
        network: in float32, on `device`. The rest of the model stays on the CPU.
    """

    def __init__(self, network: nn.Module, device: str) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).to(device).eval()
        self.device = device
        self.answers: dict[float, tuple[Tensor, Tensor]] = {}

    def forward(self, x_t: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        """(B, ...) float64."""
        if t.dim() > 0:
            return self._ask(x_t, t)
        asked, answer = self.answers.get(float(t), (None, None))
        if asked is None or asked.shape != x_t.shape or not torch.equal(asked, x_t):
            answer = self._ask(x_t, t)
            self.answers[float(t)] = x_t, answer
        assert answer is not None
        return answer

    def _ask(self, x_t: Tensor, t: Tensor) -> Tensor:
        x = x_t.to(self.device, torch.float32)
        answer: Tensor = self.network(x, t.to(self.device), None)
        return answer.to("cpu", torch.float64)


def widened(n: int) -> float:
    """By what a standard error from n draws is to be widened.

    With it, `DEVIATIONS` of them are passed as rarely as by a normal variable: the expansion of
    Student's quantile in 1/(n − 1).

    References:
        Abramowitz, Stegun 1964, 26.7.5.
    """
    z, v = DEVIATIONS, n - 1
    first, second = (z**2 + 1) / (4 * v), (5 * z**4 + 16 * z**2 + 3) / (96 * v**2)
    return 1 + first + second + (3 * z**6 + 19 * z**4 + 17 * z**2 - 15) / (384 * v**3)


def in_float64(model: Reverse, device: str) -> Reverse:
    """The same model, computing in float64 around its network."""
    found = Reverse(
        model.process,
        Asked(model.network, device),
        model.parameterization,
        model.decoder_rule,
    )
    return found.eval()


@dataclass(frozen=True)
class Kept(Setting):
    """A sampled setting whose trajectories are drawn once.

    Arguments:
        seed: of the latents.
    """

    seed: int = 0

    def trajectories(self) -> Rows:
        return self._rows

    def at(self, index: int) -> Rows:
        return self._drawn.at(index)

    @cached_property
    def _rows(self) -> Rows:
        return self._drawn.trajectories()

    @property
    def _drawn(self) -> Sampled:
        return Sampled(self.model, self.times, self.x_0, self.weight, self.family, self.seed)


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained model, rows of its data, one trajectory for each, and what is computed of them.

    Arguments:
        setting: model, grid and rows. objective: what was trained, on that grid.
        law: the data's law on the model's scale, if it is a known mixture.
        weighed: rows and trajectories of each for the importance-weighted bound.
    """

    setting: Kept
    objective: Objective
    law: GaussianMixture | None = None
    weighed: tuple[int, int] = (32, 16)

    @property
    def model(self) -> Reverse:
        """In float64 around its network."""
        return self.setting.model

    @property
    def times(self) -> Tensor:
        """(N,)."""
        return self.setting.times

    @property
    def x_0(self) -> Tensor:
        """(R, *shape)."""
        return self.setting.x_0

    @property
    def name(self) -> str:
        """Of the run."""
        return self.setting.family

    @property
    def gaussian(self) -> Gaussian | None:
        """The process, if it is Gaussian."""
        process = self.model.process
        return process if isinstance(process, Gaussian) else None

    @cached_property
    def rows(self) -> Rows:
        """x_{1:N} ~ q(x_{1:N}|x_0)."""
        return self.setting.trajectories()

    @cached_property
    def forward(self) -> Tensor:
        """log q(x_1|x_0), log q(x_t|x_s), ...; (R, N)."""
        return forward_steps(self.model, self.times, self.rows)

    @cached_property
    def posterior(self) -> Tensor:
        """log q(x_s|x_t, x_0); (R, N−1)."""
        return posterior_steps(self.model, self.times, self.rows)

    @cached_property
    def marginal(self) -> Tensor:
        """log q(x_t|x_0); (R, N)."""
        return marginals(self.model, self.times, self.rows)

    @cached_property
    def reverse(self) -> Tensor:
        """log p_θ(x_0|x_1), log p_θ(x_s|x_t), log p(x_N); (R, N+1)."""
        return reverse_steps(self.model, self.times, self.rows)

    @cached_property
    def minus_log_w(self) -> Tensor:
        """−log w of every trajectory, by the forward steps; (R,)."""
        return self.forward.sum(1) - self.reverse.sum(1)

    def at(self, index: int, model: Reverse | None = None) -> Prediction:
        """The prediction at the trajectories' latents."""
        return (model or self.model).at(self.rows.latents[:, index], self.times[index])

    @cached_property
    def terms(self) -> Bound:
        """The terms of the bound at the trajectories' latents."""
        pairs = [
            pair_term(self.at(i), self.x_0, self.times[i - 1]) for i in range(1, len(self.times))
        ]
        return Bound(
            prior_term(self.model, self.x_0, self.times),
            torch.stack(pairs, 1) if pairs else self.x_0.new_zeros(len(self.x_0), 0),
            decoder_term(self.at(0), self.x_0),
        )

    @cached_property
    def bound(self) -> Tensor:
        """The bound as `nelbo.bound.bound` draws it, apart from the trajectories; (R,)."""
        with seeded(self.setting.seed, "derive", "bound"):
            return bound(self.model, self.x_0, self.times).total

    # --- lines -----------------------------------------------------------------------------------

    def exact(self, *sides: Values, of: str = "trajectories") -> Line:
        """Sides that are equal in every place; the line shows the worst.

        Arguments:
            sides: what, values, by.
        """
        first = sides[0][1].detach().double()
        gap = torch.stack([(v - first).abs() for _, v, _ in sides]).amax(0).flatten()
        place = int(torch.where(gap.isnan(), torch.full_like(gap, torch.inf), gap).argmax())
        shown = tuple(Side(w, float(v.flatten()[place]), 0.0, by) for w, v, by in sides)
        size = max(1.0, *(float(v.abs().amax()) for _, v, _ in sides))
        note = f"the worst of {gap.numel()} {of}"
        return Line(self.name, shown, "=", ROUNDING * size * len(self.times), note=note)

    def means(self, left: Values, right: Values, unit: str = "nats") -> Line:
        """Means over examples of what is equal for every one of them, with their own errors."""
        sides = tuple(Side(w, *mean_se(v), by) for w, v, by in (left, right))
        size = max(1.0, abs(sides[0].value)) * len(self.times)
        note = f"mean over {len(self.x_0)} examples"
        return Line(self.name, sides, "=", ROUNDING * size, 0.0, note, unit)

    def drawn(
        self,
        left: Values,
        right: Values,
        relation: str = "=",
        note: str = "",
        unit: str = "nats",
    ) -> Line:
        """Means over rows, compared row by row.

        Arguments:
            left, right: what, values (R,), by.
        """
        sides = tuple(Side(w, *mean_se(v), by) for w, v, by in (left, right))
        apart = (left[1] - right[1]).double()
        size = max(1.0, abs(sides[0].value))
        many = f"{len(apart)} examples, one by one"
        return Line(
            self.name,
            sides,
            relation,
            ROUNDING * size * len(self.times),
            mean_se(apart)[1] * widened(len(apart)),
            ", ".join(part for part in (note, many) if part),
            unit,
        )
