r"""The noise ladder: certificates between the forward marginals of data and of samples.

Images of most models are told apart without noise, JSD near log 2, and the figure says nothing
more. With the noise of diffusion on both sides,

    x_t = sqrt(k) x + sqrt(l) e,   k = sigmoid(logsnr),   l = sigmoid(-logsnr),

the divergence falls as the log-SNR does, and shows at which scale the sampler goes wrong. The true
values decrease along the ladder; what is certified of them need not. The rungs share the parts,
the fakes and the error probability: all of them hold jointly with confidence 1 - alpha.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nelbo.certificate import certify
from nelbo.channels import Encode, Noise, Standard
from nelbo.claim import Certificate
from nelbo.errors import UsageError
from nelbo.looks import Ledger
from nelbo.randomness import key
from nelbo.sides import Again, Fakes, Sampler, Source, fakes, read


@dataclass(frozen=True)
class Rung:
    """A certificate at one log-SNR."""

    logsnr: float
    certificate: Certificate

    def as_json(self) -> dict[str, Any]:
        """{logsnr, certificate}."""
        return {"logsnr": self.logsnr, "certificate": self.certificate.as_json()}


def ladder(
    real: Source,
    sampler: Sampler | Source | Fakes,
    logsnrs: Sequence[float],
    *,
    alpha: float = 0.05,
    encode: Encode | Standard | None = None,
    seed: int = 0,
    ledger: Ledger | None = None,
    looks: int = 1,
    sampler_name: str | None = None,
    **options: Any,
) -> list[Rung]:
    """Certify JSD of both sides at each log-SNR.

    Arguments:
        real, sampler, seed, sampler_name: see `nelbo.certificate.certify`, as are further options.
        logsnrs: log-SNRs, each other than the others.
        alpha: probability that any of the claims is false; each rung gets an equal part.
        encode: onto the scale on which the noise acts, such as `Dataset.encode`; by default levels
            go to [-1, 1], and vectors are standardised by the reals of FIT.
        ledger, looks: the ladder is one look, since its error probability is shared out.

    Returns:
        one rung per log-SNR, in the order given.

    Raises:
        UsageError: no log-SNRs, or one twice. InputRefused: see `certify`.
    """
    if not logsnrs or len(set(logsnrs)) < len(logsnrs):
        raise UsageError(f"log-SNRs {list(logsnrs)}: give at least one, and each once")
    rows = read(real, "the reals")
    source = Again(fakes(sampler, key(seed, "fakes") % 2**63, sampler_name))
    if encode is None and rows.is_floating_point():
        encode = Standard()
    rungs: list[Rung] = []
    for logsnr in logsnrs:
        certificate = certify(
            rows,
            source,
            alpha=alpha / len(logsnrs),
            channel=Noise(logsnr),
            encode=encode,
            seed=seed,
            ledger=None if rungs else ledger,
            looks=rungs[0].certificate.looks if rungs else looks,
            **options,
        )
        rungs.append(Rung(logsnr, certificate))
    return rungs
