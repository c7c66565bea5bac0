"""Compare: samples against data, from below by a certificate, from above by the bound where there
is one, and by the companion metrics between.

Every opponent is put before the same reals. The looks at them are counted in one ledger, because a
certificate is worth its error probability once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nelbo import console, distributed
from nelbo.certificate import Certificate, certify
from nelbo.commands import Compare
from nelbo.design import enough
from nelbo.errors import UsageError
from nelbo.estimate import Estimate
from nelbo.files import write_json_atomic
from nelbo.judges import Judge, candidates
from nelbo.ladder import ladder
from nelbo.looks import Ledger
from nelbo.randomness import seeded
from nelbo.rundir import default_path
from nelbo.sandwich import Sandwich
from nelbo.sides import read, refuse_mismatch
from nelbo.walks import known, measures, witness
from nelbo.walks.chains import Means
from nelbo.walks.heldout import HELD, Reals, copies, reals
from nelbo.walks.measuring import Request, measure
from nelbo.walks.opponents import Opponent, opponents
from nelbo.walks.stored import device_of, save_arrays
from nelbo.walks.verdict import lines

FOLDER = "compare"
OPENED = (0.0, 0.15, 0.85)
"""Shares of FIT, CAL and C among held-out reals where classifiers have others to learn from."""
MOST_BOUNDED = 5000
"""Reals behind a bound."""


def run(options: Compare) -> None:
    """`nelbo compare`: open, compare, write, print."""
    documents = compared(options)
    if not distributed.is_main():
        return
    if options.json:
        whole = documents[0] if len(documents) == 1 else {"schema": 1, "compared": documents}
        print(json.dumps(whole, indent=1))
    else:
        print(text(documents))


def compared(options: Compare) -> list[dict[str, Any]]:
    """A document for every opponent, written where there is a place for it.

    Ranks draw the chains and measure the bound together; each fits the classifiers for itself,
    and what counts, is counted and is written are those of the first.
    """
    device = device_of(options.device)
    distributed.on_main(lambda: check(options))
    against = opponents(options, device)
    held = reals(options, against)
    for one in against:
        if isinstance(one.fakes, Tensor):
            sides = read(held.rows, "the data"), read(one.fakes, one.name)
            refuse_mismatch(*sides, options.as_is)
    extractor = measures.prepared(options, held)  # refused before anything is looked at
    distributed.on_main(lambda: _free(options))
    ledger = Ledger(default_path("looks.jsonl")) if distributed.is_main() else None
    documents = []
    for one in against:
        document, arrays = confront(options, held, one, extractor, ledger)
        place = _place(options, held, one, len(against))
        if place is not None and distributed.is_main():
            write(place, document, arrays)
            document["written"] = f"{place}.json"
        documents.append(document)
    return documents


def text(documents: list[dict[str, Any]]) -> str:
    """What people read of it."""
    paths = [d["written"] for d in documents if "written" in d]
    return "\n".join([lines(documents), *([""] if paths else []), *paths])


def _say(options: Compare, stage: str) -> None:
    if not options.quiet:
        console.say(stage)


def _free(options: Compare) -> None:
    """Make the folder of --out, before anything is computed that it shall hold.

    Raises:
        UsageError: it cannot be made.
    """
    if options.out is None:
        return
    try:
        options.out.mkdir(parents=True)
    except OSError as error:
        raise UsageError(
            f"{options.out}: cannot be made ({error.strerror}); name another --out"
        ) from error


def check(options: Compare) -> None:
    """Refuse what cannot be compared, before anything is opened.

    Raises:
        UsageError: says what to type.
    """
    if not options.fakes:
        raise UsageError("name what is compared with the data: a run, or a file of samples")
    if options.out is not None and options.out.exists():
        raise UsageError(f"{options.out} exists, and is not overwritten: name another --out")
    if len(set(options.ladder)) < len(options.ladder):
        raise UsageError("--ladder: name each log-SNR once")
    if options.weights is not None and not measures.is_module(options.features):
        raise UsageError("--weights go with --features FILE.py:FUNCTION")


def confront(
    options: Compare,
    held: Reals,
    one: Opponent,
    extractor: measures.Prepared | None,
    ledger: Ledger | None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The document and the arrays of one opponent before the reals."""
    fakes, means = _fakes(options, held, one)
    # whatever can be refused comes before the look at the pairs
    found = None
    if extractor is not None:
        _say(options, f"{one.name}: metrics")
        found = measures.measured(options, held, fakes, extractor)
    bound = None if one.subject is None else _bound(options, held, one)
    _say(options, f"{one.name}: certificate")
    certificate = certify(held.rows, fakes, **_terms(options, held, one), ledger=ledger)
    rows = known.pool(options, held, fakes)
    _say(options, f"{one.name}: noise ladder")
    rungs = _ladder(options, held, one, fakes, rows, certificate)
    sandwich = _sandwich(held, bound, certificate, means)
    document = {
        "schema": 1,
        "real": {
            "name": held.name,
            "what": held.what,
            "sha256": held.dataset.record.get("sha256"),
            "shape": list(held.dataset.shape()),
            "levels": held.dataset.levels,
        },
        "fake": {"name": one.name, "kind": one.kind, "family": one.family, **one.about},
        "certificate": certificate.as_json(),
        "ladder": rungs,
        "sandwich": sandwich.as_json() if sandwich else None,
        "blurred": known.blurs(held, rows),
        "metrics": found.as_json() if found else None,
        "modes": known.counted(held, rows),
        "remark": sandwich.verdict if sandwich else f"no bound: {one.unbounded}",
        "copies": copies(held, certificate.rows_fake),
    }
    return document, {**certificate.arrays(), **witness.arrays(held, certificate, means)}


