"""Train: from options to a run directory that holds a model, its bound, samples and a report."""

from __future__ import annotations

import dataclasses
import json
from contextlib import AbstractContextManager, suppress
from typing import Any

import torch
from torch import Tensor

from nelbo import console, report
from nelbo.averages import Warming
from nelbo.data.loading import batch_indices
from nelbo.design import enough
from nelbo.errors import InputRefused, ResourceExhausted
from nelbo.recipes.build import build
from nelbo.recipes.options import Options, name_of, stored
from nelbo.recipes.recipe import Recipe
from nelbo.rundir import RunDirectory, default_path
from nelbo.samplers import Ancestral
from nelbo.trainer import Player, Rate, Trainer
from nelbo.walks import evaluate as evaluating
from nelbo.walks import sample as sampling
from nelbo.walks.measuring import Request, measure
from nelbo.walks.session import Session
from nelbo.walks.signals import Stop, ending
from nelbo.walks.stored import PLAYER, Stored, check_data, device_of, options_of


def run(options: Options, arguments: list[str]) -> int:
    """`nelbo train`: returns the exit code."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    directory = RunDirectory(options.out or default_path(name_of(options)))
    recipe = _begin(directory, options, arguments)
    device = device_of(options.device)
    session = Session(directory, recipe, trainer_of(recipe, device), options.quiet)
    directory.environment(device)
    try:
        with Stop() as stop:
            session.restore(options.resume)
            code = session.train(stop)
        if code == 0:
            with ending():
                finish(session, device, options.json)
    except BaseException as error:
        # if the disk is full this fails as well, and the first error says more
        with suppress(ResourceExhausted):
            session.fail(error)
        raise
    finally:
        directory.release()
    return code


def _begin(directory: RunDirectory, options: Options, arguments: list[str]) -> Recipe:
    """A new directory, or with --resume the one that exists."""
    if options.resume and directory.begun():
        directory.open()
        directory.lock()
        recipe = build(options_of(directory))
        check_data(directory, recipe)
        _say_ignored(options, recipe)
        return recipe
    recipe = build(options)
    # refuse data that cannot fill a batch before anything is written
    batch_indices(len(recipe.dataset.train), options.batch, options.seed, 0)
    parameters = sum(p.numel() for p in recipe.model.parameters())
    about = {
        "recipe": recipe.name,
        "options": stored(options),
        "data": recipe.dataset.record,
        "model": {"parameters": parameters, "description": recipe.description},
    }
    directory.create(about, arguments)
    return recipe


def _say_ignored(options: Options, recipe: Recipe) -> None:
    """With --resume the run keeps its own options; say so if others were typed."""
    if name_of(options) != recipe.name:
        raise InputRefused(f"the run to resume is of the recipe {recipe.name}")
    before, now = stored(recipe.options), stored(options)
    defaults = stored(type(options)(**({"path": options.path} if "path" in now else {})))  # type: ignore[attr-defined]
    typed = sorted(k for k in now if now[k] != before[k] and now[k] != defaults[k])
    if typed:
        console.say(f"--resume keeps the options of the run; ignored: {', '.join(typed)}")


def trainer_of(recipe: Recipe, device: str) -> Trainer:
    """The trainer of a recipe; batches and noise are functions of (seed, step)."""
    options, dataset = recipe.options, recipe.dataset
    model = recipe.model.to(device)
    if options.compile:
        model.network.compile()

    def batch(step: int) -> Tensor:
        rows = batch_indices(len(dataset.train), options.batch, options.seed, step)
        return dataset.encode(dataset.train[rows]).to(device)

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
    player = Player(PLAYER, model, optimizer, lambda x_0: recipe.objective(model, x_0))
    return Trainer(
        [player],
        batch,
        Rate(options.rate, options.steps, options.warmup, options.decay),
        steps=options.steps,
        seed=options.seed,
        ema=Warming(options.ema),
        clip=None if options.clip is None else options.clip * dataset.dims,
        accumulation=options.accumulation,
        autocast=_autocast(device) if options.bf16 else None,
        carried={"objective": recipe.objective},
    )


def _placed(name: str) -> bool:
    """Whether a parameter is a map over positions."""
    return name.endswith((".positions", ".bias"))


def _autocast(device: str) -> Any:
    def context() -> AbstractContextManager[None]:
        return torch.autocast(torch.device(device).type, dtype=torch.bfloat16)

    return context


def finish(session: Session, device: str, as_json: bool) -> None:
    """Measure, sample, report, print."""
    recipe = dataclasses.replace(session.recipe, model=session.model)
    stored_run = Stored(session.directory, recipe, session.trainer.step, {})
    options = recipe.options
    # a small test part needs more calls than asked for; nothing may be lost for that at the end
    calls = None if options.calls is None else enough(len(recipe.dataset.test), options.calls)
    request = Request("test", calls, options.seed, quiet=session.quiet)
    (result,) = measure(recipe, [recipe.model], request)
    extra = evaluating.truth(recipe, request)
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
    if as_json:
        print(json.dumps({**value, "run": str(session.directory.path)}, indent=1))
    else:
        print(evaluating.lines(value))
        print(f"\nreport: {page}")
