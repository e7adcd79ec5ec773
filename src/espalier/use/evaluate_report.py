"""The result of an evaluation as tables, and as one JSON object."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from espalier import __version__
from espalier.errors import DataError
from espalier.use.bootstrap import CONFIDENCE, Comparison, Estimate
from espalier.use.evaluate import Result, Side

LABELS = {
    "loss": "loss",
    "perplexity": "perplexity",
    "token_accuracy": "token accuracy",
    "exact_match": "exact match",
    "json_valid": "valid JSON",
    "json_fields": "JSON fields right",
}
SHARES = ("token_accuracy", "exact_match", "json_valid", "json_fields")


@dataclass(frozen=True, slots=True)
class RowResult:
    """One row under both models. change: above 0 where the adapter is better; by the answers where there are any
    (exact match first, then fields), else by the loss, as the share of it that is gone."""

    file: str
    line: int
    prompt: str
    wanted: str
    base_loss: float
    adapter_loss: float
    base_answer: str | None
    adapter_answer: str | None
    base_exact: bool | None
    adapter_exact: bool | None
    change: float


def row_results(result: Result) -> Iterator[RowResult]:
    """Every row, in the order of the files."""
    from espalier.use.generate import decode

    tokenizer = result.evaluation.layout.tokenizer
    for i, (row, question) in enumerate(zip(result.evaluation.rows, result.evaluation.questions, strict=True)):
        base, adapter = (_mean_loss(side, i) for side in (result.base, result.adapter))
        answers = bool(result.base.answers)
        yield RowResult(
            file=row.file,
            line=row.line,
            prompt=decode(tokenizer, question.prompt),
            wanted=question.wanted,
            base_loss=base,
            adapter_loss=adapter,
            base_answer=result.base.answers[i].text if answers else None,
            adapter_answer=result.adapter.answers[i].text if answers else None,
            base_exact=result.base.answer_scores[i].exact if answers else None,
            adapter_exact=result.adapter.answer_scores[i].exact if answers else None,
            change=_worth(result.adapter, i) - _worth(result.base, i) if answers else _gone(base, adapter),
        )


def _mean_loss(side: Side, row: int) -> float:
    weight = side.scores.weight[row]
    return float(side.scores.loss[row] / weight) if weight else 0.0


def _gone(base: float, adapter: float) -> float:
    return (base - adapter) / base if base else -adapter


def _worth(side: Side, row: int) -> float:
    """1 and more for the wanted text; of a JSON answer the share of right fields."""
    score = side.answer_scores[row]
    return score.exact + (sum(score.fields.values()) / len(score.fields) if score.fields else 0.0)


def field_counts(result: Result) -> dict[str, dict[str, int]]:
    """Path -> rows that want the field, and how many answers of each model have it right."""
    wanted, base, adapter = Counter[str](), Counter[str](), Counter[str]()
    for side, right in ((result.base, base), (result.adapter, adapter)):
        for score in side.answer_scores:
            right.update(path for path, equal in score.fields.items() if equal)
    wanted.update(path for score in result.base.answer_scores for path in score.fields)
    return {path: {"rows": count, "base": base[path], "adapter": adapter[path]} for path, count in wanted.items()}


def as_json(result: Result) -> dict[str, Any]:
    """Everything, as one object; docs/evaluate.md names its keys."""
    evaluation = result.evaluation
    generation = None
    if result.max_new_tokens is not None:
        generation = {
            "max_new_tokens": result.max_new_tokens,
            "stop_ids": list(evaluation.layout.stop_ids),
            "cut_off": {"base": _cut_off(result.base), "adapter": _cut_off(result.adapter)},
        }
    return {
        "espalier_version": __version__,
        "adapter": str(evaluation.folder),
        "base": evaluation.base.name,
        "dataset": list(evaluation.files),
        "device": result.device,
        "dtype": result.dtype,
        "rows": {"evaluated": len(evaluation.rows), "left_out": evaluation.num_left_out},
        "tokens": {
            "logical": int(evaluation.rows.lengths.sum()),
            "computed": result.base.scores.computed_tokens,
            "supervised": int(result.base.scores.supervised.sum()),
        },
        "bootstrap": {"draws": result.draws, "seed": result.seed, "confidence": CONFIDENCE},
        "metrics": {name: asdict(comparison) for name, comparison in result.metrics.items()},
        "generation": generation,
        "json_fields": field_counts(result),
        "results": [asdict(row) for row in row_results(result)],
        "seconds": round(result.seconds, 3),
    }


def print_json(result: Result) -> None:
    """To standard output; a text may hold half a character, which UTF-8 cannot write."""
    text = json.dumps(as_json(result), ensure_ascii=False, allow_nan=False)
    print(text.encode("utf-8", "backslashreplace").decode("utf-8"))


def print_tables(result: Result, console: Console) -> None:
    """Metrics of base and adapter with intervals, and what the differences are worth."""
    rows = len(result.evaluation.rows)
    console.print(metrics_table(result, f"{rows:,} held-out rows"))
    share = f"{100 * CONFIDENCE:g} %"
    console.print(
        f"In brackets: {share} intervals over {result.draws:,} draws of the rows (paired bootstrap, seed "
        f"{result.seed}). Within chance: that of the difference holds 0.",
        soft_wrap=True,
    )
    if fields := field_counts(result):
        table = Table(title="JSON fields right", title_justify="left")
        table.add_column("field", overflow="fold")
        for name in ("rows", "base", "adapter"):
            table.add_column(name, justify="right")
        for path, counts in fields.items():
            table.add_row(Text(path or "(whole)"), *(str(counts[name]) for name in ("rows", "base", "adapter")))
        console.print(table)
    for who, side in (("base", result.base), ("adapter", result.adapter)):
        if count := _cut_off(side):
            console.print(f"{count} of {rows} answers of the {who} were cut off at {result.max_new_tokens} tokens")


def metrics_table(result: Result, title: str) -> Table:
    """One line a metric."""
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for name in ("base", "adapter", "difference"):
        table.add_column(name, justify="right")
    table.add_column("")
    for name, metric in result.metrics.items():
        cells = [cell(name, value) for value in (metric.base, metric.adapter)]
        table.add_row(LABELS[name], *cells, cell(name, metric.difference, signed=True), _in_words(metric))
    return table


def cell(name: str, estimate: Estimate, *, signed: bool = False) -> str:
    """A value with its interval; shares in percent."""
    interval = ""
    if estimate.low is not None and estimate.high is not None:
        interval = f"\n[{_number(name, estimate.low, signed)}, {_number(name, estimate.high, signed)}]"
    unit = (" points" if signed else " %") if name in SHARES else ""
    return _number(name, estimate.value, signed) + unit + interval


def _number(name: str, value: float, signed: bool) -> str:
    sign = "+" if signed else ""
    if name in SHARES:
        return f"{100 * value:{sign}.1f}"
    return f"{value:{sign}.4f}" if abs(value) < 1000 else f"{value:{sign}.4g}"


def _in_words(metric: Comparison) -> Text:
    style = {"better": "green", "worse": "red"}.get(metric.verdict, "")
    return Text(metric.verdict, style=style)


def _cut_off(side: Side) -> int:
    return sum(not answer.stopped for answer in side.answers)


def write_page(name: str, text: str) -> None:
    """The page, whole or not at all. Raises DataError where the disk does not take it."""
    from espalier.training.checkpoint_files import replace_text

    try:
        replace_text(Path(name), text.encode("utf-8", "backslashreplace").decode("utf-8"))
    except OSError as error:
        raise DataError(f"cannot be written: {error.strerror or error}", where=name) from error
