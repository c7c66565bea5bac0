"""Train: from options to a run directory that holds a model, its figures, samples, a report."""

from __future__ import annotations

import copy
import dataclasses
import json
from contextlib import AbstractContextManager, suppress
from typing import Any

import torch
from torch import Tensor

from nelbo import console, distributed, report, sharding
from nelbo.averages import EMA, Warming
from nelbo.data.feed import Feed
from nelbo.data.loading import batch_indices
from nelbo.design import enough
from nelbo.errors import InputRefused, ResourceExhausted, UsageError
from nelbo.losses import ModelLoss
from nelbo.rates import Rate
from nelbo.recipes.adversarial import build_game
from nelbo.recipes.build import build
from nelbo.recipes.families import Run, family_of, flag_of, folder_name, name_of, stored
from nelbo.recipes.groups import GameOptions, Options
from nelbo.recipes.recipe import Recipe
from nelbo.rundir import RunDirectory, default_path
from nelbo.samplers import Ancestral
from nelbo.speed import prepared
from nelbo.trainer import Player, Trainer
from nelbo.walks import evaluate as evaluating
from nelbo.walks import sample as sampling
from nelbo.walks.measuring import Request, measure
from nelbo.walks.pace import chosen
from nelbo.walks.play import Playing
from nelbo.walks.session import Session
from nelbo.walks.signals import Stop, ending
from nelbo.walks.stored import PLAYER, Stored, check_data, device_of, options_of
from nelbo.walks.training import Training
from nelbo.walks.watch import BoundWatch, Watch


def run(options: Run, arguments: list[str]) -> int:
    """`nelbo train`: returns the exit code."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    directory = RunDirectory(options.out or default_path(folder_name(options)))
    training = _begin(directory, options, arguments)
    device = device_of(options.device)
    trainer = training.trainer(device)
    session = Session(directory, _shown(training, options), trainer, training.watch(trainer))
    directory.environment(device)
    try:
        with Stop() as stop:
            session.restore(options.resume)
            code = session.train(stop)
        if code == 0:
            with ending():
                training.finish(session, device)
    except BaseException as error:
        # if the disk is full this fails as well, and the first error says more
        with suppress(ResourceExhausted):
            session.fail(error)
        raise
    finally:
        trainer.close()
        directory.release()
    return code


def _shown(training: Training, options: Run) -> Run:
    """The run's own options, with how this start is to speak."""
    return dataclasses.replace(training.options, json=options.json, quiet=options.quiet)


def _made(options: Run) -> Training:
    """What the options mean, with fresh weights."""
    if isinstance(options, GameOptions):
        return Playing(build_game(options))
    return Diffusing(build(options))


def _begin(directory: RunDirectory, options: Run, arguments: list[str]) -> Training:
    """A new directory, or with --resume the one that exists."""
    if distributed.on_main(lambda: options.resume and directory.begun()):
        directory.open()
        distributed.on_main(directory.lock)
        own = options_of(directory)
        training = _made(started(own, options))
        check_data(directory, training.dataset)
        _check_ranks(training)
        _say_ignored(options, training.options)
        return training
    training = _made(options)
    # refuse data that cannot fill a batch before anything is written
    batch_indices(len(training.dataset.train), options.batch, options.seed, 0)
    about = {
        "recipe": training.name,
        "family": family_of(options),
        "options": stored(options),
        "data": training.dataset.record,
        "model": training.model(),
    }
    _check_ranks(training)
    distributed.on_main(lambda: directory.create(about, arguments))
    return training


def started(own: Run, options: Run) -> Run:
    """A run's own options, with how this start reads, computes and speaks."""
    names = ("cache", "ahead", "shard", "quiet", "kernels", "graphs")
    shared = {name: getattr(options, name) for name in names if hasattr(options, name)}
    return dataclasses.replace(own, **{k: v for k, v in shared.items() if hasattr(own, k)})


def _check_ranks(training: Training) -> None:
    """Refuse ranks that read different data, or have nothing to do.

    Raises:
        InputRefused: the data differ. UsageError: more ranks than a part of the batch has rows.
    """
    distributed.spans(training.options.batch, getattr(training.options, "accumulation", 1))
    mine = str(training.dataset.record.get("sha256"))
    first = distributed.on_main(lambda: mine)
    if distributed.agree_any(first != mine):
        raise InputRefused(
            "the ranks do not read the same data (their SHA-256 differ): give every machine the "
            "same files"
        )


def _say_ignored(options: Run, own: Run) -> None:
    """With --resume the run keeps its own options; say so if others were typed."""
    if type(options) is not type(own):
        words = " ".join([name_of(own), *flag_of(own)])
        raise InputRefused(f"the run to resume is of the recipe {words}")
    before, now = stored(own), stored(options)
    defaults = stored(type(options)(**({"path": options.path} if "path" in now else {})))  # type: ignore[union-attr]
    typed = sorted(k for k in now if now[k] != before[k] and now[k] != defaults[k])
    if typed:
        console.say(f"--resume keeps the options of the run; ignored: {', '.join(typed)}")


