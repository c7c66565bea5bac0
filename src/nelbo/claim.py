r"""A certificate: what was claimed, of what, and everything that is needed to check it.

The claim is "JSD(p, g) >= x nats with confidence 1 - alpha". The logits of the certificate set are
part of it, so that any reader can compute x again. A bound of 0 is no claim: nothing was detected
with so many pairs.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import nelbo
from nelbo.errors import InputRefused
from nelbo.files import exhausted, hidden, read_json, sync_directory, write_file, write_json_atomic
from nelbo.jsd import LOG2, lower_bound
from nelbo.judges import NONE
from nelbo.prequential import prequential_bound

DETECTABLE = 6.0
"""A bound above 0 takes about 6/JSD pairs, with the best classifier."""
ARRAYS = ("logits_real", "logits_fake", "clips")
UNWRITTEN = (*ARRAYS, "rows_real", "rows_fake", "discriminator")


@dataclass(frozen=True, eq=False)
class Certificate:
    """JSD(p, g) >= jsd_nats_lower with confidence 1 - alpha.

    Arguments:
        jsd_nats_lower: the bound, nats; 0 when nothing was detected.
        alpha: its error probability. n_pairs: pairs that it rests on.
        plugin, plugin_se: mean unclipped payoff and its standard error, nats; no bound.
        log_e_value: of the test of p = g, nats; reject at log(1/alpha) or more.
        clip, temperature, offset: of the logit, fixed before the pairs were opened; the stored
            logits have temperature and offset in them, not the clip. In prequential mode those of
            the last block.
        classifier, classifier_hash: the one that was chosen; candidates: the bound in nats that
            each promised on the calibration part.
        channel: what both sides passed first, or None. sampler: the name of the fakes.
        seed: of everything. split_hash: of the certificate set. data_hash: of all reals.
        rule: how the reals were cut.
        looks: at these reals, this one included.
        mode: "split" or "prequential".
        logits_real, logits_fake: (n_pairs,) float64, in the order of the bound.
        clips: (n_pairs,) in prequential mode, else None.
        n_fit, n_calibration: reals in FIT and CAL, dropped: reals of FIT equal to one of C.
        jsd_nats_two_cells: a second bound on JSD, each with confidence 1 - alpha, not jointly;
            None in prequential mode. tv_lower: bound on total variation, from the same cells.
        accuracy, auc: of the logits on the certificate set.
        version: of the program.
        rows_real, rows_fake: (n_pairs, *shape) the certificate set as stored, in the order of the
            logits; discriminator: such rows -> (B,) logits with temperature and offset, for the
            plane or the most convincing fakes. For looking at only: neither is written.
    """

    jsd_nats_lower: float
    alpha: float
    n_pairs: int
    plugin: float
    plugin_se: float
    log_e_value: float
    clip: float
    temperature: float
    offset: float
    classifier: str
    classifier_hash: str
    candidates: Mapping[str, float]
    channel: str | None
    sampler: str
    seed: int
    split_hash: str
    data_hash: str
    rule: str
    looks: int
    mode: str
    logits_real: Tensor
    logits_fake: Tensor
    clips: Tensor | None = None
    n_fit: int = 0
    n_calibration: int = 0
    dropped: int = 0
    jsd_nats_two_cells: float | None = None
    tv_lower: float | None = None
    accuracy: float = math.nan
    auc: float = math.nan
    version: str = nelbo.__version__
    rows_real: Tensor | None = field(default=None, repr=False)
    rows_fake: Tensor | None = field(default=None, repr=False)
    discriminator: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)

    @property
    def level(self) -> float:
        """Confidence, 1 - alpha."""
        return 1 - self.alpha

    @property
    def jsd_bits_lower(self) -> float:
        """The bound in bits."""
        return self.jsd_nats_lower / LOG2

    @property
    def rejected(self) -> bool:
        """Whether the e-value rejects p = g at level alpha."""
        return self.log_e_value >= math.log(1 / self.alpha)

    def sentence(self) -> str:
        """The claim in words, never more than it is."""
        level = f"{100 * self.level:.4g} % confidence"
        if self.jsd_nats_lower > 0:
            nats, bits = _figure(self.jsd_nats_lower), _figure(self.jsd_bits_lower)
            words = f"JSD >= {nats} nats ({bits} bits) with {level} ({self.n_pairs:,} pairs)"
        else:
            least = _figure(min(DETECTABLE / self.n_pairs, LOG2))
            words = (
                f"no difference certified at n = {self.n_pairs:,} by this classifier; with the "
                f"best one it takes a JSD of about 6/n = {least} nats"
            )
            if self.classifier == NONE:
                words += "; no classifier did better than chance on the calibration pairs"
            if self.rejected:
                words += f"; yet the e-value rejects p = g with {level}"
        if self.channel:
            words += f", after {self.channel}"
        if self.looks > 1:
            words += f"; look {self.looks} at these data: for all {self.looks} to hold jointly, "
            words += f"each needs alpha/{self.looks}"
        return words

    def recomputed(self) -> float:
        """The bound from the stored logits, nats."""
        return bound_again(self.logits_real, self.logits_fake, self.clip, self.clips, self.alpha)

    def as_json(self) -> dict[str, Any]:
        """All but the logits, as a JSON object; what is not finite becomes null."""
        names = [one.name for one in fields(self) if one.name not in UNWRITTEN]
        found: dict[str, Any] = {name: _plain(getattr(self, name)) for name in names}
        found |= {"claim": "jsd_lower_bound", "level": self.level, "unit": "nats"}
        found |= {"jsd_bits_lower": self.jsd_bits_lower, "sentence": self.sentence()}
        return found

    def arrays(self) -> dict[str, np.ndarray]:
        """The logits, and in prequential mode the clips, float64."""
        found = {name: getattr(self, name) for name in ARRAYS}
        return {name: values.numpy() for name, values in found.items() if values is not None}

    def save(self, path: str | Path) -> Path:
        """Write PATH (.json) and, beside it, the logits (.npz).

        Returns:
            the path of the JSON file.

        Raises:
            ResourceExhausted: they could not be written.
        """
        target = Path(path).with_suffix(".json")
        stream = io.BytesIO()
        np.savez(stream, allow_pickle=False, **self.arrays())
        data, beside = stream.getvalue(), target.with_suffix(".npz")
        with exhausted(beside, len(data)):
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = hidden(beside, "tmp")
            write_file(temporary, data)
            os.replace(temporary, beside)
            sync_directory(beside.parent)
        logits = {"file": beside.name, "sha256": hashlib.sha256(data).hexdigest()}
        write_json_atomic(target, self.as_json() | {"schema": 1, "logits": logits})
        return target


def recompute(path: str | Path) -> float:
    """The bound in nats that the logits stored beside a certificate give.

    Arguments:
        path: of a JSON file that `Certificate.save` or `nelbo compare` wrote.

    Raises:
        InputRefused: a file is missing or damaged, or the bound is not the one that is claimed.
    """
    target = Path(path).with_suffix(".json")
    document = read_json(target)
    try:
        claim = document.get("certificate", document)
        beside = target.with_name(Path(document["logits"]["file"]).name)
        data = beside.read_bytes()
        if hashlib.sha256(data).hexdigest() != document["logits"]["sha256"]:
            raise InputRefused(f"{beside}: is not the file that {target} was written with")
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            stored = {name: torch.from_numpy(file[name]) for name in file.files}
        value = bound_again(
            stored["logits_real"],
            stored["logits_fake"],
            claim["clip"],
            stored.get("clips"),
            claim["alpha"],
        )
        claimed = claim["jsd_nats_lower"]
    except (KeyError, TypeError, OSError) as error:
        raise InputRefused(f"{target}: is no certificate with its logits ({error!r})") from error
    if not math.isclose(value, claimed, rel_tol=1e-9, abs_tol=1e-12):
        raise InputRefused(
            f"{target}: claims {claimed} nats, its logits give {value}: one of them was changed"
        )
    return value


def bound_again(
    logits_real: Tensor, logits_fake: Tensor, clip: float, clips: Tensor | None, alpha: float
) -> float:
    """The bound in nats from stored logits: split, or prequential where there are clips."""
    if clips is None:
        return lower_bound(logits_real, logits_fake, clip, alpha)
    return prequential_bound(logits_real, logits_fake, clips, alpha)


def _figure(x: float) -> str:
    """Three digits, rounded down, so that no more is claimed than was shown."""
    if x <= 0:
        return "0"
    digits = 10 ** (2 - math.floor(math.log10(x)))
    return f"{math.floor(x * digits + 1e-9) / digits:.6g}"


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return dict(value) if isinstance(value, Mapping) else value
