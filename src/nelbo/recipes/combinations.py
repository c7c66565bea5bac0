"""Options of Gaussian diffusion that make no sense together, refused before anything is built."""

from __future__ import annotations

import dataclasses

from nelbo.errors import UsageError
from nelbo.recipes.groups import Diffusion, Noise

LEARNED = ("between", "free")
"""Variances that come from the network."""


def check(options: Diffusion) -> None:
    """Refuse combinations in which a part would not be trained, or not be defined.

    Raises:
        UsageError: the message says what to type.
    """
    check_times(options)
    _variance(options)
    _prediction(options)
    _schedule(options)


def check_times(options: Noise) -> None:
    """Refuse two answers to which times are drawn more often; of any family.

    Raises:
        UsageError: --focus was typed beside --times second-moment or --schedule learned.
    """
    if options.focus is None or options.focus == default_focus(options):
        return
    if options.times == "second-moment":
        raise UsageError(
            "--focus says which times to draw more often, and --times second-moment finds it out: "
            "take one of them"
        )
    if options.schedule == "learned":
        raise UsageError(
            "--focus is a bump over the log-SNRs of a fixed schedule, and --schedule learned "
            "moves times to where they lower the variance: take one of them"
        )


def default_focus(options: Noise) -> tuple[float, float] | None:
    """What the recipe has if nothing was typed."""
    fields = {field.name: field for field in dataclasses.fields(options)}
    found: tuple[float, float] | None = fields["focus"].default  # type: ignore[assignment]
    return found


def focused(options: Noise) -> bool:
    """Whether --focus is used: a recipe's own one makes room for what finds it out."""
    found = options.times == "second-moment" or options.schedule == "learned"
    return options.focus is not None and not found


def _variance(options: Diffusion) -> None:
    learned = options.variance in LEARNED
    if options.objective == "hybrid" and not learned:
        raise UsageError(
            "--objective hybrid trains the variance by the bound and the mean by the plain error, "
            f"and --variance {options.variance} is fixed: take --variance between, or --objective "
            "simple"
        )
    if options.objective in ("simple", "mean", "continuous") and learned:
        raise UsageError(
            f"--objective {options.objective} does not see the variance, and --variance "
            f"{options.variance} would never be trained: take --objective hybrid or vlb, or a "
            "fixed variance (posterior, transition)"
        )
    if options.learn_betas and options.objective != "vlb":
        raise UsageError(
            f"--learn-betas follows the bound, and --objective {options.objective} is none: take "
            "--objective vlb"
        )


def _prediction(options: Diffusion) -> None:
    if options.predict == "epsilon" and options.schedule == "harmonic":
        raise UsageError(
            "--schedule harmonic erases everything at its last step, where noise says nothing of "
            "the data: take --predict x0 or velocity"
        )
    if options.predict != "mean":
        return
    if options.latents < 2:
        raise UsageError("--predict mean speaks of a pair of latents: take --latents 2 or more")
    if options.schedule == "learned" or options.objective == "continuous":
        raise UsageError(
            "--predict mean is of the steps of one chain, and continuous time has none: take "
            "--predict velocity, x0 or epsilon"
        )


def _schedule(options: Diffusion) -> None:
    if options.schedule == "learned" and options.objective != "continuous":
        raise UsageError(
            f"--schedule learned is trained by the bound in continuous time, and --objective is "
            f"{options.objective}: give --objective continuous as well"
        )
    if options.schedule == "learned" and options.times == "second-moment":
        raise UsageError(
            "--schedule learned moves the times to where they lower the variance, and so does "
            "--times second-moment: take one of them"
        )
    if options.objective != "continuous":
        return
    if options.schedule not in ("logsnr", "learned"):
        raise UsageError(
            f"--objective continuous needs every time, and --schedule {options.schedule} is "
            "defined at its own steps only: take --schedule logsnr or learned"
        )
    if options.latents < 2:
        raise UsageError("--objective continuous is an integral: take --latents 2 or more")
