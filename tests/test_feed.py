"""Batches prepared ahead: the same ones, in order, with errors and an end."""

from __future__ import annotations

import gc
import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import TINY, silent

from nelbo import checkpoint
from nelbo.data.base import Dataset
from nelbo.data.feed import Feed
from nelbo.data.loading import batch_indices
from nelbo.data.sources import arrays
from nelbo.errors import InputRefused


@pytest.fixture
def data(tmp_path: Path) -> Dataset:
    levels = np.random.default_rng(0).integers(0, 256, (200, 1, 4, 4), dtype=np.uint8)
    np.save(tmp_path / "a.npy", levels)
    return arrays(tmp_path / "a.npy", cache="none")


def order(step: int) -> torch.Tensor:
    return batch_indices(170, 32, 0, step)


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name == "nelbo-feed"]


def until(true) -> None:
    end = time.monotonic() + 10
    while not true() and time.monotonic() < end:
        time.sleep(0.005)
    assert true()


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_batches_are_those_of_the_synchronous_path(data, ahead):
    with Feed(data, order, "cpu", ahead, 20) as feed:
        for step in [*range(12), 4, 5, 6, 19, 20, 21, 0]:  # a jump starts again there
            assert torch.equal(feed(step), data.encode(data.train[order(step)]))
    assert threads() == []


def test_batches_are_ready_before_they_are_asked_for(data):
    asked: list[int] = []

    def noted(step: int) -> torch.Tensor:
        asked.append(step)
        return order(step)

    with Feed(data, noted, "cpu", 3, 9) as feed:
        feed(0)
        until(lambda: len(asked) >= 5)
        time.sleep(0.05)
        # one taken, three ready, one that waits for its place
        assert asked == [0, 1, 2, 3, 4]
        for step in range(1, 9):
            feed(step)
        until(lambda: not threads())
        assert asked == list(range(9))


def test_what_the_thread_met_is_raised_where_the_batch_is_wanted(data):
    def failing(step: int) -> torch.Tensor:
        if step == 2:
            raise InputRefused("row 7: is gone")
        return order(step)

    feed = Feed(data, failing, "cpu", 2)
    assert len(feed(0)) == len(feed(1)) == 32
    for _ in range(2):
        with pytest.raises(InputRefused, match="row 7: is gone"):
            feed(2)
    assert threads() == [] and len(feed(3)) == 32
    feed.close()
    feed.close()
    assert threads() == []


def test_a_thread_does_not_outlive_its_feed(data):
    feed = Feed(data, order, "cpu", 2)
    feed(0)
    assert threads()
    del feed
    gc.collect()
    until(lambda: not threads())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("share", [0.25, 0.0])
def test_on_a_gpu_the_values_are_the_same(data, share, monkeypatch):
    monkeypatch.setattr("nelbo.data.feed.SHARE", share)
    for cache in ("none", "ram"):
        held = arrays(data.record["path"], cache=cache)
        with Feed(held, order, "cuda", 2) as feed:
            for step in range(12):
                assert torch.equal(feed(step).cpu(), data.encode(data.train[order(step)]))


# --- runs --------------------------------------------------------------------------------------


def trained(out: Path, path: Path, *more: str) -> tuple[int, str]:
    code, _, err = silent(["train", "images", str(path), *TINY, "--out", str(out), *more])
    return code, err


def weights(run: Path) -> dict[str, torch.Tensor]:
    _, loaded, _ = checkpoint.newest_valid(run / "checkpoints")
    return {f"{g}.{k}": t for g, some in loaded.tensors.items() for k, t in some.items()}


def test_runs_do_not_depend_on_where_the_data_lie(tmp_path, no_report, monkeypatch):
    levels = np.random.default_rng(0).integers(0, 256, (120, 8, 8), dtype=np.uint8)
    path = tmp_path / "a.npy"
    np.save(path, levels)
    plain = ("--steps", "6", "--validate-every", "0", "--samples", "1", "--calls", "4")
    # measured and sampled at its end from disk; the other one need not be
    code, err = trained(tmp_path / "none", path, *plain, "--cache", "none", "--ahead", "3")
    assert code == 0, err
    monkeypatch.setattr("nelbo.walks.train.finish", lambda *given: None)
    code, err = trained(tmp_path / "ram", path, *plain, "--cache", "ram", "--ahead", "0")
    assert code == 0, err
    ram, none = weights(tmp_path / "ram"), weights(tmp_path / "none")
    assert ram.keys() == none.keys() and all(torch.equal(ram[k], none[k]) for k in ram)
    written = [json.loads((tmp_path / n / "recipe.json").read_text()) for n in ("ram", "none")]
    assert written[0]["options"] == written[1]["options"] and threads() == []

    levels[5] ^= 1
    np.save(path, levels)
    for cache in ("ram", "none"):
        code, err = trained(tmp_path / "none", path, "--resume", "--cache", cache)
        assert code == 3 and "the data changed since" in err


def test_data_that_fail_during_a_run_end_it_with_their_message(tmp_path, monkeypatch):
    levels = np.random.default_rng(0).integers(0, 256, (120, 8, 8), dtype=np.uint8)
    path = tmp_path / "a.npy"
    np.save(path, levels)
    own = Feed.__call__

    def changing(self: Feed, move: int) -> torch.Tensor:
        if move == 5:
            np.save(path, levels[::-1])
        return own(self, move)

    monkeypatch.setattr(Feed, "__call__", changing)
    code, err = trained(tmp_path / "run", path, "--cache", "none", "--validate-every", "0")
    assert code == 3 and "changed while it was in use" in err and threads() == []
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "failed"
