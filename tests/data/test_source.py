"""Names, streams, encodings, CSV damage: what reading says about each."""

from __future__ import annotations

import io
import json
import os
import sys
import threading
from pathlib import Path

import pytest

from espalier.data.read import BadRow, RawRow, read_rows
from espalier.errors import DataError, UsageError

LINE = '{"prompt": "q", "completion": "a"}\n'


def rows(*files: Path | str, encoding: str | None = None) -> list[RawRow | BadRow]:
    return list(read_rows([str(file) for file in files], encoding=encoding))


def test_globs_and_several_files(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.txt"):
        (tmp_path / name).write_text(LINE, encoding="utf-8")
    (tmp_path / "sub.jsonl").mkdir()
    found = rows(tmp_path / "c.txt", tmp_path / "*.jsonl")
    assert [os.path.basename(row.file) for row in found] == ["c.txt", "a.jsonl", "b.jsonl"]


def test_all_wrong_names_are_listed_at_once(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(LINE, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        rows(tmp_path / "trian.jsonl", tmp_path, tmp_path / "*.csv")
    assert caught.value.what == "3 data files cannot be read"
    pattern = tmp_path / "*.jsonl"
    assert caught.value.details == (
        f"{tmp_path / 'trian.jsonl'}: no such file (did you mean {tmp_path / 'train.jsonl'}?)",
        f"{tmp_path}: is a folder (give its files, for example '{pattern}', which matches train.jsonl)",
        f"{tmp_path / '*.csv'}: no file matches",
    )


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(LINE.encode() * 2)))
    assert [(row.file, row.line) for row in rows("-")] == [("-", 1), ("-", 2)]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_a_pipe_is_read_once(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_text(LINE * 3, encoding="utf-8"))
    writer.start()
    assert [row.line for row in rows(pipe)] == [1, 2, 3]
    writer.join()


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16-le", "utf-16-be", "utf-32", "gb18030", "cp037", "shift_jis"])
def test_named_encodings(tmp_path: Path, encoding: str) -> None:
    file = tmp_path / "rows.jsonl"
    text = LINE * 2 if encoding == "cp037" else LINE.replace("a", "表") * 2
    file.write_bytes(text.encode(encoding))
    assert [row.fields for row in rows(file, encoding=encoding) if isinstance(row, RawRow)] == [
        json.loads(text[: len(LINE)])
    ] * 2


def test_encoding_messages(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    with pytest.raises(UsageError, match="unknown encoding 'klingon'"):
        rows(file, encoding="klingon")
    file.write_bytes(LINE.encode("utf-16-le"))
    with pytest.raises(DataError, match="looks like UTF-16 without a byte order mark"):
        rows(file)
    file.write_bytes("é".encode("latin-1").join([b'{"prompt": "', b'", "completion": "a"}\n']))
    with pytest.raises(DataError, match=r"byte 0xE9 at offset 12; save the file as UTF-8, or pass its encoding"):
        rows(file)
    file.write_bytes(b"\xff\xfe" + LINE.encode("utf-16-le")[:-1])
    with pytest.raises(DataError, match="not valid UTF-16-LE"):
        rows(file)
    file.write_bytes(b"[" + b" " * 3_000_000 + b'\n{"prompt": "\xff"}]')
    with pytest.raises(DataError) as caught:
        rows(file)
    assert (caught.value.where, caught.value.what[:36]) == (f"{file}:2", "not UTF-8 (byte 0xFF at offset 30000")


def test_csv_lines_and_damage(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text(
        'prompt,completion\n"two\nlines",a\n\nonly\nb,c,d\n"x"y,z\ngood,"q""q"\n"open,\nend\n', encoding="utf-8"
    )
    found = rows(file)
    assert [(row.line, row.fields if isinstance(row, RawRow) else row.reason) for row in found] == [
        (2, {"prompt": "two\nlines", "completion": "a"}),
        (5, "too few fields (1, the header has 2)"),
        (6, "too many fields (3, the header has 2)"),
        (7, """damaged quotes (',' expected after '"')"""),
        (8, {"prompt": "good", "completion": 'q"q'}),
        (9, "a quote is never closed (it swallows lines 9 to 10)"),
    ]


def test_csv_headers(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("text\n<s>Human: a\n", encoding="utf-8")
    assert [row.fields for row in rows(file) if isinstance(row, RawRow)] == [{"text": "<s>Human: a"}]
    file.write_text("prompt;completion\na;b\n", encoding="utf-8")
    assert [row.fields for row in rows(file) if isinstance(row, RawRow)] == [{"prompt": "a", "completion": "b"}]
    file.write_text("text,text\na,b\n", encoding="utf-8")
    with pytest.raises(DataError, match="column 'text' given twice"):
        rows(file)
    file.write_text("text\n", encoding="utf-8")
    with pytest.raises(DataError, match="no rows: the file holds only a header"):
        rows(file)
    file.write_bytes(b"prompt,completion\na,b\nc,\xff\nd," + "é".encode() + b"\n")
    assert [str(row.reason) for row in rows(file) if isinstance(row, BadRow)] == ["not utf-8 (byte 0xFF)"]
    tsv = tmp_path / "rows.tsv"
    tsv.write_text("prompt\tcompletion\na,b\tc\n", encoding="utf-8")
    assert [row.fields for row in rows(tsv) if isinstance(row, RawRow)] == [{"prompt": "a,b", "completion": "c"}]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"prompt": "q",}', "trailing comma (column 15)"),
        ('  {"prompt": "q",}', "trailing comma (column 17)"),
        ('{"prompt": None}', "None is no JSON word - Python text, not JSON (column 12)"),
        ('{"prompt"： "q"}', "full-width colon U+FF1A (column 10)"),
        ('{"prompt": "q"} x', "text after the end of the value (column 17)"),
        ('{"prompt": "a\tb"}', "raw tab inside a string (column 14)"),
        ('{"prompt": "a\\x"}', "not JSON: invalid \\escape (column 14)"),
        ('{"prompt": [1, 2', "ends too early (column 17)"),
        ("[" * 100_000, "nested too deeply (column 1)"),
    ],
)
def test_json_line_reasons(tmp_path: Path, text: str, reason: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(LINE + text + "\n" + LINE, encoding="utf-8")
    found = rows(file)
    assert [row.line for row in found] == [1, 2, 3]
    assert isinstance(found[1], BadRow)
    assert found[1].reason == reason


def test_a_bad_first_line_costs_only_itself(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    for first in ('{"prompt": "cut', '{"prompt": "cut",', "{'prompt': 1}", '"text"', "42"):
        file.write_text(first + "\n" + LINE * 2, encoding="utf-8")
        assert [type(row).__name__ for row in rows(file)] == ["BadRow", "RawRow", "RawRow"], first


def test_several_objects_on_a_line(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(LINE.strip() * 2 + "\n" + LINE, encoding="utf-8")
    assert [row.line for row in rows(file)] == [1, 1, 2]


def test_a_wrapper_with_nested_fields(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps({"info": {"v": [1]}, "data": [{"text": "a"}], "end": 1}, indent=1), encoding="utf-8")
    assert [row.fields for row in rows(file) if isinstance(row, RawRow)] == [{"text": "a"}]


@pytest.mark.parametrize(
    ("text", "what", "line"),
    [
        ('[\n{"text": "a"}\n{"text": "b"}]', "not JSON: expecting ','", 3),
        ('[\n{"text": "a"},\n]', "trailing comma", 2),
        ('[\n{"text": "a"}', "the file ends too early (cut short?)", 2),
        ('[\n{"text": "a"}\n]\nx', "not JSON: expecting value", 4),
        ('[\n{"text": "a},\n]', "raw line break inside a string", 2),
    ],
)
def test_syntax_errors_of_documents(tmp_path: Path, text: str, what: str, line: int) -> None:
    file = tmp_path / "rows.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        rows(file)
    assert caught.value.where == f"{file}:{line}"
    assert caught.value.what.startswith(f"{what} (line {line}, column ")


def test_a_key_twice_in_an_array(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text('[{"text": "a"},\n{"text": "b", "text": "c"},\n{"text": "d"}]', encoding="utf-8")
    found = rows(file)
    assert [(row.line, type(row).__name__) for row in found] == [(1, "RawRow"), (2, "BadRow"), (3, "RawRow")]


def test_archives_and_others_are_named(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"PK\x03\x04rest")
    with pytest.raises(DataError, match="this is a zip archive"):
        rows(file)
    file = tmp_path / "notes.txt"
    file.write_text("some words\n", encoding="utf-8")
    with pytest.raises(DataError, match="not recognised as JSON, JSON Lines, CSV or Parquet"):
        rows(file)


def test_hub_names(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="is no dataset name"):
        rows("hub:a/b/c")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError) as caught:
        rows("hub:owner/name:train")
    assert caught.value.todo == "pip install espalier-lm[hub]"


def test_hub_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        @staticmethod
        def load_dataset(name: str, split: str, streaming: bool) -> list[dict[str, object]]:
            if name == "owner/missing":
                raise ConnectionError("offline\nmore")
            assert (name, split, streaming) == ("owner/name", "test", True)
            return [{"prompt": 1, "completion": 0.5}]

    monkeypatch.setitem(sys.modules, "datasets", Library)  # type: ignore[arg-type]
    (row,) = rows("hub:owner/name:test")
    assert row == RawRow({"prompt": "1", "completion": "0.5"}, "hub:owner/name:test", 1)
    with pytest.raises(DataError, match="the dataset could not be read: ConnectionError: offline"):
        rows("hub:owner/missing")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('\ufeff{"instruction": "a", "output": "b"}', "a byte order mark (U+FEFF) where a value begins"),
        ('{"instruction": "a", "output": "b"},', "a comma after the object"),
        ('// {"instruction": "a", "output": "b"}', "a comment - JSON has none (column 1)"),
    ],
)
def test_lines_of_joined_and_edited_files(line: str, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"instruction": "a", "output": "b"}\n' + line + "\n", encoding="utf-8")
    good, bad = read_rows([str(file)])
    assert isinstance(good, RawRow)
    assert isinstance(bad, BadRow)
    assert bad.line == 2
    assert bad.reason.startswith(reason)
