"""The page of the derivation: it says what the chain computes, whole, and loads nothing."""

from __future__ import annotations

import dataclasses
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from derived import everything

from nelbo import cli
from nelbo.derivation import chain, curves, drawings, page
from nelbo.derivation.identity import Line, Result, Side
from nelbo.derivation.models import affine
from nelbo.figures import NARROW, WIDE
from nelbo.shown import Picture

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "derivation.md"
NUMBER = r"[-−]?\d+(?:\.\d+)?(?:e[-+]\d+)?"
DRAWN = re.compile(r"the (?:worst|tightest) of|±")
"""Which place is worst, and what is drawn, may differ in rounding between machines."""


# --- the document cannot drift -------------------------------------------------------------------


def bare(text: str) -> str:
    """The text without numbers and without the room that they take."""
    return re.sub(r"\s+", " ", re.sub(rf"{NUMBER}(?: ± {NUMBER})?", "#", text))


def exact_figures(text: str) -> list[float]:
    """The figures of all blocks in which nothing is drawn and no place is the worst one."""
    found = []
    for block in re.findall(r"^```\n(.*?)^```$", text, re.M | re.S):
        if not DRAWN.search(block):
            found += [float(x) for x in re.findall(rf" {{2,}}({NUMBER})$", block, re.M)]
    return found


def same(a: str, b: str) -> bool:
    """Whether two versions say the same, and have the same exact figures."""
    one, two = exact_figures(a), exact_figures(b)
    return bare(a) == bare(b) and one == pytest.approx(two, rel=1e-4, abs=1e-8)


def test_the_document_is_what_the_chain_computes() -> None:
    """Regenerate it with `nelbo derive --page docs` where this fails."""
    written, now = DOCUMENT.read_text(), page.markdown(*everything())
    assert len(exact_figures(now)) > 30
    assert same(written, now)
    figures = exact_figures(now)
    assert not same(written, now.replace(f"{figures[0]:g}", f"{figures[0] + 1:g}"))
    assert not same(written, now.replace("Jensen", "Jansen"))


def test_every_identity_has_its_row_and_its_test() -> None:
    text = page.markdown(*everything())
    rows = dict(re.findall(r"^\| (I\d+) \| (.*) \|$", text, re.M))
    assert list(rows) and set(rows) == {f"I{i}" for i in range(1, 66)}
    for one in chain.IDENTITIES:
        cells = re.split(r"(?<!\\) \| ", rows[one.id])
        assert len(cells) == 4 and cells[3], one.id
        (test,) = re.findall(r"\.\./tests/(test_\w+\.py)", cells[2])
        module = type(one).__module__.rsplit(".", 1)[1]
        assert module in (ROOT / "tests" / test).read_text(), (test, module)
    assert not set(chain.LATER) & {one.id for one in chain.IDENTITIES}


def test_every_step_from_the_likelihood_to_l_simple_and_from_the_game_to_jsd_is_told() -> None:
    told = re.findall(r"^### (I\d+)\. ", page.markdown(*everything()), re.M)
    assert told[:17] == [f"I{i}" for i in range(1, 18)]
    assert set(told) >= {f"I{i}" for i in (*range(18, 37), *range(26, 34))}


def test_every_common_error_is_listed_once() -> None:
    listed = re.findall(r"^- \*\*(E\d+)\*\*", page.markdown(*everything()), re.M)
    assert sorted(listed, key=lambda e: int(e[1:])) == [f"E{i}" for i in range(1, 50)]


def test_no_formula_has_a_macro_that_github_refuses() -> None:
    formulas = [one.latex for one in chain.IDENTITIES]
    refused = re.compile(r"\\(?:operatorname|mbox|phantom|def|newcommand)\b")
    assert refused.search(r"\operatorname{tr}")
    assert not [latex for latex in formulas if refused.search(latex)]


def test_the_document_cites_papers_and_no_file() -> None:
    text = page.markdown(*everything())
    assert ".txt" not in text and "MATH.md" not in text
    assert "common lecture notes" in text


# --- HTML ----------------------------------------------------------------------------------------


class Tags(HTMLParser):
    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words += data


@pytest.fixture(scope="module")
def drawn() -> dict[str, Picture]:
    return page.pictures()


def test_the_html_page_is_whole_and_asks_for_nothing(drawn: dict[str, Picture]) -> None:
    results, wrong = everything()
    source = page.as_html(results, wrong, drawn)
    found = Tags(source)
    assert not {"script", "iframe", "object", "form", "a"} & {tag for tag, _ in found.tags}
    for tag, attrs in found.tags:
        assert not any(key.startswith("on") or key == "style" for key in attrs)
        for key in ("src", "srcset", "href"):
            assert (attrs.get(key) or "data:").startswith("data:"), tag
        assert tag != "img" or attrs["alt"]
    assert sum(tag == "img" for tag, _ in found.tags) == len(drawn) == 4
    assert "http://" not in source and "https://" not in source and "url(" not in source
    for one in chain.IDENTITIES:
        assert one.title in found.words and one.text in found.words, one.id
    assert 'class="agree"' in source and 'class="disagree"' not in source


