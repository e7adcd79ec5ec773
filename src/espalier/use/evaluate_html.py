"""An evaluation as one self-contained page: no script, no file beside it, readable on a phone and without colour."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from espalier.encode.template import common_prefix_length
from espalier.use.evaluate import Result
from espalier.use.evaluate_report import LABELS, RowResult, cell, row_results

MAX_ROWS = 200  # of each group; what is left out is said
_STYLE = """
:root { color-scheme: light dark; --text: #1c1c1a; --page: #fdfdfb; --soft: #66665f; --line: #d8d8d0; --good: #0b6b3a;
  --bad: #a32020; --wash: #f1f1ec; }
@media (prefers-color-scheme: dark) { :root { --text: #e8e8e2; --page: #181816; --soft: #a0a098; --line: #3a3a36;
  --good: #7ddba3; --bad: #f09a9a; --wash: #232320; } }
body { margin: 0 auto; padding: 1rem; max-width: 64rem; color: var(--text); background: var(--page);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.3rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p { margin: .3rem 0; overflow-wrap: anywhere; }
.soft { color: var(--soft); } .better { color: var(--good); } .worse { color: var(--bad); }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th, td { text-align: right; padding: .25rem .4rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th:first-child, td:first-child { text-align: left; }
td span { color: var(--soft); display: block; font-size: .85em; }
article { border: 1px solid var(--line); border-radius: .4rem; padding: .7rem; margin: .7rem 0; }
h3 { font-size: .9rem; margin: 0 0 .4rem; color: var(--soft); font-weight: 400; overflow-wrap: anywhere; }
h4 { font-size: .8rem; margin: 0 0 .15rem; color: var(--soft); font-weight: 600; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--wash); border-radius: .3rem;
  padding: .4rem .5rem; font: .9rem/1.5 ui-monospace, monospace; max-height: 16rem; overflow-y: auto; }
.three { display: grid; grid-template-columns: repeat(auto-fit, minmax(14rem, 1fr)); gap: .5rem; margin-top: .5rem; }
summary { cursor: pointer; padding: .4rem 0; }
"""


def page(result: Result) -> str:
    """The whole page as HTML text: metrics, then the rows that got better, worse, and stayed."""
    rows = list(row_results(result))
    shared = _shared_beginning([row.prompt for row in rows])
    better = sorted((row for row in rows if row.change > 0), key=lambda row: -row.change)
    worse = sorted((row for row in rows if row.change < 0), key=lambda row: row.change)
    same = [row for row in rows if row.change == 0]
    by = "their answers" if result.base.answers else "their loss"
    evaluation = result.evaluation
    files = ", ".join(evaluation.files)
    head = (
        f'<p class="soft">{len(rows):,} rows of {escape(files)}; adapter {escape(str(evaluation.folder))}; '
        f"base {escape(evaluation.base.name)}; {escape(result.dtype)} on {escape(result.device)}</p>"
    )
    start = ""
    if shared:
        start = (
            f"<details><summary>All prompts begin with the same {len(shared):,} characters, shown here once</summary>"
            f'<div class="text">{escape(shared)}</div></details>'
        )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Base and adapter on held-out rows</title><style>{_STYLE}</style></head><body>"
        f"<h1>Base and adapter on held-out rows</h1>{head}{_metrics(result)}"
        f'<p class="soft">Below, rows by {by}.</p>{start}'
        + _group(f"Better with the adapter: {len(better):,}", better, shared, opened=True)
        + _group(f"Worse with the adapter: {len(worse):,}", worse, shared, opened=True)
        + _group(f"No change: {len(same):,}", same, shared, opened=False)
        + "</body></html>\n"
    )


def _shared_beginning(prompts: Sequence[str]) -> str:
    """What all prompts begin with, up to the end of a line; empty where it is short or the rows are one."""
    shared = min(prompts)[: common_prefix_length(min(prompts), max(prompts))]
    shared = shared[: shared.rfind("\n") + 1]
    return shared if len(shared) > 40 and len(set(prompts)) > 1 else ""


def _metrics(result: Result) -> str:
    lines = []
    for name, metric in result.metrics.items():
        cells = [cell(name, metric.base), cell(name, metric.adapter), cell(name, metric.difference, signed=True)]
        shown = "".join(f"<td>{_with_interval(text)}</td>" for text in cells)
        kind = metric.verdict if metric.verdict in ("better", "worse") else "soft"
        lines.append(f'<tr><td>{LABELS[name]}<span class="{kind}">{metric.verdict}</span></td>{shown}</tr>')
    return (
        "<table><tr><th></th><th>base</th><th>adapter</th><th>difference</th></tr>" + "".join(lines) + "</table>"
        f'<p class="soft">Below each value its 95 % interval over {result.draws:,} draws of the rows (paired '
        "bootstrap). Within chance: the interval of the difference holds 0.</p>"
    )


def _with_interval(text: str) -> str:
    value, _, interval = text.partition("\n[")
    return escape(value) + (f"<span>{escape(interval.removesuffix(']'))}</span>" if interval else "")


def _group(title: str, rows: Sequence[RowResult], shared: str, *, opened: bool) -> str:
    shown = "".join(_row(row, shared) for row in rows[:MAX_ROWS])
    more = f'<p class="soft">and {len(rows) - MAX_ROWS:,} more</p>' if len(rows) > MAX_ROWS else ""
    if opened:
        return f"<h2>{escape(title)}</h2>{shown}{more}"
    return f"<details><summary>{escape(title)}</summary>{shown}{more}</details>"


def _row(row: RowResult, shared: str) -> str:
    columns = [_text("wanted", row.wanted)]
    if row.base_answer is not None and row.adapter_answer is not None:
        columns += [
            _text(f"base {_mark(row.base_exact)}", row.base_answer),
            _text(f"adapter {_mark(row.adapter_exact)}", row.adapter_answer),
        ]
    return (
        f"<article><h3>{escape(row.file)}:{row.line} · loss {row.base_loss:.3f} → {row.adapter_loss:.3f}</h3>"
        f"{_text('prompt', row.prompt[len(shared) :])}"
        f'<div class="three">{"".join(columns)}</div></article>'
    )


def _mark(exact: bool | None) -> str:
    return "✓ as wanted" if exact else "✗ other than wanted"


def _text(title: str, text: str) -> str:
    return f'<div><h4>{escape(title)}</h4><div class="text">{escape(text.strip()) or "(nothing)"}</div></div>'
