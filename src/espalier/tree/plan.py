"""Rows of one optimizer step -> Packs: which positions are computed, and once. Pure numpy, no torch.

Rows are sorted by their token ids; what a row has in common with its neighbour is computed once. With `len_i` the
length of row i and `shared_i` what it shares with row i + 1, a contiguous run of rows costs

    tokens = sum(len) - sum(shared)                          (its unique tokens)
    pairs  = sum(tri(len)) - sum(tri(shared)),  tri(n) = n(n+1)/2   ((query, key) pairs that attention computes)

so cutting the sorted rows into packs costs exactly the shared beginnings at the cuts, and a linear dynamic programme
finds the cheapest cuts. Packs depend on the set of rows alone, not on their order inside the step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from espalier.config import MIN_SHARED_TOKENS
from espalier.encode.encode import IGNORE_INDEX, Encoded
from espalier.errors import DataError, UsageError

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]

# One more pack is one more forward and backward: worth about this many tokens of repeated prefix.
PACK_COST_TOKENS = 64


@dataclass(frozen=True, slots=True)
class PackLabels:
    """The labels of the rows, one by one, K = num_supervised of them.

    row: int64 [K], index into the rows given to plan_step. target: int64 [K], index into 0..M-1 of the pack's targets.
    weight: float64 [K].
    """

    row: npt.NDArray[np.int64]
    target: npt.NDArray[np.int64]
    weight: npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Pack:
    """One forward: a forest of shared beginnings laid flat, each node followed by all that descends from it.

    input_ids, position_ids: int32 [T]. A position is the token's index in its own row.
    segment_start, segment_length, segment_parent: int32 [S]. The tokens of a segment are consecutive in the pack and
        continue the path of the parent segment's last token; parent -1 begins a row. Parents come before children.
    logit_positions: int32 [M], index into 0..T-1 of the position whose hidden state predicts target_ids[m], sorted.
    target_weights: float32 [M], sum of the row weights over the rows that share the target.
    target_counts: int32 [M], how many rows share the target.
    num_logical_tokens: tokens of the plain rows; num_supervised: sum of target_counts.
    labels: which row each target is of, for what is counted by row.
    """

    input_ids: Ints
    position_ids: Ints
    segment_start: Ints
    segment_length: Ints
    segment_parent: Ints
    logit_positions: Ints
    target_ids: Ints
    target_weights: Floats
    target_counts: Ints
    num_rows: int
    num_logical_tokens: int
    num_supervised: int
    labels: PackLabels

    @property
    def num_tokens(self) -> int:
        """Unique tokens: those that are computed."""
        return len(self.input_ids)

    @property
    def num_pairs(self) -> int:
        """(query, key) pairs inside the causal tree."""
        return int(self.position_ids.sum(dtype=np.int64)) + self.num_tokens


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one optimizer step computes. `reason` says why sharing is off, and is empty where rows are shared."""

    packs: tuple[Pack, ...]
    num_rows: int
    unique_tokens: int
    logical_tokens: int
    num_supervised: int
    weight_sum: float
    reason: str

    @property
    def saving(self) -> float:
        """Logical tokens for each computed one."""
        return self.logical_tokens / max(1, self.unique_tokens)


@dataclass(frozen=True, slots=True)
class _Branch:
    """Rows with the same computed tokens. depth: int64 [K] indices into ids whose hidden state predicts `target`, a
    label of row number `row`."""

    ids: Ints
    row: npt.NDArray[np.int64]
    depth: npt.NDArray[np.int64]
    target: Ints
    weight: npt.NDArray[np.float64]
    num_rows: int
    logical: int


