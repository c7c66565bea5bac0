"""docs/one_file.py is the library's Gaussian method: the same figures from the same draws."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from nelbo.bound import bound
from nelbo.data.toys import swissroll
from nelbo.decoders import Density
from nelbo.objectives import Simple
from nelbo.parameterizations import Epsilon
from nelbo.processes.gaussian import Gaussian
from nelbo.reverse import Reverse
from nelbo.samplers import Ancestral
from nelbo.schedules import LogSNRLinear

FILE = Path(__file__).resolve().parents[1] / "docs" / "one_file.py"
CLOSE: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-6}


def loaded(source: str) -> ModuleType:
    spec = importlib.util.spec_from_loader("one_file", loader=None)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    exec(compile(source, str(FILE), "exec"), module.__dict__)
    return module


@pytest.fixture(scope="module")
def one() -> ModuleType:
    return loaded(FILE.read_text())


class Called(nn.Module):
    """The file's network by the library's call: t is () or (B,), and nothing else is known."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x_t: Tensor, t: Tensor, cond: None = None) -> Tensor:
        out: Tensor = self.network(x_t, t if t.dim() == 0 else t[:, None])
        return out


def started(one: ModuleType) -> nn.Module:
    """A network, the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        network: nn.Module = one.Network(width=32, depth=1)
    return network


def library(one: ModuleType, network: nn.Module) -> tuple[Reverse, Tensor]:
    """The library's model around the same network, and its grid."""
    schedule = LogSNRLinear(8.0, -6.0)
    model = Reverse(Gaussian(schedule), Called(network), Epsilon(), Density())
    return model, schedule.grid(one.LATENTS)


def rows(count: int, seed: int = 2) -> tuple[Tensor, Tensor]:
    stream = torch.Generator().manual_seed(seed)
    x_0, eps = torch.randn(2, count, 2, dtype=torch.float64, generator=stream)
    return x_0, eps


def terms_of_both(one: ModuleType, count: int = 16) -> tuple[Tensor, Tensor]:
    """(3, count) prior, diffusion, reconstruction: the file's and the library's, of one seed."""
    network, (x_0, _) = started(one), rows(count)
    model, times = library(one, network)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(3)
        mine = torch.stack(one.bound(network, x_0))
        torch.manual_seed(3)
        theirs = bound(model, x_0, times)
    return mine, torch.stack([theirs.prior, theirs.diffusion.sum(1), theirs.reconstruction])


def test_the_file_is_short_and_knows_torch_and_math_alone() -> None:
    source = FILE.read_text()
    assert len(source.splitlines()) <= 150
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import)]
    others = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    names = {alias.name for node in imports for alias in node.names}
    assert names | {str(node.module).split(".")[0] for node in others} == {"torch", "math"}


def test_the_data_are_the_library_s_swiss_roll(one: ModuleType) -> None:
    truth = swissroll(8, 8, n_validation=1).truth
    assert truth is not None and truth.components is not None
    torch.testing.assert_close(one.CENTRES, truth.components.means, **CLOSE)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x = one.roll(64)
    torch.testing.assert_close(one.true_log_p(x), truth.log_prob(x), **CLOSE)


def test_schedule_and_times(one: ModuleType) -> None:
    model, times = library(one, started(one))
    schedule = model.process.schedule
    torch.testing.assert_close(one.times, times, rtol=0, atol=0)
    for name in ("logsnr", "keep", "lose"):
        theirs = getattr(schedule, name)(times)
        torch.testing.assert_close(getattr(one, name)(times), theirs, **CLOSE)


def test_posterior_and_kernel(one: ModuleType) -> None:
    network, (x_0, x_t) = started(one), rows(16)
    model, times = library(one, network)
    index = torch.arange(0, 199, 13)
    s, t = times[index], times[index + 1]
    theirs = model.process.posterior(x_t, x_0, t, s), model.kernel(x_t, t, s)
    mine = (
        one.posterior(x_t, x_0, t[:, None], s[:, None]),
        one.kernel(network, x_t, t[:, None], s[:, None]),
    )
    for (mean, variance), law in zip(mine, theirs, strict=True):
        torch.testing.assert_close(mean, law.mean, **CLOSE)
        torch.testing.assert_close(variance.expand_as(mean), law.variance, **CLOSE)


def test_the_bound_by_term(one: ModuleType) -> None:
    mine, theirs = terms_of_both(one)
    torch.testing.assert_close(mine, theirs, **CLOSE)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("lose(s) * c\n", "lose(t) * c\n"),
        ("(x_0**2 - 1)", "x_0**2"),
        ("math.pi * variance).log()", "variance).log()"),
        ("range(LATENTS)]", "range(LATENTS - 1)]"),
    ],
)
def test_an_error_in_the_file_would_be_seen(right: str, wrong: str) -> None:
    source = FILE.read_text()
    assert source.count(right) == 1
    mine, theirs = terms_of_both(loaded(source.replace(right, wrong)))
    assert float((mine - theirs).abs().max()) > 1e-4


def losses_of_the_file(one: ModuleType, network: nn.Module, t: Tensor) -> Tensor:
    x_0, eps = rows(len(t))
    loss: Tensor = one.l_simple(network, x_0, t[:, None], eps)
    return loss


def losses_of_the_library(one: ModuleType, network: nn.Module, t: Tensor) -> Tensor:
    (x_0, eps), (model, times) = rows(len(t)), library(one, network)
    law = model.process.marginal(x_0, t)
    at = model.at(law.mean + law.variance.sqrt() * eps, t)
    chance = torch.full((len(t),), 1 / len(times), dtype=torch.float64)
    return Simple(times).loss(at, x_0, torch.searchsorted(times, t), chance)


def test_l_simple_and_an_update(one: ModuleType) -> None:
    """The same losses, and the same weights after an update by Adam."""
    t = one.times[torch.arange(0, 192, 3)]
    losses, weights = [], [parameters_to_vector(started(one).parameters()).detach()]
    for losses_of in (losses_of_the_file, losses_of_the_library):
        network = started(one)
        optimizer = torch.optim.Adam(network.parameters(), lr=one.RATE)
        loss = losses_of(one, network, t)
        loss.mean().backward()
        optimizer.step()
        losses.append(loss.detach())
        weights.append(parameters_to_vector(network.parameters()).detach())
    torch.testing.assert_close(*losses, **CLOSE)
    torch.testing.assert_close(*weights[1:], **CLOSE)
    assert float((weights[1] - weights[0]).abs().max()) > one.RATE / 2, "nothing was learned"


def test_samples(one: ModuleType) -> None:
    """The same noise walks back to the same place."""
    network = started(one)
    model, times = library(one, network)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(4)
        mine = one.sample(network, 8)
        torch.manual_seed(4)
        x_t = torch.randn(8, 2, dtype=torch.float64)
        walk = Ancestral()
        for i in range(len(times) - 1, 0, -1):
            x_t, _ = walk.step(model, x_t, times[i], times[i - 1], None)
        theirs = walk.finish(model, x_t, times[0], None)
    torch.testing.assert_close(mine, theirs, **CLOSE)
