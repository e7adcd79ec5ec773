"""Inspected rows in the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from espalier.encode.pieces import InspectedRow, Inspection, Piece

LEARNT, ADDED, GIVEN = "bold underline green", "dim", ""
_EDGE = 12  # pieces shown at each end of a long stretch that is not learnt


def print_rows(inspection: Inspection, console: Any) -> None:
    """Prints each row's text and tokens, then how the rows share their beginnings."""
    from rich.text import Text

    legend = Text("learnt", style=LEARNT)
    legend.append(" · ", style="none").append("from the data", style="none").append(" · ", style="none")
    legend.append("added by the template", style="dim not bold not underline")
    console.print(f"template: {inspection.template}", markup=False, highlight=False)
    for notice in inspection.notices:
        console.print(f"note: {notice}", markup=False, highlight=False)
    console.print(legend)
    for row in inspection.rows:
        _print_row(row, console)
    for bad in inspection.bad:
        console.print(f"left out: {bad}", style="red", markup=False, highlight=False)
    if inspection.tree:
        console.print("\nWhat the rows share, each run of tokens once:", highlight=False)
        for line in inspection.tree:
            console.print(line, markup=False, highlight=False, overflow="ellipsis", no_wrap=True)


def _print_row(row: InspectedRow, console: Any) -> None:
    from rich.table import Table
    from rich.text import Text

    console.rule(f"{row.place} · {row.num_tokens} tokens, {row.num_learnt} learnt")
    for note in row.notes:
        console.print(f"note: {note}", markup=False, highlight=False)
    text = Text()
    for part in row.pieces:
        text.append(part.text, style=_style(part))
    console.print(text)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("token", "id", "text", "learnt"):
        table.add_column(column, justify="left" if column == "text" else "right")
    for piece in _shortened(row.pieces):
        if isinstance(piece, int):
            table.add_row("…", "", f"{piece} more that are not learnt", "", style="dim")
            continue
        ids = " ".join(str(i) for i in piece.ids)
        table.add_row(str(piece.start), ids, Text(visible(piece.text), style=_style(piece)), "yes" * piece.learnt)
    console.print(table)


def _style(piece: Piece) -> str:
    return LEARNT if piece.learnt else ADDED if piece.added else GIVEN


def _shortened(pieces: tuple[Piece, ...]) -> Iterator[Piece | int]:
    """All learnt pieces and the edges of the stretches between them; a number stands for pieces left away."""
    start = 0
    while start < len(pieces):
        end = start
        while end < len(pieces) and pieces[end].learnt == pieces[start].learnt:
            end += 1
        stretch = pieces[start:end]
        if pieces[start].learnt or len(stretch) <= 2 * _EDGE:
            yield from stretch
        else:
            yield from stretch[:_EDGE]
            yield len(stretch) - 2 * _EDGE
            yield from stretch[-_EDGE:]
        start = end


def visible(text: str) -> str:
    """Line ends, tabs and outer spaces as signs: '↵', '⇥', '␣'."""
    core = text.replace("\r", "␍").replace("\n", "↵").replace("\t", "⇥")
    left, right = len(core) - len(core.lstrip(" ")), len(core) - len(core.rstrip(" "))
    return "␣" * len(core) if not core.strip(" ") else "␣" * left + core.strip(" ") + "␣" * right
