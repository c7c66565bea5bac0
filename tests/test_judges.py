"""The classifiers: balanced, repeatable, on the scale that was asked for."""

from __future__ import annotations

import math

import pytest
import torch
from shifts import image, normal, shift
from torch import Tensor

from nelbo.certificate import certify
from nelbo.errors import UsageError
from nelbo.judges import Convolutional, Fixed, Judge, Perceptron, Regression
from nelbo.randomness import generator


@pytest.mark.parametrize("judge", [Regression(0), Regression(20), Perceptron(32, members=1)])
def test_unequal_numbers_do_not_move_the_logit(judge: Judge):
    """Of equal laws the logit is 0, not log(n1/n0) = log 5."""
    network = judge.fit(normal(2000, 2).float(), normal(400, 2, seed=1).float(), 0)
    with torch.no_grad():
        logits = network(normal(2000, 2, seed=2).float())
    assert abs(float(logits.mean())) < 0.3 < math.log(5) / 2


def test_the_regression_finds_the_logit_of_a_shift():
    network = Regression(0).fit(normal(4000, 2).float(), shift(1, 2)(4000).float(), 0)
    x = normal(500, 2, seed=5)
    with torch.no_grad():
        assert float((network(x.float()) - (0.5 - x[:, 0])).abs().mean()) < 0.25


def test_images_get_convolutions():
    """A stroke that stands upright or lies, at any place: means are equal, convolutions see it."""

    def strokes(n: int, lying: bool, seed: int) -> Tensor:
        x = torch.zeros(n, 1, 8, 8, dtype=torch.uint8)
        place = torch.randint(0, 6, (n, 2), generator=generator(seed, "place"))
        for i, (a, b) in enumerate(place.tolist()):
            rows, columns = (slice(a, a + 1), slice(b, b + 3))
            x[i, 0][(rows, columns) if lying else (columns, rows)] = 255
        noise = torch.randint(0, 40, x.shape, generator=generator(seed, "noise"))
        return (x.int() + noise).clamp(0, 255).byte()

    found = certify(strokes(600, True, 0), strokes(600, False, 1), judges=[Convolutional(8)])
    assert found.jsd_nats_lower > 0.3 and found.classifier == "conv-8"


def test_a_fixed_classifier_is_called_on_the_scale_of_encode():
    seen: list[Tensor] = []

    def judge(x: Tensor) -> Tensor:
        seen.append(x)
        return x.flatten(1).mean(1)

    certify(image(100), image(100, 1), judges=[judge])
    assert {x.dtype for x in seen} == {torch.float32}
    assert float(torch.cat(seen).min()) == -1 and float(torch.cat(seen).max()) == 1
    seen.clear()
    certify(image(100), image(100, 1), judges=[Fixed(judge)], encode=lambda x: x / 51)
    assert float(torch.cat(seen).max()) == 5


def test_few_fakes_may_train_and_wide_rows_are_turned_to_few_axes():
    calls: list[int] = []

    def sampler(n: int) -> Tensor:
        calls.append(n)
        return 1.5 * torch.randn(n, 1100)

    found = certify(normal(200, 1100), sampler, judges=[Regression(10)], fit_fakes=40)
    assert calls == [40, 20, 90] and found.n_fit == 90
    again = certify(normal(200, 1100), sampler, judges=[Regression(10)], fit_fakes=40)
    assert torch.equal(found.logits_real, again.logits_real)
    with pytest.raises(UsageError, match="no judges"):
        certify(normal(200), shift(1), judges=[])


def test_textures_tell_laws_of_pixels_apart_that_no_mean_and_no_shape_tells():
    """Uniform noise against clipped normal noise of the same spread, at every pixel alike."""

    def clipped(n: int) -> Tensor:
        return (74 * torch.randn(n, 1, 8, 8) + 127.5).clamp(0, 255).byte()

    found = certify(image(400), clipped)
    assert found.jsd_nats_lower > 0.3 and found.classifier == "logistic-texture"
