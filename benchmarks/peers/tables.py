"""Ratios of rates of the same round, and the tables that are printed."""

from __future__ import annotations

import statistics
from typing import Any

from peers.measuring import Measured

Row = dict[str, Any]
OURS = "nelbo"


def ratios(found: list[Measured]) -> list[Row]:
    """Every tuning of nelbo over every peer at the same work: median, least and largest."""
    rows = []
    for ours in found:
        if ours.one.project != OURS or not ours.rates:
            continue
        for peer in found:
            if peer.work != ours.work or peer.one.project == OURS or not peer.rates:
                continue
            row: Row = {"work": ours.work, "nelbo": ours.one.tuning.name}
            row["peer"] = peer.one.name
            for key in ("rates", "processor"):
                pairs = zip(getattr(ours, key), getattr(peer, key), strict=True)
                row[key] = spread([a / b for a, b in pairs])
            rows.append(row)
    return rows


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and largest."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


SHARES = {
    "of an update, the network": ("training", "forward and backward"),
    "full bound over forward": ("full bound", "forward"),
}
"""Two works of one contestant: the rate of the first in that of the second."""


def shares(found: list[Measured]) -> list[Row]:
    """By contestant and round: what an update leaves to its network, full bound over forward."""
    by = {(m.work, m.one.name): m for m in found if m.rates}
    rows = []
    for what, (work, other) in SHARES.items():
        for measured in found:
            one, two = (by.get((w, measured.one.name)) for w in (work, other))
            if measured.work != work or one is None or two is None:
                continue
            row: Row = {"what": what, "project": one.one.project, "tuning": one.one.tuning.name}
            for key in ("rates", "processor"):
                pairs = zip(getattr(one, key), getattr(two, key), strict=True)
                row[key] = spread([a / b for a, b in pairs])
            rows.append(row)
    return rows


def text(document: Row) -> str:
    """What is printed on stdout."""
    lines = ["", f"{'':20s} {'':42s} {'images/s':>10s} {'least':>9s} {'most':>9s} "
                 f"{'of ceiling':>10s} {'memory':>9s}"]  # fmt: skip
    for piece in document["pieces"]:
        lines += [_row(row) for row in piece.get("rows", [])]
    lines += ["", "nelbo over a peer, by the clock and by seconds of processor: median (range)"]
    for piece in document["pieces"]:
        lines += [_ratio(row) for row in piece.get("ratios", [])]
    lines += [""]
    for piece in document["pieces"]:
        lines += [_share(row) for row in piece.get("shares", [])]
    for piece in document["pieces"]:
        for name, one in piece.get("seconds", {}).items():
            said = one["failed"] or f"{statistics.median(one['clock']):.1f} s"
            lines.append(f"from a fresh process to the first update: {name:42s} {said}")
    return "\n".join(lines)


def _row(row: Row) -> str:
    name = f"{row['project']}, {row['tuning']}"
    if row["median"] is None:
        return f"{row['work']:20.20s} {name:42s} fails: {row['failed']}"
    share = "" if row["share_of_ceiling"] is None else f"{row['share_of_ceiling']:.1%}"
    memory = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.2f} GB"
    return (
        f"{row['work']:20.20s} {name:42s} {row['median']:10.1f} {min(row['rates']):9.1f} "
        f"{max(row['rates']):9.1f} {share:>10s} {memory:>9s}"
    )


def shown(value: dict[str, float]) -> str:
    """Median (least-most)."""
    return f"{value['median']:.2f} ({value['least']:.2f}-{value['most']:.2f})"


def _share(row: Row) -> str:
    clock, processor = shown(row["rates"]), shown(row["processor"])
    name = f"{row['project']}, {row['tuning']}"
    return f"{row['what']:26s} {name:42s} {clock:20s} {processor:20s}"


def _ratio(row: Row) -> str:
    clock, processor = shown(row["rates"]), shown(row["processor"])
    pair = f"{row['nelbo']} over {row['peer']}"
    return f"{row['work']:20.20s} {pair:62s} {clock:20s} {processor:20s}"