def test_a_disagreement_is_shown(drawn: dict[str, Picture]) -> None:
    results, _ = everything()
    line = Line("Gaussian", (Side("one way", 1.0), Side("another way", 2.0)))
    bad = dataclasses.replace(results[0], lines=(line,))
    source = page.as_html([bad], (), drawn)
    assert '<span class="disagree">disagree</span>' in source and "another way" in source
    assert "DISAGREE" in page.markdown([bad], ())


def test_a_run_has_a_page_with_its_own_figures(
    tmp_path: Path, drawn: dict[str, Picture], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "pictures", lambda: drawn)
    run = tmp_path / "<b>my run"
    run.mkdir()
    line = Line("swissroll", (Side("a side", 1.25, 0.5), Side("another", 1.5)), note="drawn")
    one = next(i for i in chain.IDENTITIES if i.id == "I7")
    said = "<b>my run, step 7 of <swissroll>; 3 of its 9 latents"
    skipped = {"I14": "its decoder is another"}
    written = page.write_beside([Result(one, (line,), 0.0)], run, said, skipped)
    source = written.read_text()
    assert written == run / "derivation.html" and "<b>my run" not in source
    words = Tags(source).words
    assert "<b>my run" in words and "swissroll, drawn" in words and "1.25 ± 0.50" in words
    assert "Not computed on this run" in words and "Common errors" not in words
    assert said in words and "Not computed on this run (its decoder is another)" in words
    assert "one by one" in words and "trajectories of two bits" not in words
    assert "nelbo derive RUN telescoping" in words and "nelbo derive jensen" in words


def test_everything_is_written_into_a_folder(
    tmp_path: Path, drawn: dict[str, Picture], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "pictures", lambda: drawn)
    results, wrong = everything()
    assert page.write(results[:3], wrong[:1], tmp_path / "new") == tmp_path / "new/derivation.html"
    names = {path.name for path in (tmp_path / "new").iterdir()}
    assert names == {"derivation.html", "derivation.md"} | {f"derivation-{n}.png" for n in drawn}
    shown = re.findall(
        r"\]\((derivation-\w+\.png)\)", (tmp_path / "new/derivation.md").read_text()
    )
    assert set(shown) == names - {"derivation.html", "derivation.md"}


def test_the_command_writes_the_page(
    tmp_path: Path,
    drawn: dict[str, Picture],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(page, "pictures", lambda: drawn)
    monkeypatch.setattr(chain, "IDENTITIES", chain.IDENTITIES[:2])
    monkeypatch.setattr(chain, "ERRATA", ())
    assert cli.main(["derive", "--page", str(tmp_path), "--quiet"]) == 0
    assert f"page: {tmp_path / 'derivation.html'}" in capsys.readouterr().out
    assert "I1" in (tmp_path / "derivation.md").read_text()
    for more in (["gap"], ["--errata"]):
        assert cli.main(["derive", *more, "--page", str(tmp_path)]) == 2


# --- the numbers behind the pictures -------------------------------------------------------------


def test_the_stairs_are_the_bound_and_lie_above_the_likelihood() -> None:
    found, setting = curves.telescope(), affine()
    total = setting.average(setting.bound().total)
    assert float(found.terms.sum()) == pytest.approx(total, abs=1e-12)
    assert found.likelihood < total and len(found.marginals) == len(found.terms) - 1


def test_the_density_of_nats_ends_at_half_a_nat_per_dimension() -> None:
    found = curves.density()
    assert 0.95 < float(found.continuous[0]) < 1.0  # d/2 = 1 for a density, from below
    assert float(found.continuous[-1]) < 0.005
    widths = found.edges[:-1] - found.edges[1:]
    whole = torch.trapezoid(found.continuous.flip(0), found.logsnr.flip(0))
    chain_sum = float((found.chain * widths).sum())
    assert float(whole) < chain_sum < 1.4 * float(whole)


def test_divergence_and_squared_error_share_a_mean_and_no_deviation() -> None:
    found = curves.errors()
    middle = len(found.means) // 2
    assert [int(kl.argmin()) for kl in found.kl_mean] == [middle] * 3
    assert [int(square.argmin()) for square in found.square_mean] == [middle] * 3
    best = float(found.deviations[found.kl_deviation.argmin()])
    assert best == pytest.approx(math.sqrt(1 + found.off**2), abs=0.02)
    assert int(found.square_deviation.argmin()) == 0


def test_what_is_paid_adds_up_to_jsd() -> None:
    found = curves.duel()
    assert float(torch.trapezoid(found.paid, found.x)) == pytest.approx(found.jsd, abs=1e-4)
    other = float(torch.trapezoid(found.paid_other, found.x))
    assert other == pytest.approx(found.reached, abs=1e-4)
    assert found.reached < found.jsd and bool((found.paid >= 0).all())
    torch.testing.assert_close(found.best, found.p / (found.p + found.g))


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_pictures_have_the_width_of_their_page(width: float) -> None:
    png = drawings.duel(curves.duel(), width)
    assert png[:4] == b"\x89PNG" and int.from_bytes(png[16:20], "big") == round(200 * width)
