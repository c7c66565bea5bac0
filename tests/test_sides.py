"""What is no comparison is refused, with what to do; the parts of the reals."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from shifts import QUICK, bits, image, normal, shift
from torch import Tensor, nn

from nelbo.certificate import certify
from nelbo.errors import InputRefused, UsageError
from nelbo.parts import cut


def test_too_few_rows_say_how_many_are_needed():
    with pytest.raises(InputRefused, match="at least 41 reals"):
        certify(normal(20), shift(1), judges=QUICK)
    with pytest.raises(InputRefused, match="too few rows"):
        certify(normal(20), shift(1), judges=QUICK, mode="prequential")
    certify(normal(41), shift(1), judges=QUICK)


@pytest.mark.parametrize(
    ("real", "fake", "words"),
    [
        (image(100), image(100, 1).float() / 255, "are levels, the fakes real numbers"),
        (image(100), image(100, 1).double(), "are levels, the fakes real numbers"),
        (image(100).double(), image(100, 1) + torch.rand(100, 1, 8, 8), "not rounded"),
        (image(100), image(100, 1) // 32, "the scale alone"),
        (normal(100), 1000 * normal(100, seed=1), "the scale alone"),
        (normal(100, 2), normal(100, 3), "have shape"),
    ],
)
def test_sides_that_differ_by_their_form_are_refused(real: Tensor, fake: Tensor, words: str):
    with pytest.raises(InputRefused, match=words):
        certify(real, fake, judges=QUICK)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (normal(100).index_fill(0, torch.tensor([3]), math.nan), "the first is row 3"),
        (normal(100).index_fill(0, torch.tensor([3]), math.inf), "NaN or infinite"),
        (torch.full((100, 2), 300), "integers from 300"),
        (torch.zeros(100), "give .n, \\*shape."),
        (torch.zeros(100, 2, dtype=torch.complex64), "complex"),
        (np.array([["a"]] * 100), "values of type"),
    ],
)
def test_rows_that_are_no_numbers_are_refused(values: Any, words: str):
    with pytest.raises(InputRefused, match=words):
        certify(values, shift(0), judges=QUICK)


def raises(n: int) -> Tensor:
    raise KeyError("weights")


def own_seed(n: int) -> Tensor:
    return torch.randn(n, 1, generator=torch.Generator().manual_seed(3))


def few_kinds(n: int) -> Tensor:
    return torch.randn(10, 1)[torch.randint(10, (n,))]


@pytest.mark.parametrize(
    ("sampler", "words"),
    [
        (raises, r"sampler raises, call 1 \(90 rows for FIT\), raised KeyError"),
        (lambda n: torch.randn(n - 1, 1), r"returned shape \(89, 1\)"),
        (lambda n: torch.randn(n, 2), "have shape"),
        (lambda n: torch.randn(n), r"returned shape \(90,\)"),
        (lambda n: [0.0] * n, "returned list"),
        (lambda n: torch.randn(n, 1).log(), "NaN or infinite"),
        (lambda n: torch.ones(n, 1), "constant sampler"),
        (few_kinds, "repeats itself: 8[0-9]%"),
        (own_seed, "came in an earlier call"),
        (3, "a sampler is a function"),
    ],
)
def test_bad_samplers_are_named(sampler: Any, words: str):
    with pytest.raises(InputRefused, match=words) as caught:
        certify(normal(200), sampler, judges=QUICK)
    if sampler is raises:
        assert isinstance(caught.value.__cause__, KeyError)


def test_a_sampler_with_atoms_passes_when_the_reals_have_them_or_when_it_is_said():
    found = certify(bits(300, 0.5, 0), lambda n: (torch.rand(n, 4) < 0.8).byte(), judges=QUICK)
    assert found.jsd_nats_lower > 0 and "atoms" in found.rule
    said = certify(normal(200), few_kinds, judges=QUICK, as_is=True)
    assert said.n_pairs == 90
    with pytest.raises(InputRefused, match="constant sampler"):
        certify(bits(300, 0.5, 0), lambda n: torch.ones(n, 4).byte(), judges=QUICK)


def test_judges_that_see_the_batch_are_refused():
    network = nn.Sequential(nn.Linear(1, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    with pytest.raises(InputRefused, match="depend on the batch"):
        certify(normal(200), shift(1), judges=[network.train()])
    certify(normal(200), shift(1), judges=[network.eval()])
    with pytest.raises(InputRefused, match="depend on the batch"):
        certify(normal(200), shift(1), judges=[lambda x: x[:, 0] + torch.randn(len(x))])


@pytest.mark.parametrize(
    ("judge", "words"),
    [
        (lambda x: x[:, 0].log(), "logits are NaN or infinite"),
        (lambda x: x[:1, 0], "logits for"),
    ],
)
def test_judges_without_logits_are_refused(judge: Any, words: str):
    with pytest.raises(InputRefused, match=words):
        certify(normal(200), shift(1), judges=[judge])


def test_options_that_are_off_are_refused():
    for options in ({"alpha": 1.5}, {"mode": "bootstrap"}, {"shares": (0.5, 0.5)}):
        with pytest.raises(UsageError):
            certify(normal(200), shift(1), judges=QUICK, **options)


def test_numpy_rows_of_any_layout_are_read():
    x = normal(200).numpy()
    plain = certify(x, shift(1), judges=QUICK)
    for other in (x.astype(">f8"), x[::-1][::-1], np.asfortranarray(x)):
        assert certify(other, shift(1), judges=QUICK).jsd_nats_lower == plain.jsd_nats_lower
    flags = np.random.default_rng(0).random((200, 9)) < 0.5
    found = certify(flags, lambda n: torch.rand(n, 9) < 0.9, judges=QUICK)
    assert found.jsd_nats_lower > 0.1


def test_what_belongs_together_stays_together():
    rows = torch.arange(100, dtype=torch.float64)[:, None].repeat(3, 1) * math.pi
    parts = cut(rows, seed=0, total=300)
    sets = [set(x.flatten().tolist()) for x in (parts.fit, parts.calibration, parts.certificate)]
    assert not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2])
    groups = torch.arange(300) // 10
    parts = cut(normal(300), seed=0, total=300, groups=groups)
    place = {float(x): int(g) for x, g in zip(normal(300), groups, strict=True)}
    found = [{place[float(x)] for x in y} for y in (parts.fit, parts.certificate)]
    assert not found[0] & found[1]
    assert len(found[1]) in (14, 15)


def test_rows_of_fit_that_equal_a_row_of_the_certificate_set_are_dropped():
    rows = normal(200)
    parts = cut(rows, seed=0, total=200, fit_real=rows)
    assert parts.dropped == len(parts.certificate) == 90
    assert len(parts.fit) == 200 + 90 - 90
    other = cut(rows, seed=1, total=200)
    assert parts.hash != other.hash
    assert not torch.equal(parts.certificate, parts.certificate.sort(0).values)