class Diffusing(Training):
    """A diffusion model.

    Arguments:
        recipe: with fresh weights.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.name = recipe.name
        self.options: Options = recipe.options
        self.dataset = recipe.dataset

    def model(self) -> dict[str, Any]:
        parameters = sum(p.numel() for p in self.recipe.model.parameters())
        return {"parameters": parameters, "description": self.recipe.description}

    def trainer(self, device: str) -> Trainer:
        return trainer_of(self.recipe, device)

    def watch(self, trainer: Trainer) -> Watch:
        return BoundWatch(self.recipe, trainer)

    def finish(self, session: Session, device: str) -> None:
        averaged: Any = session.trainer.averages[PLAYER].whole()
        finish(session, dataclasses.replace(self.recipe, model=averaged), device)


def trainer_of(recipe: Recipe, device: str) -> Trainer:
    """The trainer of a recipe; batches and noise are functions of (seed, step)."""
    options, dataset = recipe.options, recipe.dataset
    model = recipe.model.to(device)
    dealt = _deal(recipe, device) if options.shard else None
    loss = ModelLoss(recipe.objective, model)
    way = chosen(options, device, distributed.world_size(), loss.fixed)
    done = prepared(
        model.network,
        device,
        kernels=options.kernels,
        compiled=options.compile,
        graphs=way.network,
    )
    said = done if device == "cpu" else f"{done}; {way.said}"
    spoken = said != "kernels: plain" or options.kernels != "auto"
    if spoken and not options.quiet:
        console.say(said)

    mine = distributed.rows_of(options.batch, options.accumulation)

    def order(step: int) -> Tensor:
        return batch_indices(len(dataset.train), options.batch, options.seed, step)[mine]

    # biases, gains and position maps are not shrunk: zero means nothing special there
    shrunk = [p for name, p in model.named_parameters() if p.ndim >= 2 and not _placed(name)]
    others = [p for name, p in model.named_parameters() if p.ndim < 2 or _placed(name)]
    groups: list[dict[str, Any]] = [
        {"params": shrunk, "weight_decay": options.weight_decay},
        {"params": others},
    ]
    optimizer = torch.optim.AdamW(
        groups,
        lr=options.rate,
        betas=(0.9, options.beta2),
        weight_decay=0.0,
        fused=True,
    )
    player = Player(PLAYER, model, optimizer, loss)
    return Trainer(
        [player],
        Feed(dataset, order, device, options.ahead, options.steps),
        Rate(options.rate, options.steps, options.warmup, options.decay),
        steps=options.steps,
        seed=options.seed,
        ema=Warming(options.ema),
        clip=None if options.clip is None else options.clip * dataset.dims,
        accumulation=options.accumulation,
        autocast=_autocast(device) if options.bf16 else None,
        carried={"objective": recipe.objective},
        whole=options.batch,
        dealt=dealt,
        stepping=way.stepping,
    )


def _deal(recipe: Recipe, device: str) -> dict[str, EMA]:
    """Deal the network to the ranks, in place, and its average, which is made before.

    Raises:
        UsageError: something outside of the network learns as well.
    """
    inside = {id(p) for p in recipe.model.network.parameters()}
    if any(p.requires_grad and id(p) not in inside for p in recipe.model.parameters()):
        raise UsageError("--shard deals a network; a schedule that learns is none: leave it out")
    distributed.same(recipe.model.state_dict().values())
    shadow, whole = copy.deepcopy(recipe.model), copy.deepcopy(recipe.model)
    for model in (recipe.model, shadow):
        sharding.shard(model.network, device)
    average = EMA(recipe.model, Warming(recipe.options.ema), (shadow, whole))
    return {PLAYER: average}


def _placed(name: str) -> bool:
    """Whether a parameter is a map over positions."""
    return name.endswith((".positions", ".bias"))


def _autocast(device: str) -> Any:
    def context() -> AbstractContextManager[None]:
        return torch.autocast(torch.device(device).type, dtype=torch.bfloat16)

    return context


def finish(session: Session, recipe: Recipe, device: str) -> None:
    """Measure, sample, report, print.

    Arguments:
        recipe: with the averaged model.
    """
    stored_run = Stored(session.directory, recipe, session.trainer.step, {})
    options = recipe.options
    # a small test part needs more calls than asked for; nothing may be lost for that at the end
    calls = None if options.calls is None else enough(len(recipe.dataset.test), options.calls)
    request = Request("test", calls, options.seed, quiet=session.quiet)
    (result,) = measure(recipe, [recipe.model], request)
    extra = evaluating.truth(recipe, request)
    if not distributed.is_main():
        return  # what is left is for one
    value = evaluating.write(stored_run, request, result, extra)
    times = recipe.times
    samples, strip = sampling.draw(
        recipe,
        recipe.model.to(device),
        options.samples,
        Ancestral(),
        times,
        options.seed,
        device,
        session.quiet,
        batch=options.samples,
    )
    sampling.write(stored_run, session.directory.samples, samples, strip, times, options.seed)
    session.status("finished", 0)
    page = report.write(session.directory.path)
    if session.options.json:
        print(json.dumps({**value, "run": str(session.directory.path)}, indent=1))
    else:
        print(evaluating.lines(value))
        print(f"\nreport: {page}")
