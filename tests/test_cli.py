"""The command line: exit codes, streams, documents, and help that appears at once."""

from __future__ import annotations

import json
import math
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import TINY, command, silent

from nelbo import cli
from nelbo.checkpoint import load, step_path
from nelbo.errors import InputRefused, NumericalFailure, ResourceExhausted, UsageError
from nelbo.recipes.options import RECIPES
from nelbo.trainer import EMA, Trainer

SOURCE = Path(cli.__file__).parents[1]


def process(*arguments: str, **variables: str) -> subprocess.Popen[str]:
    """`python -m nelbo` as a process of its own, without a terminal."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONUNBUFFERED", "FORCE_COLOR")}
    environment = {**kept, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", **variables}
    return subprocess.Popen(
        [sys.executable, "-m", "nelbo", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


# --- help ----------------------------------------------------------------------------------------


def test_help_is_quick_and_imports_no_torch() -> None:
    """Median processor time of five starts; wall time is that of a machine with nothing to do."""
    code = (
        "import sys, nelbo.cli as c; assert c.main(['--help']) == 0; "
        "print(sorted({'torch', 'numpy', 'tyro', 'rich', 'matplotlib'} & set(sys.modules)))"
    )
    times = []
    for _ in range(5):
        before = os.times()
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(SOURCE)},
        )
        after = os.times()
        times.append(
            after.children_user
            + after.children_system
            - before.children_user
            - before.children_system
        )
        assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done.stderr
    assert sorted(times)[2] < 0.3


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    out, err = capsys.readouterr()
    assert all(f"  {name} " in out for name in cli.COMMANDS) and err == ""
    assert max(len(line) for line in out.splitlines()) <= 80


def test_nothing_to_do_is_a_usage_error() -> None:
    code, out, err = silent([])
    assert code == 2 and out == "" and "usage: nelbo COMMAND" in err
    code, out, err = silent(["train"])
    assert code == 2 and out == "" and "usage: nelbo train RECIPE" in err


def test_version() -> None:
    code, out, _ = silent(["--version"])
    assert code == 0 and out.startswith("nelbo ")


@pytest.mark.parametrize("name", [*cli.COMMANDS, *(f"train {r}" for r in RECIPES)])
def test_every_command_has_help(name: str) -> None:
    code, out, err = silent([*name.split(), "--help"])
    assert code == 0 and out and not err


def test_help_fits_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Boxes of 60 columns; one-line descriptions may wrap as the terminal sees fit."""
    done = process("train", "digits", "--help", COLUMNS="60", NO_COLOR="1")
    out, err = done.communicate(timeout=60)
    assert done.returncode == 0, err
    boxed = [line for line in out.splitlines() if line[:1] in "╭│╰"]
    assert boxed and max(len(line) for line in boxed) <= 60 and "\x1b" not in out