def plan_step(
    rows: Sequence[Encoded],
    *,
    max_tokens: int,
    max_pairs: int | None = None,
    min_shared_tokens: int = MIN_SHARED_TOKENS,
    min_saving: float = 1.15,
    share: bool = True,
) -> StepPlan:
    """Packs for the rows of one optimizer step, each within `max_tokens` unique tokens and `max_pairs` attention pairs.

    A beginning shorter than `min_shared_tokens` is not worth a branch of its own; whole rows that repeat always
    are. Where sharing saves less than a factor of `min_saving`, rows are laid side by side, isolated from each other
    (as with `share=False`), and `reason` says so. A row is never split: one that does not fit is a DataError that
    names it. Rows without a label compute nothing.
    """
    if max_tokens < 1 or (max_pairs is not None and max_pairs < 1) or min_shared_tokens < 1:
        raise UsageError(
            f"budget of {max_tokens} tokens and {max_pairs} pairs, minimum shared length {min_shared_tokens}: "
            "each must be 1 or more"
        )
    _refuse_long_rows(rows, max_tokens, max_pairs)
    labelled = ((number, row) for number, row in enumerate(rows) if (row.labels != IGNORE_INDEX).any())
    ordered = sorted((_branch(number, row) for number, row in labelled), key=_sort_key)
    reason = "" if share else "sharing is switched off"
    merged = _merge_repeats(ordered) if share else ordered
    shared = _shared_with_next(merged, min_shared_tokens) if share else np.zeros(max(0, len(ordered) - 1), np.int64)
    if share and ordered:
        plain_tokens = sum(len(branch.ids) for branch in ordered)
        unique = sum(len(branch.ids) for branch in merged) - int(shared.sum())
        if plain_tokens < min_saving * unique:
            reason = f"sharing would save a factor of {plain_tokens / unique:.2f} only, below {min_saving:g}"
            merged, shared = ordered, np.zeros(len(ordered) - 1, np.int64)
    packs = tuple(
        _lay_out(merged[begin:end], shared[begin : end - 1])
        for begin, end in _cut(merged, shared, max_tokens, max_pairs or np.iinfo(np.int64).max)
    )
    return StepPlan(
        packs=packs,
        num_rows=len(rows),
        unique_tokens=sum(pack.num_tokens for pack in packs),
        logical_tokens=sum(len(row.input_ids) for row in rows),
        num_supervised=sum(pack.num_supervised for pack in packs),
        weight_sum=float(sum(pack.target_weights.sum(dtype=np.float64) for pack in packs)),
        reason=reason,
    )


def _computed_length(row: Encoded) -> int:
    """Tokens of a row that are computed: all before the last label, which is predicted and predicts nothing."""
    supervised = np.flatnonzero(row.labels != IGNORE_INDEX)
    return int(supervised[-1]) if len(supervised) else 0


def _refuse_long_rows(rows: Sequence[Encoded], max_tokens: int, max_pairs: int | None) -> None:
    details = []
    for row in rows:
        length = _computed_length(row)
        place = f"{row.file or 'row'}:{row.line}"
        if length > max_tokens:
            details.append(f"{place}: {length} tokens to compute")
        elif max_pairs is not None and _triangle(length) > max_pairs:
            details.append(f"{place}: {_triangle(length)} attention pairs")
    if details:
        budget = f"{max_tokens} tokens" + (f" and {max_pairs} attention pairs" if max_pairs is not None else "")
        raise DataError(
            f"{len(details)} row(s) do not fit the budget of {budget} for one forward, and a row is never split",
            todo="Raise the budget, or lower the maximum length so that the length policy handles these rows.",
            details=sorted(details)[:20] + ([f"and {len(details) - 20} more"] if len(details) > 20 else []),
        )


def _branch(number: int, row: Encoded) -> _Branch:
    length = _computed_length(row)
    supervised = np.flatnonzero(row.labels != IGNORE_INDEX)
    if supervised[0] == 0:
        raise DataError("the first token has a label, which nothing can predict", where=f"{row.file}:{row.line}")
    weights = np.ones(len(row.labels), np.float32) if row.weights is None else row.weights
    return _Branch(
        ids=np.asarray(row.input_ids[:length], np.int32),
        row=np.full(len(supervised), number, np.int64),
        depth=supervised - 1,
        target=np.asarray(row.labels[supervised], np.int32),
        weight=np.asarray(weights[supervised], np.float64),
        num_rows=1,
        logical=len(row.input_ids),
    )


