"""Derive: the chain of identities, one of them in full, or the chain on a user's own run.

Everything is printed before a disagreement ends the command with exit code 4. That a wrong variant
agrees is a fault as well: the check would not see an error.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from nelbo import console, report
from nelbo.commands import Derive
from nelbo.derivation import chain, page, printed
from nelbo.derivation.chain import Wrong
from nelbo.derivation.identity import Identity, Result
from nelbo.errors import NumericalFailure, UsageError
from nelbo.walks import derived

WIDEST = 100
"""Columns; longer rows are hard to read."""


def run(options: Derive) -> None:
    """`nelbo derive`: compute, print, and say what disagrees.

    Raises:
        NumericalFailure: a line disagrees, or a wrong variant agrees; all was printed.
    """
    words, path = parted(options.what)
    _refuse_page(options, words, path)
    if path is None:
        _refuse_idle(options)
        with _threads(options.threads or 1):
            document = _exact(options, words)
    else:
        document = _on_run(options, words, path)
    if options.json:
        print(json.dumps(document, indent=1))
    sys.stdout.flush()
    if not document["agrees"]:
        raise NumericalFailure(complaint(document))


def parted(words: Sequence[str]) -> tuple[list[str], Path | None]:
    """The words that mean identities, and the run.

    Raises:
        UsageError: a word is neither, or there are two runs.
    """
    names = [word for word in words if chain.known(word)]
    others = [word for word in words if not chain.known(word)]
    places = [word for word in others if os.path.lexists(word) or os.sep in word]
    strange = [word for word in others if word not in places]
    try:
        chain.of_words(strange)
    except UsageError as error:
        raise UsageError(f"{error}; nor is there a run of that name") from None
    if len(places) > 1:
        raise UsageError(f"{' and '.join(places)}: one run at a time")
    return names, Path(places[0]) if places else None


def complaint(document: dict[str, Any]) -> str:
    """What disagrees, and which wrong variants agree, by name."""
    bad = [f"{i['id']} {i['name']}" for i in document["identities"] if not i["agrees"]]
    missed = [e["id"] for e in document["errata"] if not e["caught"]]
    said = [f"{', '.join(bad)}: two sides that are one number disagree"] if bad else []
    said += [f"{', '.join(missed)}: a wrong variant agrees"] if missed else []
    return "; ".join(said)


def _refuse_idle(options: Derive) -> None:
    idle = [name for name in ("examples", "latents") if getattr(options, name) is not None]
    idle += ["checkpoint"] if options.checkpoint != "newest" else []
    if idle:
        raise UsageError(f"--{idle[0]} speaks of a run: name its directory")


def _refuse_page(options: Derive, words: Sequence[str], path: Path | None) -> None:
    if options.page is None:
        return
    if words or options.errata:
        raise UsageError("--page writes the whole chain: name no identity, and leave out --errata")
    if path is not None:
        raise UsageError(f"--page is of the small models; of a run it is {path}/derivation.html")


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """A number of CPU threads, and the old one afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Sheet:
    """Rows on stdout, with colours where it is a terminal; silent if they are not wanted."""

    def __init__(self, wanted: bool) -> None:
        self.wanted = wanted
        self.console = Console(highlight=False)
        self.width = min(self.console.width, WIDEST)

    def show(self, rows: Iterable[printed.Row]) -> None:
        """Print rows; they already have the width."""
        if not self.wanted:
            return
        with self.console.capture() as text:  # rich ends the program where a pipe is closed
            for row, style in rows:
                self.console.print(Text(row, style), crop=False, overflow="ignore", no_wrap=True)
        print(text.get(), end="", flush=True)

    def result(self, result: Result) -> None:
        """An identity as one of the chain."""
        self.show([*printed.result_rows(result, self.width), ("", printed.PLAIN)])

    def whole(self, result: Result, wrong: Sequence[Wrong], words: Sequence[str]) -> None:
        """An identity in full, after the wrong variants that words name, before the others."""
        ids = {erratum.id for erratum in chain.named_of(result.identity, words)}
        named = [one for one in wrong if one.erratum.id in ids]
        others = [one for one in wrong if one.erratum.id not in ids]
        wrap = self.console.is_terminal
        rows = printed.whole_rows(result, others, self.width, named, wrap)
        self.show([*rows, ("", printed.PLAIN)])


