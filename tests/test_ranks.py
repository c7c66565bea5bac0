"""Any number of ranks makes one run: the same losses, the same bounds, one end (gloo, CPU)."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rankserver import Ranks, free_port, logs
from tiny import TINY, command, silent

from nelbo import cli, distributed
from nelbo.checkpoint import load, step_path, steps
from nelbo.errors import InputRefused, UsageError
from nelbo.recipes.adversarial import build_game
from nelbo.recipes.build import build
from nelbo.recipes.families import kind_of
from nelbo.samplers import Ancestral
from nelbo.stepping import Immediate, Move
from nelbo.trainer import Trainer
from nelbo.walks import chains, play, train, weighted
from nelbo.walks.measuring import Request, measure

CLOSE = 1e-6
SMALL = {"channels": 16, "multipliers": (1,), "layers": 1, "attention": (), "threads": 1}
# kernels in C round otherwise, and at this seed an update makes 1e-5 of a rounding
SMALL |= {"kernels": "plain"}


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    made = Ranks()
    yield made
    made.close()


def joined(rank: int) -> None:
    distributed.init(60.0)
    assert distributed.rank() == rank


# --- training ------------------------------------------------------------------------------------


def diffusion(**more: Any) -> Trainer:
    """An uneven batch, dropout, low-discrepancy times, weight decay, clipping."""
    shape = {**SMALL, "steps": 8, "batch": 7, "latents": 20, "warmup": 2, "clip": 0.5}
    options = kind_of("digits", "diffusion")(**{**shape, **more})
    return train.trainer_of(build(options), "cpu")  # type: ignore[arg-type]


def game() -> Trainer:
    """Two players, two moves of the first, gradient penalties, differentiable augmentation."""
    more = {"batch": 7, "steps": 5, "critic_moves": 2, "r1": 0.5, "r2": 0.5, "clip": 1.0}
    options = kind_of("digits", "game")(channels=8, augment=0.5, **more)
    return play.trainer_of(build_game(options), "cpu")  # type: ignore[arg-type]


def trainers() -> dict[str, Trainer]:
    return {
        "diffusion": diffusion(),
        "in parts": diffusion(accumulation=2, members=2, augment=0.5),
        "history": diffusion(times="second-moment", latents=2, steps=24, clip=None),
        "game": game(),
    }


def trained(rank: int, folder: str) -> int:
    """Train, and write losses, norms and last weights."""
    joined(rank)
    found: dict[str, Any] = {}
    for name, trainer in trainers().items():
        records = list(trainer)
        found[name] = [v for r in records for v in r.losses.values()]
        found[f"{name}, norms"] = [v for r in records for v in r.grad_norms.values()]
        assert {r.examples for r in records} == {7 * sum(p.moves for p in trainer.players)}
        groups = [g for n, g in trainer.state_dict().items() if "optimizer" not in n]
        found[f"{name}, weights"] = [float(t.double().norm()) for g in groups for t in g.values()]
    distributed.shutdown()
    Path(folder, f"trained{rank}.json").write_text(json.dumps(found))
    return 0


def apart(one: dict[str, list[float]], other: dict[str, list[float]]) -> dict[str, float]:
    """Largest relative difference by name."""
    assert one.keys() == other.keys()
    return {
        name: max(
            abs(a - b) / max(abs(a), 1e-2) for a, b in zip(one[name], other[name], strict=True)
        )
        for name in one
    }


def test_losses_are_those_of_one_process(ranks: Ranks, tmp_path: Path) -> None:
    found = {}
    for world in (1, 2, 3):
        folder = tmp_path / str(world)
        assert ranks.run(trained, world, folder) == [0] * world, logs(folder)
        each = [json.loads((folder / f"trained{r}.json").read_text()) for r in range(world)]
        assert all(one == each[0] for one in each), "all ranks hold the same weights"
        found[world] = each[0]
    for world in (2, 3):
        off = apart(found[1], found[world])
        print(world, off)
        # what has no gradient but rounding (a bias before a normalisation) follows it all the same
        most = {"weights": 1e-2, "norms": 5e-6}
        assert all(v < most.get(name.rpartition(", ")[2], CLOSE) for name, v in off.items()), off


def sharded(rank: int, folder: str) -> int:
    """Train in shards; its whole state, and where it goes on from a state of whole tensors."""
    joined(rank)
    straight = diffusion(shard=True)
    records = list(straight)
    before = diffusion(shard=True)
    before.steps = 4
    list(before)
    after = diffusion(shard=True)
    after.load_state_dict(before.state_dict(), 4)
    resumed = [r.losses["model"] for r in after]
    state = straight.state_dict()
    parts: list[Any] = [
        p for p in straight.players[0].module.parameters() if hasattr(p, "full_tensor")
    ]
    found = {
        "losses": [r.losses["model"] for r in records],
        "norms": [r.grad_norms["model"] for r in records],
        "resumed": resumed,
        "held": sum(p.to_local().numel() for p in parts),
        "shapes": {n: list(t.shape) for g in state for n, t in state[g].items()},
    }
    whole = straight.averages["model"].whole()
    assert all(torch.equal(t, state["model-ema"][n]) for n, t in whole.state_dict().items())
    distributed.shutdown()
    Path(folder, f"sharded{rank}.json").write_text(json.dumps(found))
    return 0


def test_shards(ranks: Ranks, tmp_path: Path) -> None:
    """The same losses, half of the weights on each, checkpoints of whole tensors."""
    assert ranks.run(sharded, 2, tmp_path) == [0, 0], logs(tmp_path)
    alone = diffusion()
    records = list(alone)
    total = sum(p.numel() for p in alone.players[0].module.parameters())
    state = alone.state_dict()
    shapes = {n: list(t.shape) for g in state for n, t in state[g].items()}
    for rank in range(2):
        found = json.loads((tmp_path / f"sharded{rank}.json").read_text())
        assert found["losses"] == pytest.approx([r.losses["model"] for r in records], rel=CLOSE)
        norms = [r.grad_norms["model"] for r in records]
        assert found["norms"] == pytest.approx(norms, rel=5e-6)
        assert found["resumed"] == pytest.approx(found["losses"][4:], rel=CLOSE)
        assert 0.4 * total < found["held"] < 0.6 * total
        assert found["shapes"] == shapes


def averaged_shares(rank: int, folder: str) -> int:
    """The planted error: a mean of the ranks' means, which weighs an uneven batch wrong."""
    joined(rank)
    trainer = diffusion()
    stepping = trainer.stepping
    assert isinstance(stepping, Immediate)
    right = stepping._backward

    def wrong(move: Move) -> float:
        loss = right(move)
        scale = move.whole / len(move.x_0) / distributed.world_size()
        for parameter in move.player.module.parameters():
            if parameter.grad is not None:
                parameter.grad *= scale
        return loss * scale

    stepping._backward = wrong  # type: ignore[method-assign]
    losses = [r.losses["model"] for r in trainer]
    Path(folder, f"wrong{rank}.json").write_text(json.dumps(losses))
    return 0


