"""`nelbo evaluate --ode`: the likelihood of the probability flow, never called the bound."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from nelbo import console
from nelbo.commands import Evaluate
from nelbo.errors import UsageError
from nelbo.estimate import Estimate
from nelbo.files import write_json_atomic
from nelbo.odelikelihood import Dequantise, FlowLikelihood, Measure, ode_likelihood
from nelbo.recipes.recipe import Subject
from nelbo.schedules import Stepped
from nelbo.walks.documents import marked, opening, show
from nelbo.walks.stored import Stored, device_of, opened, save_arrays

OPTION = "--ode"
EXACT_DIMS = 100
"""Up to here the trace is exact unless --probes says otherwise."""
TOGETHER = 64
"""Paths that are followed at the same time at most: each keeps the graph of a network call."""
NAME = "likelihood of the probability-flow ODE: another model than the bound's"
WAYS = {
    "none": "exact: the density of x_1/sqrt(k_1), data as they are",
    "uniform": "an upper bound in expectation: uniform noise within the bins",
    "variational": "an upper bound in expectation: x_1 from q(x_1|x_0), the model's own decoder",
}


def asked(options: Evaluate) -> bool:
    """Whether the options speak of the flow.

    Raises:
        UsageError: they contradict each other.
    """
    own = {"probes": options.probes, "dequantise": options.dequantise, "draws": options.draws}
    others = {"calls": options.calls, "importance": options.importance}
    for name, value in (others if options.ode else own).items():
        if value is not None:
            raise UsageError(
                f"--{name} belongs to the bound, and --ode measures the flow: leave one out"
                if options.ode
                else f"--{name} belongs to --ode: give it too, or leave --{name} out"
            )
    return options.ode


def measure_of(options: Evaluate, subject: Subject) -> Measure:
    """What the options ask for, with the defaults of this data."""
    dataset = subject.dataset
    way: Dequantise = options.dequantise or ("none" if dataset.levels is None else "variational")
    default = None if dataset.dims <= EXACT_DIMS else 2
    probes = None if options.probes == "exact" else (options.probes or default)
    draws = options.draws or (1 if way == "none" else 2)
    batch = min(options.batch, TOGETHER)
    return Measure(way, dataset.levels, draws, probes, options.tolerance, batch, options.seed)


def run(options: Evaluate) -> dict[str, Any]:
    """`nelbo evaluate --ode`: open, follow every example, write, print."""
    stored, options = opened(options, device := device_of(options.device))
    assert options.split is not None
    subject = stored.subject
    dataset, measure = subject.dataset, measure_of(options, subject)
    rows = getattr(dataset, options.split)[: options.limit]
    with console.Meter("probability flow", 1, "paths", options.quiet) as meter:
        found = ode_likelihood(
            subject.model,
            dataset.encode(rows).to(device),
            subject.times.to(device),
            measure,
            offset=dataset.offset(),
            track=lambda done, total: meter.update(done, total=total),
        )
    value = document(stored, options, rows, found)
    value = marked(stored, value)
    if stored.keeps:
        write(stored, options, value, found)
    show(value, lines(value), options.json)
    return value


def document(
    stored: Stored, options: Evaluate, rows: Tensor, found: FlowLikelihood
) -> dict[str, Any]:
    """The JSON document (schema 1)."""
    return {
        **opening(stored.subject, stored.step, options.split or stored.part, len(rows)),
        "seed": options.seed,
        "ode": {**entry(stored.subject, found), **truth(stored.subject, rows)},
    }


def entry(subject: Subject, found: FlowLikelihood) -> dict[str, Any]:
    """The figure with its errors, what it is, and what it took."""
    measure, dims = found.measure, subject.dataset.dims
    probes = found.probe_error() / (dims * math.log(2))
    calls, probed = found.evaluations.double(), measure.probes
    logsnr = subject.model.process.schedule.logsnr(subject.times[[0, -1]]).tolist()
    chain = isinstance(subject.model.process.schedule, Stepped)
    between = "; between the steps of the chain log-SNR is interpolated in time" if chain else ""
    return {
        "is": NAME,
        "total": _figure(found.estimate(), dims),
        "se_probes": probes if math.isfinite(probes) else None,
        "prior_mismatch": _figure(Estimate.of(found.prior, exact=True), dims),
        "evaluations": {"mean": float(calls.mean()), "max": int(calls.max())},
        "tolerance": measure.tolerance,
        "trace": "exact" if probed is None else f"Hutchinson, {probed} Rademacher probes per path",
        "dequantise": measure.dequantise,
        "reading": WAYS[measure.dequantise],
        "draws": measure.draws,
        "path": f"log-SNR {logsnr[0]:.4g} to {logsnr[1]:.4g}{between}",
    }


def truth(subject: Subject, rows: Tensor) -> dict[str, Any]:
    """Of toys: −log p of these very examples under the law that made them."""
    known = subject.dataset.truth
    if known is None:
        return {}
    exact = Estimate.of(-known.log_prob(rows), exact=True)
    return {"truth": _figure(exact, subject.dataset.dims)}


def _figure(estimate: Estimate, dims: int) -> dict[str, Any]:
    value = estimate.bits_per_dim(dims).as_json()
    return {**value, "mean_bits_per_example": estimate.mean / math.log(2)}


def write(stored: Stored, options: Evaluate, value: dict[str, Any], found: FlowLikelihood) -> None:
    """evaluation/ode-*.json, and nats of every example in the .npz of the same name."""
    measure = found.measure
    part = options.split if options.limit is None else f"{options.split}{options.limit}"
    trace = "exact" if measure.probes is None else f"probes{measure.probes}"
    way = measure.dequantise if measure.draws == 1 else f"{measure.dequantise}{measure.draws}"
    name = f"{part}-step{stored.step:08d}-{way}-{trace}-tol{measure.tolerance:g}"
    folder = stored.directory.evaluation
    folder.mkdir(parents=True, exist_ok=True)
    where = folder / f"ode-{name}-seed{options.seed}"
    arrays = {
        "total": found.values.mean((1, 2)),
        "values": found.values,
        "prior": found.prior,
        "evaluations": found.evaluations,
    }
    save_arrays(where.with_name(f"{where.name}.npz"), {k: v.numpy() for k, v in arrays.items()})
    write_json_atomic(where.with_name(f"{where.name}.json"), value)


def lines(value: dict[str, Any]) -> str:
    """The document as a table for people."""
    data, model, ode = value["data"], value["model"], value["ode"]
    names = {"total": "-log p", "prior_mismatch": "prior mismatch", "truth": "truth"}
    rows = [[label, *_cells(ode[key])] for key, label in names.items() if key in ode]
    calls, probes = ode["evaluations"], ode["se_probes"]
    drawn = "" if ode["dequantise"] == "none" else f"; {ode['draws']} draws"
    error = "unknown" if probes is None else f"{probes:.4f}"
    head = (
        f"{data['name']}, {data['split']} split, n = {data['n']}, {data['dims']} dimensions\n"
        f"{NAME}\n"
        f"{ode['reading']}{drawn}\n"
        f"{ode['path']}; tolerance {ode['tolerance']:g} per step\n"
        f"trace: {ode['trace']} (its part of se_mc: {error} bits/dim)\n"
        f"{model['parameterization']}, decoder {model['decoder']}; weights {model['weights']} of "
        f"step {model['step']}\n"
        f"evaluations of the field per path: mean {calls['mean']:.1f}, max {calls['max']}\n"
    )
    header = ["probability flow", "bits/dim", "± se", "± se_mc", "bits/example"]
    return console.clean(head) + "\n" + console.table(rows, header)


def _cells(figure: dict[str, Any]) -> list[str]:
    keys = (("mean", 4), ("se", 4), ("se_mc", 4), ("mean_bits_per_example", 2))
    return ["?" if figure[key] is None else f"{figure[key]:.{digits}f}" for key, digits in keys]
