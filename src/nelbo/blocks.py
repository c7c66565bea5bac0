r"""The prequential mode: every pair but the first ones is bet on, and then learned from.

For few reals. The pairs stand in random order, copies next to each other; each block is scored by
the classifier of the blocks before it, calibrated on a fifth of them (`nelbo.prequential`).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from nelbo.calibration import Chosen
from nelbo.claim import Certificate
from nelbo.inquiry import Inquiry, certificate
from nelbo.parts import in_groups, refuse_few, set_hash
from nelbo.prequential import boundaries
from nelbo.randomness import generator
from nelbo.sides import Fakes, refuse_mismatch, refuse_repeats

HELD = 0.2
"""Of the pairs before a block, held out to calibrate."""


def prequential(
    inquiry: Inquiry,
    rows: Tensor,
    source: Fakes,
    more: Tensor | None,
    groups: Tensor | None,
    keep: bool,
) -> Certificate:
    """The certificate of all pairs after the first block; see `nelbo.certificate.certify`."""
    most = source.most()
    total = len(rows) if most is None else min(len(rows), most)
    order = [i for group in in_groups(rows, groups, keep, inquiry.seed) for i in group]
    real = rows[order[:total]]
    fake = source.draw(total, "all blocks")
    refuse_mismatch(rows, fake, inquiry.as_is)
    if not inquiry.as_is:
        refuse_repeats(fake, rows, f"the sampler {source.name}")
    ends = boundaries(total)
    refuse_few(ends[0], ends[0] // 5, total - ends[0], (0.24, 0.06, 0.7))
    split_hash = set_hash(real[ends[0] :])
    looks = inquiry.look()
    first = real[: ends[0]] if more is None else torch.cat([real[: ends[0]], more])
    inquiry = replace(inquiry, view=inquiry.view.fitted(first))
    x, y = inquiry.sides(real, fake, "blocks")
    extra = None if more is None else inquiry.view(more, "fit_real")
    found: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for block, (start, end) in enumerate(zip(ends[:-1], ends[1:], strict=True)):
        chosen = _learn(inquiry, x[:start], y[:start], extra, total - ends[0], block)
        # Equal rows stand together; within a block the order must not tell anything.
        mix = start + torch.randperm(
            end - start, generator=generator(inquiry.seed, "block", block)
        )
        clip = torch.full((end - start,), chosen.setting.clip, dtype=torch.float64)
        found.append((chosen.logits(x[mix]), chosen.logits(y[mix]), clip, mix))
    logits_real, logits_fake, clips, mixed = (
        torch.cat(list(part)) for part in zip(*found, strict=True)
    )
    return certificate(
        inquiry,
        chosen,
        (logits_real, logits_fake),
        clips,
        (real[mixed], fake[mixed]),
        mode="prequential",
        looks=looks,
        split_hash=split_hash,
        rule="blocks in random order" + (", equal rows next to each other" if keep else ""),
        n_fit=ends[-2],
        n_calibration=int(HELD * ends[-2]),
    )


def _learn(
    inquiry: Inquiry, x: Tensor, y: Tensor, extra: Tensor | None, n: int, block: int
) -> Chosen:
    """Fit and calibrate on the pairs before a block."""
    held = int(HELD * len(x))
    mix = torch.randperm(len(x), generator=generator(inquiry.seed, "held", block))
    out, kept = mix[:held], mix[held:]
    real = x[kept] if extra is None else torch.cat([x[kept], extra])
    return inquiry.choose((real, y[kept]), (x[out], y[out]), n, block)
