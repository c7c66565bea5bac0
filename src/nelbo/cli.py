"""The command line: one thin function per subcommand.

A subcommand's dataclass is its options. Nothing heavy is imported before the command needs it, so
that help appears at once. Results go to stdout, everything else to stderr. Exit codes: 0 done,
1 bug, 2 usage, 3 input refused, 4 numerical failure, 5 resources, 130 and 143 stopped (saved).
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from nelbo import __version__
from nelbo.errors import (
    InputRefused,
    NumericalFailure,
    ResourceExhausted,
    UsageError,
    exit_code,
)


def train(arguments: list[str]) -> int:
    """Train a recipe, measure its bound, draw samples, write a report."""
    import tyro

    from nelbo.recipes import families, limits

    if not arguments or arguments[0] in ("-h", "--help"):
        head = "usage: nelbo train RECIPE [PATH] [options]\n\nrecipes:\n"
        text = f"{head}{_recipes()}\n\n`nelbo train RECIPE --help` lists the options of one."
        print(text, file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else UsageError.exit_code
    name = arguments[0]
    family, rest = families.chosen(name, arguments[1:])
    kind = families.kind_of(name, family)
    about = f"{_about(kind)}\n\n{_other(name, family)}".strip()
    options = tyro.cli(kind, prog=f"nelbo train {name}", args=rest, description=about)
    limits.check(options)
    from nelbo.distributed import joined
    from nelbo.walks import train as walk

    with joined(options.dist_timeout, device=options.device):
        return walk.run(options, ["train", *arguments])


def _other(name: str, family: str) -> str:
    """That the recipe has another family, for its help."""
    from nelbo.recipes import families

    if len(families.families(name)) < 2:
        return ""
    if family == families.GAME:
        return (
            "A game (--game); --no-game trains a diffusion model (its options: --no-game --help)."
        )
    return (
        "A diffusion model; --game trains a generator against a discriminator instead "
        "(--game --help: its options)."
    )


def recipes(arguments: list[str]) -> int:
    """List the recipes."""
    options = _parse("Recipes", arguments)
    if options.json:
        from nelbo.recipes.options import RECIPES

        rows = {n: _row(n, k) for n, k in RECIPES.items()}
        print(json.dumps({"schema": 1, "recipes": rows}))
    else:
        print(_recipes())
    return 0


def _row(name: str, kind: type) -> dict[str, Any]:
    from nelbo.recipes import families

    return {"path": _has_path(kind), "about": _about(kind), "families": families.families(name)}


def _recipes() -> str:
    from nelbo.recipes import families
    from nelbo.recipes.options import RECIPES

    flags = {"diffusion game": " [--game]", "game diffusion": " [--no-game]"}
    lines = []
    for name, kind in RECIPES.items():
        words = name + " PATH" * _has_path(kind) + flags.get(" ".join(families.families(name)), "")
        lines.append(f"  {words:22}  {_about(kind)}")
    note = "--game: a generator against a discriminator; --no-game: a diffusion model all the same"
    return "\n".join([*lines, "", f"  {note}"])


def _has_path(kind: type) -> bool:
    return any("path" in base.__dict__.get("__annotations__", {}) for base in kind.__mro__)


def _about(kind: type) -> str:
    return (kind.__doc__ or "").strip()


def evaluate(arguments: list[str]) -> int:
    """Measure the bound of a run's model on its data."""
    options = _parse("Evaluate", arguments)
    from nelbo.distributed import joined
    from nelbo.walks import against, flow, progressive, steps
    from nelbo.walks import evaluate as plain

    _threads(options.threads)
    asked = [walk for walk in (against, steps, flow, progressive) if walk.asked(options)]
    if len(asked) > 1:
        names = " and ".join(walk.OPTION for walk in asked)
        raise UsageError(f"{names} are measurements of their own: ask for one at a time")
    with joined(options.dist_timeout, device=options.device):
        (asked[0] if asked else plain).run(options)
    return 0


def sample(arguments: list[str]) -> int:
    """Draw samples from a run's model, freely or under a condition."""
    options = _parse("Sample", arguments)
    from nelbo.walks import conditional, generate, interpolate, strips
    from nelbo.walks import sample as walk

    _threads(options.threads)
    walk.check(options)
    others = (generate, interpolate, strips, conditional)
    next((other for other in others if other.asked(options)), walk).run(options)
    return 0


