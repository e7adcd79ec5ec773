"""Paired bootstrap: how far a difference between two models on the same rows could come from the choice of the rows.

Rows are drawn with replacement, the same rows for both models, and each draw gives the metric of both and their
difference; an interval is the middle 95 % of the draws (percentile method: Efron and Tibshirani, An Introduction to the
Bootstrap, 1993, chapter 13; paired, for language tasks: Koehn, Statistical Significance Tests for Machine Translation
Evaluation, EMNLP 2004).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

DRAWS = 10_000
CONFIDENCE = 0.95
_CHUNK = 1 << 21  # rows drawn at once: 16 MB of numbers
WITHIN_CHANCE = "within chance"


@dataclass(frozen=True, slots=True)
class Ratio:
    """A metric that is a sum over rows by another: mean loss = losses / weights, exact match = matches / rows.

    base, adapter, count: float64 [R], of each row. exponential: the metric is e to that ratio (perplexity).
    """

    base: Floats
    adapter: Floats
    count: Floats
    higher_is_better: bool = True
    exponential: bool = False

    def value(self, top: Floats, bottom: Floats) -> Floats:
        """The metric from sums; nan where nothing was counted."""
        with np.errstate(invalid="ignore", divide="ignore"):
            ratio = top / bottom
        return np.exp(np.minimum(ratio, 700.0)) if self.exponential else ratio


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value and its interval; low and high are None where fewer than two rows count."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """difference: adapter minus base. verdict: better, worse, within chance (the interval holds 0), or too few rows."""

    base: Estimate
    adapter: Estimate
    difference: Estimate
    verdict: str


def compare(metrics: Mapping[str, Ratio], *, draws: int = DRAWS, seed: int = 0) -> dict[str, Comparison]:
    """Each metric of base and adapter with intervals; metrics of which nothing was counted are left out.

    All metrics are taken from the same draws, so a seed gives the same intervals again. All ratios have the same R.
    """
    metrics = {name: ratio for name, ratio in metrics.items() if ratio.count.sum() > 0}
    if not metrics:
        return {}
    parts = [part for ratio in metrics.values() for part in (ratio.base, ratio.adapter, ratio.count)]
    sums = np.stack(parts, axis=1)  # [R, 3 x metrics]
    drawn = np.concatenate([counts @ sums for counts in _drawn_counts(len(sums), draws, seed)])  # [draws, 3 x metrics]
    found = {}
    for place, (name, ratio) in enumerate(metrics.items()):
        at = slice(3 * place, 3 * place + 3)
        found[name] = _comparison(ratio, sums[:, at].sum(axis=0), drawn[:, at])
    return found


def _drawn_counts(num_rows: int, draws: int, seed: int) -> Iterator[Floats]:
    """float64 [some draws, num_rows]: how often each row is in each draw of num_rows rows."""
    random = np.random.default_rng(seed)
    at_once = max(1, _CHUNK // num_rows)
    for first in range(0, draws, at_once):
        count = min(at_once, draws - first)
        rows = random.integers(num_rows, size=(count, num_rows)) + np.arange(count)[:, None] * num_rows
        yield np.bincount(rows.ravel(), minlength=count * num_rows).reshape(count, num_rows).astype(np.float64)


def _comparison(ratio: Ratio, whole: Floats, drawn: Floats) -> Comparison:
    """whole: [3], the sums over all rows (base, adapter, count); drawn: [draws, 3], those of each draw."""
    base, adapter = ratio.value(whole[0], whole[2]), ratio.value(whole[1], whole[2])
    drawn_base, drawn_adapter = ratio.value(drawn[:, 0], drawn[:, 2]), ratio.value(drawn[:, 1], drawn[:, 2])
    enough = int((ratio.count > 0).sum()) > 1

    def estimate(value: Floats, values: Floats) -> Estimate:
        if not enough:
            return Estimate(float(value), None, None)
        tail = (1 - CONFIDENCE) / 2
        # A draw may hold none of the rows that count.
        low, high = np.nanquantile(values, [tail, 1 - tail])
        return Estimate(float(value), float(low), float(high))

    difference = estimate(adapter - base, drawn_adapter - drawn_base)
    return Comparison(
        estimate(base, drawn_base), estimate(adapter, drawn_adapter), difference, _verdict(ratio, difference)
    )


def _verdict(ratio: Ratio, difference: Estimate) -> str:
    if difference.low is None or difference.high is None:
        return "too few rows"
    if difference.low <= 0 <= difference.high:
        return WITHIN_CHANCE
    return "better" if (difference.low > 0) == ratio.higher_is_better else "worse"
