"""What a report reads of a run directory.

    recipe.json, status.json, environment.json    what was asked for, how it went, where
    metrics.jsonl                                 training losses and validation bounds by step
    evaluation/test*.json and .npz                the bound of the test part, and of each example
    evaluation/progressive-test*.json             rate and distortion of progressive coding
    evaluation/steps-*.json, ode-*.json           the table of short chains; the probability flow
    compare/*.json and .npz                       certificate, ladder, sandwich, other metrics
    samples/samples.npz, strip.npz                samples beside data, trajectories

Of several evaluations of the test part the one of the latest step counts, and among those the one
with most network calls; of several comparisons that of the latest step, and among those the one
written last. Only recipe.json must be there. A file that is there and cannot be
understood is refused by name: a report that leaves it out would tell less than the run does.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nelbo.errors import InputRefused
from nelbo.files import read_json

Array = NDArray[Any]
Json = dict[str, Any]
EVALUATION = ("data", "model", "terms", "calls_per_example")


@dataclass(frozen=True)
class Run:
    """The contents of a run directory; a part that is not there yet is empty."""

    path: Path
    recipe: Json
    status: Json
    environment: Json
    evaluation: Json
    measured: Path
    """The file that `evaluation` was read from."""
    per_example: dict[str, Array]
    samples: dict[str, Array]
    strip: dict[str, Array]
    progressive: Json
    chains: Json
    flow: Json
    training: Array
    """(m, 2) of step, loss in bits/dim."""
    validation: Array
    """(k, 3) of step, mean, se in bits/dim; nan where the se is unknown."""
    comparison: Json
    others: tuple[str, ...]
    """Names of the comparisons that are not shown."""
    witness: dict[str, Array]
    """What lies beside the comparison: logits, D over the plane, samples most like the data."""
    played: Array
    """(m, 2) of step, plug-in JSD of the training D in nats; of a game."""
    certified: Array
    """(k, 2) of step, certified JSD of the validation part in nats; of a game."""

    @property
    def game(self) -> bool:
        """It is a generator's run, which has no likelihood."""
        return self.recipe.get("family") == "game"

    @property
    def data(self) -> Json:
        """The record of the data, with what the evaluation knows of it."""
        known: Json = self.recipe.get("data", {}) | self.evaluation.get("data", {})
        return known


def load(path: Path) -> Run:
    """Read the files of a run directory.

    Raises:
        InputRefused: there is no recipe.json, or a file cannot be understood; it is named.
    """
    if not (path / "recipe.json").is_file():
        raise InputRefused(
            f"{path}: not a run directory (no recipe.json); `nelbo train RECIPE` makes one"
        )
    recipe = _json(path / "recipe.json", "recipe")
    records = list(_records(path / "metrics.jsonl"))
    compared = _last(path / "compare")
    measured = _measured(path / "evaluation")
    return Run(
        path=path,
        recipe=recipe,
        status=_json(path / "status.json", "state", "step", "steps"),
        environment=_json(path / "environment.json"),
        evaluation=_json(measured, *EVALUATION),
        measured=measured,
        per_example=_arrays(measured.with_suffix(".npz")),
        samples=_arrays(path / "samples" / "samples.npz", "samples"),
        strip=_arrays(path / "samples" / "strip.npz", "forward", "reverse", "logsnr"),
        progressive=_json(_curve(path / "evaluation"), "points", "rate", "distortion"),
        chains=_latest(path / "evaluation", "steps-*.json", "steps", "full", "continuous"),
        flow=_latest(path / "evaluation", "ode-*.json", "ode"),
        training=_column(records, "loss"),
        validation=_validations(records),
        comparison=_json(compared, "real", "fake", "certificate"),
        witness=_arrays(compared.with_suffix(".npz")),
        others=tuple(p.name for p in sorted(compared.parent.glob("*.json")) if p != compared),
        played=_column(records, "jsd_plugin"),
        certified=_column(records, "jsd_nats_lower"),
    )


def _last(folder: Path) -> Path:
    """The comparison that counts: latest step, then written last."""
    found = sorted(folder.glob("*.json"))
    return max(found, key=_rank_comparison, default=folder / "none.json")


def _rank_comparison(path: Path) -> tuple[int, int]:
    fake = _json(path, "fake")["fake"]
    return fake.get("step") or 0, path.stat().st_mtime_ns


def _measured(folder: Path) -> Path:
    """The evaluation of the whole test part that counts: latest step, most calls."""
    found = [path for path in sorted(folder.glob("test*.json")) if _whole(path)]
    return max(found, key=_rank, default=folder / "test.json")


def _curve(folder: Path) -> Path:
    """The rate-distortion curve of the test part that counts: latest step, most calls."""
    found = list(sorted(folder.glob("progressive-test-*.json")))
    return max(found, key=_rank_curve, default=folder / "progressive-test.json")


def _latest(folder: Path, pattern: str, *needed: str) -> Json:
    """Of the test part: the document of the latest step, and of these that of most examples."""
    found = [_json(path, "data", "model", *needed) for path in sorted(folder.glob(pattern))]
    found = [document for document in found if document["data"].get("split") == "test"]
    return max(found, key=lambda d: (d["model"].get("step", 0), d["data"]["n"]), default={})


def _rank_curve(path: Path) -> tuple[int, float]:
    document = _json(path, "model", "calls_per_example")
    return document["model"].get("step", 0), document["calls_per_example"]


def _whole(path: Path) -> bool:
    """test.json or test-*.json; test100-*.json is of the first hundred examples."""
    return path.stem == "test" or path.stem.startswith("test-")


def _rank(path: Path) -> tuple[int, float]:
    document = _json(path, *EVALUATION)
    return document["model"].get("step", 0), document["calls_per_example"]


def _json(path: Path, *needed: str) -> Json:
    if not path.is_file():
        return {}
    document: Json = read_json(path)
    _need(path, document, needed)
    return document


def _arrays(path: Path, *needed: str) -> dict[str, Array]:
    if not path.is_file():
        return {}
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise InputRefused(f"{path}: cannot be read as arrays ({error})") from error
    _need(path, arrays, needed)
    return arrays


def _need(path: Path | str, found: Any, needed: tuple[str, ...]) -> None:
    if not isinstance(found, Mapping):
        raise InputRefused(f"{path}: expected a JSON object")
    missing = [name for name in needed if name not in found]
    if missing:
        raise InputRefused(f"{path}: lacks {', '.join(missing)}; make it again")


def _records(path: Path) -> Iterator[Json]:
    """The lines of a log; what follows the last line end is being written at this moment."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for number, line in enumerate(text.split("\n")[:-1], 1):
        yield _record(f"{path}, line {number}", line)


def _column(records: list[Json], name: str) -> Array:
    """(m, 2) of step and a figure; of a step that was walked twice, the later record."""
    return _table({r["step"]: [r["step"], r[name]] for r in records if name in r}, 2)


def _validations(records: list[Json]) -> Array:
    """(k, 3) of step, mean, se; of a step that was walked twice, the later record."""
    seen = {record["step"]: record["validation"] for record in records if "validation" in record}
    return _table({step: [step, bound["mean"], bound["se"]] for step, bound in seen.items()}, 3)


def _record(place: str, line: str) -> Json:
    try:
        record: Json = json.loads(line)
    except ValueError as error:
        raise InputRefused(f"{place}: not JSON ({error}); remove this line") from error
    _need(place, record, ("step",))
    return record


def _table(rows: dict[int, list[float]], columns: int) -> Array:
    """Rows in the order of their steps; null is nan."""
    return np.array([rows[step] for step in sorted(rows)], float).reshape(-1, columns)
