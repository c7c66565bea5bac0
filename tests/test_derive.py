"""nelbo derive: what it prints, what it refuses, what a planted error does, and runs of all kinds.

Drawn sides use a fixed seed; over all seeds a sound line would be called wrong at 5 standard
errors, once in 1.7 million.
"""

from __future__ import annotations

import json
import shutil
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import silent

from nelbo import binary, gan
from nelbo import bound as bound_module
from nelbo.bits import Bits
from nelbo.bound import Bound
from nelbo.derivation import chain, printed, trainedgame
from nelbo.derivation.identity import Erratum, Identity, Line, Side
from nelbo.derivation.trained import widened
from nelbo.distributions import DiagonalNormal, DiscretizedNormal
from nelbo.parameterizations import GaussianParameterization
from nelbo.processes.bernoulli import Bernoulli
from nelbo.processes.gaussian import Gaussian

QUICK = ["--threads", "1", "--quiet"]


def derived(*arguments: str) -> tuple[int, dict[str, Any]]:
    code, out, err = silent(["derive", *arguments, "--json", *QUICK])
    assert out, err
    return code, json.loads(out)


# --- the chain ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    code, value = derived()
    assert code == 0
    return value


def test_every_numbered_identity_is_in_the_chain_in_order(whole: dict[str, Any]) -> None:
    """I58 to I60 speak of bits-back coding, which is not here yet."""
    numbers = [*range(1, 26), *range(34, 58), *range(26, 34), *range(61, 66)]
    assert [one["id"] for one in whole["identities"]] == [f"I{n}" for n in numbers]
    names = [one.name for one in chain.IDENTITIES] + [c.name for c in chain.CHAPTERS]
    assert len(set(names)) == len(names)


def test_the_document_says_what_was_computed(whole: dict[str, Any]) -> None:
    assert whole["schema"] == 1 and whole["agrees"] is True and whole["seed"] == 0
    for one in whole["identities"]:
        assert one["agrees"] is True and one["lines"] and one["text"] and one["latex"]
        assert one["sides"] == one["lines"][0]["sides"] and len(one["sides"]) >= 2
        for side in (side for line in one["lines"] for side in line["sides"]):
            assert side.keys() == {"what", "value", "se", "by"}


def test_all_wrong_variants_disagree(whole: dict[str, Any]) -> None:
    assert len(whole["errata"]) == len(chain.ERRATA) > 30
    assert all(one["caught"] and not one["agrees"] for one in whole["errata"])
    known = {one["id"] for one in whole["identities"]}
    assert {one["identity"] for one in whole["errata"]} <= known


# --- words -------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["I7", "i7", "telescoping", "Telescoping"])
def test_an_identity_is_found_by_id_and_name(word: str) -> None:
    assert chain.find(word).id == "I7"


def test_one_identity_is_shown_whole() -> None:
    code, out, err = silent(["derive", "jensen", *QUICK])
    assert code == 0 and err == ""
    one = chain.find("I2")
    assert f"I2 jensen: {one.title}" in out and f"1. {one.steps[0]}" in " ".join(out.split())
    assert "Computed by: " in out and "Source: " in out and "LaTeX:" in out
    assert "E7, a wrong variant of I2" in out and "it disagrees, as it has to" in out
    assert "as printed: log p_θ(x_0) ≥ E_q[p(x_N) log Π(p/q)]" in out


def test_latex_is_one_row_and_breaks_at_spaces_in_a_terminal() -> None:
    code, out, _ = silent(["derive", "I7", *QUICK])
    latex = chain.find("I7").latex
    assert code == 0 and latex in out.splitlines()
    for one in chain.IDENTITIES:
        rows = [row for row, _ in printed.whole_rows(chain.Result(one, (), 0.0), (), 60, (), True)]
        start = rows.index("LaTeX:") + 1
        end = next(i for i, row in enumerate(rows) if row.startswith("Computed by:"))
        assert " ".join(rows[start:end]) == " ".join(one.latex.split())


def test_a_wrong_variant_that_is_named_comes_first() -> None:
    others = [e.id for e in chain.ERRATA if e.identity == "I22"]
    assert len(others) > 1
    code, out, _ = silent(["derive", others[-1], *QUICK])
    places = [out.index(f"{e}, a wrong variant of I22") for e in others]
    assert code == 0 and places[-1] < out.index("I22 ") + 30 < min(places[:-1])
    assert out.startswith(f"{others[-1]}, a wrong variant")


