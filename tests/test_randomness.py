"""Randomness as a function: stable for ever, distinct by purpose, and without a trace."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from nelbo.randomness import generator, key, seeded

# Written down once: a change here changes every run that was ever seeded.
_KEYS = {
    (0,): 3456079177858693020,
    (0, "noise"): 7958856190608717080,
    (7, "order", 3): 7391995676944021016,
    (7, "order", 3, 1): 395139908987783149,
    (2**62, "naïve"): 666038176934101407,
}


@pytest.mark.parametrize("parts", _KEYS, ids=str)
def test_keys_never_change(parts: tuple[int | str, ...]) -> None:
    assert key(*parts) == _KEYS[parts]  # type: ignore[arg-type]


def test_keys_do_not_depend_on_the_process() -> None:
    code = "from nelbo.randomness import key; print(key(7, 'order', 3))"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert int(found.stdout) == key(7, "order", 3)


def test_keys_of_different_purposes_differ() -> None:
    parts = [(s, p, i, r) for s in range(8) for p in "ab" for i in range(64) for r in range(4)]
    parts += [(s, f"a{i}") for s in range(8) for i in range(64)]  # type: ignore[misc]
    keys = {key(*p) for p in parts}
    assert len(keys) == len(parts)
    assert key(1, "a", "b") != key(1, "b", "a") != key(1, "ab")
    assert key(1, 23) != key(12, 3)


def test_keys_fill_63_bits_evenly() -> None:
    """Each bit is set in half of 4096 keys: |z| < 6.5, false-alarm rate 63 * 8e-11 < 1e-8."""
    keys = [key(0, "bits", i) for i in range(4096)]
    assert min(keys) >= 0 and max(keys) < 2**63
    for bit in range(63):
        ones = sum(k >> bit & 1 for k in keys)
        assert abs(ones - 2048) / 32 < 6.5, bit


def test_generators_agree_in_any_order() -> None:
    forward = [torch.randn(3, generator=generator(1, "noise", i)) for i in range(5)]
    backward = [torch.randn(3, generator=generator(1, "noise", i)) for i in reversed(range(5))]
    assert torch.equal(torch.stack(forward), torch.stack(backward[::-1]))
    assert not torch.equal(forward[0], forward[1])


def test_generators_leave_the_global_state_alone() -> None:
    before = torch.get_rng_state()
    torch.randn(3, generator=generator(1, "noise"))
    assert torch.equal(before, torch.get_rng_state())


def test_seeded_repeats_and_restores() -> None:
    before = torch.get_rng_state()
    draws = []
    for noise in (0, 5):
        torch.rand(noise)
        with seeded(3, "step", 9):
            draws.append((torch.randn(4), torch.randperm(9)))
    assert torch.equal(draws[0][0], draws[1][0]) and torch.equal(draws[0][1], draws[1][1])
    torch.set_rng_state(before)
    expected = torch.rand(3)
    torch.set_rng_state(before)
    with seeded(3, "step", 9):
        torch.rand(100)
    assert torch.equal(torch.rand(3), expected)


def test_seeded_draws_what_the_generator_draws() -> None:
    with seeded(3, "step", 9):
        inside = torch.randn(16)
    assert torch.equal(inside, torch.randn(16, generator=generator(3, "step", 9)))


def test_seeded_nests_and_restores_after_an_exception() -> None:
    before = torch.get_rng_state()
    with pytest.raises(KeyError), seeded(1, "outer"):
        first = torch.rand(1)
        with seeded(1, "inner"):
            torch.rand(7)
        second = torch.rand(1)
        raise KeyError
    assert torch.equal(before, torch.get_rng_state())
    with seeded(1, "outer"):
        assert torch.equal(torch.rand(1), first) and torch.equal(torch.rand(1), second)


def test_seeded_governs_distributions() -> None:
    normal = torch.distributions.Normal(torch.zeros(8), 1.0)
    with seeded(1, "a"):
        first = normal.rsample()
    with seeded(1, "b"):
        other = normal.rsample()
    with seeded(1, "a"):
        assert torch.equal(normal.rsample(), first)
    assert not torch.equal(first, other)


def test_a_process_looks_at_its_own_device_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """With eight devices at hand and the third one its own."""
    seen: list[list[int]] = []

    @contextmanager
    def fork(devices: list[int]) -> Iterator[None]:
        seen.append(list(devices))
        yield

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.random, "fork_rng", fork)
    with seeded(0, "a"):
        pass
    assert seen == [[3]]