# --- usage errors --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("bogus", "no command 'bogus'"),
        ("train bogus", "no recipe 'bogus'"),
        ("train digits --bogus 1", "bogus"),
        ("train digits --steps many", "steps"),
        ("train digits --objective magic", "objective"),
        ("train images", "PATH"),
        ("evaluate", "run"),
        ("train digits --save-every 0", "--save-every 0: it must be at least 1"),
        ("train digits --steps -1", "--steps -1"),
        ("train digits --batch 0", "--batch 0: it must be at least 1"),
        ("train digits --dropout 1.5", "--dropout 1.5: it must be at least 0 and at most 1"),
        ("train digits --rate nan", "--rate not a number"),
        ("train digits --rate 0", "--rate 0: it must be above 0"),
        ("train digits --ema 1.1", "--ema 1.1"),
        ("train digits --accumulation 0", "--accumulation 0"),
        ("train digits --samples 0", "--samples 0"),
        ("train digits --calls 0", "--calls 0: it must be above 0"),
        ("train digits --validate-calls 0", "--validate-calls 0"),
        ("train digits --latents 0", "--latents 0"),
        ("train digits --multipliers", "--multipliers"),
        ("train digits --multipliers 1 0", "--multipliers 0"),
        ("train digits --threads 0", "--threads 0"),
        ("train digits --focus 4 0", "--focus 4 0"),
        ("train digits --augment 2", "--augment 2"),
        ("train digits --multipliers 1 2 2 2 2", "multiples of 16"),
        ("train digits --decoder density", "does not fit"),
        ("train swissroll --decoder discretized", "does not fit"),
        ("train swissroll --predict levels", "levels"),
    ],
)
def test_usage_errors(arguments: str, words: str, tmp_path: Path) -> None:
    code, out, err = silent([*shlex.split(arguments), "--out", str(tmp_path / "run")])
    assert code == 2 and out == "" and words in err, err
    assert "Traceback" not in err and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("evaluate RUN --calls 3.5", "--calls 3.5"),
        ("evaluate RUN --limit 0", "--limit 0"),
        ("evaluate RUN --limit -1", "--limit -1"),
        ("evaluate RUN --batch 0", "--batch 0"),
        ("evaluate RUN --threads 0", "--threads 0"),
        ("evaluate RUN --checkpoint 4x", "--checkpoint 4x"),
        ("evaluate RUN --split every", "split"),
        ("sample RUN --n 0", "--n 0"),
        ("sample RUN --steps 0", "--steps 0"),
        ("sample RUN --steps 21", "grid of 20"),
        ("sample RUN --sampler ddim --eta 2", "--eta 2"),
    ],
)
def test_usage_errors_of_a_run(arguments: str, words: str, finished_run: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished_run.rglob("*") if p.is_file()}
    code, out, err = silent(shlex.split(arguments.replace("RUN", shlex.quote(str(finished_run)))))
    assert code == 2 and out == "" and words in err, err
    assert before == {p: p.stat().st_mtime_ns for p in finished_run.rglob("*") if p.is_file()}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(finished_run: Path) -> None:
    code, _, err = silent(["evaluate", str(finished_run), "--device", "cuda"])
    assert code == 2 and "--device cpu" in err


