"""The cases of group (a): each with its exact right value. Where our rule is not the proposed one, it says why."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from espalier.data.check import check_files, exit_code
from espalier.data.formats import Example, FormatOptions, iter_examples, read_examples
from espalier.data.keys import row_text
from espalier.data.read import BadRow
from espalier.data.report import print_report, safe_console
from espalier.errors import DataError


class Read:
    """All that reading some files gives: kept examples, bad rows, notices."""

    def __init__(self, *files: Path, options: FormatOptions | None = None) -> None:
        self.notices: list[str] = []
        self.all = list(iter_examples([str(file) for file in files], options, notice=self.notices.append))
        self.kept = [row for row in self.all if isinstance(row, Example)]
        self.bad = [row for row in self.all if isinstance(row, BadRow)]

    def texts(self) -> list[tuple[str, ...]]:
        return [tuple(message["content"] for message in example.messages) for example in self.kept]

    def kept_lines(self) -> list[int]:
        return [example.line for example in self.kept]

    def reasons(self) -> dict[int, str]:
        return {row.line: row.reason for row in self.bad}


def refusal(*files: Path, options: FormatOptions | None = None) -> DataError:
    with pytest.raises(DataError) as caught:
        Read(*files, options=options)
    return caught.value


THREE = [("Name a colour.", "Teal."), ("说一种水果。", "柚子。"), ("2+2?", "4")]


@pytest.mark.parametrize(
    ("name", "lines"), [("train.jsonl", [1, 2, 3]), ("train.json", [2, 7, 12]), ("train.csv", [2, 3, 4])]
)
def test_a01_bom(cases: Path, name: str, lines: list[int]) -> None:
    read = Read(cases / "A01_bom" / name)
    assert read.texts() == THREE
    assert read.bad == []
    assert read.kept_lines() == lines
    assert "\ufeff" not in "".join(read.notices)


def test_a01_only_the_first_mark_goes(tmp_path: Path) -> None:
    file = tmp_path / "two.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + '{"prompt": "\ufeffq", "completion": "\ufeff"}\n'.encode())
    assert Read(file).texts() == [("\ufeffq", "\ufeff")]


def test_a02_crlf_blank(cases: Path) -> None:
    read = Read(cases / "A02_crlf_blank/train.jsonl")
    assert read.texts() == [("Line one?", "First.\r\nSecond."), ("Line two?", "Done."), ("Line three?", "End.")]
    assert read.kept_lines() == [1, 4, 6]
    assert read.bad == []


def test_a04_trailing_comma(cases: Path) -> None:
    error = refusal(cases / "A04_trailing_comma/train.json")
    assert error.what == "trailing comma (line 3, column 58)"
    assert error.where == f"{cases / 'A04_trailing_comma/train.json'}:3"
    assert error.exit_code == 2


def test_a05_quotes(cases: Path) -> None:
    file = cases / "A05_quotes/train.jsonl"
    read = Read(file)
    assert read.kept_lines() == [1, 4]
    assert read.reasons() == {
        2: "single quotes - Python text, not JSON (column 2)",
        3: "full-width quote U+201C (column 2)",
    }
    with pytest.raises(DataError) as caught:
        read_examples(str(file))
    assert caught.value.details == tuple(str(row) for row in read.bad)
    assert [example.line for example in read_examples(str(file), on_bad_row="skip")] == [1, 4]


@pytest.mark.parametrize(
    ("name", "lines", "said"),
    [
        ("looks_like.json", [1, 2, 3], ""),
        ("looks_like.jsonl", [2, 7, 12], ""),
        ("concat.json", [1, 6, 11], ""),
        ("lines_of_arrays.jsonl", [1, 2, 3], "3 lines are lists of one object; read as that object"),
        ("wrapped.json", [1, 1, 1], "the rows are the list under 'data'; ignored beside it: version"),
    ],
)
def test_a06_container(cases: Path, name: str, lines: list[int], said: str) -> None:
    read = Read(cases / "A06_container" / name)
    assert read.texts() == THREE
    assert read.kept_lines() == lines
    assert [notice.partition(": ")[2] for notice in read.notices] == [
        *([said] if said else []),
        "format alpaca (instruction, output, input)",
    ]


def test_a07_misspelt(cases: Path) -> None:
    read = Read(cases / "A07_misspelt/train.jsonl")
    assert read.kept_lines() == [1]  # letter case and blanks are not folded: a key is what it is, and the row is named
    assert read.reasons() == {
        2: "key 'instrution': did you mean 'instruction'?",
        3: "key 'ouput': did you mean 'output'?",
        4: "key 'Instruction': did you mean 'instruction'? (letter case)",
        5: "key 'instruction ': did you mean 'instruction'? (a blank around the name)",
    }


def test_a07_all_wrong(cases: Path) -> None:
    file = cases / "A07_misspelt/all_wrong.jsonl"
    error = refusal(file)
    assert error.what == "no known columns (found 'question', 'answer')"
    assert error.todo is not None
    assert error.todo.endswith("--columns prompt=question,completion=answer")
    mapped = Read(file, options=FormatOptions(columns={"prompt": "question", "completion": "answer"}))
    assert mapped.texts() == [("Q0", "R0"), ("Q1", "R1"), ("Q2", "R2")]


def test_a08_null_empty(cases: Path) -> None:
    read = Read(cases / "A08_null_empty/train.jsonl")
    assert read.texts() == [("r1", "fine"), ("r2", "no input key"), ("only input", "fine too")]
    assert read.kept_lines() == [1, 2, 6]
    assert read.reasons() == {
        3: "no answer ('output' is null)",
        4: "no answer ('output' is empty)",
        5: "no answer ('output' holds only blanks)",
        7: "no prompt (instruction and input are both empty)",
        8: "no answer (key 'output' is missing)",
    }


def test_a09_nonstring(cases: Path) -> None:
    read = Read(cases / "A09_nonstring/train.jsonl")
    answers = [example.messages[1]["content"] for example in read.kept]
    assert answers == ["42", "3.0", "1e5", "12345678901234567890", "0.10", "true", "42"]
    assert all(type(answer) is str for answer in answers)
    assert read.reasons() == {
        7: "a list where text is expected ('output')",
        8: "an object where text is expected ('output')",
    }
    assert read.notices[-1].endswith(": 6 answers were numbers or true/false; kept as spelt")


def test_a11_gbk(cases: Path) -> None:
    for name, offset in (("train.csv", 26), ("train.jsonl", 17)):
        error = refusal(cases / "A11_gbk" / name)
        assert error.what == (
            f"not UTF-8 (byte 0xCE at offset {offset}; looks like GBK/GB18030 - pass the encoding: --encoding gb18030)"
        )
        read = Read(cases / "A11_gbk" / name, options=FormatOptions(encoding="gb18030"))
        assert [texts[1] for texts in read.texts()] == ["你好呀", "龙井"]


def test_a11_mixed(cases: Path) -> None:
    read = Read(cases / "A11_gbk/mixed.jsonl")
    assert [texts[1] for texts in read.texts()] == ["你好呀", "明天见"]
    assert list(read.reasons()) == [2]
    assert read.reasons()[2].startswith("not UTF-8 (byte 0xD6 at offset 68; looks like GBK/GB18030")


def test_a11_not_the_locale(cases: Path) -> None:
    code = "import sys; from espalier.data.formats import read_examples; print(len(read_examples(sys.argv[1])))"
    environment = {"PYTHONUTF8": "0", "LANG": "C", "LC_ALL": "C", "PYTHONPATH": ":".join(sys.path)}
    file = str(cases / "A14_verbatim_unicode/train.jsonl")
    done = subprocess.run([sys.executable, "-c", code, file], env=environment, capture_output=True, check=True)
    assert done.stdout == b"8\n"


def test_a12_utf16(cases: Path) -> None:
    read = Read(cases / "A12_utf16/train.jsonl")
    assert read.texts() == THREE
    assert read.kept_lines() == [1, 2, 3]
    assert read.notices[0].endswith(": read as UTF-16 (starts with FF FE)")


def test_a13_surrogate(cases: Path) -> None:
    read = Read(cases / "A13_surrogate/train.jsonl")
    assert read.texts() == [("smile", "\U0001f600"), ("plain", "fine")]
    assert read.reasons() == {2: "lone surrogate U+D83D", 3: "lone surrogate U+DE00"}


def test_a14_verbatim_unicode(cases: Path) -> None:
    file = cases / "A14_verbatim_unicode/train.jsonl"
    read = Read(file)
    expected = [json.loads(line)["output"] for line in file.read_text(encoding="utf-8").splitlines()]
    assert [texts[1] for texts in read.texts()] == expected
    assert sum(map(len, expected)) == 60
    report = check_files([str(file)])
    assert (report.read, report.kept) == (8, 8)
    found = {warning.kind: warning.details["places"] for warning in report.warnings if warning.kind != "note"}
    assert found == {"invisible_characters": [f"{file}:4", f"{file}:7"], "look_alikes": [f"{file}:8"]}


def test_a15_roles(cases: Path) -> None:
    # Documented in data/turns.py: letter case is folded, 'chatgpt' is an alias, a turn may use either pair of keys.
    # 'text' is no name for a turn's text here, so row 7 is bad rather than guessed at.
    read = Read(cases / "A15_roles/train.jsonl")
    assert read.kept_lines() == [1, 2, 3, 5, 6, 8]
    assert read.texts()[1] == ("s2", "q2", "a2")
    assert [message["role"] for message in read.kept[1].messages] == ["system", "user", "assistant"]
    assert all([m["role"] for m in e.messages][-2:] == ["user", "assistant"] for e in read.kept)
    assert read.reasons() == {
        4: "unknown role 'hummany': did you mean 'human'? (turn 1)",
        7: "turn 1 has no 'content' (found 'role', 'text')",
    }


def test_a16_turn_order(cases: Path) -> None:
    read = Read(cases / "A16_turn_order/train.jsonl")
    assert read.texts() == [
        ("u1", "a1"),
        ("u2", "u2b", "a2"),
        ("greeting", "u3", "a3"),
        ("u4", "a4"),
        ("u5", "a5", "a5b"),
        ("u6", "", "u6b", "a6"),
        ("u9", "late system", "a9"),
    ]
    learnt = [[m["content"] for m, t in zip(e.messages, e.train, strict=True) if t] for e in read.kept]
    assert learnt == [["a1"], ["a2"], ["greeting", "a3"], ["a4"], ["a5", "a5b"], ["a6"], ["a9"]]
    assert read.reasons() == {7: "no messages (an empty list)", 8: "nothing to learn (no assistant turn)"}
    assert [notice.partition(": ")[2] for notice in read.notices[1:]] == [
        "1 empty answers are kept as context and not learnt",
        "1 rows end with turns that nobody answers; these turns are cut off (lines 4)",
    ]


def test_a18_one_bad_row(cases: Path, tmp_path: Path) -> None:
    file = cases / "A18_one_bad_row/train.jsonl"
    with pytest.raises(DataError, match=r":4321: unterminated string \(column \d+\)") as caught:
        read_examples(str(file))
    assert caught.value.what == "1 of 5000 rows cannot be used"
    rejects = tmp_path / "rejects.jsonl"
    report = check_files([str(file)], rejects=str(rejects))
    assert (report.read, report.kept) == (5000, 4999)
    (rejected,) = map(json.loads, rejects.read_text(encoding="utf-8").splitlines())
    raw = file.read_text(encoding="utf-8").split("\n")[4320]
    assert (rejected["file"], rejected["line"], rejected["text"]) == (str(file), 4321, raw)
    assert rejected["reason"].startswith("unterminated string")


def test_a19_huge_row(cases: Path) -> None:
    read = Read(cases / "A19_huge_row/train.jsonl")
    assert [len(texts[1]) for texts in read.texts()] == [2, 300_000, 2]
    assert read.kept_lines() == [1, 2, 3]


def test_a20_duplicates(cases: Path) -> None:
    file = str(cases / "A20_duplicates/train.jsonl")
    report = check_files([file])
    counts = {warning.kind: warning.details["count"] for warning in report.warnings if warning.kind != "note"}
    assert counts == {"duplicates": 6, "conflicting_answers": 1}
    assert (report.read, report.kept) == (10, 10)
    assert exit_code(report) == 0
    assert exit_code(report, strict=True) == 1


def test_a20_split_by_content(cases: Path, shared: Path) -> None:
    """No prompt on both sides, the same split on every run; four distinct rows stay four."""
    from transformers import AutoTokenizer

    from espalier.encode.encode import Encoder
    from espalier.encode.store import encode_files, split_heldout
    from espalier.encode.template import resolve_template

    file = str(cases / "A20_duplicates/train.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(shared / "tok-bos")
    dataset = encode_files([file], Encoder(tokenizer, resolve_template(tokenizer)), num_workers=0).dataset
    for seed in range(20):
        train, heldout = split_heldout(dataset, 0.3, seed)
        assert len(train) + len(heldout) == 10
        assert len(heldout) > 0
        assert not set(train.prompt_keys.tolist()) & set(heldout.prompt_keys.tolist())
        again = split_heldout(dataset, 0.3, seed)[1]
        assert [row.line for row in again] == [row.line for row in heldout]
    assert len({row_text(example) for example in read_examples(file)}) == 4


def test_a21_type_drift(cases: Path) -> None:
    folder = cases / "A21_type_drift"
    read = Read(folder / "train.jsonl", folder / "part2.jsonl")
    # 'history' is a column that we know: its turns come first, and its answer is learnt like every assistant turn.
    assert read.texts() == [
        ("r1", "one"),
        ("r2", "two"),
        ("r3\nnow text", "three"),
        ("q", "a", "r4\nx", "four"),
        ("r5\ny", "five"),
    ]
    assert [notice.rpartition(": format ")[2] for notice in read.notices] == [
        "alpaca (instruction, output, input, history); ignored columns: meta, score",
        "alpaca (instruction, output, input); ignored columns: extra",
    ]


def test_a22_not_objects(cases: Path) -> None:
    read = Read(cases / "A22_not_objects/train.jsonl")
    assert read.kept_lines() == [1, 7]
    assert read.reasons() == {
        2: "a text where an object is expected",
        3: "a number where an object is expected",
        4: "null where an object is expected",
        5: "a list where an object is expected",
        6: "an empty object",
    }


def test_a23_dup_keys(cases: Path) -> None:
    read = Read(cases / "A23_dup_keys/train.jsonl")
    assert read.texts() == [("r2", "ok")]
    assert read.reasons() == {1: "'output' given twice (column 1)"}


def test_a25_nan_literal(cases: Path) -> None:
    read = Read(cases / "A25_nan_literal/train.jsonl")
    assert read.texts() == [("r1", "ok"), ("r3", "ok")]
    assert read.reasons() == {2: "no answer ('output' is NaN)"}
    assert read.notices[-1].endswith(": 2 values were NaN, which is no JSON; read as missing")


def test_a26_parquet(cases: Path) -> None:
    folder = cases / "A26_parquet"
    index = Read(folder / "with_index.parquet")
    assert index.texts() == [("q0", "a0"), ("q1", "a1"), ("q2\nctx", "a2")]
    assert index.kept_lines() == [1, 2, 3]
    assert "__index_level_0__" not in "".join(index.notices)
    types = Read(folder / "types.parquet")
    assert types.texts() == [("q0", "1"), ("q1", "2")]
    assert types.reasons() == {3: "no answer ('output' is null)"}
    (chat,) = Read(folder / "messages.parquet").kept
    assert chat.messages == ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"})
    assert refusal(folder / "cut.parquet").what == "the Parquet file is incomplete (its footer is missing)"


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("empty.jsonl", "empty file (0 bytes)"),
        ("blank.jsonl", "no rows: the file holds only blank lines"),
        ("empty_array.json", "no rows: the file holds an empty list"),
        ("pointer.jsonl", "this is a Git LFS pointer, not the file itself"),
        ("page.json", "this is an HTML page, not a data file"),
    ],
)
def test_a27_not_data(cases: Path, name: str, what: str) -> None:
    assert refusal(cases / "A27_not_data" / name).what == what


def test_a27_gzip_under_another_name(cases: Path) -> None:
    assert Read(cases / "A27_not_data/really_gzip.jsonl").texts() == THREE


@pytest.mark.parametrize("encoding", ["gbk", "ascii", "utf-8"])
def test_a28_console(tmp_path: Path, cases: Path, encoding: str) -> None:
    row = {"instruction": "emoji please", "ouput \U0001f917\u2047": 1}
    file = tmp_path / "\u4e00.jsonl"
    file.write_text((cases / "A28_console/train.jsonl").read_text(encoding="utf-8") + json.dumps(row), encoding="utf-8")
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    print_report(check_files([str(file)]), safe_console(stream))
    stream.flush()
    shown = raw.getvalue().decode(encoding)
    assert "left out" in shown
    assert ("\u4e00.jsonl" if encoding != "ascii" else "\\u4e00.jsonl") in shown.replace("\n", "")
