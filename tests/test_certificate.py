"""Certificates end to end: coverage, refusals, what is stored, and who looked."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from nelbo.certificate import Certificate, certify, recompute
from nelbo.errors import InputRefused, UsageError
from nelbo.judges import Convolutional, Fixed, Judge, Perceptron, Regression
from nelbo.ladder import ladder
from nelbo.looks import Ledger
from nelbo.parts import cut
from nelbo.randomness import generator

QUICK = (Regression(0),)
TRUE = {1.0: 0.111421, 2.0: 0.336831, 4.0: 0.632720}


def shift(d: float, dims: int = 1) -> Callable[[int], Tensor]:
    """Draws from N(d e_1, I)."""

    def sampler(n: int) -> Tensor:
        x = torch.randn(n, dims, dtype=torch.float64)
        x[:, 0] += d
        return x

    return sampler


def normal(n: int, dims: int = 1, seed: int = 0) -> Tensor:
    return torch.randn(n, dims, dtype=torch.float64, generator=generator(seed, "reals"))


def bits(n: int, p: float, seed: int) -> Tensor:
    return (torch.rand(n, 4, generator=generator(seed, "bits")) < p).to(torch.uint8)


class Best(nn.Module):
    """The best logit between N(0, 1) and N(d, 1)."""

    def __init__(self, d: float) -> None:
        super().__init__()
        self.d = d

    def forward(self, x: Tensor) -> Tensor:
        return self.d**2 / 2 - self.d * x[:, 0]


# --- coverage ------------------------------------------------------------------------------------

RUNS = 40
MOST = int(stats.binom.isf(1e-6, RUNS, 0.05))


@pytest.mark.parametrize("mode", ["split", "prequential"])
def test_equal_laws_are_not_told_apart(mode: str):
    """More than 10 of 40 false claims have probability below 1e-6 at alpha = .05."""
    found = [
        certify(normal(160, 2, s), shift(0, 2), judges=QUICK, seed=s, mode=mode)
        for s in range(RUNS)
    ]
    assert sum(c.jsd_nats_lower > 0 for c in found) <= MOST
    assert sum(c.rejected for c in found) <= MOST


@pytest.mark.parametrize("d", [1.0, 4.0])
def test_the_best_discriminator_does_not_pass_the_truth(d: float):
    """With L(D) = JSD nothing is left between bound and truth but alpha."""
    found = [
        certify(normal(200, 1, s), shift(d), judges=[Best(d)], seed=s).jsd_nats_lower
        for s in range(RUNS)
    ]
    assert sum(bound > TRUE[d] for bound in found) <= MOST
    assert sum(found) / RUNS > 0.3 * TRUE[d]


class Memory(nn.Module):
    """Sure that what lies next to a known real is real, and next to a known fake, fake."""

    def __init__(self, real: Tensor, fake: Tensor) -> None:
        super().__init__()
        self.real, self.fake = real.flatten(1), fake.flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        near = [torch.cdist(x.flatten(1), rows).amin(1) for rows in (self.fake, self.real)]
        return 2 * torch.sign(near[0] - near[1])


def test_a_discriminator_that_knows_the_certificate_set_is_caught_by_this_test():
    """The broken variant: D was trained on the very pairs, and claims a difference every time."""
    false = 0
    for s in range(RUNS):
        x, y = normal(160, 2, s), normal(160, 2, 1000 + s)
        false += certify(x, y, judges=[Memory(x.float(), y.float())], seed=s).jsd_nats_lower > 0
    assert false > MOST


class Memorises(Judge):
    name = "memory"

    def fit(self, real: Tensor, fake: Tensor, seed: int) -> nn.Module:
        return Memory(real, fake)


def random_network(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 1))


class Loud(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = 100 * self.network(x)
        return out


@pytest.mark.parametrize("kind", ["random", "overfit", "loud"])
def test_hostile_discriminators_never_break_validity(kind: str):
    """Of 40 equal pairs, and of 40 shifted ones with B fixed at 5 from outside."""
    misses = 0
    for s in range(RUNS):
        network = random_network(s)
        judge = {"random": network, "overfit": Memorises(), "loud": Loud(network)}[kind]
        options: dict[str, Any] = {"judges": [judge], "seed": s, "clips": (5.0,)}
        misses += certify(normal(120, 2, s), shift(0, 2), **options).jsd_nats_lower > 0
        bound = certify(normal(120, 2, s), shift(1, 2), **options).jsd_nats_lower
        assert bound < TRUE[1.0]
    assert misses <= MOST


def test_the_usual_candidates_come_near_the_truth():
    """At 5,000 reals .6 of the truth is asked for; here 2,400 reals, and half of it."""
    found = certify(normal(2400, 2), shift(1, 2))
    assert 0.5 * TRUE[1.0] < found.jsd_nats_lower < TRUE[1.0]
    assert abs(found.plugin - TRUE[1.0]) < 5 * found.plugin_se + 0.02
    assert found.n_pairs == 1080 and found.n_calibration == 240 and found.n_fit == 1080
    assert set(found.candidates) == {"logistic-quadratic", "logistic-fourier-100", "mlp-2x128"}
    assert 0 < found.tv_lower < 0.383 and found.auc == pytest.approx(0.76, abs=0.06)


# --- the claim -----------------------------------------------------------------------------------


def claim(**changes: Any) -> Certificate:
    found = certify(normal(200), shift(2), judges=QUICK)
    return replace(found, **changes)


def test_the_sentence_claims_no_more_than_was_shown():
    words = claim(jsd_nats_lower=0.10149, n_pairs=5000).sentence()
    assert words == "JSD >= 0.101 nats (0.146 bits) with 95 % confidence (5,000 pairs)"
    nothing = claim(jsd_nats_lower=0.0, n_pairs=300, log_e_value=0.0).sentence()
    assert nothing == (
        "no difference certified at n = 300; a JSD of about 6/n = 0.02 nats would have been"
    )
    rejected = claim(jsd_nats_lower=0.0, n_pairs=300, log_e_value=4.0)
    assert rejected.rejected and "the e-value rejects p = g" in rejected.sentence()
    assert "look 3 at these pairs" in claim(looks=3).sentence()
    assert "after noise" in claim(channel="noise to log-SNR 3").sentence()


@pytest.mark.parametrize("mode", ["split", "prequential"])
def test_anyone_can_compute_the_bound_again(mode: str, tmp_path: Path):
    found = certify(normal(300), shift(2), judges=QUICK, mode=mode)
    assert found.recomputed() == found.jsd_nats_lower > 0
    path = found.save(tmp_path / "claims" / "one.json")
    assert recompute(path) == found.jsd_nats_lower
    document = json.loads(path.read_text())
    assert document["schema"] == 1 and document["level"] == pytest.approx(0.95)
    assert document["jsd_bits_lower"] == pytest.approx(found.jsd_nats_lower / math.log(2))
    assert document["sentence"] == found.sentence() and document["mode"] == mode
    path.write_text(path.read_text().replace('"alpha": 0.05', '"alpha": 0.2'))
    with pytest.raises(InputRefused, match="one of them was changed"):
        recompute(path)
    path.with_suffix(".npz").write_bytes(b"PK")
    with pytest.raises(InputRefused, match="is not the file"):
        recompute(path)


def test_the_same_seed_gives_the_same_logits_and_another_one_others():
    judges = (Regression(20), Perceptron(16, members=1))
    a, b, c = (certify(normal(200), shift(1), judges=judges, seed=s) for s in (0, 0, 1))
    assert torch.equal(a.logits_real, b.logits_real) and torch.equal(a.logits_fake, b.logits_fake)
    assert a.classifier_hash == b.classifier_hash and a.split_hash == b.split_hash
    assert a.split_hash != c.split_hash and not torch.equal(a.logits_fake, c.logits_fake)


def test_arrays_and_files_serve_as_samplers(tmp_path: Path):
    y = shift(2)(400).numpy()
    np.save(tmp_path / "real.npy", normal(400).numpy())
    np.save(tmp_path / "fake.npy", y)
    whole = certify(tmp_path / "real.npy", tmp_path / "fake.npy", judges=QUICK)
    assert whole.jsd_nats_lower > 0.1 and whole.sampler.endswith("fake.npy")
    # Fewer fakes than reals: as many pairs as there are fakes for, the other reals train.
    few = certify(normal(400), y[:200], judges=QUICK)
    assert few.n_pairs == 90 and few.n_fit == 290
    with pytest.raises(InputRefused, match="too few rows"):
        certify(normal(400), y[:20], judges=QUICK)


def test_reals_that_the_sampler_knows_are_only_fitted_on():
    known = normal(500, seed=7)
    found = certify(normal(100), shift(2), judges=QUICK, fit_real=known)
    assert found.n_fit == 545 and found.n_pairs == 45
    alone = certify(normal(100), shift(2), judges=QUICK, fit_real=known, shares=(0, 0.2, 0.8))
    assert alone.n_fit == 500 and alone.n_pairs == 80


# --- refusals ------------------------------------------------------------------------------------


def test_too_few_rows_say_how_many_are_needed():
    with pytest.raises(InputRefused, match="at least 41 reals"):
        certify(normal(20), shift(1), judges=QUICK)
    with pytest.raises(InputRefused, match="too few rows"):
        certify(normal(20), shift(1), judges=QUICK, mode="prequential")
    certify(normal(41), shift(1), judges=QUICK)


def image(n: int, seed: int = 0) -> Tensor:
    draws = generator(seed, "images")
    return torch.randint(0, 256, (n, 1, 8, 8), generator=draws, dtype=torch.uint8)


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


# --- the parts -----------------------------------------------------------------------------------


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


# --- classifiers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("judge", [Regression(0), Regression(20), Perceptron(32, members=1)])
def test_unequal_numbers_do_not_move_the_logit(judge: Judge):
    """Of equal laws the logit is 0, not log(n1/n0) = log 5."""
    network = judge.fit(normal(2000, 2).float(), normal(400, 2, seed=1).float(), 0)
    with torch.no_grad():
        logits = network(normal(2000, 2, seed=2).float())
    assert abs(float(logits.mean())) < 0.3 < math.log(5) / 2


def test_the_regression_finds_the_logit_of_a_shift():
    network = Regression(0).fit(normal(4000, 2).float(), shift(1, 2)(4000).float(), 0)
    x = normal(500, 2, seed=5)
    with torch.no_grad():
        assert float((network(x.float()) - (0.5 - x[:, 0])).abs().mean()) < 0.25


def test_images_get_convolutions():
    """A stroke that stands upright or lies, at any place: means are equal, convolutions see it."""

    def strokes(n: int, lying: bool, seed: int) -> Tensor:
        x = torch.zeros(n, 1, 8, 8, dtype=torch.uint8)
        place = torch.randint(0, 6, (n, 2), generator=generator(seed, "place"))
        for i, (a, b) in enumerate(place.tolist()):
            rows, columns = (slice(a, a + 1), slice(b, b + 3))
            x[i, 0][(rows, columns) if lying else (columns, rows)] = 255
        noise = torch.randint(0, 40, x.shape, generator=generator(seed, "noise"))
        return (x.int() + noise).clamp(0, 255).byte()

    found = certify(strokes(600, True, 0), strokes(600, False, 1), judges=[Convolutional(8)])
    assert found.jsd_nats_lower > 0.3 and found.classifier == "conv-8"


def test_a_fixed_classifier_is_called_on_the_scale_of_encode():
    seen: list[Tensor] = []

    def judge(x: Tensor) -> Tensor:
        seen.append(x)
        return x.flatten(1).mean(1)

    certify(image(100), image(100, 1), judges=[judge])
    assert {x.dtype for x in seen} == {torch.float32}
    assert float(torch.cat(seen).min()) == -1 and float(torch.cat(seen).max()) == 1
    seen.clear()
    certify(image(100), image(100, 1), judges=[Fixed(judge)], encode=lambda x: x / 51)
    assert float(torch.cat(seen).max()) == 5


# --- looks ---------------------------------------------------------------------------------------


def test_the_ledger_counts_the_looks_at_a_set(tmp_path: Path):
    ledger = Ledger(tmp_path / "new" / "looks.jsonl")
    assert [ledger.look("a", "x"), ledger.look("b", "y"), ledger.look("a", "z")] == [1, 1, 2]
    with ledger.path.open("a") as file:
        file.write('{"set": "a", "lo')  # a run killed while writing
    assert ledger.look("a", "w") == 3 and ledger.looks("a") == 3 and ledger.looks("c") == 0
    ledger.path.write_text("something else\n")
    with pytest.raises(InputRefused, match="line 1"):
        ledger.look("a", "x")


def looked(path: str) -> list[int]:
    return [Ledger(path).look("a", "x") for _ in range(5)]


def test_looks_of_several_processes_are_all_counted(tmp_path: Path):
    with get_context("fork").Pool(3) as pool:
        found = pool.map(looked, [str(tmp_path / "looks.jsonl")] * 3)
    assert sorted(look for looks in found for look in looks) == list(range(1, 16))


def test_the_look_is_written_before_the_set_is_opened(tmp_path: Path):
    ledger, real = Ledger(tmp_path / "looks.jsonl"), normal(200)
    whole = certify(real, shift(1), judges=QUICK, ledger=ledger)
    held = cut(real, seed=0, total=200).certificate.float()

    def dies(x: Tensor) -> Tensor:
        if torch.isin(x, held).any():
            assert ledger.looks(whole.split_hash) == 2
            raise KeyboardInterrupt
        return x[:, 0]

    with pytest.raises(KeyboardInterrupt):
        certify(real, shift(1), judges=[dies], ledger=ledger)
    third = certify(real, shift(1), judges=QUICK, ledger=ledger)
    assert (whole.looks, third.looks) == (1, 3)


# --- the ladder ----------------------------------------------------------------------------------


def test_the_ladder_shares_fakes_parts_and_error_probability(tmp_path: Path):
    calls: list[int] = []

    def sampler(n: int) -> Tensor:
        calls.append(n)
        return shift(4)(n)

    ledger = Ledger(tmp_path / "looks.jsonl")
    rungs = ladder(normal(600), sampler, [6, 0, -4], alpha=0.06, judges=QUICK, ledger=ledger)
    assert len(calls) == 3
    bounds = [rung.certificate.jsd_nats_lower for rung in rungs]
    assert bounds[0] > bounds[1] > 0 and bounds[0] > bounds[2]
    assert [rung.certificate.alpha for rung in rungs] == pytest.approx([0.02] * 3)
    assert len({rung.certificate.split_hash for rung in rungs}) == 1
    assert [rung.certificate.looks for rung in rungs] == [1, 1, 1]
    assert rungs[1].certificate.channel == "noise to log-SNR 0"
    # N(0, 1) and N(4, 1) on the scale of the reals: at log-SNR 0 N(0, 1) and N(4/sqrt 2, 1).
    assert bounds[1] < 0.5
    assert rungs[0].as_json()["certificate"]["channel"] == "noise to log-SNR 6"
    with pytest.raises(UsageError):
        ladder(normal(600), sampler, [1, 1])


def test_numpy_rows_of_any_layout_are_read():
    x = normal(200).numpy()
    plain = certify(x, shift(1), judges=QUICK)
    for other in (x.astype(">f8"), x[::-1][::-1], np.asfortranarray(x)):
        assert certify(other, shift(1), judges=QUICK).jsd_nats_lower == plain.jsd_nats_lower
    flags = np.random.default_rng(0).random((200, 9)) < 0.5
    found = certify(flags, lambda n: torch.rand(n, 9) < 0.9, judges=QUICK)
    assert found.jsd_nats_lower > 0.1


def test_few_fakes_may_train_and_wide_rows_are_turned_to_few_axes():
    calls: list[int] = []

    def sampler(n: int) -> Tensor:
        calls.append(n)
        return 1.5 * torch.randn(n, 1100)

    found = certify(normal(200, 1100), sampler, judges=[Regression(10)], fit_fakes=40)
    assert calls == [40, 20, 90] and found.n_fit == 90
    again = certify(normal(200, 1100), sampler, judges=[Regression(10)], fit_fakes=40)
    assert torch.equal(found.logits_real, again.logits_real)
    with pytest.raises(UsageError, match="no judges"):
        certify(normal(200), shift(1), judges=[])
