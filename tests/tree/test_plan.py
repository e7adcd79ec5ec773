"""Packs of a step: exact layouts of small trees, and properties over random ones."""

from __future__ import annotations

import time
from collections import Counter
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from espalier.encode.encode import IGNORE_INDEX, Encoded
from espalier.errors import DataError, UsageError
from espalier.tree.plan import PACK_COST_TOKENS, Pack, StepPlan, plan_step
from parity.models import row


def six_rows() -> list[Encoded]:
    """The tree of docs/prompt-tree.md, without its first level."""
    return [
        row([1, 2, 3], [4, 5]),
        row([1, 2, 3], [4, 6]),
        row([1, 2, 3], [7, 8]),
        row([1, 2], [9, 9, 9]),
        row([1, 2, 3], [4, 5]),
        row([5], [6]),
    ]


def test_six_rows_exactly() -> None:
    plan = plan_step(six_rows(), max_tokens=100, min_shared_tokens=1)
    (pack,) = plan.packs
    # 1 2 -> 3 -> 4 (twice 5, once 6), 3 -> 7 (8), 2 -> 9 9 (9), 5 (6). No last token is computed.
    assert pack.input_ids.tolist() == [1, 2, 3, 4, 7, 9, 9, 5]
    assert pack.position_ids.tolist() == [0, 1, 2, 3, 3, 2, 3, 0]
    assert pack.segment_start.tolist() == [0, 2, 3, 4, 5, 7]
    assert pack.segment_length.tolist() == [2, 1, 1, 1, 2, 1]
    assert pack.segment_parent.tolist() == [-1, 0, 1, 1, 0, -1]
    assert pack.logit_positions.tolist() == [1, 2, 2, 3, 3, 4, 5, 6, 7]
    assert pack.target_ids.tolist() == [9, 4, 7, 5, 6, 8, 9, 9, 6]
    assert pack.target_counts.tolist() == [1, 3, 1, 2, 1, 1, 1, 1, 1]
    assert pack.target_weights.tolist() == [1, 3, 1, 2, 1, 1, 1, 1, 1]
    assert (pack.num_rows, pack.num_logical_tokens, pack.num_supervised, pack.num_pairs) == (6, 27, 12, 22)
    assert (plan.unique_tokens, plan.logical_tokens, plan.num_supervised, plan.weight_sum) == (8, 27, 12, 12.0)
    assert plan.reason == ""


def test_a_row_that_begins_another_adds_targets_only() -> None:
    plan = plan_step([row([1, 2], [3]), row([1, 2, 3, 4], [5])], max_tokens=9, min_shared_tokens=1)
    (pack,) = plan.packs
    assert pack.input_ids.tolist() == [1, 2, 3, 4]
    assert pack.segment_length.tolist() == [4]  # no branch, one segment
    assert (pack.logit_positions.tolist(), pack.target_ids.tolist()) == ([1, 3], [3, 5])


def test_short_common_beginnings_are_not_shared_but_repeats_are() -> None:
    rows = [row([1, 2, 3], [4, 5]), row([1, 2, 3], [6, 7]), row([1, 2, 3], [6, 7]), row([9], [8])]
    (pack,) = plan_step(rows, max_tokens=100, min_shared_tokens=4).packs
    assert pack.input_ids.tolist() == [1, 2, 3, 4, 1, 2, 3, 6, 9]
    assert pack.segment_parent.tolist() == [-1, -1, -1]
    assert pack.target_counts.tolist() == [1, 1, 2, 2, 1]


def test_a_short_second_level_is_left_in_the_branches() -> None:
    system = list(range(10, 20))
    rows = [row([*system, 1], [2, 2]), row([*system, 1], [3, 3]), row([*system, 4], [5])]
    (pack,) = plan_step(rows, max_tokens=100, min_shared_tokens=5).packs
    assert pack.segment_length.tolist() == [10, 2, 2, 1]
    assert pack.segment_parent.tolist() == [-1, 0, 0, 0]


def test_sharing_that_does_not_pay_is_off_and_says_so() -> None:
    rows = [row([1, 2], [3] * 9), row([1, 2], [4] * 9)]
    plan = plan_step(rows, max_tokens=100, min_shared_tokens=1)
    assert plan.reason == "sharing would save a factor of 1.11 only, below 1.15"
    assert plan.packs[0].segment_parent.tolist() == [-1, -1]
    assert plan.unique_tokens == 20
    off = plan_step(six_rows(), max_tokens=100, share=False)
    assert off.reason == "sharing is switched off"
    assert off.packs[0].segment_parent.tolist() == [-1] * 6
    assert off.unique_tokens == 21


