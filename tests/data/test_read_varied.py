"""The kinds behind the cases: the same rows in any container, encoding, compression; no row lost, no foreign error."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from espalier.data.check import check_files
from espalier.data.formats import Example, FormatOptions, iter_examples
from espalier.data.read import RawRow, read_rows
from espalier.data.rows import BadRow
from espalier.errors import EspalierError

settings.register_profile("short", deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
settings.load_profile("short")

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
WORD = TEXT.filter(lambda text: bool(text.strip()) and "\0" not in text)
ROWS = st.lists(
    st.fixed_dictionaries(
        {"instruction": WORD, "output": WORD}, optional={"input": TEXT.filter(lambda t: "\0" not in t)}
    ),
    min_size=1,
    max_size=6,
)


def as_lines(rows: list[dict[str, str]], end: str, ascii_only: bool) -> str:
    return end.join(json.dumps(row, ensure_ascii=ascii_only) for row in rows)


def container(rows: list[dict[str, str]], form: str, end: str, ascii_only: bool) -> str:
    """The rows as text in one of the forms that people write."""
    if form == "lines":
        return as_lines(rows, end, ascii_only) + end
    if form == "blank lines":
        return end + as_lines(rows, end + "  " + end, ascii_only)
    if form == "array":
        return json.dumps(rows, ensure_ascii=ascii_only)
    if form == "pretty array":
        return json.dumps(rows, ensure_ascii=ascii_only, indent=1).replace("\n", end)
    if form == "rows in an array":
        return "[" + as_lines(rows, "," + end, ascii_only) + "]"
    if form == "concatenated":
        return end.join(json.dumps(row, ensure_ascii=ascii_only, indent=2).replace("\n", end) for row in rows)
    if form == "wrapped":
        return json.dumps({"version": 1, "data": rows}, ensure_ascii=ascii_only, indent=1).replace("\n", end)
    if form == "lists":
        return end.join(json.dumps([row], ensure_ascii=ascii_only) for row in rows)
    assert form == "csv"
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, ["output", "input", "instruction"], lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


FORMS = ["lines", "blank lines", "array", "pretty array", "rows in an array", "concatenated", "wrapped", "lists", "csv"]
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-32", "gb18030"]
PACK = {"": bytes, "gzip": gzip.compress, "zstd": zstandard.compress}


def plain(rows: list[dict[str, str]]) -> list[tuple[str, str]]:
    return [(row["instruction"] + ("\n" + row["input"] if row.get("input") else ""), row["output"]) for row in rows]


def read(path: Path, encoding: str | None = None) -> list[Example | BadRow]:
    return list(iter_examples([str(path)], FormatOptions(encoding=encoding)))


def texts(examples: list[Example | BadRow]) -> list[tuple[str, ...]]:
    assert all(isinstance(example, Example) for example in examples), examples
    return [tuple(m["content"] for m in example.messages) for example in examples if isinstance(example, Example)]


@given(
    rows=ROWS,
    form=st.sampled_from(FORMS),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    encoding=st.sampled_from(ENCODINGS),
    pack=st.sampled_from(list(PACK)),
    ascii_only=st.booleans(),
    name=st.sampled_from(["rows", "rows.json", "rows.jsonl", "rows.txt"]),
)
def test_same_rows_in_any_form(
    rows: list[dict[str, str]], form: str, end: str, encoding: str, pack: str, ascii_only: bool, name: str
) -> None:
    data = container(rows, form, end, ascii_only).encode(encoding)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ("rows.csv" if form == "csv" else name)
        path.write_bytes(PACK[pack](data))
        examples = read(path, encoding if encoding == "gb18030" else None)
        assert texts(examples) == plain(rows)


@given(rows=ROWS, pack=st.sampled_from(list(PACK)), order=st.permutations(["instruction", "output", "input"]))
def test_same_rows_in_parquet(rows: list[dict[str, str]], pack: str, order: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.bin"
        sink = io.BytesIO()
        pq.write_table(pa.table({key: pa.array([row.get(key) for row in rows], pa.string()) for key in order}), sink)
        path.write_bytes(PACK[pack](sink.getvalue()))
        assert texts(read(path)) == plain(rows)


@given(rows=ROWS, data=st.data())
def test_key_order_and_strange_columns(rows: list[dict[str, str]], data: st.DataObject) -> None:
    shuffled = []
    for row in rows:
        extra = {**row, "meta": data.draw(st.none() | st.booleans() | st.lists(st.integers(), max_size=2))}
        shuffled.append({key: extra[key] for key in data.draw(st.permutations(list(extra)))})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text("\n".join(map(json.dumps, shuffled)), encoding="utf-8")
        assert texts(read(path)) == plain(rows)


@given(rows=ROWS, data=st.data())
def test_one_damaged_line_costs_one_row(rows: list[dict[str, str]], data: st.DataObject) -> None:
    lines = [json.dumps(row, ensure_ascii=False).encode() for row in rows]
    victim = data.draw(st.integers(0, len(lines) - 1))
    at = data.draw(st.integers(1, len(lines[victim]) - 1))
    damage = data.draw(st.sampled_from(["cut", "byte", "nul"]))
    good = lines[victim]
    lines[victim] = {"cut": good[:at], "byte": good[:at] + b"\xff" + good[at:], "nul": good[:at] + b"\0" + good[at:]}[
        damage
    ]
    before = [json.dumps({"instruction": f"é{i}", "output": "x"}, ensure_ascii=False).encode() for i in range(8)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_bytes(b"\n".join([*before, *lines]))
        found = read(path)
        assert [row.line for row in found] == list(range(1, len(before) + len(lines) + 1))
        bad = [row for row in found if isinstance(row, BadRow)]
        assert [row.line for row in bad] == [len(before) + victim + 1]
        kept = texts([row for row in found if isinstance(row, Example)])
        assert kept[8:] == [pair for index, pair in enumerate(plain(rows)) if index != victim]


@given(data=st.binary(max_size=200), name=st.sampled_from(["a.jsonl", "a.csv", "a.parquet", "a"]), magic=st.booleans())
def test_no_foreign_exception(data: bytes, name: str, magic: bool) -> None:
    if magic:
        start = [b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1", b"\xff\xfe", b"\xfe\xff", b"[", b"{", b'{"data": [{'][
            len(data) % 8
        ]
        data = start + data
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(data)
        try:
            report = check_files([str(path)], fix=f"{folder}/fix.jsonl", rejects=f"{folder}/rejects.jsonl")
        except EspalierError:
            return  # ours, and printed without a traceback
        assert report.read == report.kept + sum(reason.count for reason in report.reasons.values())
        assert report.read or report.errors


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)
KEYS = ["instruction", "input", "output", "system", "history", "messages", "conversations", "prompt", "completion"]
TURN = st.dictionaries(
    st.sampled_from(["role", "from", "content", "value", "train", "weight", "tool_calls"]), JSON, max_size=4
)
ROLES = st.sampled_from(["user", "assistant", "system", "human", "gpt", "tool", "function_call", "Bot", "x"])
GOOD_TURN = st.fixed_dictionaries(
    {"role": ROLES, "content": TEXT}, optional={"train": st.booleans(), "weight": st.sampled_from([0, 1, 0.5, -1])}
)


@given(
    st.lists(
        st.dictionaries(
            st.sampled_from([*KEYS, "text", "tools", "weight", "odd"]), JSON | st.lists(TURN | GOOD_TURN), max_size=4
        )
        | st.fixed_dictionaries({"messages": st.lists(GOOD_TURN, min_size=1, max_size=5)}),
        min_size=1,
        max_size=5,
    )
)
def test_fix_reads_back_and_no_row_is_lost(rows: list[dict[str, object]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path, fixed = Path(folder) / "rows.jsonl", Path(folder) / "fixed.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        try:
            first = list(iter_examples([str(path)]))
        except EspalierError:
            return
        assert len(first) == len(rows)
        kept = [example for example in first if isinstance(example, Example)]
        for example in kept:
            assert len(example.train) == len(example.messages)
            assert example.text is not None or any(example.train)
            assert len(example.weights) in (0, max(1, len(example.messages)))
        report = check_files([str(path)], fix=str(fixed))
        assert report.kept == len(kept)
        if kept:
            assert [content(example) for example in iter_examples([str(fixed)])] == [
                content(example) for example in kept
            ]


def content(example: Example | BadRow) -> tuple[object, ...]:
    assert isinstance(example, Example), example
    return example.messages, example.train, example.weights, example.tools, example.text


@given(
    rows=st.lists(st.fixed_dictionaries({"prompt": WORD, "completion": WORD}), min_size=1, max_size=3),
    form=st.booleans(),
)
def test_fix_of_a_csv_reads_back(rows: list[dict[str, str]], form: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path, fixed = Path(folder) / "rows.csv", Path(folder) / "fixed.jsonl"
        out = io.StringIO(newline="")
        writer = csv.DictWriter(out, ["prompt", "completion"], quoting=csv.QUOTE_ALL if form else csv.QUOTE_MINIMAL)
        writer.writeheader()
        writer.writerows(rows)
        path.write_text(out.getvalue(), encoding="utf-8", newline="")
        check_files([str(path)], fix=str(fixed))
        first, again = list(iter_examples([str(path)])), list(iter_examples([str(fixed)]))
        assert [content(example) for example in again] == [content(example) for example in first]
        assert texts(first) == [(row["prompt"], row["completion"]) for row in rows]


@pytest.mark.parametrize("cut", [1, 5, 20])
@pytest.mark.parametrize("pack", ["gzip", "zstd"])
def test_cut_compression_is_named(tmp_path: Path, pack: str, cut: int) -> None:
    rows = [{"prompt": f"question {i}", "completion": f"answer {i * 7919}"} for i in range(200)]
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(PACK[pack](as_lines(rows, "\n", True).encode())[:-cut])
    with pytest.raises(EspalierError, match=f"the {pack} data is damaged or cut short"):
        list(iter_examples([str(path)]))


def test_a_long_array_is_read_in_pieces(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i} \U0001f917", "completion": "字" * 1000 + f'"{i}\\'} for i in range(1500)]
    path = tmp_path / "one-line.json"
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    assert texts(read(path)) == [(row["prompt"], row["completion"]) for row in rows]


def test_a_row_longer_than_a_piece(tmp_path: Path) -> None:
    long = 'word \\ " é' * 200_000
    path = tmp_path / "rows.json"
    path.write_text(
        json.dumps([{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": long}]), encoding="utf-8"
    )
    assert texts(read(path)) == [("a", "b"), ("c", long)]


def test_numbers_keep_their_spelling(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(
        '[{"prompt": -0, "completion": 1.50}, {"prompt": 1E+2, "completion": 00}]'.replace("00", "0"), encoding="utf-8"
    )
    assert [row.fields for row in read_rows([str(path)]) if isinstance(row, RawRow)] == [
        {"prompt": "-0", "completion": "1.50"},
        {"prompt": "1E+2", "completion": "0"},
    ]