def test_a_mean_of_means_is_found_out(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks.run(averaged_shares, 2, tmp_path) == [0, 0], logs(tmp_path)
    wrong = json.loads((tmp_path / "wrong0.json").read_text())
    right = [r.losses["model"] for r in diffusion()]
    assert max(abs(a - b) / abs(a) for a, b in zip(right, wrong, strict=True)) > 100 * CLOSE


def test_the_rows_of_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row once, in contiguous shares of each part, none of them empty."""
    for world, whole, parts in [(1, 7, 3), (2, 7, 1), (3, 7, 2), (5, 23, 4)]:
        monkeypatch.setattr(distributed, "world_size", lambda world=world: world)
        dealt: list[list[range]] = []
        for rank in range(world):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            dealt.append(distributed.spans(whole, parts))
        order = [row for part in zip(*dealt, strict=True) for share in part for row in share]
        assert order == list(range(whole))
        sizes = [{len(share) for share in part} for part in zip(*dealt, strict=True)]
        assert all(max(s) - min(s) <= 1 and min(s) > 0 for s in sizes)
    with pytest.raises(UsageError, match="batch of 23 in 8 parts leaves some of 5 ranks"):
        distributed.spans(23, 8)


# --- the run -------------------------------------------------------------------------------------


def started(rank: int, folder: str, arguments: list[str], what: str, on: int, at: int) -> int:
    """The command line; on one rank something happens in one update."""
    update, backward = Trainer.update, Immediate._backward

    def updated(trainer: Trainer) -> Any:
        if trainer.step + 1 == at and rank == on and what.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, what))
        return update(trainer)

    def lost(stepping: Immediate, move: Move) -> float:
        loss = backward(stepping, move)
        if move.step + 1 == at and rank == on and what in ("nan", "error"):
            if what == "error":
                raise InputRefused("the file is damaged")
            return float("nan")
        return loss

    Trainer.update, Immediate._backward = updated, lost  # type: ignore[method-assign]
    return cli.main(arguments)


def start(ranks: Ranks, world: int, path: Path, more: list[str], what: str = "", on: int = 0,
          at: int = 0) -> list[int]:  # fmt: skip
    arguments = command(path, *more, "--quiet", "--keep", "9", "--dist-timeout", "20")
    return ranks.run(started, world, path.parent / "logs", arguments, what, on, at)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def assert_close(path: Path, straight: Path) -> None:
    """Losses, norms and validation bounds of every step, and the kept checkpoints."""
    assert [row["step"] for row in rows(path)] == [row["step"] for row in rows(straight)]
    for mine, other in zip(rows(path), rows(straight), strict=True):
        for name in {"loss", "grad_norm", "lr"} & other.keys():
            assert mine[name] == pytest.approx(other[name], rel=CLOSE)
        if "validation" in mine:
            assert mine["validation"]["mean"] == pytest.approx(
                other["validation"]["mean"], rel=CLOSE
            )
    one, other = (load(step_path(p / "checkpoints", 12)).tensors for p in (path, straight))
    assert {g: set(t) for g, t in one.items()} == {g: set(t) for g, t in other.items()}


@pytest.fixture(scope="module")
def straight(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process that nobody disturbed."""
    path = tmp_path_factory.mktemp("straight") / "run"
    assert start(ranks, 1, path, []) == [0], logs(path.parent / "logs")
    return path


def status(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "status.json").read_text())
    return found