def test_weights_of_a_shared_target_add_up() -> None:
    rows = [row([1, 2], [3, 4], weight=0.5), row([1, 2], [3, 4], weight=2.0), row([1, 2], [3, 5])]
    plan = plan_step(rows, max_tokens=9, min_shared_tokens=1)
    (pack,) = plan.packs
    assert pack.target_ids.tolist() == [3, 4, 5]
    assert pack.target_weights.tolist() == [3.5, 2.5, 1.0]
    assert pack.target_counts.tolist() == [3, 2, 1]
    assert (plan.num_supervised, plan.weight_sum) == (6, 7.0)


def test_rows_without_a_label_compute_nothing() -> None:
    silent = Encoded(np.array([1, 2], np.int32), np.full(2, IGNORE_INDEX, np.int32))
    plan = plan_step([silent], max_tokens=9)
    assert (plan.packs, plan.num_rows, plan.unique_tokens, plan.logical_tokens) == ((), 1, 0, 2)
    plan = plan_step([silent, row([1], [2])], max_tokens=9)
    assert (plan.num_rows, plan.num_supervised, plan.unique_tokens) == (2, 1, 1)
    assert plan_step([], max_tokens=9).packs == ()


def test_rows_longer_than_the_budget_are_named_together() -> None:
    rows = [row([1] * 8, [2, 3], line=4), row([1], [2], line=5), row([1] * 20, [2], line=6)]
    with pytest.raises(DataError, match="2 row") as caught:
        plan_step(rows, max_tokens=8)
    assert caught.value.details == ("rows.jsonl:4: 9 tokens to compute", "rows.jsonl:6: 20 tokens to compute")
    assert "a row is never split" in str(caught.value)
    with pytest.raises(DataError, match="2 row") as caught:
        plan_step(rows, max_tokens=50, max_pairs=10)
    assert caught.value.details == ("rows.jsonl:4: 45 attention pairs", "rows.jsonl:6: 210 attention pairs")


def test_a_label_on_the_first_token_is_refused() -> None:
    bad = Encoded(np.array([1, 2], np.int32), np.array([1, 2], np.int32), None, "a.jsonl", 3)
    with pytest.raises(DataError, match="first token") as caught:
        plan_step([bad], max_tokens=9)
    assert caught.value.where == "a.jsonl:3"


def test_budgets_below_one_are_refused() -> None:
    with pytest.raises(UsageError, match="each must be 1 or more"):
        plan_step([row([1], [2])], max_tokens=0)


# Few distinct tokens, so that rows share by chance; grown row by row from each other, so that they share by design.
@st.composite
def random_rows(draw: st.DrawFn) -> list[Encoded]:
    rows: list[list[int]] = []
    for _ in range(draw(st.integers(1, 12))):
        kept = rows[draw(st.integers(0, len(rows) - 1))] if rows else []
        begin = kept[: draw(st.integers(0, len(kept)))]
        rows.append(begin + draw(st.lists(st.integers(3, 6), min_size=0 if len(begin) > 1 else 2, max_size=8)))
    answers = [draw(st.integers(1, len(ids) - 1)) for ids in rows]
    weights = draw(st.lists(st.sampled_from([None, None, 0.5, 2.0]), min_size=len(rows), max_size=len(rows)))
    return [
        row(ids[:-answer], ids[-answer:], line=line, weight=weight)
        for line, (ids, answer, weight) in enumerate(zip(rows, answers, weights, strict=True), 1)
    ]


def expected_targets(rows: list[Encoded]) -> Counter[tuple[tuple[int, ...], int]]:
    """(everything before the target, target) of every label of every row, with multiplicity."""
    return Counter(
        (tuple(r.input_ids[:at].tolist()), int(r.labels[at])) for r in rows for at in np.flatnonzero(r.labels >= 0)
    )


def path_of(pack: Pack, position: int) -> tuple[int, ...]:
    segment = int(np.searchsorted(pack.segment_start, position, side="right")) - 1
    tokens: list[int] = []
    end = position + 1
    while segment >= 0:
        tokens = pack.input_ids[pack.segment_start[segment] : end].tolist() + tokens
        segment = int(pack.segment_parent[segment])
        end = int(pack.segment_start[segment] + pack.segment_length[segment])
    return tuple(tokens)


def found_targets(plan: StepPlan) -> Counter[tuple[tuple[int, ...], int]]:
    found: Counter[tuple[tuple[int, ...], int]] = Counter()
    for pack in plan.packs:
        for at, target, count in zip(pack.logit_positions, pack.target_ids, pack.target_counts, strict=True):
            found[path_of(pack, int(at)), int(target)] += int(count)
    return found


