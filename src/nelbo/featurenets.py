r"""Features from networks that need no download: one trained on labels, one left at random.

    classifier      h(y), where softmax(W h(y) + b) was trained on labelled rows
    random network  at each scale s, the means over a 2x2 grid of r_s = SiLU(conv_s(pool r_{s-1}))

A trained last layer looks at what tells the classes apart and forgets the rest; random filters
look at edges and colours alike. Neither normalises over the batch.

References:
    Wu, He 2018 for group normalisation; Saxe et al. 2011 for random filters as features.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nelbo.errors import InputRefused, NumericalFailure
from nelbo.extractors import Features, Inputs
from nelbo.randomness import generator, seeded

WIDTH, SCALES, GRID, GROUPS = 16, 3, 2, 8
RATE = 2e-3


def random_network(inputs: Inputs, seed: int = 0) -> Features:
    """Means on a 2x2 grid at each of up to three scales of a convolutional network left at random.

    Raises:
        InputRefused: the examples are no images.
    """
    if len(inputs.shape) != 3:
        raise InputRefused(
            "the random ConvNet reads images (C, H, W); for vectors take standardised or PCA"
        )
    scales = sum(min(inputs.shape[1:]) >= 2**s for s in range(SCALES))
    with seeded(seed, "random features"):
        network = _Random(inputs.shape[0], scales)
    return Features(f"random ConvNet, seed {seed}", inputs, network)


class _Random(nn.Module):
    def __init__(self, channels: int, scales: int) -> None:
        super().__init__()
        widths = [channels] + [WIDTH] * scales
        self.layers = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(widths)
        )
        for layer in self.layers:
            assert isinstance(layer, nn.Conv2d) and layer.bias is not None
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.normal_(layer.bias, std=0.5)

    def forward(self, h: Tensor) -> Tensor:
        found = []
        for scale, layer in enumerate(self.layers):
            # SiLU, because a channel that ReLU switches off everywhere would be no feature.
            h = nn.functional.silu(layer(h if scale == 0 else nn.functional.avg_pool2d(h, 2)))
            grid = (min(GRID, h.shape[2]), min(GRID, h.shape[3]))
            found.append(nn.functional.adaptive_avg_pool2d(h, grid).flatten(1))
        return torch.cat(found, 1)


@dataclass(frozen=True)
class Labelled:
    """Examples with classes, never those that are scored.

    Arguments:
        rows: (n, *shape). classes: (n,) integers from 0 on.
    """

    rows: Tensor
    classes: Tensor


def classifier(
    train: Labelled,
    held_out: Labelled,
    *,
    levels: int | None = 256,
    dims: int = 64,
    epochs: int = 15,
    seed: int = 0,
) -> Features:
    """The last hidden layer of a small classifier; its note states the held-out accuracy.

    A ConvNet with group normalisation for images, a perceptron for vectors; Adam, batches of 64.
    Each feature is standardised by the training rows, since kernels depend on the scale.

    Arguments:
        train, held_out: labelled examples, disjoint. levels: of uint8 rows.
        dims: k, features; a multiple of 16.
        seed: of weights and order. The same seed gives the same features on the same machine.
    Raises:
        InputRefused: classes that do not fit, or a single one.
        NumericalFailure: the training diverged.
    """
    if dims % (2 * GROUPS):
        raise InputRefused(f"dims={dims}: ask for a multiple of {2 * GROUPS} features")
    _check_classes(train, held_out)
    inputs = Inputs.of(train.rows, levels)
    x = inputs.encode(train.rows).float()
    count = int(train.classes.max()) + 1
    with seeded(seed, "classifier features"):
        body = _body(x, dims)
        head = nn.Linear(dims, count)
    _fit(nn.Sequential(body, head), x, train.classes.long(), epochs, seed)
    kind = f"classifier, {count} classes"
    with torch.no_grad():
        hidden = Features(kind, inputs, body)
        guess = head(hidden.features(held_out.rows).float()).argmax(1)
        scaled = _standardizing(hidden.features(train.rows).float())
    right = float((guess == held_out.classes).double().mean())
    note = f"accuracy {100 * right:.1f} % on {len(guess)} held-out examples"
    return Features(kind, inputs, nn.Sequential(body, scaled), note=note)


def _check_classes(train: Labelled, held_out: Labelled) -> None:
    for part in (train, held_out):
        fits = part.classes.shape == (len(part.rows),) and len(part.rows) > 0
        if not fits or part.classes.is_floating_point() or int(part.classes.min()) < 0:
            raise InputRefused(
                f"classes are {tuple(part.classes.shape)} {part.classes.dtype} for "
                f"{len(part.rows)} examples: give one integer from 0 on for each"
            )
    if int(train.classes.max()) < 1:
        raise InputRefused("all labels are one class: a classifier needs at least two")


def _body(x: Tensor, dims: int) -> nn.Module:
    """(B, *shape) -> (B, dims); vectors are standardised by the training rows."""
    if x.dim() != 4:
        first = nn.Linear(x[0].numel(), 2 * dims)
        return nn.Sequential(
            nn.Flatten(), _standardizing(x.flatten(1)), first, nn.SiLU(), _last(2 * dims, dims)
        )
    convolutions: list[nn.Module] = []
    before, side = x.shape[1], min(x.shape[2:])
    for width in (dims // 2, dims):
        convolutions += [
            nn.Conv2d(before, width, 3, padding=1),
            nn.GroupNorm(GROUPS, width),
            nn.SiLU(),
        ]
        before = width
        if side > GRID:
            convolutions, side = [*convolutions, nn.AvgPool2d(2)], side // 2
    pooled = nn.AdaptiveAvgPool2d(GRID)
    return nn.Sequential(*convolutions, pooled, nn.Flatten(), _last(GRID**2 * dims, dims))


def _last(wide: int, dims: int) -> nn.Module:
    return nn.Sequential(nn.Linear(wide, dims), nn.SiLU())


class _Shift(nn.Module):
    def __init__(self, shift: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("shift", shift)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = (x - self.get_buffer("shift")) / self.get_buffer("scale")
        return out


def _standardizing(x: Tensor) -> nn.Module:
    """By the mean and deviation of each column of (n, k); columns without spread keep theirs."""
    scale = x.std(0, correction=0)
    return _Shift(x.mean(0), torch.where(scale > 0, scale, 1.0))


def _fit(network: nn.Module, x: Tensor, classes: Tensor, epochs: int, seed: int) -> None:
    optimizer = torch.optim.Adam(network.parameters(), RATE)
    for epoch in range(epochs):
        order = torch.randperm(len(x), generator=generator(seed, "classifier order", epoch))
        for rows in order.split(64):
            loss = nn.functional.cross_entropy(network(x[rows]), classes[rows])
            if not bool(torch.isfinite(loss)):
                raise NumericalFailure(f"the classifier for features diverged in epoch {epoch}")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
