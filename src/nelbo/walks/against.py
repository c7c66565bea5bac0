"""`nelbo evaluate RUN --against OTHER`: two models on the same examples, and their difference.

Models of the same process and grid share every x_t: the noise that both suffer drops out, and the
difference is known far better than either bound. Models of other grids share the examples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nelbo import console
from nelbo.commands import Evaluate
from nelbo.errors import UsageError
from nelbo.estimate import NORMAL95, Estimate
from nelbo.evaluation import TERMS, Evaluation
from nelbo.files import write_json_atomic
from nelbo.randomness import key
from nelbo.recipes.recipe import Subject
from nelbo.walks import evaluate as evaluating
from nelbo.walks.documents import marked, show
from nelbo.walks.measuring import Request, measure
from nelbo.walks.stored import Stored, assumptions, device_of, opened, opened_beside, save_arrays

OPTION = "--against"
DRAWS, EXAMPLES = "examples, times and noise", "examples"


@dataclass(frozen=True)
class Comparison:
    """Both bounds, the difference of one less other, and what they share."""

    one: Evaluation
    other: Evaluation
    difference: dict[str, Estimate]
    values: Tensor
    shared: str


def check_data(one: Subject, other: Subject, split: str) -> None:
    """Refuse to compare bounds of different data, which are different quantities.

    Raises:
        UsageError: other files, levels, or another part of them.
    """
    names = [s.dataset.record.get("sha256") for s in (one, other)]
    if names[0] != names[1] or one.dataset.shape() != other.dataset.shape():
        raise UsageError(
            f"the two models were given different data ({one.dataset.name} and "
            f"{other.dataset.name}, SHA-256 {str(names[0])[:12]}... and {str(names[1])[:12]}...): "
            "bounds of different data cannot be compared"
        )
    parts = [getattr(s.dataset, split) for s in (one, other)]
    if one.dataset.levels != other.dataset.levels or not torch.equal(*parts):
        raise UsageError(
            f"the two models do not have the same {split} part (or levels) of {one.dataset.name}: "
            "take --split test, or models that were trained with the same --validation"
        )


def same_draws(one: Subject, other: Subject) -> bool:
    """Whether both have the same latents on the same scale: one x_t serves both."""
    if len(one.times) != len(other.times):
        return False
    if type(one.model.process) is not type(other.model.process):
        return False
    rows = one.dataset.train[:2]
    if not torch.equal(one.dataset.encode(rows), other.dataset.encode(rows)):
        return False  # the networks see the data on other scales
    grids = [s.model.process.schedule.logsnr(s.times).cpu() for s in (one, other)]
    # an exported chain comes back from its betas, equal to rounding
    pairs = (grids, [one.times, other.times])
    return all(torch.allclose(a, b, rtol=1e-9, atol=1e-9) for a, b in pairs)


def compare(one: Subject, other: Subject, request: Request) -> Comparison:
    """Measure both on the same examples, and on the same draws where that is possible."""
    check_data(one, other, request.split)
    if same_draws(one, other):
        a, b, d = measure(one, [one.model, other.model], request, "compare")
        return Comparison(a, b, d.estimates(), d.values()["total"], DRAWS)
    (a,) = measure(one, [one.model], request, "first")
    apart = replace(request, seed=key(request.seed, "second"))
    (b,) = measure(other, [other.model], apart, "second")
    gaps = {name: a.values()[name] - b.values()[name] for name in TERMS}
    found = {name: _paired(gaps[name], a, b, name) for name in TERMS}
    return Comparison(a, b, found, gaps["total"], EXAMPLES)


def _paired(gap: Tensor, a: Evaluation, b: Evaluation, name: str) -> Estimate:
    """The mean difference by example; the draws have seeds of their own and are independent."""
    noise = math.hypot(a.estimates()[name].se_mc, b.estimates()[name].se_mc)
    return Estimate.of(gap, se_mc_known=noise)


def document(one: Stored, other: Stored, request: Request, found: Comparison) -> dict[str, Any]:
    """The JSON document (schema 1): that of an evaluation, and the other model beside it."""
    dims = one.subject.dataset.dims
    value = evaluating.document(one.subject, one.step, request, found.one)
    against = evaluating.document(other.subject, other.step, request, found.other)
    entries = {name: evaluating.entry(e, dims) for name, e in found.difference.items()}
    beside = {key: against[key] for key in ("model", "terms", "calls_per_example")}
    return {
        **marked(one, value),
        "against": beside if other.assumed is None else {**beside, "assumed": other.assumed},
        "difference": entries,
        "shared": found.shared,
    }


def write(stored: Stored, request: Request, value: dict[str, Any], found: Comparison) -> None:
    """Store the document and the difference of every example beside the run's evaluations."""
    if not stored.keeps:
        return
    folder = stored.directory.evaluation
    folder.mkdir(parents=True, exist_ok=True)
    latents = len(stored.subject.times)
    name = evaluating.name_of(request, stored.step, latents)
    step = value["against"]["model"]["step"]
    other = "foreign" if "assumed" in value["against"] else f"step{step:08d}"
    path = folder / f"against-{other}-{name}.json"
    number = 1
    while path.exists():  # another run can have the same step
        number += 1
        path = folder / f"against-{other}-{number}-{name}.json"
    save_arrays(path.with_suffix(".npz"), {"difference": found.values.numpy()})
    write_json_atomic(path, value)


