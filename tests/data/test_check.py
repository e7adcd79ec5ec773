"""The report: counts, warnings, files written whole, exit codes."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest

from espalier.data.check import CheckReport, check_files, exit_code
from espalier.data.formats import FormatOptions
from espalier.data.keys import key, prompt_text
from espalier.data.report import print_report, safe_console, visible
from espalier.data.rows import Example
from espalier.errors import DataError, UsageError


def write(path: Path, *rows: dict[str, object] | str) -> str:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n", encoding="utf-8")
    return str(path)


def pair(prompt: str, completion: str) -> dict[str, object]:
    return {"prompt": prompt, "completion": completion}


def warnings(report: CheckReport) -> dict[str, str]:
    return {warning.kind: warning.message for warning in report.warnings if warning.kind != "note"}


def test_json_is_exactly_this(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", pair("q", "a"), pair("q", ""), pair("q", "b"))
    assert check_files([file]).to_json() == {
        "read": 3,
        "kept": 2,
        "left_out": [{"file": file, "line": 2, "reason": "no answer ('completion' is empty)"}],
        "warnings": [
            {
                "kind": "conflicting_answers",
                "message": f"1 prompt has different answers (for example {file}:1, {file}:3)",
                "count": 1,
            },
            {"kind": "note", "message": f"{file}: format prompt_completion (prompt, completion)"},
        ],
    }


def test_overlap_with_the_held_out_rows(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", pair("q1", "a"), pair("q2", "a"))
    heldout = write(tmp_path / "held.jsonl", pair("q1", "a"), pair("q2", "b"), pair("q3", "a"), pair("q4", ""))
    report = check_files([train], heldout=[heldout], fix=str(tmp_path / "fix.jsonl"))
    assert (report.read, report.kept) == (6, 5)
    assert [str(row) for row in report.left_out] == [f"{heldout}:4: no answer ('completion' is empty)"]
    assert warnings(report) == {
        "overlap": "2 held-out rows have a prompt that is also trained, 1 with the same answer "
        f"({heldout}:1, {heldout}:2)"
    }
    assert len((tmp_path / "fix.jsonl").read_text(encoding="utf-8").splitlines()) == 2


def test_short_and_placeholder_answers(tmp_path: Path) -> None:
    rows = [pair(f"q{i}", "a long answer " * 5) for i in range(3)]
    file = write(tmp_path / "a.jsonl", *rows, pair("q8", "a"), pair("q9", "None."))
    assert warnings(check_files([file])) == {
        "short_answers": f"1 answers have at most 2 characters, while half have 70 or more ({file}:4)",
        "placeholder_answers": f"1 rows have an answer that is only a placeholder ('None.'): {file}:5",
    }
    labels = write(tmp_path / "b.jsonl", pair("q1", "A"), pair("q2", "B"))
    assert warnings(check_files([labels])) == {}


@pytest.mark.parametrize(
    ("text", "kind", "sample"),
    [
        ("a\u200bb", "invisible_characters", "U+200B"),
        ("a\x07", "control_characters", "U+0007"),
        ("a\ufffd", "replacement_characters", "U+FFFD"),
        ("p\u0430y", "look_alikes", "U+0070+U+0430"),
        ("\u2f46", "look_alikes", "U+2F46"),
        ("stop<|im_end|>", "special_tokens", "<|im_end|>"),
        ("stop</s>", "special_tokens", "</s>"),
        ("[INST] x", "special_tokens", "[INST]"),
    ],
)
def test_odd_characters_are_told(tmp_path: Path, text: str, kind: str, sample: str) -> None:
    file = write(tmp_path / "a.jsonl", pair("q", text), pair(text + "?", "b"), pair("a <b>", "好 👨\u200d👩"))
    (warning,) = [w for w in check_files([file]).warnings if w.kind != "note"]
    assert (warning.kind, warning.details) == (kind, {"count": 2, "places": [f"{file}:1", f"{file}:2"]})
    assert f"({sample})" in warning.message


def test_special_tokens_of_finished_texts_are_right(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", {"text": "<s>Human: q\n</s><s>Assistant: a\n</s>"})
    assert warnings(check_files([file])) == {}


def test_a_file_that_cannot_be_read_does_not_hide_the_others(tmp_path: Path) -> None:
    bad, good = write(tmp_path / "bad.json", '[{"text": "a"},'), write(tmp_path / "good.jsonl", pair("q", "a"))
    report = check_files([bad, good])
    assert (report.read, report.kept) == (2, 2)
    assert [error.where for error in report.errors] == [f"{bad}:2"]
    assert exit_code(report) == 2
    assert report.to_json()["warnings"][0]["kind"] == "error"
    with pytest.raises(DataError, match="no such file"):
        check_files([str(tmp_path / "none.jsonl")])


def test_fix_keeps_the_text_of_json_rows(tmp_path: Path) -> None:
    lines = ['{"prompt":"é", "completion" : 0.10, "meta": [1]}', '[{"text": "\\u00e9"}]']
    file = write(tmp_path / "a.jsonl", *lines)
    pretty = write(tmp_path / "b.json", json.dumps([{"text": "a  b"}], indent=1))
    fixed = tmp_path / "fix.jsonl"
    check_files([file, pretty], fix=str(fixed))
    assert fixed.read_text(encoding="utf-8").splitlines() == [lines[0], lines[1][1:-1], '{ "text": "a  b" }']
    # Where options gave the columns their meaning, the rows are written in our own words.
    check_files([file], fix=str(fixed), options=FormatOptions(columns={"text": "prompt"}))
    assert fixed.read_text(encoding="utf-8").splitlines() == ['{"text": "é"}']


def test_outputs_appear_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "a.jsonl", pair("q", "a"))
    fixed = tmp_path / "fix.jsonl"
    fixed.write_text("old", encoding="utf-8")

    def stop(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("espalier.data.check.kept_line", stop)
    with pytest.raises(KeyboardInterrupt):
        check_files([file], fix=str(fixed))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "fix.jsonl"]
    assert fixed.read_text(encoding="utf-8") == "old"
    with pytest.raises(DataError, match="cannot be written"):
        check_files([file], fix=str(tmp_path / "no folder" / "fix.jsonl"))


def test_left_out_rows_are_bounded_but_counted(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", pair("q", "a"), *[pair("q", "")] * 50)
    report = check_files([file], keep_left_out=10)
    assert len(report.left_out) == 10
    assert report.reasons["no answer"].count == 50
    assert [row.line for row in report.reasons["no answer"].first] == [2, 3, 4, 5, 6]
    assert len(check_files([file], keep_left_out=None).left_out) == 50


def test_exit_codes(tmp_path: Path) -> None:
    clean = check_files([write(tmp_path / "a.jsonl", pair("q", "a"))])
    assert (exit_code(clean), exit_code(clean, strict=True)) == (0, 0)  # a note is no warning
    twice = check_files([write(tmp_path / "b.jsonl", pair("q", "a"), pair("q", "a"))])
    assert (exit_code(twice), exit_code(twice, strict=True)) == (0, 1)
    bad = check_files([write(tmp_path / "c.jsonl", pair("q", "a"), "{")])
    assert (exit_code(bad), exit_code(bad, strict=True)) == (2, 2)


def test_printed_report(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", pair("q", "a" * 9), pair("[red]x[/red]", "b"), "\x1b[31m{", pair("q2", ""))
    out = io.StringIO()
    print_report(check_files([file]), safe_console(out))
    shown = out.getvalue()
    for part in (
        "4",
        "read",
        "2",
        "kept",
        "left out",
        "not JSON: expecting value (column 1)",
        "2 distinct prompts in 2 rows",
    ):
        assert part in shown
    assert "smallest 1, median 5, largest 9" in shown
    assert "\x1b" not in shown
    assert visible("a\x1b\n\u202e字") == "a\\x1b\\n\\u202e字"


def test_keys_do_not_mix_texts_up() -> None:
    def prompt(*contents: str) -> str:
        messages = tuple({"role": "user", "content": content} for content in contents)
        return prompt_text(Example(messages, (False,) * len(messages)))

    assert len({prompt("a", "b"), prompt("ab"), prompt("a user 1 b"), prompt("", "ab"), prompt("a")}) == 5
    assert key("a") != key("b")
    assert prompt_text(Example((), (), text="<s>Human: q</s><s>Assistant: a")) == "<s>Human: q</s><s>Assistant:"
    with_tools = Example(({"role": "user", "content": "a"},), (False,), tools=({"name": "t"},))
    assert prompt_text(with_tools) != prompt("a")


def test_no_output_takes_the_place_of_an_input(tmp_path: Path) -> None:
    """An output may not be a file that is read, by whatever name, nor the other output."""
    file = write(tmp_path / "a.jsonl", pair("q1", "a"), pair("q2", ""))
    heldout = write(tmp_path / "held.jsonl", pair("q3", "a"))
    (tmp_path / "link.jsonl").symlink_to(file)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    read_here = "this file is read here, and would be overwritten"
    for options, words in (
        ({"fix": file}, f"--fix {file}: {read_here}"),
        ({"rejects": heldout}, f"--rejects {heldout}: {read_here}"),
        ({"fix": str(tmp_path / "link.jsonl")}, read_here),
        ({"rejects": str(tmp_path / "." / "a.jsonl")}, read_here),
        ({"fix": "out.jsonl", "rejects": "./out.jsonl"}, "--rejects out.jsonl: --fix is the same file"),
    ):
        with pytest.raises(UsageError, match=re.escape(words)):
            check_files([str(tmp_path / "a*.jsonl")], heldout=[heldout], **options)
    with pytest.raises(DataError, match="this is a folder"):
        check_files([file], fix=str(tmp_path))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
