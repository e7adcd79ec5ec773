"""The check's report in the terminal: one table, the warnings, the lengths."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from espalier.data.check import NOTE, CheckReport
from espalier.data.rows import places

_BAR_CHARS = 40
_LOG_WIDTH = 160  # characters, where the output goes to a file: paths should stay whole


def safe_console(stream: Any = None) -> Console:
    """A console that writes what it can and escapes the rest: GBK and ASCII terminals must not end a run."""
    stream = stream or sys.stdout
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")
    width = None if stream.isatty() else _LOG_WIDTH
    return Console(file=stream, highlight=False, markup=False, soft_wrap=True, width=width)


def visible(text: str) -> str:
    """The text on one line, control characters as escapes (a data file must not steer the terminal)."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def print_report(report: CheckReport, console: Console) -> None:
    """Read, kept and left out by reason with the first lines of each; then errors, warnings, notes and lengths."""
    table = Table(show_header=True, show_edge=False, pad_edge=False)
    table.add_column("rows", justify="right")
    table.add_column("")
    table.add_column("first lines", overflow="fold")
    table.add_row(f"{report.read:,}", "read", "")
    table.add_row(f"{report.kept:,}", "kept", "")
    if report.figures.get("heldout_rows"):
        table.add_row(f"{report.figures['heldout_rows']:,}", "  of them held out", "")
    left = report.read - report.kept
    table.add_row(f"{left:,}", "left out", "")
    for kind, reason in sorted(report.reasons.items(), key=lambda item: -item[1].count):
        where = places(reason.first, more=reason.count > len(reason.first))
        what = reason.first[0].reason if reason.count == 1 else kind
        table.add_row(f"{reason.count:,}", Text("  " + visible(what)), Text(visible(where)))
    console.print(table)
    for error in report.errors:
        # Our own message is of several lines; each is shown as one.
        console.print(Text("\n".join(visible(line) for line in f"error: {error}".split("\n")), style="red"))
    for warning in report.warnings:
        style, word = ("dim", "note") if warning.kind == NOTE else ("yellow", "warning")
        console.print(Text(f"{word}: {visible(warning.message)}", style=style))
    _print_figures(report.figures, console)


def _print_figures(figures: dict[str, Any], console: Console) -> None:
    rows = figures.get("train_rows", 0)
    if not rows:
        return
    tokens = figures.get("row_tokens")
    if tokens is not None and len(tokens):
        _print_histogram("tokens a row", tokens, console)
        learnt = figures["learnt_tokens"]
        console.print(f"{int(tokens.sum()):,} tokens, {learnt:,} of them learnt ({learnt / tokens.sum():.0%})")
    else:
        _print_histogram("characters an answer", figures["answer_chars"], console)
    distinct = figures["distinct_prompts"]
    console.print(f"{distinct:,} distinct prompts in {rows:,} rows")
    sharing = figures.get("sharing")
    if sharing is not None:
        console.print(
            f"a step of {sharing['rows_a_step']} rows: {sharing['logical_tokens']:,.0f} tokens, as a tree "
            f"{sharing['unique_tokens']:,.0f} ({sharing['saved']:.0%} saved; mean of {sharing['steps']} random steps)"
        )


def _print_histogram(title: str, values: Any, console: Console) -> None:
    """One line a power of two: how many values lie in [2^k, 2^(k+1))."""
    values = np.asarray(values)
    console.print(
        f"{title}: smallest {int(values.min()):,}, median {int(np.median(values)):,}, largest {int(values.max()):,}"
    )
    bins = np.floor(np.log2(np.maximum(values, 1))).astype(int)
    counts = np.bincount(bins)
    block = "█" if (console.encoding or "").lower().startswith("utf") else "#"
    for power in range(int(bins.min()), len(counts)):
        bar = block * int(np.ceil(_BAR_CHARS * counts[power] / counts.max()))
        console.print(f"  {2**power:>9,} to {2 ** (power + 1) - 1:>9,} {counts[power]:>10,} {bar}")