@settings(max_examples=150, deadline=None)
@given(random_rows(), st.integers(24, 60), st.integers(1, 4), st.booleans(), st.randoms(use_true_random=False))
def test_every_label_is_predicted_from_its_own_past(rows, budget, min_shared, share, random) -> None:
    budget = max(budget, *(len(r.input_ids) for r in rows))
    options = {"max_tokens": budget, "max_pairs": budget * budget, "min_shared_tokens": min_shared, "share": share}
    plan = plan_step(rows, **options)
    assert found_targets(plan) == expected_targets(rows)
    assert sum(pack.num_rows for pack in plan.packs) == len(rows)
    assert plan.num_supervised == sum(int((r.labels >= 0).sum()) for r in rows)
    for pack in plan.packs:
        assert pack.num_tokens <= budget
        assert pack.num_tokens == pack.segment_length.sum()
        for start, length, parent in zip(pack.segment_start, pack.segment_length, pack.segment_parent, strict=True):
            # Positions go on where the parent's stop.
            begin = (
                0 if parent < 0 else pack.position_ids[pack.segment_start[parent] + pack.segment_length[parent] - 1] + 1
            )
            assert pack.position_ids[start : start + length].tolist() == list(range(begin, begin + length))
    shuffled = list(rows)
    random.shuffle(shuffled)
    assert_same_plan(plan_step(shuffled, **options), plan)


def assert_same_plan(a: StepPlan, b: StepPlan) -> None:
    assert (len(a.packs), a.num_rows, a.reason, a.weight_sum) == (len(b.packs), b.num_rows, b.reason, b.weight_sum)
    for mine, other in zip(a.packs, b.packs, strict=True):
        for field in set(Pack.__slots__) - {"labels"}:
            assert np.array_equal(getattr(mine, field), getattr(other, field)), field


@settings(max_examples=60, deadline=None)
@given(random_rows(), st.integers(12, 40))
def test_cuts_are_the_cheapest(rows, budget) -> None:
    """Against every way to cut the sorted rows, each priced by laying out the runs on their own."""
    budget = max(budget, *(len(r.input_ids) for r in rows))
    plan = plan_step(rows, max_tokens=budget, min_shared_tokens=1, min_saving=0.0)
    distinct = sorted({tuple(r.input_ids[:-1].tolist()) for r in rows})
    prices = []
    for count in range(len(distinct)):
        for cuts in combinations(range(1, len(distinct)), count):
            edges = [0, *cuts, len(distinct)]
            sizes = [
                len({ids[: depth + 1] for ids in distinct[a:b] for depth in range(len(ids))})
                for a, b in pairwise(edges)
            ]
            if max(sizes) <= budget:
                prices.append(sum(sizes) + PACK_COST_TOKENS * len(sizes))
    assert plan.unique_tokens + PACK_COST_TOKENS * len(plan.packs) == min(prices)


def test_planning_is_fast() -> None:
    """2,048 rows of 300 tokens, 5 levels: well under a second, where a step of them takes minutes."""
    rng = np.random.default_rng(0)
    levels = [rng.integers(3, 30000, (2**level, 50)).tolist() for level in range(5)]
    rows = []
    for number in range(2048):
        prompt = [token for level in range(5) for token in levels[level][number % 2**level]]
        rows.append(row(prompt, rng.integers(3, 30000, 50).tolist()))
    begin = time.perf_counter()
    plan = plan_step(rows, max_tokens=8192)
    seconds = time.perf_counter() - begin
    # 31 nodes of 50 tokens and 2,048 answers of 49, and what the cuts repeat: less than one path a pack.
    unique = 31 * 50 + 2048 * 49
    assert unique <= plan.unique_tokens <= unique + 250 * len(plan.packs)
    assert plan.logical_tokens == 2048 * 300
    assert seconds < 3.0


def test_the_six_rows_of_the_docs() -> None:
    """The picture and the figures of docs/prompt-tree.md: S S S = 1 2 3, Q Q = 4 5, a b c = 6 7 8, and so on."""
    system, question = [1, 2, 3], [4, 5]
    rows = [
        row(system + question, [6, 7]),
        row(system + question, [6, 8]),
        row(system + question, [6, 7]),
        row([*system, 9], [10, 11, 12]),
        row([*system, 13, 14], [15]),
        row([16, 17], [18, 19]),
    ]
    plan = plan_step(rows, max_tokens=100, min_shared_tokens=1)
    (pack,) = plan.packs
    assert (plan.logical_tokens, plan.unique_tokens, plan.num_supervised) == (38, 14, 12)
    assert max(len(r.input_ids) for r in rows) * len(rows) == 42
    assert pack.input_ids.tolist() == [1, 2, 3, 4, 5, 6, 9, 10, 11, 13, 14, 16, 17, 18]
    assert pack.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 0, 1, 2]
    assert pack.segment_start.tolist() == [0, 3, 6, 9, 11]
    assert sorted(set(pack.logit_positions.tolist())) == [4, 5, 6, 7, 8, 10, 12, 13]
    assert dict(zip(pack.target_ids.tolist(), pack.target_counts.tolist(), strict=True))[6] == 3
