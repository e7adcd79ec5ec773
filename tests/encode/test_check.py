"""The checks that need a tokenizer, and the command as scripts see it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from espalier.data.check import check_files
from espalier.encode.check import TokenCheck, prompt_sharing, run_check, unique_tokens
from espalier.encode.encode import Encoder
from espalier.encode.template import resolve_template


def encoder(folder: Path, template: str | None = None, **options: Any) -> Encoder:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return Encoder(tokenizer, resolve_template(tokenizer, template), **options)


def ids(*values: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.array(values, dtype=np.int32)


def test_strict_template_is_a_reason(cases: Path, shared: Path) -> None:
    file = str(cases / "B17_strict_roles/train.jsonl")
    report = check_files([file], tokens=TokenCheck(encoder(shared / "tok-trim")))
    assert (report.read, report.kept) == (3, 1)
    assert [row.line for row in report.left_out] == [1, 2]
    assert all(row.reason.startswith("the template refuses the conversation (") for row in report.left_out)


def test_strange_orders_of_turns_are_refused_by_a_strict_template(cases: Path, shared: Path) -> None:
    file = str(cases / "A16_turn_order/train.jsonl")
    report = check_files([file], tokens=TokenCheck(encoder(shared / "tok-trim")))
    # Doubled turns, assistant first and a late system turn: no text is joined or dropped to please the template.
    assert {2, 3, 5, 9} <= {row.line for row in report.left_out}
    assert {1, 4} & {row.line for row in report.left_out} == set()


def test_characters_that_the_tokenizer_cannot_write(cases: Path, shared: Path) -> None:
    file = str(cases / "B16_unknown_chars/train.jsonl")
    report = check_files([file], tokens=TokenCheck(encoder(shared / "tok-meta", "plain")))
    assert {row.line: row.reason for row in report.left_out} == {
        1: "the answer holds characters that the tokenizer cannot write ('你好')"
    }


def test_overlong_rows_are_listed_worst_first(tmp_path: Path, shared: Path) -> None:
    file = tmp_path / "rows.jsonl"
    words = [2, 41, 10, 80, 3, 60, 50, 70]
    file.write_text(
        "\n".join(json.dumps({"prompt": "q", "completion": "pear " * count}) for count in words), encoding="utf-8"
    )
    rejects = tmp_path / "rejects.jsonl"
    tokens = TokenCheck(encoder(shared / "tok-turn", max_length=60))
    report = check_files([str(file)], tokens=tokens, rejects=str(rejects))
    (warning,) = [w for w in report.warnings if w.kind == "overlong"]
    assert [int(row["place"].rpartition(":")[2]) for row in warning.details["worst"]] == [4, 8, 6, 7, 2]
    assert warning.details["count"] == 5
    assert "(62.5%; policy drop)" in warning.message
    assert [row.line for row in report.left_out] == [2, 4, 6, 7, 8]
    (kind,) = report.reasons
    assert report.reasons[kind].count == 5
    rejected = [json.loads(line) for line in rejects.read_text(encoding="utf-8").splitlines()]
    assert [row["text"] for row in rejected] == [
        json.dumps({"prompt": "q", "completion": "pear " * count}) for count in words if count >= 40
    ]
    assert len(report.figures["row_tokens"]) == 3


def test_turn_end_and_figures(cases: Path, shared: Path) -> None:
    expected = json.loads((cases / "B15_turn_end_not_eos/expected.json").read_text(encoding="utf-8"))
    file = str(cases / "B15_turn_end_not_eos/train.jsonl")
    tokens = TokenCheck(encoder(shared / "tok-turn"))
    report = check_files([file], tokens=tokens)
    assert [w.kind for w in report.warnings if w.kind in ("missing_stop", "untrained_stop")] == []
    assert report.figures["row_tokens"].tolist() == [len(expected["input_ids"])]
    assert 0 < report.figures["learnt_tokens"] < len(expected["input_ids"])
    assert report.figures["sharing"] is None


def test_unique_tokens_counts_shared_beginnings_once() -> None:
    rows = [ids(1, 2, 3, 4), ids(1, 2, 3, 5, 6), ids(1, 9), ids(7), ids(1, 2, 3, 4)]
    # The tree: 1 -> (2 3 -> (4, 5 6), 9), 7: eight tokens.
    assert unique_tokens(rows) == 8
    assert unique_tokens(rows[::-1]) == 8
    assert unique_tokens([ids(1, 2)]) == 2
    # Bytes must be compared big-endian: as little-endian ones, 256 would stand before 1 and part its like.
    assert unique_tokens([ids(1, 1), ids(256, 1), ids(1, 2)]) == 5


@pytest.mark.parametrize("seed", range(20))
def test_unique_tokens_matches_a_tree(seed: int) -> None:
    chance = np.random.default_rng(seed)
    rows = [chance.integers(0, 3, chance.integers(1, 9)).astype(np.int32) for _ in range(12)]
    nodes = {tuple(row[: end + 1].tolist()) for row in rows for end in range(len(row))}
    assert unique_tokens(rows) == len(nodes)


def test_prompt_sharing() -> None:
    prompt = list(range(10))
    rows = [ids(*prompt, 100 + i) for i in range(32)]
    assert prompt_sharing(rows, random.Random(0)) == {
        "rows_a_step": 16,
        "steps": 2,
        "logical_tokens": 176.0,
        "unique_tokens": 26.0,
        "saved": 1 - 26 / 176,
    }
    assert prompt_sharing(rows[:15], random.Random(0)) is None


def test_command_json(cases: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(cases / "A05_quotes/train.jsonl")
    assert run_check([file], as_json=True) == 2
    said = json.loads(capsys.readouterr().out)
    assert list(said) == ["read", "kept", "left_out", "warnings"]
    assert (said["read"], said["kept"]) == (4, 2)
    assert said["left_out"][1] == {"file": file, "line": 3, "reason": "full-width quote U+201C (column 2)"}


def test_command_table(cases: Path, shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(cases / "A20_duplicates/train.jsonl")
    fixed = tmp_path / "fix.jsonl"
    code = run_check([file], encoder_factory=lambda: encoder(shared / "tok-turn"), strict=True, fix=str(fixed))
    shown = capsys.readouterr().out
    assert code == 1
    assert "warning: 6 rows repeat an earlier row exactly" in shown
    assert "warning: 1 prompt has different answers" in shown
    assert "tokens a row: smallest" in shown
    assert "3 distinct prompts in 10 rows" in shown
    assert f"kept rows of the training files written to {fixed}" in shown.replace("\n", "")
    assert len(fixed.read_text(encoding="utf-8").splitlines()) == 10
