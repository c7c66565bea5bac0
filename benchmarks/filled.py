"""The tables of docs/speed.md, from the documents that the benchmarks wrote."""

from __future__ import annotations

import statistics
from typing import Any

Document = dict[str, Any]
AIMS = {
    "rates": {"training": "8,000; 1.4", "forward": "30,000; 1.4"},
    "processor_rates": {"training": "1.3", "sampling": "1.3"},
}
"""Images per second and ratio, on a GPU; the ratio on a CPU."""
BITS = "3.10; peers 3.51 (L_hybrid), 3.28 (continuous time)"
NOTHING = "| not measured yet |\n|---|"


def rates(document: Document, work: str, key: str) -> dict[tuple[str, str], Document]:
    """Rows of a work that did not fail by project and tuning, of the fastest piece of each."""
    found: dict[tuple[str, str], Document] = {}
    for piece in document.get("pieces", []):
        for row in piece.get("rows", []):
            name = row["project"], row["tuning"]
            if row["work"] != work or not row[key]:
                continue
            value = statistics.median(row[key])
            if name not in found or value > found[name]["value"]:
                found[name] = {**row, "value": value}
    return found


def best(found: dict[tuple[str, str], Document], ours: bool) -> tuple[str, str] | None:
    """The fastest tuning of nelbo, or of any peer."""
    mine = {name: row for name, row in found.items() if (name[0] == "nelbo") == ours}
    return max(mine, key=lambda name: mine[name]["value"], default=None)


def ratio(document: Document, work: str, ours: str, peer: str, key: str) -> str:
    """Of two rates of the same rounds: median (least-most)."""
    for piece in document.get("pieces", []):
        for row in piece.get("ratios", []):
            if (row["work"], row["nelbo"], row["peer"]) == (work, ours, peer):
                found = row["rates" if key == "rates" else "processor"]
                return f"**{found['median']:.2f}** ({found['least']:.2f}-{found['most']:.2f})"
    return ""


def failures(document: Document) -> list[str]:
    """Who could not do what, and why."""
    found = []
    for piece in document.get("pieces", []):
        found += [f"{name}: absent, {why}" for name, why in piece.get("absent", {}).items()]
        for row in piece.get("rows", []):
            if row["failed"]:
                name = f"{row['project']}, {row['tuning']}"
                found.append(f"{name}: {row['work']} fails ({row['failed'][:120]})")
        for name, one in piece.get("seconds", {}).items():
            if one["failed"]:
                found.append(f"{name}: first update fails ({one['failed'][:120]})")
    return sorted(set(found))


def work_row(document: Document, work: str, tunings: list[str], key: str) -> str:
    """A line: nelbo by tuning, the best peer, the ratio, the aim."""
    found = rates(document, work, key)
    cells = [
        f"{found['nelbo', t]['value']:,.0f}" if ("nelbo", t) in found else "" for t in tunings
    ]
    mine, peer = best(found, True), best(found, False)
    told = over = ""
    if peer is not None:
        told = f"{found[peer]['value']:,.0f} ({', '.join(peer)})"
        over = ratio(document, work, mine[1], ", ".join(peer), key) if mine else ""
    unit = "calls/s" if "bound" in work else "images/s"
    return (
        f"| {work}, {unit} | {' | '.join(cells)} | {told} | {over} | {AIMS[key].get(work, '')} |"
    )


def peers_table(document: Document, key: str) -> list[str]:
    """The fastest tuning of nelbo over the fastest of each peer."""
    works = ("training", "forward", "sampling")
    lines = [f"| nelbo over | {' | '.join(works)} |", "|---" * (len(works) + 1) + "|"]
    projects = sorted(
        {row["project"] for piece in document["pieces"] for row in piece.get("rows", [])}
        - {"nelbo"}
    )
    for project in projects:
        cells = []
        for work in works:
            found = rates(document, work, key)
            mine = best(found, True)
            peer = best({name: row for name, row in found.items() if name[0] == project}, False)
            value = ratio(document, work, mine[1], ", ".join(peer), key) if mine and peer else ""
            cells.append(f"{value} {mine[1]} over {peer[1]}" if mine and peer else "")
        lines.append(f"| {project} | {' | '.join(cells)} |")
    return lines


def field_row(document: Document, title: str, field: str, tunings: list[str], aim: str) -> str:
    """A line of what goes with training: share of the ceiling, memory."""
    found = rates(document, "training", "rates")

    def cell(name: tuple[str, str] | None) -> str:
        value = None if name is None or name not in found else found[name][field]
        if value is None:
            return ""
        return f"{value / 2**30:.1f} GB" if field == "peak_bytes" else f"{value:.0%}"

    cells = [cell(("nelbo", t)) for t in tunings]
    return f"| {title} | {' | '.join(cells)} | {cell(best(found, False))} | | {aim} |"


def share_row(document: Document, what: str, tunings: list[str], key: str, aim: str) -> str:
    """A line of one work in another: median (least-most)."""
    cells = {t: "" for t in tunings}
    for piece in document.get("pieces", []):
        for row in piece.get("shares", []):
            if row["what"] == what and row["project"] == "nelbo" and row["tuning"] in cells:
                found = row["rates" if key == "rates" else "processor"]
                low, high = f"{found['least']:.3f}", f"{found['most']:.3f}"
                cells[row["tuning"]] = f"{found['median']:.3f} ({low}-{high})"
    return f"| {what} | {' | '.join(cells.values())} | | | {aim} |"