def _sort_key(branch: _Branch) -> tuple[bytes, bytes, bytes, bytes, int]:
    """Token ids in order (big-endian bytes compare as numbers do), then all else that tells two rows apart."""
    labels = branch.depth.tobytes(), branch.target.tobytes(), branch.weight.tobytes()
    return branch.ids.astype(">i4").tobytes(), *labels, branch.logical


def _merge_repeats(ordered: list[_Branch]) -> list[_Branch]:
    """Neighbours with the same computed tokens become one branch that holds the targets of all."""
    groups: list[list[_Branch]] = []
    for branch in ordered:
        if groups and np.array_equal(groups[-1][0].ids, branch.ids):
            groups[-1].append(branch)
        else:
            groups.append([branch])
    return [
        group[0]
        if len(group) == 1
        else _Branch(
            ids=group[0].ids,
            row=np.concatenate([branch.row for branch in group]),
            depth=np.concatenate([branch.depth for branch in group]),
            target=np.concatenate([branch.target for branch in group]),
            weight=np.concatenate([branch.weight for branch in group]),
            num_rows=len(group),
            logical=sum(branch.logical for branch in group),
        )
        for group in groups
    ]


def common_prefix(a: Ints, b: Ints) -> int:
    """How many leading tokens two rows have in common."""
    length = min(len(a), len(b))
    differs = a[:length] != b[:length]
    first = int(differs.argmax()) if length else 0
    return first if length and differs[first] else length


def _shared_with_next(branches: Sequence[_Branch], min_shared: int) -> npt.NDArray[np.int64]:
    """int64 [rows - 1]: how many leading tokens each row shares with the next, once short branches are undone.

    Top-down: a run of rows that agree on `depth` tokens stays together where neighbours agree on at least
    `min_shared` more; the agreement of a whole run is one node. Rows that agree on less are separate children.
    """
    raw = np.array([common_prefix(a.ids, b.ids) for a, b in pairwise(branches)], np.int64)
    shared = np.zeros_like(raw)
    todo = [(0, len(raw), 0)]  # neighbour pairs begin..end agree on `depth` tokens at least
    while todo:
        begin, end, depth = todo.pop()
        shared[begin:end] = depth
        near = np.flatnonzero(raw[begin:end] >= depth + min_shared) + begin
        if not len(near):
            continue
        breaks = np.flatnonzero(np.diff(near) > 1)
        firsts = near[np.concatenate([[0], breaks + 1])]
        lasts = near[np.concatenate([breaks, [len(near) - 1]])]
        todo += [(int(a), int(b) + 1, int(raw[a : b + 1].min())) for a, b in zip(firsts, lasts, strict=True)]
    return shared


def _triangle(length: int) -> int:
    return length * (length + 1) // 2


