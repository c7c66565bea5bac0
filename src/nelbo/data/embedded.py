"""The 1,797 handwritten digits that the package carries: 8x8 pixels, 17 grey levels.

E. Alpaydin, C. Kaynak (1998), Optical Recognition of Handwritten Digits, UCI, CC BY 4.0; the file
`digits.ATTRIBUTION.txt` beside the data has the details.
"""

from __future__ import annotations

from importlib.resources import files

import numpy as np

from nelbo.data.base import Dataset
from nelbo.data.provenance import Provenance
from nelbo.data.splits import Rows, by_content

LICENCE = (
    "CC BY 4.0: E. Alpaydin, C. Kaynak (1998), Optical Recognition of Handwritten Digits, UCI "
    "Machine Learning Repository, https://doi.org/10.24432/C50P49"
)
TEST = 297


def digits(validation: int = 100) -> Dataset:
    """Handwritten digits, levels 0..16, (1, 8, 8), with labels.

    The test part are the 297 examples whose bytes have the least SHA-256 sums.

    Arguments:
        validation: number of validation examples, taken from the other 1,500.
    """
    with (
        files("nelbo.data").joinpath("digits.npz").open("rb") as stored,
        np.load(stored, allow_pickle=False) as arrays,
    ):
        rows = Rows(arrays["images"][:, None], labels=arrays["labels"])
    origin = Provenance("digits", None, levels=17, licence=LICENCE)
    return by_content(rows, origin, test=TEST, validation=validation)
