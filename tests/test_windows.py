"""Means over neighbours, and Chebyshev interpolation."""

from __future__ import annotations

import torch

from nelbo.windows import chebyshev, lagrange, neighbours


def test_means_are_symmetric_and_keep_lines() -> None:
    """On an even grid a line stays a line, to its ends; no window reaches beyond its width."""
    logsnr = torch.linspace(5, -5, 101, dtype=torch.float64)
    line = (3 + 2 * logsnr)[None]
    torch.testing.assert_close(neighbours(line, logsnr, 0.35), line, rtol=1e-12, atol=1e-12)
    spike = torch.zeros(1, 101, dtype=torch.float64)
    spike[0, 50] = 1
    spread = neighbours(spike, logsnr, 0.35)[0]
    assert (spread > 0).nonzero().flatten().tolist() == list(range(47, 54))
    torch.testing.assert_close(spread[47:54], torch.full((7,), 1 / 7, dtype=torch.float64))


def test_noise_falls_and_ends_and_steps_stay() -> None:
    torch.manual_seed(0)
    logsnr = torch.linspace(5, -5, 1001, dtype=torch.float64)
    noise = torch.randn(4, 1001, 2).double()
    smooth = neighbours(noise, logsnr, 0.25)
    assert smooth.shape == noise.shape and float(smooth[:, 50:-50].std()) < 0.2
    assert torch.equal(smooth[:, 0], noise[:, 0]) and torch.equal(smooth[:, -1], noise[:, -1])
    coarse = torch.tensor([5.0, 1.0, -4.0, -torch.inf], dtype=torch.float64)
    assert torch.equal(neighbours(noise[:, :4], coarse, 0.25), noise[:, :4])


def test_polynomials_through_the_nodes_are_exact() -> None:
    nodes, place = chebyshev(7), torch.linspace(-1, 1, 50, dtype=torch.float64)

    def curve(u: torch.Tensor) -> torch.Tensor:
        return 1 - 2 * u + 0.5 * u**3 + u**6

    torch.testing.assert_close(lagrange(place, 7) @ curve(nodes), curve(place))
    torch.testing.assert_close(lagrange(nodes, 7), torch.eye(7, dtype=torch.float64))