def _cut(
    branches: Sequence[_Branch], shared: npt.NDArray[np.int64], max_tokens: int, max_pairs: int
) -> list[tuple[int, int]]:
    """Cheapest cuts of the sorted rows into runs within both budgets, as (begin, end), in linear time.

    best[j] = min over begins i that fit of best[i] + repeated[i] + PACK_COST_TOKENS: cutting before row i repeats
    what rows i - 1 and i share. The begins that fit form a window that only moves forward, so its minimum is kept
    in a queue. A row alone always fits (see _refuse_long_rows).
    """
    count = len(branches)
    lengths = np.array([len(branch.ids) for branch in branches], np.int64)
    repeated = np.concatenate([[0], shared]).astype(np.int64)  # [rows], lost by a cut before the row
    tokens = np.concatenate([[0], np.cumsum(lengths - repeated[:count])])
    pairs = np.concatenate([[0], np.cumsum((lengths * (lengths + 1) - repeated[:count] * (repeated[:count] + 1)) // 2)])
    best, previous = [0] * (count + 1), [0] * (count + 1)
    window: deque[int] = deque()
    low = 0
    for end in range(1, count + 1):
        begin = end - 1
        price = best[begin] + int(repeated[begin])
        while window and best[window[-1]] + int(repeated[window[-1]]) > price:
            window.pop()
        window.append(begin)
        while (
            tokens[end] - tokens[low] + repeated[low] > max_tokens
            or pairs[end] - pairs[low] + _triangle(int(repeated[low])) > max_pairs
        ):
            low += 1
        while window[0] < low:
            window.popleft()
        previous[end] = window[0]
        best[end] = best[window[0]] + int(repeated[window[0]]) + PACK_COST_TOKENS
    cuts, end = [], count
    while end:
        cuts.append((previous[end], end))
        end = previous[end]
    return cuts[::-1]


def _lay_out(branches: Sequence[_Branch], shared: npt.NDArray[np.int64]) -> Pack:
    """One pack: each row adds the tokens that it does not share with the row before it, depth first."""
    starts = np.concatenate([[0], shared]).astype(np.int64)  # depth at which each row leaves the row before it
    offsets = np.concatenate([[0], np.cumsum([len(b.ids) - s for b, s in zip(branches, starts, strict=True)])])
    total = int(offsets[-1])
    input_ids, position_ids = np.empty(total, np.int32), np.empty(total, np.int32)
    parent_token = np.arange(-1, total - 1)  # [T], the token before this one on its path
    path = np.empty(max(len(branch.ids) for branch in branches), np.int64)  # pack index at each depth of this row
    where = []
    for branch, depth, begin, end in zip(branches, starts, offsets, offsets[1:], strict=False):
        input_ids[begin:end] = branch.ids[depth:]
        position_ids[begin:end] = np.arange(depth, len(branch.ids))
        parent_token[begin] = path[depth - 1] if depth else -1
        path[depth : len(branch.ids)] = np.arange(begin, end)
        where.append(path[branch.depth])
    start, length, parent = _segments(parent_token)
    rows, label_weights = (np.concatenate([getattr(b, name) for b in branches]) for name in ("row", "weight"))
    positions, targets, weights, counts, merged_into = _merge_targets(
        np.concatenate(where), np.concatenate([branch.target for branch in branches]), label_weights
    )
    return Pack(
        input_ids=input_ids,
        position_ids=position_ids,
        segment_start=start,
        segment_length=length,
        segment_parent=parent,
        logit_positions=positions,
        target_ids=targets,
        target_weights=weights,
        target_counts=counts,
        num_rows=sum(branch.num_rows for branch in branches),
        num_logical_tokens=sum(branch.logical for branch in branches),
        num_supervised=int(counts.sum()),
        labels=PackLabels(rows, merged_into, label_weights),
    )


def _segments(parent_token: npt.NDArray[np.int64]) -> tuple[Ints, Ints, Ints]:
    """(start, length, parent) of the longest runs of tokens without a branch, from each token's parent (or -1)."""
    total = len(parent_token)
    children = np.bincount(parent_token[parent_token >= 0], minlength=total)
    follows = (parent_token == np.arange(-1, total - 1)) & (parent_token >= 0)
    begins = ~follows | (children[parent_token] > 1)  # children[-1] is read for roots only, which begin anyway
    start = np.flatnonzero(begins)
    segment_of_token = np.cumsum(begins) - 1
    before = parent_token[start]
    parent = np.where(before >= 0, segment_of_token[before], -1)
    length = np.diff(np.append(start, total))
    return start.astype(np.int32), length.astype(np.int32), parent.astype(np.int32)


def _merge_targets(
    positions: npt.NDArray[np.int64], targets: Ints, weights: npt.NDArray[np.float64]
) -> tuple[Ints, Ints, Floats, Ints, npt.NDArray[np.int64]]:
    """Equal (position, target) pairs once, with the sum of their weights (added in sorted order) and their count; and
    the pair that each given one became."""
    order = np.lexsort((weights, targets, positions))
    positions, targets, weights = positions[order], targets[order], weights[order]
    new = np.ones(len(order), bool)
    new[1:] = (np.diff(positions) != 0) | (np.diff(targets) != 0)
    first = np.flatnonzero(new)
    counts = np.diff(np.append(first, len(order)))
    sums = np.add.reduceat(weights, first)
    merged_into = np.empty(len(order), np.int64)
    merged_into[order] = np.cumsum(new) - 1
    return (
        positions[first].astype(np.int32),
        targets[first].astype(np.int32),
        sums.astype(np.float32),
        counts.astype(np.int32),
        merged_into,
    )