def _fakes(options: Compare, held: Reals, one: Opponent) -> tuple[Any, Means | None]:
    """A cheap sampler as it is; of a chain as many rows as are needed, once for all.

    A chain in the plane with a normal decoder is drawn as its last means plus their noise.
    """
    if one.family != "diffusion":
        return one.fakes, None
    usual = len(held.rows) if held.fit is None else 2 * _used(options, held)
    count = max(options.draws or usual, _used(options, held))
    with seeded(options.seed, "compare", "fakes"):
        means = None if one.means is None or known.plane(held) is None else one.means(count)
        if means is None:
            return one.draw(count), None
        return means.centres + means.std * torch.randn_like(means.centres), means


def _used(options: Compare, held: Reals) -> int:
    """Reals that are cut: enough for the pairs that were asked for."""
    share = OPENED[2] if held.fit is not None else HELD
    return len(held.rows) if options.n is None else min(len(held.rows), round(options.n / share))


def _terms(options: Compare, held: Reals, one: Opponent) -> dict[str, Any]:
    """What every certificate of a comparison is made with."""
    usual: list[Judge] = list(candidates(None, held.dataset.shape()))
    return {
        "alpha": options.alpha,
        "n": _used(options, held),
        "judges": [*usual, *([one.judge] if one.judge is not None else [])],
        "mode": options.mode,
        "fit_real": held.fit,
        "encode": held.dataset.encode,
        "seed": options.seed,
        "as_is": options.as_is,
        "sampler_name": f"{one.name} {one.about.get('step', '')}".strip(),
        **({"shares": OPENED} if held.fit is not None and options.mode == "split" else {}),
    }


def _ladder(
    options: Compare,
    held: Reals,
    one: Opponent,
    fakes: Any,
    rows: Tensor | None,
    certificate: Certificate,
) -> list[dict[str, Any]]:
    """A certificate for every noise level, and beside it the exact value where it is known."""
    if not options.ladder:
        return []
    terms = _terms(options, held, one)
    # the pairs are those of the first certificate: the look was counted there
    rungs = ladder(held.rows, fakes, options.ladder, looks=certificate.looks, **terms)
    return [
        {
            "logsnr": rung.logsnr,
            "certificate": rung.certificate.as_json(),
            **known.exact(held, rows, rung),
        }
        for rung in rungs
    ]


def _sandwich(
    held: Reals, bound: Estimate | None, certificate: Certificate, means: Means | None
) -> Sandwich | None:
    """From above by the bound of the very chain that was drawn from; None where there is none."""
    if bound is None:
        return None
    truth = held.dataset.truth
    return Sandwich(
        lower=certificate.jsd_nats_lower,
        level=certificate.level,
        bound=bound,
        entropy=None if truth is None else truth.entropy,
        entropy_error=0.0 if truth is None else truth.entropy_error,
        exact=known.whole(held, means),
    )


def _bound(options: Compare, held: Reals, one: Opponent) -> Estimate:
    """E L over the held-out reals, nats per example in stored units."""
    assert one.subject is not None
    rows = held.rows[:MOST_BOUNDED]
    dataset = dataclasses.replace(one.subject.dataset, test=rows)
    subject = dataclasses.replace(one.subject, dataset=dataset)
    few = options.calls < len(subject.times)
    calls = enough(len(rows), options.calls) if few else None
    request = Request("test", calls, options.seed, quiet=options.quiet)
    (result,) = measure(subject, [subject.model], request, "bound")
    return result.estimates()["total"]


def _place(options: Compare, held: Reals, one: Opponent, several: int) -> Path | None:
    """A path without suffix that is free: in --out, or in the run; None for bare samples."""
    name = f"{held.name}-{one.name}" if one.folder is None else held.name
    name += f"-step{one.about['step']:08d}" if "step" in one.about else ""
    if options.out is not None:
        base = options.out / (f"{one.name}-{name}" if several > 1 and one.folder else name)
    elif one.folder is not None:
        base = one.folder / FOLDER / name
    else:
        return None
    found, number = base, 1
    while found.with_name(f"{found.name}.json").exists():
        number += 1
        found = base.with_name(f"{base.name}-{number}")
    return found


def write(place: Path, document: dict[str, Any], arrays: dict[str, Any]) -> None:
    """Write PLACE.npz, then PLACE.json with its checksum, as `nelbo.claim.recompute` wants it."""
    place.parent.mkdir(parents=True, exist_ok=True)
    beside = place.with_name(f"{place.name}.npz")
    save_arrays(beside, arrays)
    logits = {"file": beside.name, "sha256": hashlib.sha256(beside.read_bytes()).hexdigest()}
    write_json_atomic(place.with_name(f"{place.name}.json"), {**document, "logits": logits})
