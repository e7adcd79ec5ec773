"""What inspect shows: pieces, JSON, the page, the tree; which rows are chosen."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from encoding import chat, encoder_for, load
from rich.console import Console

from espalier.encode.encode import Encoder
from espalier.encode.inspect import inspect_rows, run_inspect
from espalier.encode.prefixes import draw, prefix_tree
from espalier.errors import UsageError


@pytest.fixture
def encoder(shared: Path) -> Encoder:
    return encoder_for(load(shared / "tok-plain"), "atom")


@pytest.fixture
def data(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    turns = [("你好", "北京 👩‍👩‍👧 é!"), ("<b>&", "ok\n"), ("x", "")]
    lines = [json.dumps({"instruction": user, "output": answer}, ensure_ascii=False) for user, answer in turns]
    path.write_text("\n\n".join(lines), encoding="utf-8")  # rows at lines 1, 3, 5
    return str(path)


def shown(data: str, encoder: Encoder, **options: Any) -> tuple[int, str, list[str]]:
    """Exit code, what went to the terminal, the JSON lines."""
    screen, lines = io.StringIO(), []
    console = Console(file=screen, width=100, color_system=None)
    code = run_inspect([data], encoder, console=console, write=lines.append, **options)
    return code, screen.getvalue(), lines


def test_pieces_join_the_tokens_of_a_character(encoder: Encoder) -> None:
    (row,) = inspect_rows(encoder, [chat("你好", "北京 👩‍👩‍👧!")]).rows
    shown_texts = [(piece.text, piece.learnt, piece.added) for piece in row.pieces]
    assert ("你", False, False) in shown_texts
    assert ("👩‍👩‍👧", True, False) in shown_texts
    assert shown_texts[-1] == ("</s>", True, True)
    assert shown_texts[0] == ("<s>", False, True)
    assert row.text == "<s>Human: 你好\n</s><s>Assistant:北京 👩‍👩‍👧!</s>"
    assert [i for piece in row.pieces for i in piece.ids] == row.encoded.input_ids.tolist()
    assert len(row.token_texts()) == row.num_tokens


def test_json_is_one_object_a_row(encoder: Encoder, data: str) -> None:
    code, screen, lines = shown(data, encoder, as_json=True)
    rows = [json.loads(line) for line in lines]
    assert [sorted(row) for row in rows] == [["file", "input_ids", "labels", "line", "text"]] * 2
    assert [(row["file"], row["line"]) for row in rows] == [(data, 1), (data, 3)]
    assert rows[1]["text"] == "<s>Human: <b>&\n</s><s>Assistant:ok\n</s>"
    assert rows[1]["labels"][-1] == rows[1]["input_ids"][-1] == 1
    assert code == 2  # the third row has no answer
    assert f"{data}:5: " in screen


def test_rows_are_chosen_by_number_line_or_chance(encoder: Encoder, data: str) -> None:
    assert json.loads(shown(data, encoder, as_json=True, row=2)[2][0])["line"] == 3
    assert json.loads(shown(data, encoder, as_json=True, line=3)[2][0])["line"] == 3
    drawn = shown(data, encoder, as_json=True, random_rows=2, seed=1)
    assert shown(data, encoder, as_json=True, random_rows=2, seed=1) == drawn
    assert len(drawn[2]) + drawn[1].count(":5: ") == 2
    with pytest.raises(UsageError, match="there is no row 9: the data has 3 rows"):
        shown(data, encoder, row=9)
    with pytest.raises(UsageError, match="no row begins at line 2"):
        shown(data, encoder, line=2)
    with pytest.raises(UsageError, match="--row and --line exclude each other"):
        shown(data, encoder, row=1, line=1)


def test_terminal_shows_text_ids_and_tree(encoder: Encoder, data: str) -> None:
    code, screen, _ = shown(data, encoder)
    assert code == 2
    assert "template: built-in atom (asked for)" in screen
    assert "<s>Human: 你好" in screen
    assert "left out: " in screen
    assert "2 rows · <s>Human:" in screen
    assert "of them different" in screen


def test_page_is_self_contained(encoder: Encoder, data: str, tmp_path: Path) -> None:
    page = tmp_path / "out.html"
    assert shown(data, encoder, html=str(page))[0] == 2
    text = page.read_text(encoding="utf-8")
    assert '<meta name="viewport"' in text
    assert "&lt;b&gt;" in text
    assert "<b>&" not in text
    assert "👩‍👩‍👧" in text
    assert 'class="learnt"' in text
    assert "prefers-color-scheme: dark" in text
    assert "http" not in text
    assert "<script" not in text


def test_prefix_tree_counts_each_shared_run_once() -> None:
    rows = [[1, 2, 3, 4], [1, 2, 5], [1, 2, 3, 6], [7], [1, 2]]
    branches = prefix_tree(rows)
    assert sum(branch.num_tokens for branch in branches) == len(
        {tuple(row[: i + 1]) for row in rows for i in range(len(row))}
    )
    texts = [[str(token) for token in row] for row in rows]
    assert draw(branches, [f"row {i}" for i in range(5)], texts) == [
        "2 tokens · 4 rows · 12",
        "├─ 1 token · 2 rows · 3",
        "│  ├─ 1 token · row 0 · 4",
        "│  └─ 1 token · row 2 · 6",
        "└─ 1 token · row 1 · 5",
        "1 token · row 3 · 7",
    ]


def test_number_of_random_rows_and_page_over_the_rows(encoder: Encoder, data: str) -> None:
    with pytest.raises(UsageError, match="0 is not 1 or more"):
        shown(data, encoder, random_rows=0)
    before = Path(data).read_bytes()
    with pytest.raises(UsageError, match="this file is read here"):
        shown(data, encoder, html=data)
    assert Path(data).read_bytes() == before