def test_several_and_chapters() -> None:
    _, value = derived("I8", "I7", "instrument")
    assert [one["id"] for one in value["identities"]] == [
        "I8",
        "I7",
        *(f"I{n}" for n in range(61, 66)),
    ]
    _, value = derived("E7")
    assert [one["id"] for one in value["identities"]] == ["I2"]


def test_errata_alone() -> None:
    code, out, _ = silent(["derive", "--errata", *QUICK])
    assert code == 0 and out.count("it disagrees, as it has to") == len(chain.ERRATA)
    assert out.splitlines()[-1].startswith(f"{len(chain.ERRATA)} wrong variants: all disagree")


@pytest.mark.parametrize("width", [60, 80])
def test_a_narrow_terminal_shows_the_same(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    code, out, _ = silent(["derive", "I1", "I7", "I25", "I34", "instrument", *QUICK])
    assert code == 0 and "I7 telescoping" in out
    formulas = [one.latex for one in chain.IDENTITIES]
    rows = [row for row in out.splitlines() if row not in formulas]
    assert max(printed.cell_len(row) for row in rows) <= width
    assert out.count(" agree") > 20


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["telescopin"], 2, "telescoping"),
        (["I99"], 2, "no identity 'I99'"),
        (["i100"], 2, "near it are I10"),
        (["I59"], 2, "I59 is of bits-back coding and comes with the coder"),
        (["I7", "i60"], 2, "I60 is of bits-back"),
        (["zzzzqqq"], 2, "`nelbo derive` lists them all"),
        (["no/where"], 3, "not a run directory"),
        (["I7", "no/where", "no/other"], 2, "one run at a time"),
        (["--examples", "40"], 2, "speaks of a run"),
        (["I7", "--checkpoint", "best"], 2, "speaks of a run"),
    ],
)
def test_what_is_refused(words: list[str], code: int, said: str) -> None:
    found, out, err = silent(["derive", *words])
    assert (found, out) == (code, "") and said in err


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    code, _, err = silent(["derive", str(tmp_path)])
    assert code == 3 and "recipe.json" in err


# --- exit 4 ------------------------------------------------------------------------------------


class _Stub(Identity):
    id, name, title, latex, text = "I7", "telescoping", "t", "l", "t"

    def __init__(self, *lines: Line) -> None:
        self.own = list(lines)

    def lines(self, seed: int) -> list[Line]:
        return self.own


def off(a: float, b: float, **more: Any) -> Line:
    return Line("Gaussian", (Side("a", a), Side("b", b)), **more)


