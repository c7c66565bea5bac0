"""The panel: equal n, a floor of real against real, and samplers that are off are named."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nelbo.companions import panel
from nelbo.errors import InputRefused, NumericalFailure
from nelbo.extractors import Features, Inputs, standardized
from nelbo.panels import BETTER, Spread
from nelbo.randomness import generator

PERMUTATIONS = 39


def law(n: int, generator: torch.Generator | None = None) -> Tensor:
    """Two modes in three dimensions."""
    x = torch.randn(n, 3, dtype=torch.float64, generator=generator)
    return x + 8 * torch.randint(0, 2, (n, 1), generator=generator)


def rows(n: int, purpose: str) -> Tensor:
    return law(n, generator(0, "test companions", purpose))


REAL, TRAINING = rows(400, "real"), rows(300, "training")
EXTRACTOR = standardized(rows(200, "fit"))


def scored(fakes, **options):  # type: ignore[no-untyped-def]
    chosen = {"training": TRAINING, "permutations": PERMUTATIONS, **options}
    return panel(REAL, fakes, EXTRACTOR, **chosen)


def test_the_law_itself_scores_like_real_against_real() -> None:
    """Six deviations of a single figure: both rows are means of five."""
    found = scored(law)
    assert [row.name for row in found.rows] == list(BETTER) and not found.skipped
    for row in found.rows:
        assert abs(row.fake.mean - row.real.mean) < 6 * max(row.fake.sd, row.real.sd, 0.01), row
    assert found.n == 200 and found.seeds == 5


def collapsed(n: int) -> Tensor:
    return torch.randn(n, 3, dtype=torch.float64)


def copied(n: int) -> Tensor:
    return TRAINING[torch.randperm(300)[:n]] + 1e-3 * torch.randn(n, 3, dtype=torch.float64)


def shifted(n: int) -> Tensor:
    return law(n) + 3


@pytest.mark.parametrize(
    ("sampler", "moved", "still"),
    [
        (collapsed, {"kid", "fid", "recall", "coverage", "sliced_w2_squared", "mmd2"}, set()),
        (copied, {"training_distance_ratio"}, {"kid", "fid", "recall", "coverage"}),
        (shifted, {"kid", "fid", "density", "sliced_w2_squared", "mmd2"}, set()),
    ],
)
def test_faults_show_where_they_should(sampler, moved: set[str], still: set[str]) -> None:  # type: ignore[no-untyped-def]
    found = scored(sampler)
    for name in moved | still:
        row = found.row(name)
        side = {"lower": -1.0, "higher": 1.0, "near 1": 0.0}[row.better]
        worse = side * (row.real.mean - row.fake.mean)
        worse = worse if side else abs(row.fake.mean - 1)
        seen = worse > 3 * max(row.fake.sd, row.real.sd) + 0.01
        assert seen == (name in moved), row
    assert (found.row("mmd_p").fake.mean < 0.05) == (sampler is not copied)


def test_the_same_seed_gives_the_same_panel_and_leaves_the_generators_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one, again, other = scored(law), scored(law), scored(law, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert one == again != other


def test_an_array_gives_subsets_and_says_what_its_spread_is() -> None:
    stock = law(150, generator(0, "stock"))
    found = scored(stock.numpy())
    assert found.n == 150 and "the same 150" in found.spread
    part = scored(stock, n=60)
    assert part.n == 60 and "understated" in part.spread and "150 generated" in part.text()
    assert "fresh sample" in scored(law, n=20, seeds=2).spread


def test_json_and_text() -> None:
    found = scored(law, training=None, n=50, seeds=2)
    document = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert document["features"] == EXTRACTOR.as_json() and document["n"] == 50
    assert {row["name"]: row["better"] for row in document["rows"]} == {
        name: better for name, better in BETTER.items() if name != "training_distance_ratio"
    }
    assert set(document["rows"][0]["fake"]) == {"mean", "sd"}
    text = found.text()
    assert max(map(len, text.splitlines())) <= 80
    assert "n = 50 on both sides" in text and EXTRACTOR.hash[:16] in text
    assert "training_distance_ratio: not computed" in text


def test_spreads_show_two_digits_of_the_deviation_and_no_minus_zero() -> None:
    assert str(Spread.of([1.0, 1.0])) == "1 ± 0"
    assert str(Spread(-0.00001, 0.0123)) == "0.000 ± 0.012"
    assert str(Spread(123.4, 45.6)) == "123 ± 46"
    assert Spread.of([1.0, 3.0]).sd == pytest.approx(math.sqrt(2))


def test_fid_is_left_out_with_a_reason_where_n_is_at_most_the_dimensions() -> None:
    wide = torch.randn(40, 30, dtype=torch.float64, generator=generator(0, "wide"))
    found = panel(wide, wide.flip(0), standardized(wide), seeds=2, permutations=9)
    assert found.n == 20 and "take n > 30" in found.skipped["fid"]
    with pytest.raises(KeyError):
        found.row("fid")


def test_unseen_rows_that_are_training_rows_leave_no_ratio() -> None:
    found = scored(law, training=REAL, n=20, seeds=2)
    assert "no denominator" in found.skipped["training_distance_ratio"]


def raises(n: int) -> Tensor:
    raise RuntimeError("out of order")


def refuses(n: int) -> Tensor:
    raise NumericalFailure("samples hold NaN")


@pytest.mark.parametrize(
    ("sampler", "words"),
    [
        (raises, "sampler raised RuntimeError: out of order"),
        (lambda n: law(n)[:-1], r"returned \(49, 3\), asked for \(50, 3\)"),
        (lambda n: law(n)[:, :2], r"returned \(50, 2\)"),
        (lambda n: rows(n, "fixed"), "repeats itself"),
        (lambda n: law(n).tolist(), "list"),
        (lambda n: torch.full((n, 3), math.nan), "NaN"),
        (lambda n: torch.zeros(n, 3, dtype=torch.uint8), "real vectors"),
    ],
)
def test_samplers_that_are_off_are_named(sampler, words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputRefused, match=words):
        scored(sampler, n=50, seeds=2)


def test_failures_of_the_model_keep_their_kind() -> None:
    with pytest.raises(NumericalFailure, match="samples hold NaN"):
        scored(refuses, n=50)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"n": 201}, "can be 6 to 200"), ({"n": 5}, "can be 6"), ({"seeds": 1}, "at least two")],
)
def test_sizes_are_checked(options: dict[str, int], words: str) -> None:
    with pytest.raises(InputRefused, match=words):
        scored(law, **options)


def test_float_samples_against_levels_are_refused() -> None:
    levels = np.random.default_rng(0).integers(0, 17, (40, 1, 4, 4)).astype(np.uint8)
    extractor = Features("flat", Inputs((1, 4, 4), 17), nn.Flatten())
    with pytest.raises(InputRefused, match="same type and range"):
        panel(levels, levels.astype(np.float32), extractor)
