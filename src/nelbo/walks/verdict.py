"""What `compare` says to people: one table for all that was compared, and a sentence for each."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable
from typing import Any

from nelbo import console
from nelbo.estimate import at_least, at_most

Json = dict[str, Any]
Cell = Callable[[Json], str]
LONGEST, WIDTH, ABREAST = 16, 80, 2
"""Letters of a name, columns of a line, and opponents in one table that fits it."""


def lines(documents: list[Json]) -> str:
    """The table, and below it what each certificate claims.

    Arguments:
        documents: of one comparison, of the same reals.
    """
    real = documents[0]["real"]
    full = [console.clean(d["fake"]["name"]) for d in documents]
    names = [_short(name, full, k) for k, name in enumerate(full)]
    head = console.clean(f"{real['name']}: {real['what']}")
    tables = [
        _table(documents[k : k + ABREAST], names[k : k + ABREAST])
        for k in range(0, len(documents), ABREAST)
    ]
    return "\n\n".join([head, *tables, *_claims(documents, full)])


def _short(name: str, others: list[str], place: int) -> str:
    """A heading that fits: long names keep both ends, and those that look alike get a number."""
    if len(name) <= LONGEST:
        return name
    half = LONGEST // 2 - 1
    cut = f"{name[:half]}..{name[-half:]}"
    alike = [o for o in others if f"{o[:half]}..{o[-half:]}" == cut]
    return cut if len(alike) < 2 else f"{cut[: LONGEST - 3]} {place + 1}"


def _table(documents: list[Json], names: list[str]) -> str:
    rows = [*_certificate(documents), *_ladder(documents), *_sandwich(documents)]
    rows += [*_modes(documents), *_blurred(documents)]
    floor = any(d["metrics"] for d in documents)
    table = [[*row, *([""] if floor else [])] for row in rows] + _metrics(documents)
    text = console.table(table, ["", *names, *(["real"] if floor else [])])
    return "\n".join([text, *_features(documents)])


def _features(documents: list[Json]) -> list[str]:
    """What the metrics were computed on, and how their spread is meant."""
    for panel in (d["metrics"] for d in documents):
        if panel:
            used = panel["features"]
            said = f"metrics on {used['name']} ({used['dims']} dimensions, {used['hash'][:12]})"
            note = f"; {used['note']}" if used.get("note") else ""
            text = f"{said}{note}; ± over {panel['seeds']} seeds"
            return ["", textwrap.fill(console.clean(text), WIDTH, subsequent_indent="  ")]
    return []


def _row(label: str, documents: list[Json], cell: Cell) -> list[str]:
    return [label, *(cell(document) for document in documents)]


def _certificate(documents: list[Json]) -> list[list[str]]:
    def of(cell: Cell) -> Cell:
        return lambda document: cell(document["certificate"])

    level = documents[0]["certificate"]["level"]
    return [
        _row(
            f"JSD >= ({100 * level:g} %), nats",
            documents,
            of(_lower),
        ),
        _row("  plug-in", documents, of(lambda c: _pm(c["plugin"], c["plugin_se"]))),
        _row("  log e-value, nats", documents, of(lambda c: f"{c['log_e_value']:.1f}")),
        _row("  pairs", documents, of(lambda c: f"{c['n_pairs']}")),
        _row("  looks at these data", documents, of(lambda c: f"{c['looks']}")),
    ]


def _lower(certificate: Json) -> str:
    return at_least(certificate["jsd_nats_lower"])


def _ladder(documents: list[Json]) -> list[list[str]]:
    rows = []
    for k, rung in enumerate(documents[0]["ladder"]):
        label = f"  noise to log-SNR {rung['logsnr']:g}: >="
        rows.append(_row(label, documents, lambda d, k=k: _rung(d["ladder"][k])))  # type: ignore[misc]
    return rows


def _rung(rung: Json) -> str:
    exact = "" if rung["exact"] is None else f" (exact {rung['exact']:.4f})"
    return f"{at_least(rung['certificate']['jsd_nats_lower'])}{exact}"


def _sandwich(documents: list[Json]) -> list[list[str]]:
    if not any(d["sandwich"] for d in documents):
        return []

    def of(name: str, show: Callable[[float], str] = "{:.4f}".format) -> Cell:
        def cell(document: Json) -> str:
            value = (document["sandwich"] or {}).get(name)
            if isinstance(value, dict):
                mean = value.get("mean", value.get("jsd_nats"))
                return _pm(mean, value.get("se", value.get("error")))
            return "" if value is None else show(value)

        return cell

    named = {
        "JSD <= (asymptotic 95 %)": of("jsd_nats_upper", at_most),
        "  exact JSD": of("exact"),
        "  bound, nats/example": of("bound_nats"),
        "  entropy H, nats/example": of("entropy_nats"),
        "  bound - H >= (kappa)": of("kappa_nats", at_least),
        "  so H <=": of("entropy_upper_nats"),
    }
    rows = [_row(label, documents, cell) for label, cell in named.items()]
    return [row for row in rows if any(row[1:])]


def _modes(documents: list[Json]) -> list[list[str]]:
    if not any(d["modes"] for d in documents):
        return []

    def of(show: Callable[[Json], str]) -> Cell:
        return lambda document: show(document["modes"]) if document["modes"] else ""

    return [
        _row("modes found", documents, of(lambda m: f"{m['found']} of {m['of']}")),
        _row("  high quality", documents, of(lambda m: f"{100 * m['high_quality']:.1f} %")),
        _row("  reverse KL, nats", documents, of(lambda m: f"{m['reverse_kl_nats']:.4f}")),
    ]


def _blurred(documents: list[Json]) -> list[list[str]]:
    first: list[Json] = next((d["blurred"] for d in documents if d.get("blurred")), [])

    def of(sd: float) -> Cell:
        def cell(document: Json) -> str:
            found = [b for b in document.get("blurred", []) if b["sd"] == sd]
            return _pm(found[0]["jsd_nats"], found[0]["error"]) if found else ""

        return cell

    return [_row(f"JSD blurred, sd {b['sd']:.3g}", documents, of(b["sd"])) for b in first]


def _metrics(documents: list[Json]) -> list[list[str]]:
    panels = [d["metrics"] for d in documents]
    first = next((panel for panel in panels if panel), None)
    if first is None:
        return []
    rows = [[f"metrics, n = {first['n']} on a side", *[""] * (len(documents) + 1)]]
    for entry in first["rows"]:
        cells = []
        for panel in panels:
            found = [r for r in (panel or {}).get("rows", []) if r["name"] == entry["name"]]
            cells.append(_pm(found[0]["fake"]["mean"], found[0]["fake"]["sd"]) if found else "")
        floor = _pm(entry["real"]["mean"], entry["real"]["sd"]) if entry["real"] else ""
        rows.append([f"  {entry['name']}", *cells, floor])
    return rows


def _claims(documents: list[Json], names: list[str]) -> list[str]:
    said = [
        f"{name}: {d['certificate']['sentence']} (classifier {d['certificate']['classifier']})"
        for name, d in zip(names, documents, strict=True)
    ]
    named = zip(names, documents, strict=True)
    copied = [
        f"{name}: {d['copies']['found']} of {d['copies']['of']} samples are, to the bit, rows of "
        "the data"
        for name, d in zip(names, documents, strict=True)
        if d["copies"]["found"]
    ]
    whole = [f"{name}: {d['remark']}" for name, d in named if d["remark"]]
    several = []
    if len(documents) > 1:
        alpha = documents[0]["certificate"]["alpha"]
        several.append(
            f"Each claim holds by itself. For all {len(documents)} at once run with --alpha "
            f"{alpha / len(documents):.3g}."
        )
    told = [*said, *copied, *whole, *several]
    return ["\n".join(textwrap.fill(text, WIDTH, subsequent_indent="  ") for text in told)]


def _pm(mean: float | None, error: float | None) -> str:
    if mean is None:
        return "?"
    if error is None or not math.isfinite(error):
        return f"{mean:.4g}"
    digits = 4 if error == 0 else min(6, max(0, 1 - int(f"{error:.1e}".partition("e")[2])))
    return f"{mean:.{digits}f} ± {error:.{digits}f}"
