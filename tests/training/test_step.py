"""Which rows a step has: a function of seed and epoch, every row once an epoch, like beginnings together if asked."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from espalier.encode.encode import IGNORE_INDEX, Encoded
from espalier.training.step import Begun, StepCollator, StepOptions, StepSampler, order_by_prefix


def row(*ids: int) -> Encoded:
    array = np.array(ids, np.int32)
    labels = np.full(len(ids), IGNORE_INDEX, np.int32)
    labels[-1] = ids[-1]
    return Encoded(array, labels)


def steps(sampler: StepSampler, epoch: int = 0) -> list[list[int]]:
    sampler.set_epoch(epoch)
    return list(sampler)


def test_order_of_rows_stays_as_it_is() -> None:
    """Recorded from the sampler: another order would change every run that is resumed after an update."""
    assert steps(StepSampler(7, 3, 42)) == [[3, 1, 5], [6, 4, 0], [2]]
    assert steps(StepSampler(7, 3, 42), epoch=1) == [[5, 4, 0], [3, 1, 6], [2]]
    begun = Begun(1, 1, 2)
    assert steps(StepSampler(7, 3, 42, begun=begun), epoch=0) == [[3, 1, 5], [6, 4, 0], [2]]
    assert steps(StepSampler(7, 3, 42, begun=begun), epoch=1) == [[5, 4, 0], [6], [2]]
    assert steps(StepSampler(5, 2, 42, shuffle=False)) == [[0, 1], [2, 3], [4]]


@given(st.integers(1, 60), st.integers(1, 9), st.integers(0, 2**31), st.integers(0, 5))
def test_every_row_once_an_epoch(num_rows: int, size: int, seed: int, epoch: int) -> None:
    for alike in (None, np.arange(num_rows)):
        sampler = StepSampler(num_rows, size, seed, alike=alike)
        drawn = steps(sampler, epoch)
        assert sorted(i for step in drawn for i in step) == list(range(num_rows))
        assert len(drawn) == len(sampler) == -(-num_rows // size)
        assert steps(StepSampler(num_rows, size, seed, alike=alike), epoch) == drawn


def test_group_by_prefix_draws_like_beginnings_together() -> None:
    rows = [row(group, 7, own) for own in range(4) for group in (1, 2, 3)]
    alike = order_by_prefix(rows)
    assert [int(rows[i].input_ids[0]) for i in alike] == [1] * 4 + [2] * 4 + [3] * 4
    together = [len({int(rows[i].input_ids[0]) for i in step}) for step in steps(StepSampler(12, 4, 0, alike=alike))]
    scattered = [len({int(rows[i].input_ids[0]) for i in step}) for step in steps(StepSampler(12, 4, 0))]
    assert sum(together) < sum(scattered)


def test_the_plain_twin_counts_padding_and_the_tree_does_not() -> None:
    rows = [row(1, 2, 3, 4), row(1, 2, 5)]
    plain = StepCollator(StepOptions(tree=False), micro_batch_rows=1)(rows)
    assert [len(part) for part in plain.parts] == [1, 1]
    assert (plain.unique_tokens, plain.logical_tokens, plain.num_supervised, plain.weight_sum) == (7, 7, 2, 2.0)
    together = StepCollator(StepOptions(tree=False), micro_batch_rows=2)(rows)
    assert together.unique_tokens == 8
    tree = StepCollator(StepOptions(min_shared_tokens=1), micro_batch_rows=2)(rows)
    assert (tree.unique_tokens, tree.logical_tokens, tree.num_supervised) == (3, 7, 2)
