r"""Train a game: two players, the value of the game beside them, and samples at the end.

The value that is shown is that of the training discriminator on training batches: it certifies
nothing. Samples are held against the validation part by two figures that no player minimises and
that leave the test part untouched, both on the model's scale:

    sliced Wasserstein   the mean over directions u of W_2^2(u.x, u.y)
    MMD^2                E κ(x, x') + E κ(y, y') − 2 E κ(x, y),  κ = Σ_k exp(−|a − b|²/2h_k²)

The best checkpoint is that of the least MMD^2: its kernel has a scale h_k for every factor of 4
below the root mean squared distance of the data, so that it sees the width of tight modes. The
sliced Wasserstein distance does not: how many examples happen to fall into which mode moves it by
more than modes that are three times too wide.

References:
    Rabin, Peyré, Delon, Bernot 2011; Bonneel, Rabin, Peyré, Pfister 2015, section 3;
    Gretton et al. 2012, A kernel two-sample test, lemma 6.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nelbo import distributed, report
from nelbo.averages import Halving
from nelbo.commands import Compare
from nelbo.data.feed import Feed
from nelbo.data.loading import batch_indices
from nelbo.errors import UsageError
from nelbo.gan import DiscriminatorLoss, GeneratorLoss
from nelbo.randomness import seeded
from nelbo.rates import Rate
from nelbo.recipes.recipe import GameRecipe
from nelbo.scores import multiscale_mmd2, sliced_wasserstein
from nelbo.trainer import Player, Record, Trainer
from nelbo.walks import compare as comparing
from nelbo.walks.generate import draw
from nelbo.walks.opponents import OWN
from nelbo.walks.played import DISCRIMINATOR, GENERATOR, Played, drawn
from nelbo.walks.sample import write_beside
from nelbo.walks.session import Session
from nelbo.walks.training import Training
from nelbo.walks.watch import Validation, Watch

LEAST = 1000
"""Samples at least that are compared with the validation part."""
MOST = 2000
"""Validation examples at most; all pairs of them are looked at."""
MANY = 5000
"""Training examples of which the root mean squared distance is taken."""
PATIENCE = 0.5
"""Seconds between two values of the game that are shown."""


class Playing(Training):
    """A game.

    Arguments:
        recipe: with fresh weights.
    """

    def __init__(self, recipe: GameRecipe) -> None:
        self.recipe = recipe
        self.name = recipe.name
        self.options = recipe.options
        self.dataset = recipe.dataset

    def model(self) -> dict[str, Any]:
        parameters = sum(p.numel() for p in self.recipe.game.parameters())
        return {"parameters": parameters, "description": self.recipe.description}

    def trainer(self, device: str) -> Trainer:
        return trainer_of(self.recipe, device)

    def watch(self, trainer: Trainer) -> Watch:
        return GameWatch(self.recipe, trainer)

    def finish(self, session: Session, device: str) -> None:
        averaged = session.trainer.averages[GENERATOR].module
        step = session.trainer.step
        played = Played(session.directory, self.recipe, averaged, step, device, {})
        finish(session, played)


def trainer_of(recipe: GameRecipe, device: str) -> Trainer:
    """The trainer of a game: k moves of the discriminator, then one of the generator."""
    options, dataset, rules = recipe.options, recipe.dataset, recipe.rules
    if options.shard:
        raise UsageError("--shard is for diffusion models; a game's players are kept whole")
    game = recipe.game.to(device)

    mine = distributed.rows_of(options.batch)

    def order(move: int) -> Tensor:
        return batch_indices(len(dataset.train), options.batch, options.seed, move)[mine]

    def progress() -> float:
        return max(0, trainer.step - options.warmup) / max(trainer.steps - options.warmup, 1)

    def adam(module: nn.Module) -> torch.optim.Optimizer:
        weights = module.parameters()
        return torch.optim.Adam(weights, lr=options.rate, betas=options.betas, fused=True)

    critic, maker = game.discriminator, game.generator
    loss_critic = DiscriminatorLoss(game, rules, progress)
    moves = options.critic_moves
    trainer = Trainer(
        [
            Player(DISCRIMINATOR, critic, adam(critic), loss_critic, moves, averaged=False),
            Player(GENERATOR, maker, adam(maker), GeneratorLoss(game, rules)),
        ],
        Feed(dataset, order, device, options.ahead, options.steps * (moves + 1)),
        Rate(options.rate, options.steps, options.warmup, options.decay),
        steps=options.steps,
        seed=options.seed,
        ema=Halving(options.half_life, options.batch),
        clip=None if options.clip is None else options.clip * dataset.dims,
        whole=options.batch,
    )
    return trainer


class GameWatch(Watch):
    """A game: the players' losses, the running value, and how far samples are from held-out data.

    Arguments:
        recipe, trainer: of the run.
    """

    def __init__(self, recipe: GameRecipe, trainer: Trainer) -> None:
        self.recipe = recipe
        self.trainer = trainer
        self.records: list[Record] = []
        self.text = ""
        self.due = 0.0
        rows = recipe.dataset.encode(recipe.dataset.train[:MANY]).double()
        self.reach = math.sqrt(2 * float(rows.flatten(1).var(0, correction=0).sum())) or 1.0

    def note(self, record: Record) -> str:
        self.records.append(record)
        if time.monotonic() >= self.due:
            self.due = time.monotonic() + PATIENCE
            self.text = f"JSD (training D, not certified) {self._plug_in():.3f} nats"
        return self.text

    def row(self) -> Mapping[str, Any]:
        """Means of the losses, the value and the gradient norms, these per dimension."""
        last, dims = self.records[-1], self.recipe.dataset.dims
        found = {
            "loss": self._mean(GENERATOR),
            "loss_discriminator": self._mean(DISCRIMINATOR),
            "jsd_plugin": self._plug_in(everywhere=True),
            "grad_norm": last.grad_norms[GENERATOR] / dims,
            "grad_norm_discriminator": last.grad_norms[DISCRIMINATOR] / dims,
        }
        self.records.clear()
        return found

    def _mean(self, name: str) -> float:
        return math.fsum(r.losses[name] for r in self.records) / len(self.records)

    def _plug_in(self, everywhere: bool = False) -> float:
        """Of this rank's logits, or of those of all: then all come here."""
        loss = self.trainer.players[0].loss
        assert isinstance(loss, DiscriminatorLoss)
        return loss.plug_in(everywhere)

    def validate(self) -> Validation | None:
        """Samples of the averaged generator against the validation part; the same z every time."""
        rows = self.recipe.dataset.validation[:MOST]
        if len(rows) < 2:
            return None
        averaged, encode = self.trainer.averages[GENERATOR].module, self.recipe.dataset.encode
        device = str(next(averaged.parameters()).device)
        copies = -(-LEAST // len(rows))
        with seeded(0, "validation"):
            samples = drawn(self.recipe, averaged, copies * len(rows), device)
        real, fake = (encode(some).flatten(1).double() for some in (rows, samples))
        far = sliced_wasserstein(real.repeat(copies, 1), fake)
        apart = multiscale_mmd2(real, fake, self.reach)
        kept = {"mean": apart, "unit": "MMD^2, model's scale", "n": len(rows)}
        plug_in = self._plug_in(everywhere=True)
        jsd = f"JSD (training D, not certified) {plug_in:.3f} nats"
        text = f"validation: MMD^2 {apart:.3g}, sliced Wasserstein {far:.3g}; {jsd}"
        return Validation(kept, {"mmd2": apart, "sliced_wasserstein": far}, text)


def finish(session: Session, played: Played) -> None:
    """Sample, report, print where."""
    options = played.recipe.options
    paths = {}
    if distributed.is_main():
        samples = draw(played, options.samples, options.seed, session.quiet)
        paths = write_beside(session.directory.samples, played.recipe.dataset, samples)
    found = _compared(session, played) if options.compare else []
    if not distributed.is_main():
        return  # what is left is for one
    session.status("finished", 0)
    page = report.write(session.directory.path)
    if session.options.json:
        about = {"schema": 1, "family": "game", "step": played.step, **paths}
        places = {"report": str(page), "run": str(session.directory.path)}
        print(json.dumps({**about, **places, "compared": found}))
    else:
        said = [comparing.text(found), ""] if found else []
        print("\n".join([*said, *paths.values(), f"report: {page}"]))


def _compared(session: Session, played: Played) -> list[dict[str, Any]]:
    """The samples before data that nobody trained on: what a generator has instead of a bound."""
    options = Compare(
        real=OWN,
        fakes=(str(session.directory.path),),
        seed=played.recipe.options.seed,
        device="cpu" if played.device == "cpu" else "cuda",
        quiet=session.quiet,
    )
    return comparing.compared(options)
