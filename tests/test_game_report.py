"""What a report says of a comparison: every figure of its files, and nothing they could inject."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_report import Page, edit, make_run, png_size

from nelbo import figures, gamefigures, remake, report, shown, wording
from nelbo.errors import InputRefused
from nelbo.estimate import Estimate, at_most
from nelbo.runfiles import load
from nelbo.sandwich import Reference, Sandwich

LEVELS = (6.0, 3.0, 0.0, -3.0)
SIDES = {"wide": figures.WIDE, "narrow": figures.NARROW}


def certificate(lower: float, **more: Any) -> dict[str, Any]:
    sentence = f"JSD >= {lower:.4f} nats with 95 % confidence (5,000 pairs)"
    return {
        "jsd_nats_lower": lower, "jsd_bits_lower": lower / math.log(2), "level": 0.95,
        "alpha": 0.05, "n_pairs": 5000, "plugin": lower + 0.009, "plugin_se": 0.004,
        "log_e_value": 1103.2, "clip": 2.5, "temperature": 0.93, "offset": -0.01,
        "classifier": "mlp-2x128", "classifier_hash": "a1f3" * 16, "channel": None, "looks": 1,
        "seed": 0, "split_hash": "77aa" * 16, "mode": "split", "sentence": sentence, **more,
    }  # fmt: skip


def comparison(family: str, sandwich: Sandwich | None) -> dict[str, Any]:
    rungs = [
        {"logsnr": level, "certificate": certificate(0.08 * k, alpha=0.0125), "exact": 0.09 * k}
        for k, level in zip((4, 3, 1, 0), LEVELS, strict=True)
    ]
    rungs[1]["exact"] = None
    scores = [("kid", 0.0123, 0.0002, "lower"), ("coverage", 0.871, 0.953, "higher"),
              ("sliced_w2_squared", 0.0412, 0.0021, "lower")]  # fmt: skip
    rows = [
        {"name": name, "fake": {"mean": a, "sd": a / 9}, "real": {"mean": b, "sd": b / 9},
         "better": better}
        for name, a, b, better in scores
    ]  # fmt: skip
    return {
        "schema": 1,
        "real": {"name": "ring, test part"},
        "fake": {"name": "this run", "kind": "run", "family": family, "step": 3000},
        "certificate": certificate(0.1014),
        "ladder": rungs,
        "sandwich": sandwich and sandwich.as_json(),
        "metrics": {"features": {"name": "raw", "hash": "beef" * 16, "dims": 2}, "n": 500,
                    "rows": rows, "skipped": {"fid": "n <= d"}},
        "modes": {"found": 7, "of": 8, "high_quality": 0.953, "reverse_kl_nats": 0.0123,
                  "rule": "Within 3 sd of the nearest mode."},
    }  # fmt: skip


def witness(levels: int | None) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    logits = {name: rng.normal(size=50) for name in ("logits_real", "logits_fake")}
    if levels is None:
        x, y = np.linspace(-2, 2, 41), np.linspace(-2, 2, 31)
        learned = 1 / (1 + np.exp(-4 * (np.hypot(x[None], y[:, None]) - 1)))
        best = 1 / (1 + np.exp(-6 * (np.hypot(x[None], y[:, None]) - 1.1)))
        plane = {"witness_x": x, "witness_y": y}
        return logits | plane | {"witness_learned": learned, "witness_optimal": best}
    rows = rng.integers(0, levels, (2, 8, 1, 8, 8)).astype(np.uint8)
    return logits | {
        "witness_most": rows[0],
        "witness_least": rows[1],
        "witness_most_logits": np.linspace(3, 2, 8),
        "witness_least_logits": np.linspace(-9, -5, 8),
    }


def add_comparison(path: Path, document: dict[str, Any], levels: int | None, name: str) -> None:
    (path / "compare").mkdir(exist_ok=True)
    (path / f"compare/{name}.json").write_text(json.dumps(document))
    np.savez(path / f"compare/{name}.npz", **witness(levels))


def make_game(path: Path, kind: str = "ring", levels: int | None = None) -> Path:
    """The directory of a finished game with everything that can be measured of it."""
    make_run(path, kind, (2,) if levels is None else (1, 8, 8), levels)
    for file in (path / "evaluation").iterdir():
        file.unlink()
    (path / "samples/strip.npz").unlink()
    edit(path / "recipe.json", family="game")
    rng, lines = np.random.default_rng(0), []
    for step in range(10, 3001, 10):
        jsd = 0.02 + 0.4 * math.exp(-step / 500) + 0.02 * rng.normal()
        lines.append({"step": step, "loss": 0.7, "jsd_plugin": jsd, "grad_norm": 0.1})
        if step % 500 == 0:
            lines.append({"step": step, "sliced_wasserstein": 0.1, "jsd_nats_lower": 0.9 * jsd})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (path / "metrics.jsonl").write_text(text)
    add_comparison(path, comparison("game", None), levels, "data")
    return path


HELD = Sandwich(
    0.0414, 0.95, Estimate(0.61, 0.013, 0.001, 4000), 0.4195, 1e-9,
    Reference(0.052, 0.0007, "blurred by N(0, 0.05² I)", blurred=True),
)  # fmt: skip


def make_held(path: Path) -> Path:
    """A diffusion run on a toy, compared with its data."""
    make_run(path, "swissroll", (2,), None)
    add_comparison(path, comparison("diffusion", HELD), None, "data")
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("games")
    return {
        "ring": make_game(root / "ring"),
        "digits": make_game(root / "digits", "digits", 17),
        "held": make_held(root / "held"),
    }


@pytest.fixture(scope="module")
def pages(runs: dict[str, Path]) -> dict[str, Page]:
    return {name: Page(report.write(path)) for name, path in runs.items()}


def flat(page: Page) -> str:
    return " ".join(page.text.split())


def test_a_game_has_no_bound_and_is_asked_for_none(pages: dict[str, Page]) -> None:
    for name in ("ring", "digits"):
        text = flat(pages[name])
        assert "A generator has no likelihood" in text and "What can be measured of it" in text
        assert (
            "nelbo evaluate" not in text
            and "no trajectory" not in text
            and "has not been measured" not in text
        )
        assert "nelbo compare data" in text
    assert "A generator has no likelihood" not in flat(pages["held"])


def test_every_figure_of_the_certificate_stands_on_the_page(pages: dict[str, Page]) -> None:
    for name in ("ring", "digits", "held"):
        text = flat(pages[name])
        for words in (
            "JSD >= 0.1014 nats with 95 % confidence (5,000 pairs)",
            "JSD ≥ 0.1014 nats (0.1462 bits) with 95 % confidence",
            "0.1104 ± 0.0040 nats",
            "1103.20 nats; equal laws are rejected from 3.00 on",
            "5000, held out",
            "clip 2.5, temperature 0.930, offset −0.010",
            "a1f3" * 16,
            "77aa" * 16,
            "none: the stored values themselves",
            "All 4 bounds hold together with 95 % confidence",
            "0.0123 ± 0.00140.000200 ± 0.000022lower",
            "sliced w2 squared",
            "No fid: n <= d.",
            "beef" * 16,
            "7 of 8 modes found; 95.3 % of the samples",
            "Within 3 sd of the nearest mode.",
        ):
            assert words in text, words
    assert "≥ 0.101" in flat(pages["ring"]) and "good" not in flat(pages["ring"]).lower()


def test_the_sandwich_stands_on_the_page_of_a_model_with_a_bound(pages: dict[str, Page]) -> None:
    text = flat(pages["held"])
    for words in (
        "Told apart from the data",
        "≥ 0.0414",
        "0.0520 ± 0.0007",
        "bound of this model0.610 ± 0.013",
        "entropy H of the data0.4195",
        f"so H ≤ bound − κ≤ {0.61 - HELD.kappa:.3f} ± 0.013",
        f"holds: 0.0414 <= {at_most(HELD.upper or 0)} nats",
    ):
        assert words in text, words
    assert "φ(exp" not in flat(pages["ring"])


def test_pages_are_whole_and_ask_for_nothing(pages: dict[str, Page]) -> None:
    for page in pages.values():
        assert not {"script", "iframe", "object", "form"} & {tag for tag, _ in page.tags}
        assert "http://" not in page.source and "https://" not in page.source
        for tag, attrs in page.tags:
            assert not any(key.startswith("on") or key == "style" for key in attrs)
            assert tag != "img" or attrs["alt"]


def test_pictures_lie_beside_the_page(runs: dict[str, Path], pages: dict[str, Page]) -> None:
    own = {"ring": "witness", "digits": "convincing"}
    for name, witnessed in own.items():
        names = {"ladder", "learning", "real", "samples", witnessed}
        assert {file.stem for file in (runs[name] / "report").iterdir()} == names
        for drawn in names - {"real", "samples"}:
            wide = round(figures.WIDE * figures.DPI)
            assert png_size(runs[name] / f"report/{drawn}.png")[0] == wide
    assert (runs["held"] / "report/sandwich.png").is_file()


def test_same_files_give_the_same_page(runs: dict[str, Path], pages: dict[str, Page]) -> None:
    assert report.write(runs["ring"]).read_text() == pages["ring"].source


def test_hostile_text_in_a_comparison_is_text(tmp_path: Path, pages: dict[str, Page]) -> None:
    evil = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>{{ 7 * 7 }}&$\\frac{$"
    path = make_game(tmp_path / "x")
    document = comparison("game", None)
    document["certificate"] |= dict.fromkeys(
        ("sentence", "classifier", "classifier_hash", "channel", "split_hash", "mode"), evil
    )
    document["real"]["name"] = document["fake"]["name"] = evil
    document["metrics"]["rows"][0]["name"] = document["metrics"]["features"]["name"] = evil
    document["metrics"]["skipped"] = {evil: evil}
    document["modes"]["rule"] = evil
    add_comparison(path, document, None, "data")
    page = Page(report.write(path))
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in pages["ring"].tags]
    assert page.text.count(evil) >= 12


def test_a_bug_of_the_sandwich_is_marked(tmp_path: Path) -> None:
    path = make_game(tmp_path / "run")
    broken = Sandwich(0.3, 0.95, Estimate(0.45, 0.013, 0.001, 4000), 0.4195)
    add_comparison(path, comparison("game", broken), None, "data")
    page = Page(report.write(path))
    assert "a bug: JSD >= 0.3000 and JSD <= " in flat(page)
    assert ("p", {"class": "message"}) in page.tags


def test_the_comparison_that_counts(tmp_path: Path) -> None:
    path = make_game(tmp_path / "run")
    for name, step in (("early", 100), ("late", 4000), ("middle", 2000)):
        document = comparison("game", None)
        document["fake"]["step"] = step
        add_comparison(path, document, None, name)
    assert load(path).comparison["fake"]["step"] == 4000
    (path / "compare/late.json").write_text('{"fake": {"step": 5000}}')
    with pytest.raises(InputRefused, match=r"late\.json: lacks real, certificate"):
        load(path)


def test_parts_may_be_missing_and_unknown(tmp_path: Path) -> None:
    path = make_game(tmp_path / "run")
    document = comparison("game", None)
    for part in ("ladder", "metrics", "modes"):
        document[part] = None
    document["certificate"] |= {"jsd_nats_lower": 0.0, "plugin_se": None, "log_e_value": None,
                                "sentence": "no difference certified"}  # fmt: skip
    (path / "compare/data.json").write_text(json.dumps(document))
    (path / "compare/data.npz").unlink()
    (path / "metrics.jsonl").unlink()
    page = Page(report.write(path))
    text = flat(page)
    assert "no difference certified." in text and "± ? nats" in text
    assert not any(attrs.get("class") == "headline" for _, attrs in page.tags)
    assert {file.stem for file in (path / "report").iterdir()} == {"real", "samples"}
    del document["certificate"]["classifier"]
    (path / "compare/data.json").write_text(json.dumps(document))
    with pytest.raises(InputRefused, match="classifier"):
        report.write(path)
    (path / "compare/data.json").unlink()
    assert "certifies how far samples and data are apart" in flat(Page(report.write(path)))


def test_commands_of_a_game(tmp_path: Path) -> None:
    path = make_game(tmp_path / "run 1")
    commands = remake.commands(load(path))
    assert f"nelbo compare data '{path}'" in commands
    assert not any(line.startswith("nelbo evaluate") for line in commands)
    bound = remake.commands(load(make_run(tmp_path / "b")))
    assert not any("compare" in line for line in bound)


# --- figures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", SIDES.values(), ids=SIDES)
def test_figures_show_what_they_are_given(width: float) -> None:
    x, lower = [6.0, 0.0, -6.0], [0.4, 0.1, 0.0]
    nothing, known = [math.nan] * 3, [0.45, math.nan, 0.01]
    pictures = [
        gamefigures.ladder(x, lower, nothing, width),
        gamefigures.ladder(x, lower, known, width),
        gamefigures.ladder(x, [0.0] * 3, nothing, width),
        gamefigures.sandwich(0.1, ("exact", None), None, width),
        gamefigures.sandwich(0.1, ("exact", 0.2), None, width),
        gamefigures.sandwich(0.1, ("exact", 0.2), 0.3, width),
        gamefigures.sandwich(0.1, ("blurred", 0.2), 0.3, width),
        gamefigures.sandwich(0.0, ("exact", 0.2), 0.3, width),
        gamefigures.learning(np.array([[1.0, 0.6], [2, 0.3]]), np.empty((0, 2)), width),
        gamefigures.learning(np.empty((0, 2)), np.array([[1.0, 0.6], [2, 0.3]]), width),
    ]
    assert len(set(pictures)) == len(pictures)
    reverse = gamefigures.ladder(x[::-1], lower[::-1], nothing, width)
    assert reverse == pictures[0]


@pytest.mark.parametrize("width", SIDES.values(), ids=SIDES)
def test_a_witness_may_have_no_contour_and_no_points(width: float) -> None:
    axis, empty = np.linspace(0, 1, 5), np.empty((0, 2))
    plane = np.full((5, 5), 0.5)
    alone = gamefigures.witness(axis, axis, plane, None, (empty, empty), width)
    beside = gamefigures.witness(axis, axis, plane, plane, (empty, empty), width)
    assert alone != beside


def test_half_of_the_samples_on_a_phone_start_a_new_row() -> None:
    images = np.zeros((8, 1, 8, 8))
    logits = np.arange(8.0), -np.arange(8.0)
    sizes = {}
    for name, width in SIDES.items():
        png = gamefigures.convincing(images, images, logits, None, width)
        sizes[name] = shown.Picture(png).pixels
    assert sizes["wide"][0] / sizes["wide"][1] > 2.2
    assert sizes["narrow"][0] / sizes["narrow"][1] < 1.2


def test_words_of_divergences() -> None:
    assert [wording.nats(x) for x in (0.10144, -0.00001, -0.5, None, math.inf)] == [
        "0.1014", "0.0000", "−0.5000", "?", "?",
    ]  # fmt: skip
    assert wording.spread({"mean": 0.0123, "sd": 0.0045}) == "0.0123 ± 0.0045"
