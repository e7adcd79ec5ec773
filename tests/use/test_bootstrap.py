"""Paired bootstrap against a hand-worked case, another way to draw, and the normal interval."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from espalier.use import bootstrap as module
from espalier.use.bootstrap import Comparison, Estimate, Ratio, compare


def ratio(base: Any, adapter: Any, count: Any = None, **kwargs: Any) -> Ratio:
    base, adapter = np.asarray(base, float), np.asarray(adapter, float)
    return Ratio(base, adapter, np.ones(len(base)) if count is None else np.asarray(count, float), **kwargs)


def test_two_rows_by_hand() -> None:
    """Two rows, losses 1 and 3: a draw is (1, 1), (1, 3), (3, 1) or (3, 3): means 1, 2, 2, 3 in shares 1/4, 1/2, 1/4.
    2.5 % and 97.5 % of that are 1 and 3. The adapter halves every loss: its difference is -0.5, -1 or -1.5."""
    found = compare({"loss": ratio([1, 3], [0.5, 1.5], higher_is_better=False)})["loss"]
    assert found.base == Estimate(2.0, 1.0, 3.0)
    assert found.adapter == Estimate(1.0, 0.5, 1.5)
    assert found.difference == Estimate(-1.0, -1.5, -0.5)
    assert found.verdict == "better"


def test_all_draws_of_four_rows_written_out() -> None:
    """4 rows have 256 equally likely draws; with them all, the share of draws below each end is what it should be."""
    base, adapter, count = (
        np.array([2.0, 9.0, 4.0, 6.0]),
        np.array([1.0, 9.0, 5.0, 2.0]),
        np.array([1.0, 3.0, 2.0, 2.0]),
    )
    differences = sorted(
        float((adapter - base)[list(rows)].sum() / count[list(rows)].sum())
        for rows in itertools.product(range(4), repeat=4)
    )
    found = compare({"x": ratio(base, adapter, count)}, draws=40_000, seed=3)["x"]
    assert found.difference.value == (17 - 21) / 8
    low, high = np.quantile(differences, [0.025, 0.975])
    assert found.difference.low == pytest.approx(low, abs=0.03)
    assert found.difference.high == pytest.approx(high, abs=0.03)


def test_many_rows_match_the_normal_interval() -> None:
    random = np.random.default_rng(0)
    base = random.normal(5, 2, 2000)
    adapter = base + random.normal(-0.5, 1, 2000)
    found = compare({"x": ratio(base, adapter, higher_is_better=False)}, draws=4000)["x"]
    spread = 1.96 * (adapter - base).std() / np.sqrt(2000)
    mean = float((adapter - base).mean())
    assert found.difference.low == pytest.approx(mean - spread, abs=0.006)
    assert found.difference.high == pytest.approx(mean + spread, abs=0.006)
    # Paired: the spread of the rows themselves, which both models share, is not in it.
    assert found.base.high is not None
    assert found.base.low is not None
    assert found.base.high - found.base.low > 1.8 * 2 * spread


@pytest.mark.parametrize(
    ("base", "adapter", "higher", "verdict"),
    [
        ([0, 1, 0, 1] * 5, [1, 0, 1, 0] * 5, True, "within chance"),
        ([1, 1, 0, 1] * 5, [1, 1, 0, 1] * 5, True, "within chance"),
        ([0] * 20, [1] * 20, True, "better"),
        ([0] * 20, [1] * 20, False, "worse"),
        ([1] * 20, [0] * 20, True, "worse"),
    ],
)
def test_verdicts(base: list[int], adapter: list[int], higher: bool, verdict: str) -> None:
    assert compare({"x": ratio(base, adapter, higher_is_better=higher)})["x"].verdict == verdict


def test_one_row_has_no_interval() -> None:
    found = compare({"loss": ratio([2.0, 0.0], [1.0, 0.0], [1, 0])})["loss"]
    nothing = [Estimate(2.0, None, None), Estimate(1.0, None, None), Estimate(-1.0, None, None)]
    assert found == Comparison(*nothing, "too few rows")


def test_metrics_of_few_rows() -> None:
    """Two JSON rows among twenty: draws without either are left out; a metric of no rows is not there."""
    count = [1, 1] + [0] * 18
    found = compare(
        {"valid": ratio([0, 0] + [0] * 18, [1, 1] + [0] * 18, count), "none": ratio([0] * 20, [0] * 20, [0] * 20)}
    )
    assert list(found) == ["valid"]
    assert found["valid"].adapter == Estimate(1.0, 1.0, 1.0)


def test_perplexity_is_e_to_the_mean() -> None:
    found = compare({"p": ratio([1, 3], [1, 3], exponential=True, higher_is_better=False)})["p"]
    assert found.base.value == pytest.approx(np.exp(2))
    assert (found.base.low, found.base.high) == (pytest.approx(np.exp(1)), pytest.approx(np.exp(3)))
    assert np.isfinite(compare({"p": ratio([9e9, 9e9], [1, 1], exponential=True)})["p"].base.value)


def test_the_seed_decides_and_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(1)
    metric = {"x": ratio(random.normal(size=30), random.normal(size=30))}
    one = compare(metric, seed=5, draws=500)
    assert one == compare(metric, seed=5, draws=500)
    assert one != compare(metric, seed=6, draws=500)
    monkeypatch.setattr(module, "_CHUNK", 70)
    again = compare(metric, seed=5, draws=500)["x"].difference
    assert again.low == pytest.approx(one["x"].difference.low, abs=1e-12)
    assert again.high == pytest.approx(one["x"].difference.high, abs=1e-12)