def test_stopped_on_two_and_resumed_on_one(ranks: Ranks, straight: Path, tmp_path: Path) -> None:
    """SIGTERM to the second rank stops both at the same step, after a good save."""
    path = tmp_path / "run"
    assert start(ranks, 2, path, [], "SIGTERM", 1, 6) == [143, 143], logs(tmp_path / "logs")
    assert (status(path)["state"], status(path)["step"]) == ("stopped", 6)
    assert [step for step, _ in steps(path / "checkpoints")] == [0, 4, 6]
    said = logs(tmp_path / "logs")
    assert said.count("saved. Continue with --resume") == 1 and "Traceback" not in said
    assert start(ranks, 1, path, ["--resume"]) == [0], logs(tmp_path / "logs")
    assert_close(path, straight)


def test_stopped_on_one_and_resumed_on_two(ranks: Ranks, straight: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    assert start(ranks, 1, path, [], "SIGINT", 0, 5) == [130], logs(tmp_path / "logs")
    assert start(ranks, 2, path, ["--resume"]) == [0, 0], logs(tmp_path / "logs")
    assert_close(path, straight)
    assert status(path)["state"] == "finished"
    (document,) = (path / "evaluation").glob("*.json")
    (same,) = (straight / "evaluation").glob("*.json")
    mine, other = (json.loads(p.read_text())["terms"]["total"] for p in (document, same))
    assert mine["mean"] == pytest.approx(other["mean"], rel=CLOSE)


@pytest.mark.parametrize(
    ("what", "codes", "said"),
    [
        ("nan", [4, 4], "loss of model is nan at update 6; the weights of update 5 are unchanged"),
        ("error", [3, 3], "the file is damaged"),
        ("SIGKILL", [5, -9], "a rank is gone"),
    ],
)
def test_one_rank_fails_and_all_end(
    what: str, codes: list[int], said: str, ranks: Ranks, tmp_path: Path
) -> None:
    """With the right exit code, one sentence, and a run that continues."""
    path = tmp_path / "run"
    more = ["--validate-every", "0"]
    assert start(ranks, 2, path, more, what, 1, 6) == codes, logs(tmp_path / "logs")
    heard = logs(tmp_path / "logs")
    assert said in heard and heard.count("nelbo:") == 1 and "Traceback" not in heard
    assert (status(path)["state"], status(path)["exit_code"]) == ("failed", codes[0])
    whole = [step for step, folder in steps(path / "checkpoints") if load(folder)]
    # what was done before another rank was lost is saved; a failure of numbers saves nothing
    assert whole == ([0, 4] if what == "nan" else [0, 4, 5])


def test_a_directory_that_exists_is_refused_once(
    ranks: Ranks, straight: Path, tmp_path: Path
) -> None:
    assert start(ranks, 2, straight, []) == [2, 2]
    said = logs(straight.parent / "logs")
    assert said.count("exists, and nothing in it is overwritten") == 1


# --- measuring -----------------------------------------------------------------------------------


def measured(rank: int, folder: str) -> int:
    """Bounds in full and from few calls, importance weights and chains, 5 batches of examples."""
    joined(rank)
    chains.CHUNK = 16
    options = kind_of("digits", "diffusion")(**{**SMALL, "latents": 5})
    recipe = build(options)  # type: ignore[arg-type]
    few = dataclasses.replace(
        recipe, dataset=dataclasses.replace(recipe.dataset, test=recipe.dataset.test[:290])
    )
    found: dict[str, torch.Tensor] = {}
    for name, calls in (("full", None), ("few", 3.0), ("rare", 0.5)):
        request = Request("test", calls, batch=64, quiet=True)
        (result,) = measure(few, [few.model], request)
        found |= {f"{name} {term}": values for term, values in result.values().items()}
        found[name] = torch.tensor([(e.mean, e.se, e.se_mc) for e in result.estimates().values()])
    weighing = weighted.Weighing(3, batch=64, quiet=True)
    found["weights"] = weighted.measure(few, few.dataset.test[:70], weighing).log_w
    torch.manual_seed(1)
    found["chains"] = chains.draws(few, Ancestral(), "cpu", True)(70)
    distributed.shutdown()
    data = {name: tensor.double().numpy().tobytes().hex() for name, tensor in found.items()}
    Path(folder, f"measured{rank}.json").write_text(json.dumps(data))
    return 0


def test_measurements_are_the_same_bits_at_any_world_size(ranks: Ranks, tmp_path: Path) -> None:
    found = {}
    for world in (1, 2, 3, 5):
        folder = tmp_path / str(world)
        assert ranks.run(measured, world, folder) == [0] * world, logs(folder)
        for rank in range(world):
            found[world, rank] = json.loads((folder / f"measured{rank}.json").read_text())
    first = found[1, 0]
    for place, other in found.items():
        off = [name for name in first if other[name] != first[name]]
        assert not off, f"rank {place[1]} of {place[0]}: {off}"


def compared(rank: int, folder: str, run: str) -> int:
    """`nelbo compare` of a run with its own data."""
    os.environ["NELBO_OUT"] = f"{folder}/out"
    out = f"{folder}/compared"
    words = ["compare", "data", run, "--n", "60", "--no-metrics", "--calls", "2", "--ladder"]
    return cli.main([*words, "--threads", "1", "--quiet", "--json", "--out", out])


def test_compare(ranks: Ranks, straight: Path, tmp_path: Path) -> None:
    """One document, by the first rank, the same as that of one process; one look is counted."""
    found = {}
    for world in (1, 2):
        folder = tmp_path / str(world)
        assert ranks.run(compared, world, folder, str(straight)) == [0] * world, logs(folder)
        assert len((folder / "out/looks.jsonl").read_text().splitlines()) == 1
        (document,) = (folder / "compared").glob("*.json")
        found[world] = json.loads(document.read_text())
        assert not (folder / f"rank{world - 1}.log").read_text() or world == 1
    for part in ("certificate", "sandwich", "remark"):
        assert found[1][part] == found[2][part]


# --- the real thing ------------------------------------------------------------------------------


def test_torchrun(tmp_path: Path) -> None:
    """`torchrun --nproc-per-node 2 -m nelbo train digits`: one run, one report, one table."""
    path = tmp_path / "run"
    words = ["--nproc-per-node", "2", "--master-port", str(free_port()), "-m", "nelbo"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *words, *command(path), "--steps", "4"],
        capture_output=True,
        text=True,
        timeout=120,
        env={
            **os.environ,
            "PYTHONPATH": str(Path(cli.__file__).parents[1]),
            "OMP_NUM_THREADS": "1",
        },
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("report: ") == 1
    assert (path / "report.html").is_file() and status(path)["state"] == "finished"
    assert json.loads((path / "environment.json").read_text())["ranks"] == 2


def test_doctor_knows_of_one_rank() -> None:
    code, out, _ = silent(["doctor", "--json"])
    found = json.loads(out)["checks"]["ranks"]
    assert code == 0 and found["world_size"] == 1 and found["passed"] is True


def test_other_commands_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert silent(["recipes"]) == (0, "", "")
    monkeypatch.setenv("RANK", "0")
    assert "digits" in silent(["recipes"])[1]


assert TINY  # the configuration of all runs here
