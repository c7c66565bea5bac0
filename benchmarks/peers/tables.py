"""Ratios of rates of the same round, and the tables that are printed."""

from __future__ import annotations

import statistics
from typing import Any

from peers.measuring import Measured


def ratios(found: list[Measured]) -> list[dict[str, Any]]:
    """Every tuning of nelbo over every peer at the same work: median, least and largest."""
    rows = []
    for ours in found:
        if ours.one.project != "nelbo" or not ours.rates:
            continue
        for peer in found:
            if peer.work != ours.work or peer.one.project == "nelbo" or not peer.rates:
                continue
            row: dict[str, Any] = {"work": ours.work, "nelbo": ours.one.tuning.name}
            row["peer"] = peer.one.name
            for key in ("rates", "processor"):
                pairs = zip(getattr(ours, key), getattr(peer, key), strict=True)
                each = sorted(a / b for a, b in pairs)
                row[key] = {"median": statistics.median(each), "least": each[0], "most": each[-1]}
            rows.append(row)
    return rows


def text(document: dict[str, Any]) -> str:
    """What is printed on stdout."""
    lines = ["", f"{'':11s} {'':42s} {'images/s':>10s} {'least':>9s} {'most':>9s} "
                 f"{'of ceiling':>10s} {'memory':>9s}"]  # fmt: skip
    for row in document["rows"]:
        name = f"{row['project']}, {row['tuning']}"
        if row["median"] is None:
            lines.append(f"{row['work']:18.18s} {name:42s} fails: {row['failed']}")
            continue
        share = "" if row["share_of_ceiling"] is None else f"{row['share_of_ceiling']:.1%}"
        memory = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.2f} GB"
        lines.append(
            f"{row['work']:18.18s} {name:42s} {row['median']:10.1f} {min(row['rates']):9.1f} "
            f"{max(row['rates']):9.1f} {share:>10s} {memory:>9s}"
        )
    lines += [
        "",
        "nelbo over a peer, by the clock and by seconds of processor: median (least-most)",
    ]
    for row in document["ratios"]:
        clock, processor = (
            f"{row[key]['median']:5.2f} ({row[key]['least']:.2f}-{row[key]['most']:.2f})"
            for key in ("rates", "processor")
        )
        pair = f"{row['nelbo']} over {row['peer']}"
        lines.append(f"{row['work']:18.18s} {pair:60s} {clock:20s} {processor:20s}")
    lines += [""]
    for name, seconds in document.get("first step", {}).items():
        shown = "fails" if seconds is None else f"{seconds:.1f} s"
        lines.append(f"from a fresh process to the first update: {name:42s} {shown}")
    return "\n".join(lines)