@pytest.mark.usefixtures("no_report")
def test_the_two_commands_of_an_existing_run_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Typed as printed: the first continues (and finishes), the second starts beside it."""
    monkeypatch.chdir(tmp_path)
    typed = ["train", "digits", *TINY, "--steps", "1", "--out", "my run", "--quiet"]
    assert silent(typed)[0] == 0
    code, out, err = silent(typed)
    assert code == 2 and out == ""
    lines = [shlex.split(line) for line in err.splitlines() if line.startswith("  nelbo ")]
    assert len(lines) == 2 and "--resume" in lines[0] and "--resume" not in lines[1]
    for line in lines:
        assert silent(line[1:])[0] == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["my run", "my run-2"]


# --- exit codes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UsageError("a"), 2, "nelbo: a"),
        (InputRefused("b"), 3, "nelbo: b"),
        (NumericalFailure("c"), 4, "nelbo: c"),
        (ResourceExhausted("d"), 5, "nelbo: d"),
        (MemoryError(), 5, "out of memory"),
        (OSError(28, "No space left on device"), 5, "No space left"),
        (RuntimeError("CUDA out of memory"), 5, "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 5, "allocate"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(5, "Input/output error"), 1, "bug of nelbo"),
        (RuntimeError("shapes"), 1, "bug of nelbo"),
    ],
)
def test_exit_codes(
    error: BaseException, code: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def command(arguments: list[str]) -> int:
        raise error

    monkeypatch.setitem(cli.COMMANDS, "recipes", command)
    found, out, err = silent(["recipes"])
    assert found == code and words in err and out == ""
    assert ("Traceback" in err) == (code == 1)


def status(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "status.json").read_text())
    return found


def test_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    """Exit 4 with the step; the checkpoints hold no damaged weights."""
    path = tmp_path / "run"
    code, out, err = silent(command(path, "--rate", "1e30", "--warmup", "0", "--save-every", "1"))
    assert code == 4 and out == "" and "at update 2; the weights of update 1 are unchanged" in err
    assert status(path)["state"] == "failed" and status(path)["exit_code"] == 4
    assert "update 2" in status(path)["message"] and status(path)["step"] == 1
    assert [p.name for p in (path / "checkpoints").iterdir()] == ["step-00000001"]
    weights = load(path / "checkpoints" / "step-00000001").tensors["model"].values()
    assert all(bool(torch.isfinite(w).all()) for w in weights)


def test_a_bug_leaves_its_trace_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(trainer: Trainer) -> None:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(Trainer, "update", broken)
    code, _, err = silent(command(tmp_path / "run"))
    assert code == 1 and "planted" in err and "bug of nelbo" in err
    assert "ZeroDivisionError: planted" in (tmp_path / "run" / "log.txt").read_text()
    assert status(tmp_path / "run")["exit_code"] == 1


# --- streams -------------------------------------------------------------------------------------


def test_a_process_prints_results_only(finished_run: Path) -> None:
    """`python -m nelbo`, no terminal: one document on stdout, plain text on stderr."""
    done = process("evaluate", str(finished_run), "--calls", "4", "--json", FORCE_COLOR="")
    out, err = done.communicate(timeout=120)
    assert done.returncode == 0 and json.loads(out)["schema"] == 1
    assert "\x1b" not in err and "\r" not in err and err == ""


@pytest.mark.parametrize("arguments", [["recipes"], ["--help"], ["doctor"]])
def test_a_closed_pipe_ends_quietly(arguments: list[str]) -> None:
    running = process(*arguments)
    assert running.stdout is not None and running.stderr is not None
    running.stdout.close()
    err = running.stderr.read()
    assert running.wait(60) == 0 and err == ""
    running.stderr.close()


@pytest.mark.usefixtures("no_report")
def test_training_speaks_on_stderr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nelbo.console.PLAIN_SECONDS", 0.0)
    code, out, err = silent(command(tmp_path / "run", "--json"))
    assert code == 0 and json.loads(out)["run"] == str(tmp_path / "run")
    assert "6 of 12 steps: validation bound" in err and "bits/dim" in err
    assert "train 12/12 steps (100 %)" in err and "sample " in err
    assert "\x1b" not in err and "\r" not in err


@pytest.mark.usefixtures("no_report")
def test_quiet(tmp_path: Path) -> None:
    """And --resume of a run that is not there starts it."""
    code, out, err = silent(command(tmp_path / "run", "--quiet", "--steps", "1", "--resume"))
    assert code == 0 and err == "" and "reconstruction" in out


# --- documents -----------------------------------------------------------------------------------


def check_entry(entry: dict[str, Any], dims: int) -> None:
    assert entry.keys() == {"mean", "se", "se_mc", "n", "unit", "mean_bits_per_example"}
    assert entry["unit"] == "bits/dim" and entry["n"] > 0
    assert entry["mean_bits_per_example"] == pytest.approx(entry["mean"] * dims)


def check_document(value: dict[str, Any], n: int, calls: float) -> None:
    assert value["schema"] == 1 and value["calls_per_example"] == calls
    assert value["data"] | {"name": "digits", "n": n, "dims": 64, "levels": 17} == value["data"]
    assert {"parameterization", "variance", "decoder", "grid", "clip"} <= value["model"].keys()
    assert value["model"]["weights"] == "ema" and value["model"]["step"] == 12
    assert list(value["terms"]) == ["prior", "diffusion", "reconstruction", "total"]
    for entry in value["terms"].values():
        check_entry(entry, 64)
    parts = sum(value["terms"][k]["mean"] for k in ("prior", "diffusion", "reconstruction"))
    assert value["terms"]["total"]["mean"] == pytest.approx(parts)
    assert value["terms"]["prior"]["se_mc"] == 0 < value["terms"]["total"]["se_mc"]


@pytest.mark.parametrize("calls", [None, 6])
def test_evaluate_json(calls: int | None, finished_run: Path) -> None:
    more = [] if calls is None else ["--calls", str(calls)]
    code, out, _ = silent(["evaluate", str(finished_run), "--json", "--quiet", *more])
    assert code == 0
    value = json.loads(out)
    check_document(value, 297, 40 if calls is None else 6)
    assert value["baselines"]["uniform"]["mean"] == pytest.approx(math.log2(17))
    for entry in value["baselines"].values():
        check_entry(entry, 64)
    name = "full" if calls is None else "calls6"
    stem = finished_run / "evaluation" / f"test-step00000012-{name}-seed0"
    assert json.loads(stem.with_suffix(".json").read_text()) == value
    with np.load(stem.with_suffix(".npz")) as arrays:
        for term, entry in value["terms"].items():
            assert arrays[term].shape == (297,) and arrays[term].dtype == np.float64
            mean = arrays[term].mean() / (64 * math.log(2))
            assert mean == pytest.approx(entry["mean"], rel=1e-12)
        assert {"integrand_logsnr", "integrand_mean", "integrand_se"} <= set(arrays.files)


def test_evaluate_a_part(finished_run: Path) -> None:
    base = ["evaluate", str(finished_run), "--json", "--quiet", "--calls", "4"]
    code, out, _ = silent([*base, "--limit", "70", "--batch", "64"])
    assert code == 0
    check_document(json.loads(out), 70, 4)
    code, out, _ = silent([*base, "--split", "validation"])
    assert code == 0 and json.loads(out)["data"]["split"] == "validation"
    assert json.loads(out)["baselines"] == {}
    code, out, _ = silent([*base, "--limit", "1"])
    assert code == 0 and json.loads(out)["terms"]["total"]["se"] is None


def test_evaluate_for_people(finished_run: Path) -> None:
    code, out, err = silent(["evaluate", str(finished_run), "--calls", "5"])
    assert code == 0 and err == ""
    assert all(word in out for word in ("prior", "total", "baseline histogram", "± se_mc"))
    assert max(len(line) for line in out.splitlines()) <= 100


def test_evaluate_is_reproducible_and_seeded(finished_run: Path) -> None:
    def total(*more: str) -> float:
        base = ["evaluate", str(finished_run), "--calls", "4", "--json", "--quiet"]
        mean: float = json.loads(silent([*base, *more])[1])["terms"]["total"]["mean"]
        return mean

    assert total() == total() == pytest.approx(total("--batch", "64"), rel=1e-5)
    assert total() != total("--seed", "1")


def check_weights(path: Path) -> None:
    """What was measured at the end are the averaged weights, not the raw ones."""
    tensors = load(step_path(path / "checkpoints", 12)).tensors
    names = [n for n, _ in sorted(tensors["model"].items()) if n.endswith("weight")]
    apart = [n for n in names if not torch.equal(tensors["model"][n], tensors["model-ema"][n])]
    assert apart == names, "ema"
    written = (path / "evaluation" / "test-step00000012-calls4-seed0.json").read_text()
    again = silent(["evaluate", str(path), "--calls", "4", "--json", "--quiet"])[1]
    a, b = (json.loads(text)["terms"]["total"]["mean"] for text in (written, again))
    assert a == pytest.approx(b, rel=1e-6)


def test_what_is_measured_are_the_averaged_weights(run_copy: Path) -> None:
    check_weights(run_copy)


@pytest.mark.usefixtures("no_report")
def test_the_check_finds_an_average_that_is_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def follow(average: EMA, module: torch.nn.Module, step: int) -> None:
        average.module.load_state_dict(module.state_dict())

    monkeypatch.setattr(EMA, "update", follow)
    assert silent(command(tmp_path / "run", "--quiet"))[0] == 0
    with pytest.raises(AssertionError, match="ema"):
        check_weights(tmp_path / "run")


def test_sample(finished_run: Path, tmp_path: Path) -> None:
    base = ["sample", str(finished_run), "--n", "5", "--json", "--quiet", "--sampler", "ddim"]
    arguments = [*base, "--steps", "3", "--out", str(tmp_path / "s")]
    code, out, err = silent(arguments)
    assert code == 0 and err == ""
    value = json.loads(out)
    assert value["schema"] == 1 and (value["n"], value["grid"], value["step"]) == (5, 3, 12)
    assert Path(value["picture"]).is_file()
    with np.load(value["array"]) as arrays:
        assert arrays["samples"].shape == (5, 1, 8, 8) and arrays["samples"].max() <= 16
    code, out, err = silent(arguments)
    assert code == 2 and "nothing in it is overwritten" in err


def test_samples_do_not_depend_on_how_many_are_asked_for(
    finished_run: Path, tmp_path: Path
) -> None:
    found = []
    for n in (2, 7):
        out = ["--out", str(tmp_path / str(n)), "--steps", "2", "--quiet"]
        assert silent(["sample", str(finished_run), "--n", str(n), *out])[0] == 0
        with np.load(tmp_path / str(n) / "samples.npz") as arrays:
            found.append(arrays["samples"])
    assert np.array_equal(found[0], found[1][:2])


def test_report(run_copy: Path) -> None:
    (run_copy / "report.html").unlink()
    code, out, _ = silent(["report", str(run_copy), "--json"])
    value = json.loads(out)
    assert code == 0 and value["schema"] == 1
    assert Path(value["report"]) == run_copy / "report.html" and Path(value["report"]).is_file()


def test_recipes_json() -> None:
    code, out, _ = silent(["recipes", "--json"])
    value = json.loads(out)
    assert code == 0 and value["schema"] == 1 and list(value["recipes"]) == list(RECIPES)
    assert [n for n, r in value["recipes"].items() if r["path"]] == [
        "texture",
        "images",
        "vectors",
        "bits",
        "mnist",
        "cifar10",
    ]
    code, out, _ = silent(["recipes"])
    assert code == 0 and "images PATH" in out


def test_doctor() -> None:
    code, out, _ = silent(["doctor", "--json"])
    value = json.loads(out)
    assert code == 0 and value["schema"] == 1
    assert all(check["passed"] for check in value["checks"].values())


# --- the run -------------------------------------------------------------------------------------


def test_what_a_finished_run_holds(finished_run: Path) -> None:
    found = {
        "recipe.json",
        "status.json",
        "environment.json",
        "metrics.jsonl",
        "report.html",
        "checkpoints/step-00000012/manifest.json",
        "samples/samples.npz",
        "samples/strip.npz",
    }
    assert all((finished_run / name).is_file() for name in found)
    assert status(finished_run)["state"] == "finished" and status(finished_run)["exit_code"] == 0
    rows = [json.loads(r) for r in (finished_run / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if "loss" in r] == list(range(1, 13))
    assert [r["step"] for r in rows if "validation" in r] == [6, 12]
    keys = {"step", "loss", "grad_norm", "lr", "examples_per_second", "seconds"}
    assert all(r.keys() == keys for r in rows if "loss" in r)
    assert all(r["validation"]["unit"] == "bits/dim" for r in rows if "validation" in r)
    assert not list(finished_run.rglob(".tmp-*"))


@pytest.mark.usefixtures("no_report")
def test_a_finished_run_is_finished_again(run_copy: Path) -> None:
    before = load(step_path(run_copy / "checkpoints", 12)).tensors
    code, out, err = silent(command(run_copy, "--resume", "--json"))
    assert code == 0 and "continuing" in err and json.loads(out)["model"]["step"] == 12
    after = load(step_path(run_copy / "checkpoints", 12)).tensors
    assert all(torch.equal(v, after[g][n]) for g in before for n, v in before[g].items())


@pytest.mark.usefixtures("no_report")
def test_resume_says_which_options_it_ignores(run_copy: Path) -> None:
    code, _, err = silent(command(run_copy, "--resume", "--rate", "0.5", "--quiet"))
    assert code == 0 and "ignored: rate" in err
    code, _, err = silent(["train", "swissroll", "--resume", "--out", str(run_copy)])
    assert code == 3 and "recipe digits" in err


def test_best_and_last_are_kept(run_copy: Path) -> None:
    kept = sorted(p.name for p in (run_copy / "checkpoints").iterdir())
    assert kept[-1] == "step-00000012" and len(kept) <= 2
    for which in ("best", "12"):
        arguments = ["evaluate", str(run_copy), "--checkpoint", which, "--calls", "4", "--quiet"]
        assert silent(arguments)[0] == 0


def test_one_writer(run_copy: Path) -> None:
    from nelbo.rundir import RunDirectory

    owner = RunDirectory(run_copy)
    owner.lock()
    code, _, err = silent(command(run_copy, "--resume"))
    assert code == 2 and "another process is writing" in err
    owner.release()


@pytest.mark.usefixtures("no_report")
def test_the_clock_of_a_run_adds_up(run_copy: Path) -> None:
    start = time.monotonic()
    before = status(run_copy)["seconds"]
    assert silent(command(run_copy, "--resume", "--quiet"))[0] == 0
    assert before <= status(run_copy)["seconds"] <= before + time.monotonic() - start
