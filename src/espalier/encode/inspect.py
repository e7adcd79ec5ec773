"""`espalier inspect`: rows as they will be trained, token by token."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from espalier.data.formats import Example, FormatOptions, iter_examples
from espalier.data.output import check_outputs
from espalier.data.read import BadRow
from espalier.encode.encode import Encoder
from espalier.encode.inspect_html import page
from espalier.encode.inspect_text import print_rows
from espalier.encode.pieces import InspectedRow, Inspection, pieces_of
from espalier.encode.prefixes import draw, prefix_tree
from espalier.errors import DataError, UsageError

DEFAULT_ROWS = 8  # shown where no rows are asked for (as JSON all of them)


def inspect_rows(encoder: Encoder, items: Sequence[Example | BadRow], *, tree: bool = True) -> Inspection:
    """Encodes the items and takes the rows apart; with `tree`, draws what they share."""
    outcomes = iter(encoder.encode_batch([item for item in items if isinstance(item, Example)]))
    rows: list[InspectedRow] = []
    bad: list[BadRow] = []
    for item in items:
        if isinstance(item, BadRow):
            bad.append(item)
            continue
        outcome = next(outcomes)
        if outcome.bad is not None:
            bad.append(outcome.bad)
        rows += [InspectedRow(row, pieces_of(encoder, row, item), outcome.notes) for row in outcome.rows]
    template = encoder.template
    source = f"{template.source} ({template.reason})"
    return Inspection(tuple(rows), tuple(bad), tuple(_tree(rows) if tree else ()), source, tuple(template.notices()))


def _tree(rows: Sequence[InspectedRow]) -> list[str]:
    """The tree of shared beginnings, if there are rows to share; its last line counts what need not be computed."""
    if len(rows) < 2:
        return []
    branches = prefix_tree([row.encoded.input_ids.tolist() for row in rows])
    lines = draw(branches, [row.place for row in rows], [row.token_texts() for row in rows])
    logical, unique = sum(row.num_tokens for row in rows), sum(branch.num_tokens for branch in branches)
    saved = 1 - unique / logical
    return [
        *lines,
        f"{logical:,} tokens in {len(rows)} rows, {unique:,} of them different: {saved:.0%} need no computing",
    ]


def choose(
    items: Iterable[Example | BadRow],
    *,
    row: int | None = None,
    line: int | None = None,
    random_rows: int | None = None,
    seed: int = 0,
    first: int = DEFAULT_ROWS,
) -> list[Example | BadRow]:
    """The rows asked for: the row-th (from 1), those at a line, some drawn at random, or the `first` ones.

    Raises UsageError where there is no such row or more than one way of choosing is given.
    """
    given = [name for name, value in (("--row", row), ("--line", line), ("--random", random_rows)) if value is not None]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} exclude each other", todo="Give one of them.")
    if row is not None:
        return [_nth(items, row)]
    if line is not None:
        found = [item for item in items if item.line == line]
        if not found:
            raise UsageError(f"no row begins at line {line}", where="--line")
        return found
    if random_rows is not None and random_rows < 1:
        raise UsageError(f"{random_rows} is not 1 or more", where="--random")
    if random_rows is not None:
        return _drawn(items, random_rows, random.Random(seed))
    return list(islice(items, first))


def _nth(items: Iterable[Example | BadRow], row: int) -> Example | BadRow:
    count = 0
    for item in items:
        count += 1
        if count == row:
            return item
    raise UsageError(f"there is no row {row}: the data has {count} rows, counted from 1", where="--row")


def _drawn(items: Iterable[Example | BadRow], count: int, draw_from: random.Random) -> list[Example | BadRow]:
    """`count` items drawn without reading the data twice, in file order (reservoir sampling, algorithm R)."""
    kept: list[tuple[int, Example | BadRow]] = []
    for number, item in enumerate(items):
        if len(kept) < count:
            kept.append((number, item))
        elif (place := draw_from.randrange(number + 1)) < count:
            kept[place] = (number, item)
    return [item for _, item in sorted(kept, key=lambda pair: pair[0])]


def run_inspect(
    files: Sequence[str],
    encoder: Encoder,
    format_options: FormatOptions | None = None,
    *,
    row: int | None = None,
    line: int | None = None,
    random_rows: int | None = None,
    seed: int = 0,
    as_json: bool = False,
    html: str | None = None,
    console: Any = None,
    write: Callable[[str], None] = print,
) -> int:
    """Shows rows in the terminal, as JSON lines (`write` gets one line each), or as a page at `html`.

    Exit code 0, or 2 where a row asked for cannot be trained. console: a rich Console for all that is not JSON; where
    as_json is set, give one that writes to standard error. Raises DataError, UsageError.
    """
    check_outputs({"--html": html}, files)
    items = iter_examples(files, format_options)
    all_rows = as_json and html is None and row is None and line is None and random_rows is None
    if console is None:
        from rich.console import Console

        console = Console(stderr=as_json)
    if all_rows:
        codes = [_write_json(inspect_rows(encoder, chunk, tree=False), write, console) for chunk in _chunks(items)]
        return max(codes, default=0)
    inspection = inspect_rows(encoder, choose(items, row=row, line=line, random_rows=random_rows, seed=seed))
    if as_json:
        _write_json(inspection, write, console)
    if html is not None:
        _save(html, page(inspection))
        console.print(f"wrote {html}: {len(inspection.rows)} rows", markup=False, highlight=False, soft_wrap=True)
    if not as_json and html is None:
        print_rows(inspection, console)
    return 2 if inspection.bad else 0


def _chunks(items: Iterator[Example | BadRow]) -> Iterator[list[Example | BadRow]]:
    while chunk := list(islice(items, 512)):
        yield chunk


def _write_json(inspection: Inspection, write: Callable[[str], None], console: Any) -> int:
    for text in json_lines(inspection.rows):
        write(text)
    for bad in inspection.bad:
        console.print(str(bad), style="red", markup=False, highlight=False, soft_wrap=True)
    return 2 if inspection.bad else 0


def json_lines(rows: Iterable[InspectedRow]) -> Iterator[str]:
    """One JSON object a row: file, line, input_ids, labels, text."""
    for row in rows:
        yield json.dumps(
            {
                "file": row.encoded.file,
                "line": row.encoded.line,
                "input_ids": row.encoded.input_ids.tolist(),
                "labels": row.encoded.labels.tolist(),
                "text": row.text,
            },
            ensure_ascii=False,
        )


def _save(path: str, text: str) -> None:
    try:
        Path(path).write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise DataError(f"the page cannot be written ({error.strerror})", where=path) from error
