r"""Certifying a lower bound on JSD(p, g) for any sampler, from samples alone.

The reals are cut into FIT, CAL and C (`nelbo.parts`), and the sampler gives fakes for each. The
candidates are fitted on FIT, one of them is chosen with temperature, offset and clip on CAL, and C
is opened once: with probability at least 1 - alpha over C,

    jsd_nats_lower <= L(D) <= JSD(p, g),

whatever D and the sampler are, for any number of pairs. What can be claimed is a bound from below:
no number of samples bounds JSD from above without assumptions on p and g.

References:
    Lopez-Paz, Oquab 2017 (classifier two-sample tests); Pandeva et al. 2024;
    Waudby-Smith, Ramdas 2023; Podkopaev, Ramdas 2023 (betting while learning).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from nelbo.blocks import prequential
from nelbo.channels import Channel, Declared, Encode, Standard, View, usual_scale
from nelbo.claim import Certificate, recompute
from nelbo.errors import UsageError
from nelbo.inquiry import Inquiry, certificate
from nelbo.jsd import refuse_level, two_cells
from nelbo.judges import Judge, candidates
from nelbo.looks import Ledger
from nelbo.parts import SHARES, Parts, cut, refuse_few, set_hash, together
from nelbo.randomness import generator, key
from nelbo.sides import Fakes, Sampler, Source, fakes, read, refuse_mismatch, refuse_repeats

__all__ = ["Certificate", "certify", "recompute"]

MODES = ("split", "prequential")


def certify(
    real: Source,
    sampler: Sampler | Source | Fakes,
    *,
    alpha: float = 0.05,
    n: int | None = None,
    judges: Sequence[Judge | nn.Module | Callable[[Tensor], Tensor]] | None = None,
    clips: Sequence[float] | None = None,
    mode: str = "split",
    channel: Channel | str | None = None,
    fit_real: Source | None = None,
    fit_fakes: int | None = None,
    groups: Tensor | None = None,
    encode: Encode | Standard | None = None,
    levels: int | None = None,
    seed: int = 0,
    shares: Sequence[float] = SHARES,
    looks: int = 1,
    ledger: Ledger | None = None,
    sampler_name: str | None = None,
    as_is: bool = False,
    copies_together: bool | None = None,
) -> Certificate:
    """Certify JSD(p, g) >= x nats with confidence 1 - alpha.

    Arguments:
        real: reals that the sampler never saw, in training or in choosing it: (N, *shape) levels
            (integers) or vectors (floats), or a path.
        sampler: a function n -> (n, *shape) that draws from torch's global generator, or an array
            or path of independent fakes, in the units of the reals.
        alpha: probability that the claim is false, at most.
        n: reals to use; all when None.
        judges: candidate classifiers; modules and functions are taken as they are (a GAN's own
            discriminator can be one). The usual ones for the shape when None.
        clips: clips B to choose from.
        mode: "split", or "prequential" for few reals: no part is set aside for good.
        channel: applied to both sides, or the name of what both sides have passed already.
        fit_real: reals that the sampler may have seen; the classifiers are fitted on them too.
        fit_fakes: most fakes to draw for FIT, where they are dear; by default as many as reals
            there, or all that an array has left.
        groups: (N,) a number per real; equal ones (subjects, scenes) stay in one part.
        encode: stored rows -> what the channel and the classifiers read, such as
            `Dataset.encode`; by default levels go to [-1, 1] and vectors stay as they are.
        levels: number of levels, for the default `encode`.
        seed: of the split, the sampler and the classifiers.
        shares: of FIT, CAL and C among the reals.
        looks: at these reals, this one included, when no ledger counts them.
        ledger: counts the looks at these reals, whatever the seed; one is written before any pair
            is opened.
        sampler_name: what certificates call the sampler: run, step, EMA, truncation.
        as_is: let pass another range, and fakes with many copies.
        copies_together: equal reals stay in one part (True), or are independent draws of a law
            with atoms (False); by default the latter for bits and level vectors with many copies.

    Returns:
        the certificate, with the logits of C.

    Raises:
        InputRefused: the sides are not comparable, the sampler fails or repeats itself, there are
            too few rows, or a classifier gives NaN or looks at the batch.
        UsageError: an option is off.
    """
    refuse_level(alpha)
    if mode not in MODES:
        raise UsageError(f"mode {mode!r}: give one of {', '.join(MODES)}")
    rows = read(real, "the reals")
    source = fakes(sampler, key(seed, "fakes") % 2**63, sampler_name)
    more = None if fit_real is None else read(fit_real, "fit_real")
    if more is not None:
        refuse_mismatch(rows, more, as_is=True)
    data = set_hash(rows)
    if n is not None and n < len(rows):
        rows, groups = _some(rows, groups, n, seed)
    if isinstance(channel, str):
        channel = Declared(channel)
    inquiry = Inquiry(
        alpha=alpha,
        seed=seed,
        judges=candidates(judges, rows.shape[1:]),
        clips=None if clips is None else tuple(clips),
        view=View(encode or usual_scale(rows, levels), channel, key(seed, "channel")),
        looks=looks,
        ledger=ledger,
        sampler=source.name,
        as_is=as_is,
        data=data,
        fit_fakes=fit_fakes,
    )
    keep = together(rows, copies_together)
    if mode == "prequential":
        return prequential(inquiry, rows, source, more, groups, keep)
    return _split(inquiry, rows, source, more, groups, keep, shares)


def _split(
    inquiry: Inquiry,
    rows: Tensor,
    source: Fakes,
    more: Tensor | None,
    groups: Tensor | None,
    keep: bool,
    shares: Sequence[float],
) -> Certificate:
    total = len(rows) if source.most() is None else min(len(rows), source.most() or 0)
    parts = cut(
        rows,
        seed=inquiry.seed,
        total=total,
        shares=shares,
        groups=groups,
        fit_real=more,
        keep=keep,
    )
    inquiry = replace(inquiry, view=inquiry.view.fitted(parts.fit))
    drawn = _draw(inquiry, parts, source, rows)
    pairs = len(parts.certificate)
    fit = inquiry.sides(parts.fit, drawn["FIT"], "FIT")
    calibration = inquiry.sides(parts.calibration, drawn["CAL"], "CAL")
    chosen = inquiry.choose(fit, calibration, pairs)
    looks = inquiry.look()
    real, fake = inquiry.sides(parts.certificate, drawn["C"], "C")
    logits = chosen.logits(real), chosen.logits(fake)
    cells = two_cells(*logits, chosen.threshold, inquiry.alpha)
    return certificate(
        inquiry,
        chosen,
        logits,
        None,
        (parts.certificate, drawn["C"]),
        mode="split",
        looks=looks,
        split_hash=parts.hash,
        rule=parts.rule,
        n_fit=len(parts.fit),
        n_calibration=len(parts.calibration),
        dropped=parts.dropped,
        jsd_nats_two_cells=cells.jsd_nats_lower,
        tv_lower=cells.tv_lower,
    )


def _draw(inquiry: Inquiry, parts: Parts, source: Fakes, rows: Tensor) -> dict[str, Tensor]:
    """One fake per real on CAL and C; on FIT as many, or all that an array has left."""
    pairs = {"CAL": len(parts.calibration), "C": len(parts.certificate)}
    most = source.most()
    wanted = len(parts.fit) if most is None else most - sum(pairs.values())
    wanted = min(wanted, inquiry.fit_fakes or wanted)
    refuse_few(wanted, pairs["CAL"], pairs["C"], SHARES)
    drawn: dict[str, Tensor] = {}
    for part, count in {"FIT": wanted, **pairs}.items():
        drawn[part] = source.draw(count, part)
        refuse_mismatch(rows, drawn[part], inquiry.as_is)
        if not inquiry.as_is:
            earlier = drawn["FIT"] if most is None and part != "FIT" else None
            refuse_repeats(drawn[part], rows, f"the sampler {source.name}", earlier)
    return drawn


def _some(rows: Tensor, groups: Tensor | None, n: int, seed: int) -> tuple[Tensor, Tensor | None]:
    chosen = torch.randperm(len(rows), generator=generator(seed, "some"))[:n]
    return rows[chosen], None if groups is None else groups[chosen]
