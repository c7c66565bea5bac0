"""K of Sohl-Dickstein et al. 2015 beside the bound, and both beside what is known.

Vectors and bits: K and −L are in bits per example on the model's scale, the larger the better.
They agree where the decoder is the fixed edge step and the data has the activity (or second
moment) of pure noise; see `nelbo.entropy`. Where the truth is known, the gap is E L(x) + log q(x)
over the test examples, and beside it that of the best model of the same grid.

Images with levels: the paper dequantises them (a uniform number is added to each level), scales
them to variance 1 over all values and counts bits per *pixel*, all channels of it together. A
model of levels is a density of dequantised data that is constant in every bin, so that

    bits/dim = log2 σ − K/c,     K = c (log2 σ − bits/dim),

with σ the standard deviation in levels and c the channels. A K is not a bits/dim: CIFAR-10's 5.4
is 4.2 bits/dim.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from nelbo import console
from nelbo.data.base import Dataset
from nelbo.data.part import CHUNK, pieces
from nelbo.decoders import EdgeFixed
from nelbo.entropy import EntropyForm, entropy_form, step_entropies
from nelbo.estimate import Estimate
from nelbo.evaluation import Evaluation
from nelbo.recipes.recipe import OPTIMUM, TRUTH, Subject

VALUES = 2**13
"""Values of examples over which the entropies of the reverse steps are averaged."""
MOST_EXAMPLES = 256
PIXEL = "bits/pixel"


def has_k(subject: Subject) -> bool:
    """Whether the paper's K by entropies is that of this very kind of model, or of its chain."""
    known = subject.dataset.truth is not None
    return subject.dataset.binary or known or isinstance(subject.model.decoder_rule, EdgeFixed)


def is_picture(dataset: Dataset) -> bool:
    """Images of levels."""
    return dataset.levels is not None and not dataset.binary and len(dataset.shape()) == 3


