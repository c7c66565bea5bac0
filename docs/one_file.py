"""A Gaussian diffusion model in one file: it trains on a Swiss roll, and bounds -log p(x_0).

Letters: x_0 is data, x_t a latent, which keeps the share `keep` of the data's variance and loses
the share lose = 1 - keep to the noise eps: x_t = sqrt(keep) x_0 + sqrt(lose) eps, eps ~ N(0, 1).
Latents live at `times` t_1 < ... < t_N (data has no time), s is the one before t, and logsnr =
log(keep/lose) falls in t. The bound on -log p(x_0), in nats per example, is L(x_0) = prior +
diffusion + reconstruction =

    KL(q(x_N|x_0) || N(0, 1)) + sum over t of KL(q(x_s|x_t,x_0) || p(x_s|x_t)) - log p(x_0|x_1).
"""

import math

import torch
from torch import nn
from torch.nn.functional import softplus

LATENTS, UPDATES, BATCH, RATE, TRAIN, TEST = 200, 4000, 512, 2e-3, 10_000, 1000
times = torch.linspace(0, 1, LATENTS, dtype=torch.float64)

# Data: 256 equal Gaussians along a spiral, u from 1.5 pi to 4.5 pi. Its density is known.
COUNT, STD = 256, torch.tensor(0.05, dtype=torch.float64)
u = 1.5 * math.pi * (1 + (2 * torch.arange(COUNT, dtype=torch.float64) + 1) / COUNT)
CENTRES = torch.stack([u * u.cos(), u * u.sin()], 1) / 10


def roll(count):
    """(count, 2) independent draws."""
    kind = torch.multinomial(torch.ones(COUNT), count, replacement=True)
    return CENTRES[kind] + STD * torch.randn(count, 2, dtype=torch.float64)


def log_normal(x, mean, variance):
    """log N(x; mean, variance), summed over dimensions; nats."""
    return -0.5 * ((x - mean) ** 2 / variance + (2 * math.pi * variance).log()).sum(-1)


def true_log_p(x):
    """The log density of the data; nats."""
    return log_normal(x[:, None], CENTRES, STD**2).logsumexp(1) - math.log(COUNT)


# The schedule. lose is not computed as 1 - keep: next to data its digits would be gone.
def logsnr(t):
    return 8.0 - 14.0 * t


def keep(t):
    return torch.sigmoid(logsnr(t))


def lose(t):
    return torch.sigmoid(-logsnr(t))


class Network(nn.Module):
    """(x_t, t) -> the noise that it believes to be in x_t. Any network will do."""

    def __init__(self, width=256, depth=4):
        super().__init__()
        hidden = [part for _ in range(depth) for part in (nn.Linear(width, width), nn.SiLU())]
        self.layers = nn.Sequential(nn.Linear(15, width), nn.SiLU(), *hidden, nn.Linear(width, 2))

    def forward(self, x_t, t):
        t = t.expand(len(x_t), 1)
        angles = t * math.pi * 2.0 ** torch.arange(6)
        return self.layers(torch.cat([x_t, t, angles.sin(), angles.cos()], 1).float()).double()


# Below, x is (B, 2), t () or (B, 1), all float64; the network alone computes in float32.
def noised(x_0, t, eps):
    """x_t ~ q(x_t|x_0)."""
    return keep(t).sqrt() * x_0 + lose(t).sqrt() * eps


def posterior(x_t, x_0, t, s):
    """Mean and variance of q(x_s|x_t,x_0): by Bayes, where x_t came from if one knows x_0."""
    c = -torch.expm1(logsnr(t) - logsnr(s))  # 1 - snr_t/snr_s, without cancellation
    alpha = keep(t) / keep(s)
    return keep(s).sqrt() * c * x_0 + alpha.sqrt() * lose(s) / lose(t) * x_t, lose(s) * c


def guess(network, x_t, t):
    """The network's x_0: the noise that it sees is taken out of x_t."""
    return (x_t - lose(t).sqrt() * network(x_t, t)) / keep(t).sqrt()


def kernel(network, x_t, t, s):
    """Mean and variance of p(x_s|x_t): the posterior, with the guess in the place of x_0."""
    return posterior(x_t, guess(network, x_t, t), t, s)


def l_simple(network, x_0, t, eps):
    """What is trained, (B,): the KLs of the bound without their weights, at one time each."""
    return ((eps - network(noised(x_0, t, eps), t)) ** 2).sum(1)


def term(network, x_0, i, eps):
    """What is measured, (B,) nats: term i of the bound at one draw of its latent."""
    t = times[i]
    x_t = noised(x_0, t, eps)
    if i == 0:  # the decoder p(x_0|x_1) is N(guess, lose)
        return -log_normal(x_0, guess(network, x_t, t), lose(t))
    mean, variance = posterior(x_t, x_0, t, times[i - 1])
    mean_p, _ = kernel(network, x_t, t, times[i - 1])
    return ((mean - mean_p) ** 2 / (2 * variance)).sum(1)  # KL of Gaussians of equal variance


@torch.no_grad()
def bound(network, x_0):
    """Prior, diffusion and reconstruction, each (B,) nats; the prior needs no draw."""
    prior = 0.5 * (keep(times[-1]) * (x_0**2 - 1) + softplus(logsnr(times[-1]))).sum(1)
    terms = [term(network, x_0, i, torch.randn_like(x_0)) for i in range(LATENTS)]
    return prior, torch.stack(terms[1:]).sum(0), terms[0]


@torch.no_grad()
def sample(network, count):
    """(count, 2) draws x_0 ~ p: noise, and then back along the chain."""
    x = torch.randn(count, 2, dtype=torch.float64)
    for i in range(LATENTS - 1, 0, -1):
        mean, variance = kernel(network, x, times[i], times[i - 1])
        x = mean + variance.sqrt() * torch.randn_like(x)
    return guess(network, x, times[0]) + lose(times[0]).sqrt() * torch.randn_like(x)


def main():
    torch.manual_seed(0)
    data, test, network = roll(TRAIN), roll(TEST), Network()
    shift, scale = data.mean(0), data.var(0).mean().sqrt()
    optimizer = torch.optim.Adam(network.parameters(), lr=RATE)
    for update in range(UPDATES):
        x_0 = (data[torch.randint(TRAIN, (BATCH,))] - shift) / scale
        t = times[torch.randint(LATENTS, (BATCH, 1))]
        optimizer.zero_grad()
        l_simple(network, x_0, t, torch.randn_like(x_0)).mean().backward()
        optimizer.param_groups[0]["lr"] = RATE * (1 - update / UPDATES)
        optimizer.step()
    terms = bound(network, (test - shift) / scale)
    total = sum(terms) + 2 * scale.log()  # a density has units: back from the model's scale
    rows = dict(zip(("prior", "diffusion", "reconstruction"), terms, strict=True))
    rows |= {"bound, units of data": total, "bound - truth": total + true_log_p(test)}
    drawn = sample(network, TEST) * scale + shift
    rows |= {"true -log p, test": -true_log_p(test), "true -log p, samples": -true_log_p(drawn)}
    for name, nats in rows.items():
        print(f"{name:20} {nats.mean():8.4f} ± {nats.std() / math.sqrt(TEST):.4f} nats/example")


if __name__ == "__main__":
    main()
