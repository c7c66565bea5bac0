"""Looks at a certificate set are counted, also those of the dead; the ladder is one look."""

from __future__ import annotations

from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from shifts import QUICK, normal, shift
from torch import Tensor

from nelbo.certificate import certify
from nelbo.errors import InputRefused, UsageError
from nelbo.ladder import ladder
from nelbo.looks import Ledger
from nelbo.parts import cut


def test_the_ledger_counts_the_looks_at_a_set(tmp_path: Path):
    ledger = Ledger(tmp_path / "new" / "looks.jsonl")
    assert [ledger.look("a", "x"), ledger.look("b", "y"), ledger.look("a", "z")] == [1, 1, 2]
    with ledger.path.open("a") as file:
        file.write('{"data": "a", "lo')  # a run killed while writing
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
            assert ledger.looks(whole.data_hash) == 2
            raise KeyboardInterrupt
        return -x[:, 0]

    with pytest.raises(KeyboardInterrupt):
        certify(real, shift(1), judges=[dies], ledger=ledger)
    # other pairs of the same reals are no fresh data
    third = certify(real, shift(1), judges=QUICK, ledger=ledger, seed=1)
    assert third.split_hash != whole.split_hash
    assert (whole.looks, third.looks) == (1, 3)


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