def compare(arguments: list[str]) -> int:
    """Certify how far samples are from data, at least."""
    options = _parse("Compare", arguments)
    from nelbo.distributed import joined
    from nelbo.walks import compare as walk

    _threads(options.threads)
    with joined(options.dist_timeout, device=options.device):
        walk.run(options)
    return 0


def derive(arguments: list[str]) -> int:
    """Run the derivation, on small exact models or on a run."""
    options = _parse("Derive", arguments)
    from nelbo.walks import derive as walk

    _threads(options.threads)
    walk.run(options)
    return 0


def export(arguments: list[str]) -> int:
    """Write a run's model for another library."""
    options = _parse("Export", arguments)
    from nelbo.walks import export as walk

    walk.run(options)
    return 0


def report(arguments: list[str]) -> int:
    """Write the report of a run."""
    options = _parse("Report", arguments)
    from nelbo import report as pages
    from nelbo.rundir import RunDirectory

    RunDirectory(options.run).open()
    page = pages.write(options.run)
    print(json.dumps({"schema": 1, "report": str(page)}) if options.json else page)
    return 0


def doctor(arguments: list[str]) -> int:
    """Check this machine and installation."""
    options = _parse("Doctor", arguments)
    from nelbo.distributed import joined
    from nelbo.walks import doctor as walk

    with joined():
        return walk.run(options.json)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train,
    "evaluate": evaluate,
    "sample": sample,
    "compare": compare,
    "derive": derive,
    "export": export,
    "report": report,
    "recipes": recipes,
    "doctor": doctor,
}


SHARED = {"train", "evaluate", "compare", "doctor"}
"""Commands at which the ranks of torchrun work together."""


def _parse(kind: str, arguments: list[str]) -> Any:
    import tyro

    from nelbo import commands
    from nelbo.recipes import limits

    options = tyro.cli(getattr(commands, kind), prog=f"nelbo {kind.lower()}", args=arguments)
    limits.check(options)
    return options


def _threads(count: int | None) -> None:
    if count is not None:
        import torch

        torch.set_num_threads(count)


def usage() -> str:
    """The text of `nelbo --help`."""
    lines = [
        "usage: nelbo COMMAND [options]",
        "",
        "Trains, samples and measures diffusion models and GANs: every nat accounted for.",
        "",
    ]
    for name, command in COMMANDS.items():
        lines.append(f"  {name:10}  {(command.__doc__ or '').splitlines()[0]}")
    return "\n".join([*lines, "", "`nelbo COMMAND --help` lists the options of a command."])


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # tyro colours its help whenever the terminal can, also where NO_COLOR is set
    if os.environ.get("NO_COLOR"):
        os.environ.setdefault("PYTHON_TYRO_ANSI_CODES", "False")
    if "RANK" in os.environ:  # what becomes of a rank is told in a sentence, not by stack traces
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    return _guarded(arguments)


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage(), file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else UsageError.exit_code
    if arguments[0] in ("-V", "--version"):
        print(f"nelbo {__version__}")
        return 0
    if arguments[0] not in COMMANDS:
        raise UsageError(f"no command {arguments[0]!r}\n\n{usage()}")
    if arguments[0] not in SHARED and os.environ.get("RANK", "0") != "0":
        return 0  # one rank is enough
    return COMMANDS[arguments[0]](arguments[1:])


def _complain(text: str, error: Exception) -> None:
    """Say what is wrong, once for all ranks that found the same."""
    several = os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" in os.environ
    who = f"rank {os.environ['RANK']}: " if several else ""
    if not getattr(error, "told", False):
        print(f"nelbo: {who}{text}", file=sys.stderr)


def _guarded(arguments: list[str]) -> int:
    """Run a command; errors that a user can mend are one message, others a traceback."""
    try:
        code = _run(arguments)
        sys.stdout.flush()
        return code
    except (UsageError, InputRefused, NumericalFailure, ResourceExhausted) as error:
        _complain(str(error), error)
        return error.exit_code
    except MemoryError:
        print("nelbo: out of memory; take a smaller --batch", file=sys.stderr)
        return ResourceExhausted.exit_code
    except BrokenPipeError:
        # the reader of our output is gone; nothing is left to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("nelbo: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if exit_code(error) == ResourceExhausted.exit_code:
            _complain(f"{error}; make room, then run again", error)
            return ResourceExhausted.exit_code
        traceback.print_exc()
        print("nelbo: this is a bug of nelbo; please report the lines above", file=sys.stderr)
        return 1