def lines(value: dict[str, Any], names: tuple[str, str]) -> str:
    """The document as a table for people."""
    rows = []
    for name in TERMS:
        one, two = value["terms"][name], value["against"]["terms"][name]
        gap = value["difference"][name]
        numbers = (one["mean"], two["mean"], gap["mean"], gap["se"], gap["se_mc"])
        rows.append([name, *("?" if x is None else f"{x:.5f}" for x in numbers)])
    data, calls = value["data"], value["calls_per_example"]
    head = (
        f"{data['name']}, {data['split']} split, n = {data['n']}, {calls:.4g} network calls per "
        f"example and model\nfirst:  {names[0]}\nsecond: {names[1]}\n"
        f"both on the same {value['shared']}; bits/dim, lower is better\n"
    )
    header = ["bound", "first", "second", "difference", "± se", "± se_mc"]
    return console.clean(head) + "\n" + console.table(rows, header) + "\n\n" + _verdict(value)


def _verdict(value: dict[str, Any]) -> str:
    """One sentence: which is better, if that can be told."""
    gap = value["difference"]["total"]
    mean, error = gap["mean"], gap["se"]
    if error is None or abs(mean) <= NORMAL95 * error:
        return (
            "Which is better cannot be told from these examples: the 95 % interval of the "
            "difference holds 0."
        )
    better = "first" if mean < 0 else "second"
    return f"The {better} is better by {abs(mean):.5f} ± {error:.5f} bits/dim."


def asked(options: Evaluate) -> bool:
    """Whether the options ask for a comparison."""
    return options.against is not None


def run(options: Evaluate) -> dict[str, Any]:
    """Open both, measure, write, print."""
    if options.importance is not None:
        raise UsageError("--importance speaks of one model: leave out --against")
    device = device_of(options.device)
    one, options = opened(options, device)
    assert options.against is not None
    other = opened_beside(options, options.against, options.against_checkpoint, device)
    request = evaluating.request_of(options)
    found = compare(one.subject, other.subject, request)
    value = document(one, other, request, found)
    write(one, request, value, found)
    places = ((options.run, one), (options.against, other))
    names = [f"{path}, step {s.step}" if s.assumed is None else str(path) for path, s in places]
    text = lines(value, (names[0], names[1]))
    if other.assumed is not None:
        text += f"\n\nthe second, {assumptions(other.assumed)}"
    show(value, text, options.json)
    return value