@pytest.mark.parametrize(
    "lines", [[off(1.0, 2.0)], [off(1.0, float("nan"))], [], [off(2, 1, relation="<=")]]
)
def test_a_line_that_disagrees_ends_with_4(
    lines: list[Line], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After all was printed; an identity without a line has shown nothing."""
    monkeypatch.setattr(chain, "IDENTITIES", (_Stub(*lines), _Stub(off(1, 1))))
    monkeypatch.setattr(chain, "ERRATA", ())
    code, out, err = silent(["derive", *QUICK])
    assert code == 4 and "DISAGREE: I7" in out and "I7 telescoping: two sides" in err
    assert "agree, to the last digit" in out
    code, value = derived()
    assert code == 4 and value["agrees"] is False
    assert [one["agrees"] for one in value["identities"]] == [False, True]


def test_a_wrong_variant_that_agrees_ends_with_4(monkeypatch: pytest.MonkeyPatch) -> None:
    class Blind(Erratum):
        id, identity, printed, right, why = "E7", "I7", "x", "y", "z"

        def line(self, seed: int) -> Line:
            return off(1.0, 1.0)

    monkeypatch.setattr(chain, "IDENTITIES", (_Stub(off(1, 1)),))
    monkeypatch.setattr(chain, "ERRATA", (Blind(),))
    code, out, err = silent(["derive", *QUICK])
    assert code == 4 and "AGREES" in out and "E7: a wrong variant agrees" in err


Plant = Callable[[pytest.MonkeyPatch], None]


def _no_prior(model, x_0, times, cond=None):
    index = torch.arange(len(times))
    terms = torch.stack([term(model, x_0, times, i, cond) for i in index], dim=1)  # noqa: F821
    return Bound(0 * prior_term(model, x_0, times), terms[:, 1:], terms[:, 0])  # noqa: F821


def _no_decoder(model, x_0, times, cond=None):
    index = torch.arange(len(times))
    terms = torch.stack([term(model, x_0, times, i, cond) for i in index], dim=1)  # noqa: F821
    return Bound(prior_term(model, x_0, times), terms[:, 1:], 0 * terms[:, 0])  # noqa: F821


def _scaled_value(real, fake):
    return -F.softplus(-real.double()) - 1.02 * F.softplus(fake.double())  # noqa: F821


def _shifted_mixture(at, logits, s):
    return Bits(_sound_mixture(at, logits, s).logits + 0.05)  # noqa: F821


def code_of(function: Any, other: Any) -> Plant:
    """The same function object with another body, whoever imported it by name."""
    return lambda patch: patch.setattr(function, "__code__", other.__code__)


def law_of(owner: type, name: str, change: Callable[[Any], Any]) -> Plant:
    """A method whose law is changed."""
    sound = getattr(owner, name)
    return lambda patch: patch.setattr(owner, name, lambda *a: change(sound(*a)))


def bit_kernel(patch: pytest.MonkeyPatch) -> None:
    sound = types.FunctionType(binary.mixed.__code__, binary.mixed.__globals__)
    patch.setattr(binary, "_sound_mixture", sound, raising=False)
    patch.setattr(binary.mixed, "__code__", _shifted_mixture.__code__)


def wider(law: DiagonalNormal) -> DiagonalNormal:
    return DiagonalNormal(law.mean, law.logvar + 0.05)


def further(law: DiagonalNormal) -> DiagonalNormal:
    return DiagonalNormal(1.02 * law.mean, law.logvar)


PLANTS: dict[str, tuple[Plant, list[str]]] = {
    "bound": (code_of(bound_module.bound, _no_prior), ["I11"]),
    "posterior": (law_of(Gaussian, "posterior", wider), ["I6", "I9"]),
    "posterior of bits": (
        law_of(Bernoulli, "posterior", lambda law: Bits(law.logits + 0.05)),
        ["I6", "I9"],
    ),
    "kernel": (law_of(GaussianParameterization, "kernel", further), ["I16", "I22"]),
    "variance of the kernel": (law_of(GaussianParameterization, "kernel", wider), ["I16", "I23"]),
    "kernel of bits": (bit_kernel, ["I16"]),
    "masses": (law_of(DiscretizedNormal, "log_prob", lambda v: v + 0.01), ["I1"]),
    "value": (code_of(gan.value, _scaled_value), ["I28", "I30"]),
}


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_error_ends_with_4(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, ids = PLANTS[name]
    plant(monkeypatch)
    code, value = derived(*ids)
    assert code == 4
    assert [one["agrees"] for one in value["identities"]] == [False] * len(ids)


# --- runs --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two small Gaussian models, a heartbeat of one update, and a game of one update."""
    root = tmp_path_factory.mktemp("derive")
    small = ["--width", "16", "--samples", "2", "--threads", "1", "--quiet"]
    chainlike = ["--calls", "2", "--validate-every", "0", "--latents", "12"]
    told = {
        "normal": ["gaussian", "--no-game", "--steps", "0", "--examples", "2000", *chainlike],
        "hybrid": [
            *("gaussian", "--no-game", "--steps", "1", "--examples", "2000"),
            *("--objective", "hybrid"),
            *("--variance", "between", "--predict", "epsilon", *chainlike),
        ],
        "beat": ["heartbeat", "--steps", "1", "--length", "10", *chainlike],
        "ring": ["ring", "--steps", "1", "--examples", "2000", "--no-compare"],
    }
    with pytest.MonkeyPatch.context() as patch:
        # neither their evaluation nor their report is looked at
        patch.setattr("nelbo.walks.train.finish", lambda *a: None)
        patch.setattr("nelbo.walks.play.finish", lambda *a: None)
        patch.setattr(trainedgame, "COMPONENTS", 4)
        patch.setattr(trainedgame, "SAMPLES", 5000)
        for name, words in told.items():
            code, _, err = silent(["train", *words, *small, "--out", str(root / name)])
            assert code == 0, err
        yield root


def ids(value: dict[str, Any]) -> list[str]:
    return [one["id"] for one in value["identities"]]


def test_a_gaussian_run(runs: Path) -> None:
    code, value = derived(str(runs / "normal"), "--examples", "128")
    assert code == 0 and value["run"]["latents"] == value["run"]["of_latents"] == 12
    spoken = [
        "I4",
        "I6",
        "I7",
        "I8",
        "I9",
        "I10",
        "I11",
        "I12",
        "I13",
        "I22",
        "I23",
        "I24",
        "I25",
        "I34",
        "I47",
    ]
    assert ids(value) == spoken and value["skipped"].keys() == {"I14", "I15"}
    families = {line["family"] for one in value["identities"] for line in one["lines"]}
    assert families == {"normal"}
    (vlb,) = [one for one in value["identities"] if one["id"] == "I34"]
    assert "THE LOSS THAT WAS TRAINED" in vlb["lines"][0]["note"]


def test_the_loss_of_a_hybrid_run_is_marked(runs: Path) -> None:
    code, value = derived(str(runs / "hybrid"), "I24", "--examples", "64")
    assert code == 0 and ids(value) == ["I24"]
    marked = [line for line in value["identities"][0]["lines"] if "TRAINED" in line["note"]]
    assert len(marked) == 1 and "L_hybrid" in marked[0]["sides"][0]["what"]


def test_a_run_of_bits(runs: Path) -> None:
    code, value = derived(str(runs / "beat"), "--examples", "128")
    assert code == 0
    assert ids(value) == [
        "I6",
        "I7",
        "I8",
        "I9",
        "I10",
        "I11",
        "I12",
        "I13",
        "I14",
        "I15",
        "I34",
        "I47",
    ]
    assert "bits" in value["skipped"]["I24"]


def test_a_subset_of_the_latents_is_said(runs: Path) -> None:
    code, out, _ = silent(
        ["derive", str(runs / "normal"), "I11", "I1", "--latents", "5", "--examples", "64", *QUICK]
    )
    assert code == 0 and "5 of its 12 latents" in " ".join(out.split())
    assert "I1 importance does not apply" in out


def test_a_game(runs: Path) -> None:
    code, value = derived(str(runs / "ring"), "--examples", "2000")
    assert code == 0 and ids(value) == ["I27", "I28", "I29", "I30", "I33"]
    (slack,) = [one for one in value["identities"] if one["id"] == "I30"]
    assert len(slack["lines"]) == 4


@pytest.mark.parametrize(
    ("run", "word", "plant"),
    [
        ("normal", "I6", law_of(Gaussian, "posterior", wider)),
        ("normal", "I22", law_of(GaussianParameterization, "kernel", further)),
        ("normal", "I11", code_of(bound_module.bound, _no_decoder)),
        ("beat", "I6", law_of(Bernoulli, "posterior", lambda law: Bits(law.logits + 0.05))),
        ("ring", "I30", code_of(gan.value, _scaled_value)),
    ],
)
def test_an_error_is_seen_on_a_run(
    run: str, word: str, plant: Plant, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    code, _, _ = silent(["derive", str(runs / run), word, "--examples", "128", *QUICK])
    assert code == 4


@pytest.mark.parametrize(
    ("run", "more", "code", "said"),
    [
        ("normal", ["--examples", "3"], 2, "take 16 or more"),
        ("normal", ["--latents", "40"], 2, "give 2 to 12"),
        ("normal", ["--latents", "1"], 2, "give 2 to 12"),
        ("normal", ["--checkpoint", "77"], 2, "--checkpoint 77"),
        ("normal", ["--errata"], 2, "leave out the run"),
        ("ring", ["--latents", "4"], 2, "a game"),
        ("ring", ["--examples", "3"], 2, "take 100 or more"),
    ],
)
def test_what_a_run_refuses(run: str, more: list[str], code: int, said: str, runs: Path) -> None:
    found, out, err = silent(["derive", str(runs / run), *more])
    assert (found, out) == (code, "") and said in err


@pytest.mark.parametrize(
    ("run", "named", "why"),
    [
        ("normal", ["I29"], "I29: it speaks of a game, and this is a diffusion model"),
        ("normal", ["I14", "I1", "I3"], "I1, I3: shown on small exact models only"),
        ("ring", ["I7"], "I7: it speaks of a diffusion model, and this is a game"),
    ],
)
def test_nothing_that_applies_is_no_success(
    run: str, named: list[str], why: str, runs: Path
) -> None:
    code, _, err = silent(["derive", str(runs / run), *named, *QUICK])
    assert code == 2 and "no identity of these applies" in err and why in " ".join(err.split())


def test_a_run_without_its_checkpoint(runs: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(runs / "normal", tmp_path / "normal"))
    shutil.rmtree(path / "checkpoints")
    code, _, err = silent(["derive", str(path)])
    assert code == 3 and "checkpoint" in err


def test_few_draws_are_given_a_wider_error() -> None:
    """Student's quantile of 2.87e-7 is 6.28 with 31 degrees of freedom, 5 in the limit."""
    assert 5 * widened(32) == pytest.approx(6.28, abs=0.05)
    assert widened(10**6) == pytest.approx(1, abs=1e-4)
