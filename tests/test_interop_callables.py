"""Any Python function as a model: what it predicts, in every meaning, comes out as the same model.

Data of one point a have the exact denoiser x_0 = a, so that every prediction is known, and with
the posterior's variance every KL is 0; what is left is the mass of one bin under the decoder.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from nelbo.bound import bound
from nelbo.errors import InputRefused
from nelbo.interop.callables import wrap
from nelbo.interop.foreign import Assumptions, Foreign
from nelbo.recipes.foreign import Unit

T = 20
BETAS = torch.linspace(1e-3, 0.4, T, dtype=torch.float64)
KEEP = torch.cumprod(1 - BETAS, 0)
LEVEL = 5  # of 17
POINT = LEVEL / 8 - 1
DATA = torch.full((6, 1, 4, 4), POINT)


def scales(i: Tensor) -> tuple[Tensor, Tensor]:
    keep = KEEP[i].float().reshape(-1, 1, 1, 1)
    return keep.sqrt(), (1 - keep).sqrt()


def noise_of_the_point(x: Tensor, i: Tensor) -> Tensor:
    keep, lose = scales(i)
    return (x - keep * POINT) / lose


def velocity_of_the_point(x: Tensor, i: Tensor) -> Tensor:
    keep, lose = scales(i)
    return keep * noise_of_the_point(x, i) - lose * POINT


def mean_of_the_point(x: Tensor, i: Tensor) -> Tensor:
    """μ̃ by Ho et al. 2020, eq. 7, with x_0 = a; at the first step a itself."""
    before = torch.where(i > 0, KEEP[(i - 1).clamp(min=0)], torch.ones(()))
    data = before.sqrt() * BETAS[i] / (1 - KEEP[i])
    latent = (1 - BETAS[i]).sqrt() * (1 - before) / (1 - KEEP[i])
    return (data.reshape(-1, 1, 1, 1) * POINT + latent.reshape(-1, 1, 1, 1) * x).float()


PREDICTIONS = {
    "epsilon": noise_of_the_point,
    "x0": lambda x, i: torch.full_like(x, POINT),
    "velocity": velocity_of_the_point,
    "mean": mean_of_the_point,
}


def wrapped(name: str = "x0", **more: object) -> Foreign:
    options: dict[str, object] = {"assumptions": Assumptions(levels=17), **more}
    return wrap(  # type: ignore[arg-type]
        PREDICTIONS[name], betas=BETAS, shape=(1, 4, 4), prediction=name, **options
    )


@pytest.mark.parametrize("name", PREDICTIONS)
def test_every_prediction_of_a_point_costs_nothing(name: str) -> None:
    found = wrapped(name)
    value = bound(found.model, DATA, found.times)
    assert float(value.diffusion.abs().max()) < 1e-4
    copied = float(BETAS[1] * (1 - KEEP[0]) / (1 - KEEP[1]))  # the second step's variance
    nats = -16 * math.log(math.erf((1 / 16) / math.sqrt(2 * copied)))
    assert value.reconstruction.tolist() == pytest.approx([nats] * 6, rel=1e-3)
    keep = float(KEEP[-1])
    prior = 8 * (keep * POINT**2 - keep - math.log(1 - keep))
    assert value.prior.tolist() == pytest.approx([prior] * 6, rel=1e-4)


def test_a_lambda() -> None:
    found = wrap(lambda x, i: 0 * x, betas=[0.1, 0.2, 0.3], shape=(3, 4, 4))
    assert found.times.tolist() == pytest.approx([1 / 3, 2 / 3, 1])
    assert found.description["parameterization"] == "epsilon"
    assert found.description["parameters"] == "unknown"
    assert set(found.assumed) == {"scaling", "levels", "edge", "clip"}
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(found.model.predict(x, found.times[0]), x / math.sqrt(0.9))


def test_times_are_whole_numbers_per_example() -> None:
    seen = []
    found = wrap(lambda x, i: (seen.append(i), 0 * x)[1], betas=BETAS, shape=(1, 4, 4))
    found.model.predict(DATA, found.times[3])
    found.model.predict(DATA, found.times[torch.tensor([0, 4, 19, 1, 2, 7])])
    assert [i.tolist() for i in seen] == [[3] * 6, [0, 4, 19, 1, 2, 7]]
    assert {i.dtype for i in seen} == {torch.int64}


def test_the_times_of_a_shorter_walk_are_the_original_ones() -> None:
    """A chain of which every fifth step is kept tells the network the steps that it knows."""
    seen = []
    found = wrap(lambda x, i: (seen.append(int(i[0])), 0 * x)[1], betas=BETAS, shape=(1, 4, 4))
    times = found.model.process.schedule.grid(4)
    bound(found.model, DATA, times)
    assert seen == [0, 6, 13, 19]


def test_variances() -> None:
    small = wrapped(variance="posterior").model.kernel(DATA, *reversed_pair(7))
    large = wrapped(variance="transition").model.kernel(DATA, *reversed_pair(7))
    assert float(large.variance.flatten()[0]) == pytest.approx(float(BETAS[7]), rel=1e-6)
    ratio = (1 - KEEP[6]) / (1 - KEEP[7])
    assert float(small.variance.flatten()[0]) == pytest.approx(float(ratio * BETAS[7]), rel=1e-6)

    def learned(x: Tensor, i: Tensor) -> Tensor:
        return torch.cat((torch.full_like(x, POINT), torch.zeros_like(x)), 1)

    both = wrap(learned, betas=BETAS, shape=(1, 4, 4), prediction="x0", variance="between")
    middle = both.model.kernel(DATA, *reversed_pair(7)).variance.flatten()[0]
    want = (large.variance * small.variance).sqrt().flatten()[0]
    torch.testing.assert_close(middle, want)


def reversed_pair(i: int) -> tuple[Tensor, Tensor]:
    times = wrapped().times
    return times[i], times[i - 1]


def test_clipping_is_part_of_the_model() -> None:
    found = wrap(lambda x, i: 0 * x + 3, betas=BETAS, shape=(1, 4, 4), prediction="x0", clip=0.5)
    assert float(found.model.predict(DATA, found.times[0]).max()) == 0.5
    free = wrap(
        lambda x, i: 0 * x + 3,
        betas=BETAS,
        shape=(1, 4, 4),
        prediction="x0",
        clip=0.5,
        assumptions=Assumptions(clip="none"),
    )
    assert float(free.model.predict(DATA, free.times[0]).max()) == 3


def test_data_on_zero_to_one() -> None:
    """The same function on x/16 instead of x/8 - 1: levels are encoded and read off there."""
    data = Unit("d", *3 * [torch.full((2, 1, 4, 4), LEVEL)], 17, torch.zeros(()), 1.0, {})  # type: ignore[arg-type]
    x = data.encode(data.test)
    assert torch.equal(x, torch.full((2, 1, 4, 4), LEVEL / 16))
    assert torch.equal(data.decode(x), data.test.to(torch.uint8))
    found = wrap(
        lambda x, i: torch.full_like(x, LEVEL / 16),
        betas=BETAS,
        shape=(1, 4, 4),
        prediction="x0",
        assumptions=Assumptions(levels=17, scaling="unit", edge=1e-6),
    )
    value = bound(found.model, x, found.times)
    assert float(value.reconstruction.abs().max()) < 1e-6
    assert float(value.diffusion.abs().max()) < 1e-4


def test_a_module_is_put_into_eval_mode_and_its_parameters_counted() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.drop = nn.Conv2d(1, 1, 1), nn.Dropout(0.9)

        def forward(self, x: Tensor, i: Tensor) -> Tensor:
            return self.drop(self.conv(x))

    net = Net().train()
    found = wrap(net, betas=BETAS, shape=(1, 4, 4))
    assert not net.training and found.description["parameters"] == "2"


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x, i: x[:, :, :2], "returned .6, 1, 2, 4. for x_t .6, 1, 4, 4."),
        (lambda x, i: (x,), "returned tuple"),
        (lambda x, i: torch.cat((x, x), 1), "expected a tensor .6, 1, 4, 4."),
    ],
)
def test_functions_that_return_something_else(function: object, message: str) -> None:
    found = wrap(function, betas=BETAS, shape=(1, 4, 4))  # type: ignore[arg-type]
    with pytest.raises(InputRefused, match=message):
        found.model.predict(DATA, found.times[0])


@pytest.mark.parametrize("betas", [[], [0.0, 0.1], [0.1, 1.5], [math.nan, 0.1], [0.5, 1.0]])
def test_betas_that_are_none(betas: list[float]) -> None:
    with pytest.raises(InputRefused, match="beta"):
        wrap(lambda x, i: x, betas=betas, shape=(1, 4, 4))


def test_one_step_has_no_second_variance() -> None:
    assert "lose" in wrap(lambda x, i: x, betas=[0.5], shape=(1, 4, 4)).description["decoder"]
    with pytest.raises(InputRefused, match="no second variance"):
        given = Assumptions(edge="following")
        wrap(lambda x, i: x, betas=[0.5], shape=(1, 4, 4), assumptions=given)
