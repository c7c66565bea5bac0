"""The one command that fills the table: pieces, what is done already, and figures from files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import filled  # noqa: E402
import table  # noqa: E402
from marked import between  # noqa: E402

PAGE = "a\n<!-- cpu table -->\nold\n<!-- end of cpu table -->\nb\n"


def row(
    work: str, project: str, tuning: str, rates: list[float], failed: str | None = None
) -> Any:
    return {
        "work": work, "project": project, "tuning": tuning, "rates": rates,
        "processor_rates": rates, "failed": failed, "share_of_ceiling": 0.25,
        "peak_bytes": 3 * 2**30,
    }  # fmt: skip


def ratio(work: str, ours: str, peer: str, median: float) -> Any:
    found = {"median": median, "least": median - 0.1, "most": median + 0.1}
    return {"work": work, "nelbo": ours, "peer": peer, "rates": found, "processor": found}


def document() -> dict[str, Any]:
    machine = {"gpu": "H", "torch": "2", "commit": "abc", "date": "D", "load": [0.5],
               "threads": 1, "ceiling_of": "a product", "ceiling_tflops": 780.0}  # fmt: skip
    rows = [
        row("training", "nelbo", "as shipped", [100.0, 110.0, 90.0]),
        row("training", "nelbo", "tuned", [7000.0, 8100.0, 8000.0]),
        row("training", "peer", "as shipped", [1000.0]),
        row("training", "peer", "tuned", [5000.0]),
        row("training", "slow", "tuned", [], "RuntimeError: no"),
    ]
    ratios = [ratio("training", "tuned", "peer, tuned", 1.6),
              ratio("training", "tuned", "peer, as shipped", 8.0)]  # fmt: skip
    share = {"what": "of an update, the network", "project": "nelbo", "tuning": "tuned"}
    shares = [share | {k: {"median": 0.95, "least": 0.9, "most": 1.0}
                       for k in ("rates", "processor")}]  # fmt: skip
    piece = {"work": "training", "setting": {"name": "big", "batch": 256}, "machine": machine,
             "projects": ["nelbo", "peer"], "absent": {"gone": "not installed"}, "rows": rows,
             "ratios": ratios, "shares": shares}  # fmt: skip
    start = {"work": "first update", "setting": piece["setting"], "machine": machine,
             "projects": ["nelbo"], "seconds": {
                 "nelbo, tuned": {"clock": [60.0], "processor": [70.0], "failed": None},
                 "peer, tuned": {"clock": [80.0], "processor": [90.0], "failed": None},
             }}  # fmt: skip
    return {"schema": 2, "pieces": [piece, start]}


def test_the_table_is_that_of_the_file() -> None:
    total = {"mean": 3.0999, "se": 0.006, "n": 10_000}
    bits = {"measured": {"sixteen calls per image": {"document": {"terms": {"total": total}}}},
            "run": {"times": {"seconds_of_updates": 270.4, "seconds_before": 61.0}}}  # fmt: skip
    parts = {"network alone": {"median": 18.0}, "update, one graph": {"median": 20.0},
             "update, at once": {"failed": "no"}}  # fmt: skip
    read = {"speed": document(), "cifar10-270": bits, "overheads": {"milliseconds": parts}}
    lines = filled.gpu_table(read).splitlines()
    assert any("update, one graph 10.0%. Aim" in line for line in lines)
    assert "| | nelbo as shipped | nelbo tuned | best peer | ratio | aim |" in lines
    training = "| 100 | 8,000 | 5,000 (peer, tuned) | **1.60** (1.50-1.70) | 8,000; 1.4 |"
    assert f"| training, images/s {training}" in lines
    assert "| share of the ceiling | 25% | 25% | 25% | |  |" in lines
    assert "| of an update, the network |  | 0.950 (0.900-1.000) | | | 0.9 |" in lines
    assert "| first update, s |  | 60.0 | 80.0 (peer) | | |" in lines
    assert "| peer | **1.60** (1.50-1.70) tuned over tuned |  |  |" in lines
    assert "- gone: absent, not installed" in lines
    assert "- slow, tuned: training fails (RuntimeError: no)" in lines
    assert any(line.startswith("CIFAR-10 after 270 s of updates (61 s before") for line in lines)
    assert any("**3.100 ± 0.006** bits/dim, 10000" in line for line in lines)


def test_without_figures_there_is_no_table() -> None:
    assert filled.gpu_table({}) == filled.cpu_table({}) == filled.NOTHING


def test_pieces_are_done_once_and_failures_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    count = tmp_path / "count"
    adds = f"open({str(count)!r}, 'a').write('x')"
    every = [
        table.Piece("good", ("-c", adds), 60),
        table.Piece("bad", ("-c", f"{adds}; raise SystemExit(3)"), 60),
        table.Piece("slow", ("-c", "import time; time.sleep(60)"), 0.5),
        table.Piece("absent", ("-c", adds), 60, tmp_path / "nothing.py"),
        table.Piece("long", ("-c", adds), 1000),
    ]
    monkeypatch.setattr(table, "pieces", lambda *rest: every)
    monkeypatch.setattr(table.torch.cuda, "is_available", lambda: False)
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    given = ["--folder", str(tmp_path / "found"), "--page", str(page), "--budget", "900"]
    table.main(given)
    found = json.loads((tmp_path / "found/done.json").read_text())
    outcomes = {name: one["outcome"] for name, one in found.items()}
    assert outcomes == {"good": "done", "bad": "failed", "slow": "not within 0.5 s"}
    said = capsys.readouterr().err
    assert "skipped: absent (there is no nothing.py)" in said
    assert "left for another time: long" in said
    table.main(given)
    assert count.read_text() == "xxx"  # the good one once, the bad one twice
    assert "not measured yet" in page.read_text() and page.read_text().startswith("a\n")


def test_every_piece_ends_within_nine_minutes() -> None:
    for gpu in (False, True):
        found = table.pieces(gpu, Path("x"), Path("improved"), Path("cifar"))
        assert all(0 < piece.limit <= 540 for piece in found)
        assert len({piece.name for piece in found}) == len(found)
        scripts = [Path(p.words[0]) for p in found if p.words[0].endswith(".py")]
        own = {s.name for s in scripts} - {"normalisation.py", "overheads.py"}
        assert all((table.HERE / name).is_file() for name in own)


def test_marks_must_be_there_once() -> None:
    assert between(PAGE, "cpu table", " new\n") == PAGE.replace("old", "new")
    with pytest.raises(ValueError, match="needs the marks"):
        between(PAGE + PAGE, "cpu table", "new")
