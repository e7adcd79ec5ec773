"""Example -> Encoded: token ids, labels, and the length policy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IGNORE_INDEX = -100


@dataclass(frozen=True, slots=True)
class Encoded:
    """One row as the model sees it.

    input_ids: int32 [n]. labels: int32 [n]; labels[t] is input_ids[t] where token t is learnt, else IGNORE_INDEX
    (not shifted: the prediction of token t is made at position t - 1; labels[0] is always IGNORE_INDEX).
    weights: float32 [n], factor on the loss of each supervised token, or None for all 1.
    """

    input_ids: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32] | None = None
    file: str = ""
    line: int = 0