def _exact(options: Derive, words: Sequence[str]) -> dict[str, Any]:
    """The chain, or some of it, on small models whose answers are known."""
    started = time.monotonic()
    sheet = Sheet(not options.json)
    chosen = [] if options.errata and not words else chain.of_words(words)
    if not words and not options.errata:
        chosen = list(chain.IDENTITIES)
    tried = [e for e in chain.ERRATA if not words or e.identity in {one.id for one in chosen}]
    results, wrong = [], []
    with _meter(options, len(chosen) + len(tried)) as meter:
        for one in chosen:
            results.append(chain.compute(one, options.seed))
            own = [chain.tried(e, options.seed) for e in chain.errata_of(one)] if words else []
            wrong += own
            sheet.show(_opened(one) if not words else ())
            sheet.whole(results[-1], own, words) if words else sheet.result(results[-1])
            meter.update(len(results) + len(wrong), one.name)
        for erratum in () if words else tried:
            wrong.append(chain.tried(erratum, options.seed))
            if options.errata or not wrong[-1].caught:
                sheet.show([*printed.wrong_rows(wrong[-1], sheet.width), ("", printed.PLAIN)])
            meter.update(len(results) + len(wrong), erratum.id)
    sheet.show(_summary(results, wrong, time.monotonic() - started, sheet.width))
    document = {**chain.document(results, wrong), "seed": options.seed}
    if options.page is not None:
        document["page"] = str(page.write(results, wrong, options.page))
        sheet.show([(f"page: {document['page']}", printed.PLAIN)])
    return document


def _opened(one: Identity) -> Iterator[printed.Row]:
    """The title of the chapter that begins with this identity."""
    for chapter in chain.CHAPTERS:
        if chapter.identities[:1] == (one,):
            yield chapter.title, printed.HEAD
            yield "=" * len(chapter.title), printed.PLAIN
            yield "", printed.PLAIN


def _meter(options: Derive, total: int) -> console.Meter:
    """Progress where nothing else moves on the terminal."""
    moving = sys.stdout.isatty() and not options.json
    return console.Meter("derive", total, "identities", options.quiet or moving)


def _summary(
    results: Sequence[Result], wrong: Sequence[Wrong], seconds: float, width: int
) -> Iterator[printed.Row]:
    """How many agree, how many wrong variants disagree, and which do not."""
    lines = [line for result in results for line in result.lines]
    bad = [result.identity.id for result in results if not result.agrees]
    missed = [one.erratum.id for one in wrong if not one.caught]
    said = []
    if results:
        verdict = f"DISAGREE: {', '.join(bad)}" if bad else "all agree"
        many = f"{len(results)} identit{'y' if len(results) == 1 else 'ies'}"
        said.append(f"{many}, {len(lines)} line{'s' * (len(lines) != 1)}: {verdict}.")
    if wrong:
        verdict = f"AGREE: {', '.join(missed)}" if missed else "all disagree, as they have to"
        said.append(f"{len(wrong)} wrong variant{'s' * (len(wrong) != 1)}: {verdict}.")
    said.append(f"{seconds:.1f} s")
    style = printed.BAD if bad or missed else printed.GOOD
    for row in printed.beside(" ".join(said), "", width):
        yield row, style


def _on_run(options: Derive, words: Sequence[str], path: Path) -> dict[str, Any]:
    """The chain on a trained model and its data.

    Raises:
        UsageError: nothing that was named applies to it.
    """
    if options.errata:
        raise UsageError("--errata are shown on small exact models: leave out the run")
    started = time.monotonic()
    sheet = Sheet(not options.json)
    wanted = {one.id for one in chain.of_words(words)} if words else None
    run = derived.opened(options, path)
    sheet.show(run.opening(sheet.width))
    results = []
    with _meter(options, len(wanted or run.table)) as meter:
        for found in run.results(wanted):
            results.append(found)
            sheet.whole(found, (), words) if words else sheet.result(found)
            meter.update(len(results), found.identity.name)
    if not results:
        raise UsageError(run.nothing())
    sheet.show(run.closing(sheet.width))
    sheet.show(_summary(results, (), time.monotonic() - started, sheet.width))
    about = {"run": run.about, "skipped": run.skipped, "seed": options.seed}
    if not words:
        about["page"] = str(
            page.write_beside(results, path, console.clean(run.words), run.skipped)
        )
        sheet.show([(f"page: {about['page']}", printed.PLAIN)])
    if not words and (path / "report.html").is_file():
        report.write(path)  # it links to the page
    return {**chain.document(results), **about}