def form_of(subject: Subject, rows: Tensor, result: Evaluation) -> EntropyForm:
    """The entropy form of every example, from the divergences of an evaluation."""
    process = subject.model.cpu().process
    divergences = result.values()["diffusion"]
    parts = [
        entropy_form(process, subject.dataset.encode(some), subject.times, kl)
        for some, kl in zip(pieces(rows), divergences.split(CHUNK), strict=True)
    ]
    names = [field.name for field in dataclasses.fields(EntropyForm)]
    return EntropyForm(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


@torch.no_grad()
def entry(subject: Subject, rows: Tensor, result: Evaluation) -> dict[str, Any]:
    """The JSON object of the comparison; empty where K has no meaning (vectors from files)."""
    if is_picture(subject.dataset):
        return {"comparison": picture(subject, result)}
    return {"comparison": chain(subject, rows, result)} if has_k(subject) else {}


def chain(subject: Subject, rows: Tensor, result: Evaluation) -> dict[str, Any]:
    """Of vectors and bits: all in bits per example on the model's scale."""
    form, dataset = form_of(subject, rows, result), subject.dataset
    total = result.values()["total"]
    figures = {
        "minus_bound": Estimate.of(dataset.offset() - total).bits(),
        "null": Estimate.of(form.null, exact=True).bits(),
    }
    if isinstance(subject.model.decoder_rule, EdgeFixed) or dataset.levels is None:
        figures["K"] = Estimate.of(form.k).bits()
        figures["K_minus_null"] = Estimate.of(form.gain).bits()
    if isinstance(subject.model.decoder_rule, EdgeFixed):
        figures["K_plus_bound"] = Estimate.of(form.excess, exact=True).bits()
    if dataset.binary and len(dataset.shape()) == 3:
        figures["bound_nats"] = Estimate.of(total, unit="nats/image")
    values: dict[str, Any] = {name: value.as_json() for name, value in figures.items()}
    known = {reference.name: reference for reference in subject.references()}
    values["references"] = {name: reference.bits for name, reference in known.items()}
    if dataset.truth is not None:
        values["gap"] = Estimate.of(total + dataset.truth.log_prob(rows)).bits().as_json()
        if OPTIMUM in known:
            values.update(_beside(values["gap"], known[TRUTH].bits, known[OPTIMUM].bits))
    return values


def pair_gaps(value: dict[str, Any]) -> None:
    """Put the two gaps of a document on the same examples and draws, where it has them.

    The exact denoiser that was measured beside the model shares its noise, so that the ratio of
    the gaps has far less error than with an optimum of its own.
    """
    gap = value.get("comparison", {}).get("gap")
    exact = value.get("truth", {}).get("exact_denoiser")
    if gap is None or exact is None:
        return
    bits = "mean_bits_per_example"
    least = gap["mean"] + exact["total"][bits] - value["terms"]["total"][bits]
    value["comparison"].update({"gap_optimum": least, "gap_ratio": gap["mean"] / least})


def _beside(gap: dict[str, Any], truth: float, optimum: float) -> dict[str, Any]:
    """The gap of the best model of the same grid, and how many times as large the model's is."""
    least = truth - optimum
    return {"gap_optimum": least, "gap_ratio": gap["mean"] / least}


def picture(subject: Subject, result: Evaluation) -> dict[str, Any]:
    """Of images of levels: all in bits per pixel, of the dequantised data with variance 1."""
    dataset = subject.dataset
    channels, height, width = dataset.shape()
    sigma = deviation(dataset)
    gain = channels * math.log2(sigma)
    bound = result.values()["total"] / (height * width * math.log(2))
    # the variance of the test examples is not exactly 1 on this scale, that of pure noise is
    null = -0.5 * channels * math.log2(2 * math.pi * math.e)
    figures = {
        "K": Estimate.of(gain - bound, unit=PIXEL),
        "null": Estimate(null, 0.0, 0.0, len(bound), PIXEL),
        "K_minus_null": Estimate.of(gain - bound - null, unit=PIXEL),
    }
    return {
        **{name: value.as_json() for name, value in figures.items()},
        "references": {reference.name: reference.bits for reference in subject.references()},
        "sigma_levels": sigma,
        "dims_per_pixel": channels,
        "conversion": "bits/dim = log2(sigma_levels) - K/dims_per_pixel",
    }


def deviation(dataset: Dataset) -> float:
    """σ of the training part in levels, over all values, after a uniform number in [0, 1)."""
    levels = dataset.levels
    assert levels is not None
    counts = torch.zeros(levels, dtype=torch.float64)
    for rows in pieces(dataset.train):
        counts += torch.bincount(rows.flatten().long(), minlength=levels)
    share, level = counts / counts.sum(), torch.arange(levels, dtype=torch.float64)
    mean = (share * level).sum()
    return math.sqrt(float((share * (level - mean) ** 2).sum()) + 1 / 12)


@torch.no_grad()
def arrays(subject: Subject, rows: Tensor) -> dict[str, Tensor]:
    """Bounds on the entropy of every reverse step, (N−1,) nats per example, means over some."""
    if not has_k(subject):
        return {}
    count = max(1, min(MOST_EXAMPLES, VALUES // subject.dataset.dims))
    x_0 = subject.dataset.encode(rows[:count])
    steps = step_entropies(subject.model.cpu().process, x_0, subject.times)
    return {"step_entropy_lower": steps.lower.mean(0), "step_entropy_upper": steps.upper.mean(0)}


NAMES = {
    "K": "K (entropy form)",
    "minus_bound": "-L (the bound)",
    "K_minus_null": "K - L_null",
    "null": "L_null",
    "K_plus_bound": "K + L, expected",
    "gap": "gap: truth - (-L)",
}
PICTURE_NAMES = {"K": "K", "K_minus_null": "K - L_null", "null": "L_null"}


def lines(value: dict[str, Any]) -> str:
    """The comparison as a table for people."""
    found = value["comparison"]
    if "conversion" in found:
        return _picture_lines(found, value["terms"]["total"]["mean"])
    rows = [[label, *_number(found[name])] for name, label in NAMES.items() if name in found]
    if "gap_ratio" in found:
        rows.append(["gap of the exact model, same draws", f"{found['gap_optimum']:.4f}", ""])
        rows.append(["ratio of the two gaps", f"{found['gap_ratio']:.3f}", ""])
    rows += [[name, f"{bits:.4f}", ""] for name, bits in found["references"].items()]
    table = console.table(rows, ["comparison (model scale)", "bits/example", "± se"])
    if "bound_nats" not in found:
        return table
    mean, error = _number(found["bound_nats"])
    return f"{table}\n\nthe bound in nats: {mean} ± {error} nats/image"


def _picture_lines(found: dict[str, Any], bits_per_dim: float) -> str:
    rows = [[label, *_number(found[name])] for name, label in PICTURE_NAMES.items()]
    rows += [[name, f"{bits:.4f}", ""] for name, bits in found["references"].items()]
    sigma, channels = found["sigma_levels"], found["dims_per_pixel"]
    head = ["K, dequantised data of variance 1", "bits/pixel", "± se"]
    return (
        f"{console.table(rows, head)}\n\n"
        f"bits/dim = log2(sigma) - K/channels: {bits_per_dim:.4f} = {math.log2(sigma):.4f} - "
        f"{found['K']['mean']:.4f}/{channels}, sigma = {sigma:.2f} levels"
    )


def _number(entry: dict[str, Any]) -> list[str]:
    error = entry["se"]
    return [f"{entry['mean']:.4f}", "?" if error is None or math.isnan(error) else f"{error:.4f}"]
