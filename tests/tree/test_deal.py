"""Rows of a step dealt to processes: every row once, shared beginnings together, unique tokens balanced."""

from __future__ import annotations

import numpy as np
import pytest

from espalier.encode.encode import Encoded
from espalier.tree.deal import deal_rows
from espalier.tree.plan import plan_step


def row(prompt: list[int], answer: list[int], line: int = 0) -> Encoded:
    ids = np.array([*prompt, *answer], np.int32)
    labels = np.array([-100] * len(prompt) + answer, np.int32)
    return Encoded(ids, labels, None, "rows.jsonl", line)


def unique(rows: list[Encoded], share: list[int]) -> int:
    return plan_step([rows[i] for i in share], max_tokens=10_000, min_saving=1.0).unique_tokens


def test_every_row_is_dealt_once_for_any_number_of_ranks() -> None:
    random = np.random.default_rng(0)
    rows = [row(random.integers(1, 50, 20 + i).tolist(), [7] * (1 + i % 5), i) for i in range(13)]
    for ranks in (1, 2, 3, 5, 13, 20):
        shares = deal_rows(rows, ranks)
        assert len(shares) == ranks
        assert sorted(i for share in shares for i in share) == list(range(13))
        assert all(share == sorted(share) for share in shares)
        assert shares == deal_rows(rows, ranks)


def test_rows_of_one_prompt_stay_together_and_tokens_are_balanced() -> None:
    prompts = [[p] * 40 for p in (3, 1, 4, 2)]
    rows = [row(prompts[i % 4], [50 + i, 60 + i], i) for i in range(16)]
    shares = deal_rows(rows, 2)
    assert [sorted({i % 4 for i in share}) for share in shares] == [[1, 3], [0, 2]]
    assert [unique(rows, share) for share in shares] == [2 * 40 + 8, 2 * 40 + 8]


def test_a_prompt_of_all_rows_is_cut_where_that_is_cheapest() -> None:
    rows = [row([9] * 30, [40 + i] * (30 if i == 0 else 10), i) for i in range(8)]
    shares = deal_rows(rows, 2)
    costs = [unique(rows, share) for share in shares]
    # 8 rows: 30 shared and 29 + 7 x 9 of their own (a last token is predicted only); halves cost the beginning twice.
    assert sum(costs) == 30 + 29 + 63 + 30
    assert max(costs) == min(max(a, b) for a, b in ((30 + 29 + 9 * k, 30 + 9 * (7 - k)) for k in range(7)))


@pytest.mark.parametrize(("count", "expected"), [(1, [[0], [], []]), (0, [[], [], []])])
def test_ranks_without_rows(count: int, expected: list[list[int]]) -> None:
    assert deal_rows([row([1, 2], [3])] * count, 3) == expected


def test_padded_rows_are_dealt_in_their_order() -> None:
    rows = [row([i], [2]) for i in range(7)]
    assert deal_rows(rows, 2, share=False) == [[0, 1, 2, 3], [4, 5, 6]]
