r"""What is asked of two sides, and the certificate that answers it.

Everything but the pairs is fixed here: error level, candidates, clips, the view of the rows, the
count of looks. A mode brings the logits of its pairs; the answer is the bound that they give, with
the plug-in value, the e-value and the plain readings (accuracy, area under the curve) beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nelbo.calibration import Chosen, choose
from nelbo.channels import View
from nelbo.claim import Certificate, bound_again
from nelbo.jsd import log_e_value, plug_in
from nelbo.judges import Judge
from nelbo.looks import Ledger
from nelbo.randomness import key
from nelbo.sides import read


@dataclass(frozen=True)
class Inquiry:
    """What is asked.

    Arguments:
        alpha, seed, clips, looks, ledger, as_is, fit_fakes: see `nelbo.certificate.certify`.
        data: hash of all reals. judges: the candidates. view: what they see of stored rows.
        sampler: name of the fakes.
    """

    alpha: float
    seed: int
    judges: tuple[Judge, ...]
    clips: tuple[float, ...] | None
    view: View
    looks: int
    ledger: Ledger | None
    sampler: str
    as_is: bool
    data: str
    fit_fakes: int | None

    def choose(self, fit: Any, calibration: Any, n: int, block: int = 0) -> Chosen:
        """A classifier, fitted and calibrated for n pairs."""
        return choose(
            self.judges,
            fit,
            calibration,
            n=n,
            alpha=self.alpha,
            seed=key(self.seed, "fit", block),
            clips=self.clips,
        )

    def look(self) -> int:
        """Written down before any pair is opened."""
        if self.ledger is None:
            return self.looks
        return self.ledger.look(self.data, f"{self.sampler}, seed {self.seed}")

    def sides(self, real: Tensor, fake: Tensor, part: str) -> tuple[Tensor, Tensor]:
        """Both sides of a part as the classifiers see them."""
        return self.view(real, part, "real"), self.view(fake, part, "fake")

    @property
    def channel(self) -> str | None:
        """Its name."""
        return self.view.channel.name if self.view.channel else None


def certificate(
    inquiry: Inquiry,
    chosen: Chosen,
    logits: tuple[Tensor, Tensor],
    clips: Tensor | None,
    rows: tuple[Tensor, Tensor],
    **about: Any,
) -> Certificate:
    """The certificate that the logits of the pairs give.

    Arguments:
        logits: (n,) of reals and of fakes, in the order of the bound. clips: see `Certificate`.
        rows: (n, *shape) stored rows of both sides, in the same order.
        about: its other fields.
    """
    setting = chosen.setting
    plugin, error = plug_in(*logits)
    return Certificate(
        jsd_nats_lower=bound_again(*logits, setting.clip, clips, inquiry.alpha),
        alpha=inquiry.alpha,
        n_pairs=len(logits[0]),
        plugin=plugin,
        plugin_se=error,
        log_e_value=log_e_value(*logits),
        clip=setting.clip,
        temperature=setting.temperature,
        offset=setting.offset,
        classifier=chosen.name,
        classifier_hash=chosen.hash,
        candidates=chosen.predicted,
        channel=inquiry.channel,
        sampler=inquiry.sampler,
        seed=inquiry.seed,
        data_hash=inquiry.data,
        logits_real=logits[0],
        logits_fake=logits[1],
        clips=clips,
        rows_real=rows[0],
        rows_fake=rows[1],
        discriminator=lambda some: chosen.logits(inquiry.view(read(some, "the rows"), "looking")),
        accuracy=float((logits[0] > 0).double().mean() + (logits[1] <= 0).double().mean()) / 2,
        auc=_auc(*logits),
        **about,
    )


def _auc(real: Tensor, fake: Tensor) -> float:
    """P(s(x) > s(y)), ties counted half."""
    ordered = fake.sort().values
    below = torch.searchsorted(ordered, real) + torch.searchsorted(ordered, real, right=True)
    return float(below.double().mean()) / (2 * len(fake))