def start_row(document: Document, tunings: list[str], key: str) -> str:
    """A line of seconds from a fresh process to the end of the first update, caches empty."""
    found: dict[tuple[str, str], float] = {}
    for piece in document.get("pieces", []):
        for name, one in piece.get("seconds", {}).items():
            project, tuning = name.split(", ", 1)
            if not one["failed"]:
                value = one["clock" if key == "rates" else "processor"]
                found[project, tuning] = statistics.median(value)
    cells = [f"{found['nelbo', t]:.1f}" if ("nelbo", t) in found else "" for t in tunings]
    peers = {name: value for name, value in found.items() if name[0] != "nelbo"}
    told = ""
    if peers:
        projects = sorted({project for project, _ in peers})
        least = {p: min(v for n, v in peers.items() if n[0] == p) for p in projects}
        told = ", ".join(f"{value:.1f} ({project})" for project, value in least.items())
    return f"| first update, s | {' | '.join(cells)} | {told} | | |"


def tuned(document: Document) -> list[str]:
    """Tunings of nelbo that were measured, in their order."""
    rows = [row for piece in document.get("pieces", []) for row in piece.get("rows", [])]
    names = [row["tuning"] for row in rows if row["project"] == "nelbo"]
    return list(dict.fromkeys(names))


def speed_table(document: Document, key: str) -> list[str]:
    """Everything of benchmarks/speed.py."""
    names = tuned(document)
    lines = [f"| | {' | '.join(f'nelbo {n}' for n in names)} | best peer | ratio | aim |",
             "|---" * (len(names) + 4) + "|"]  # fmt: skip
    lines.append(work_row(document, "training", names, key))
    if key == "rates":
        lines.append(field_row(document, "share of the ceiling", "share_of_ceiling", names, ""))
        lines.append(field_row(document, "peak memory", "peak_bytes", names, ""))
    lines.append(share_row(document, "of an update, the network", names, key, "0.9"))
    for work in ("forward", "sampling", "full bound", "bound by few calls"):
        lines.append(work_row(document, work, names, key))
    lines.append(share_row(document, "full bound over forward", names, key, "0.95"))
    return [*lines, start_row(document, names, key)]


def machine(document: Document) -> str:
    """Where and when, in a line."""
    here = document["pieces"][-1]["machine"]
    setting = document["pieces"][-1]["setting"]
    commits = sorted({piece["machine"]["commit"] for piece in document["pieces"]})
    where = here["gpu"] or f"{here['threads']} threads of a CPU"
    return (
        f"{where}, torch {here['torch']}, {setting['name']}, batch {setting['batch']}, "
        f"{here['ceiling_of']} at {here['ceiling_tflops']:.3g} TFLOP/s, load "
        f"{here['load'][0]:.1f}, {here['date']}, commit {', '.join(commits)}."
    )


def overhead(found: Document) -> str:
    """The share of an update that is not its network, in each way of making updates."""
    rows = found["milliseconds"]
    network = rows["network alone"]["median"]
    shares = [
        f"{name} {1 - network / row['median']:.1%}"
        for name, row in rows.items()
        if name != "network alone" and "median" in row
    ]
    return (
        f"Of an update not the network ({network:.1f} ms; benchmarks/overheads.py): "
        f"{', '.join(shares)}. Aim 10 % at most."
    )


def bits(total: Document, times: Document) -> str:
    """The figure of CIFAR-10 and what it cost."""
    updates, before = times["seconds_of_updates"], times["seconds_before"]
    return (
        f"CIFAR-10 after {updates:.0f} s of updates ({before:.0f} s before the first): "
        f"**{total['mean']:.3f} ± {total['se']:.3f}** bits/dim, {total['n']} test images. "
        f"Aim {BITS}."
    )


def gpu_table(read: dict[str, Document]) -> str:
    """Rates of the clock, and bits per dimension after 270 s.

    Arguments:
        read: documents by the name of their file.
    """
    if not read.get("speed", {}).get("pieces"):
        return NOTHING
    speed = read["speed"]
    lines = [machine(speed), "", *speed_table(speed, "rates"), "", *peers_table(speed, "rates")]
    if "median" in read.get("overheads", {}).get("milliseconds", {}).get("network alone", {}):
        lines += ["", overhead(read["overheads"])]
    measured = read.get("cifar10-270", {}).get("measured", {}).get("sixteen calls per image")
    if measured:
        times = read["cifar10-270"]["run"]["times"]
        lines += ["", bits(measured["document"]["terms"]["total"], times)]
    return "\n".join([*lines, "", *(f"- {line}" for line in failures(speed))])


def cpu_table(read: dict[str, Document]) -> str:
    """Rates by seconds of processor, and starts.

    Arguments:
        read: documents by the name of their file.
    """
    lines = [NOTHING]
    if read.get("speed", {}).get("pieces"):
        speed = read["speed"]
        lines = [machine(speed) + " Per second of processor.", "",
                 *speed_table(speed, "processor_rates"), "",
                 *peers_table(speed, "processor_rates"), "",
                 *(f"- {line}" for line in failures(speed))]  # fmt: skip
    if "starts" in read:
        lines += ["", "| start | seconds on the clock | of processor |", "|---|---|---|"]
        for name, one in read["starts"]["starts"].items():
            clock, spent = (statistics.median(one[k]) for k in ("clock", "processor"))
            lines.append(f"| {name} | {clock:.2f} | {spent:.2f} |")
    return "\n".join(lines)
