"""K of Sohl-Dickstein et al. 2015 beside the bound, and both beside what is known.

K and −L are in bits per example on the model's scale, the larger the better. They agree where the
decoder is the fixed edge step and the data has the activity (or second moment) of pure noise; see
`nelbo.entropy`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from nelbo import console
from nelbo.decoders import EdgeFixed
from nelbo.entropy import EntropyForm, entropy_form, step_entropies
from nelbo.estimate import Estimate
from nelbo.evaluation import Evaluation
from nelbo.recipes.recipe import Recipe

EXAMPLES = 256
"""Examples over which the entropies of the reverse steps are averaged."""


def wanted(recipe: Recipe) -> bool:
    """Whether the run is one of the kind for which the paper states K."""
    return recipe.dataset.binary or isinstance(recipe.model.decoder_rule, EdgeFixed)


def form_of(recipe: Recipe, rows: Tensor, result: Evaluation) -> EntropyForm:
    """The entropy form of every example, from the divergences of an evaluation."""
    x_0 = recipe.dataset.encode(rows)
    process = recipe.model.cpu().process
    return entropy_form(process, x_0, recipe.times, result.values()["diffusion"])


@torch.no_grad()
def entry(recipe: Recipe, rows: Tensor, result: Evaluation) -> dict[str, Any]:
    """The JSON object of the comparison, all in bits per example; empty where K has no meaning."""
    if not wanted(recipe):
        return {}
    form = form_of(recipe, rows, result)
    # all on the model's scale, on which the paper states K
    figures = {
        "minus_bound": Estimate.of(recipe.dataset.offset() - result.values()["total"]),
        "null": Estimate.of(form.null, exact=True),
    }
    if isinstance(recipe.model.decoder_rule, EdgeFixed):
        figures["K"] = Estimate.of(form.k)
        figures["K_minus_null"] = Estimate.of(form.gain)
        figures["K_plus_bound"] = Estimate.of(form.excess, exact=True)
    known = {reference.name: reference.bits for reference in recipe.references()}
    values = {name: value.bits().as_json() for name, value in figures.items()}
    return {"comparison": {**values, "references": known}}


@torch.no_grad()
def arrays(recipe: Recipe, rows: Tensor) -> dict[str, Tensor]:
    """Bounds on the entropy of every reverse step, (N−1,) nats per example, means over some."""
    if not wanted(recipe):
        return {}
    x_0 = recipe.dataset.encode(rows[:EXAMPLES])
    steps = step_entropies(recipe.model.cpu().process, x_0, recipe.times)
    return {"step_entropy_lower": steps.lower.mean(0), "step_entropy_upper": steps.upper.mean(0)}


NAMES = {
    "K": "K (entropy form)",
    "minus_bound": "-L (the bound)",
    "K_minus_null": "K - L_null",
    "null": "L_null",
    "K_plus_bound": "K + L, expected",
}


def lines(value: dict[str, Any]) -> str:
    """The comparison as a table for people."""
    found = value["comparison"]
    rows = [[label, *_number(found[name])] for name, label in NAMES.items() if name in found]
    rows += [[name, f"{bits:.4f}", ""] for name, bits in found["references"].items()]
    return console.table(rows, ["comparison (model scale)", "bits/example", "± se"])


def _number(entry: dict[str, Any]) -> list[str]:
    error = entry["se"]
    return [f"{entry['mean']:.4f}", "?" if error is None or math.isnan(error) else f"{error:.4f}"]
