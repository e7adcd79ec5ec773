"""Rows of one optimizer step dealt to the processes of a run. Pure numpy, no torch.

Sorted by their token ids, rows that share a beginning are neighbours (see plan.py). Contiguous runs of that order keep
them together, and a run costs its unique tokens:

    tokens(run) = sum(len) - sum(shared inside the run)

The cuts that make the most expensive run as cheap as it can be are found by bisection over its price.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from espalier.config import MIN_SHARED_TOKENS
from espalier.encode.encode import IGNORE_INDEX, Encoded
from espalier.tree.plan import common_prefix


def deal_rows(
    rows: Sequence[Encoded], num_ranks: int, *, share: bool = True, min_shared_tokens: int = MIN_SHARED_TOKENS
) -> list[list[int]]:
    """Which rows of a step each rank computes: a list of indices into `rows` for every rank, in their order.

    Every row is in exactly one list; lists may be empty. A function of the rows alone, so each rank finds the same.
    share False: rows are not sorted, runs of the given order of equal numbers of rows.
    """
    if not share or not len(rows):
        return [part.tolist() for part in np.array_split(np.arange(len(rows)), num_ranks)]
    return deal_by_beginning([_computed_ids(row) for row in rows], num_ranks, min_shared=min_shared_tokens)


def deal_by_beginning(
    sequences: Sequence[np.ndarray[tuple[int], np.dtype[np.int32]]], num_ranks: int, *, min_shared: int
) -> list[list[int]]:
    """`deal_rows` by any numbers that stand for a row: token ids, or the bytes of its text."""
    order = sorted(range(len(sequences)), key=lambda i: (sequences[i].astype(">i4").tobytes(), i))
    shared = [common_prefix(sequences[a], sequences[b]) for a, b in pairwise(order)]
    shared = [0, *(count if count >= min_shared else 0 for count in shared)]  # with the row before
    lengths = [len(sequences[i]) for i in order]
    low = max(lengths, default=0)
    high = sum(lengths)
    while low < high:
        middle = (low + high) // 2
        if len(_runs(lengths, shared, middle)) <= num_ranks:
            high = middle
        else:
            low = middle + 1
    runs = _runs(lengths, shared, low)
    runs += [(len(order), len(order))] * (num_ranks - len(runs))
    return [sorted(order[begin:end]) for begin, end in runs]


def _runs(lengths: Sequence[int], shared: Sequence[int], most: int) -> list[tuple[int, int]]:
    """The fewest contiguous runs of at most `most` tokens each; one row always fits."""
    runs: list[tuple[int, int]] = []
    begin, tokens = 0, 0
    for at, (length, common) in enumerate(zip(lengths, shared, strict=True)):
        if at > begin and tokens + length - common > most:
            runs.append((begin, at))
            begin, tokens = at, 0
        tokens += length - (common if at > begin else 0)
    return [*runs, (begin, len(lengths))]


def _computed_ids(row: Encoded) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    """The tokens of a row that are computed: all before its last label."""
    supervised = np.flatnonzero(row.labels != IGNORE_INDEX)
    return np.asarray(row.input_ids[: int(supervised[-1]) if len(supervised) else 0], np.int32)
