"""The cases of group (b), tokens and labels: each with its exact right values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from encoding import chat, chat_ids, encoder_for, example, learnt, load, spans

from espalier.data.formats import Example, iter_examples
from espalier.data.read import BadRow
from espalier.encode.encode import Encoded, Encoder
from espalier.encode.length import length_limit
from espalier.encode.spans import REWRITES, TRIMMED
from espalier.encode.stops import check_vocabulary, generation_stop_ids, turn_end_ids
from espalier.encode.store import encode_files, overlength_report
from espalier.errors import ModelError

SMOLLM_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def expected(cases: Path, name: str) -> Any:
    return json.loads((cases / name / "expected.json").read_text(encoding="utf-8"))


def rows_of(cases: Path, name: str) -> list[Example]:
    rows = list(iter_examples([str(cases / name / "train.jsonl")]))
    assert all(isinstance(row, Example) for row in rows)
    return [row for row in rows if isinstance(row, Example)]


def only(outcome: list[Encoded] | BadRow) -> Encoded:
    assert isinstance(outcome, list), outcome
    (row,) = outcome
    return row


def reason(outcome: list[Encoded] | BadRow) -> str:
    assert isinstance(outcome, BadRow)
    return outcome.reason


@pytest.fixture(scope="module")
def smollm2(smollm2_dir: Path) -> Any:
    return load(smollm2_dir)


def test_b01_double_bos(cases: Path, shared: Path) -> None:
    tokenizer = load(shared / "tok-bos")
    encoder = encoder_for(tokenizer)
    (conversation,) = rows_of(cases, "B01_double_bos")
    row, right = only(encoder.encode(conversation)), expected(cases, "B01_double_bos")
    assert row.input_ids.tolist() == right["input_ids"]
    assert row.labels.tolist() == right["labels"]
    assert row.input_ids.tolist().count(0) == 1
    prompt = encoder.prompt_ids(conversation.messages[:1])
    assert prompt == right["input_ids"][:12] == chat_ids(tokenizer, conversation.messages[:1])


def test_b01_template_without_start_token_sends_none(cases: Path, shared: Path) -> None:
    tokenizer = load(shared / "tok-bos")
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ bos_token }}", "")
    (conversation,) = rows_of(cases, "B01_double_bos")
    row = only(encoder_for(tokenizer).encode(conversation))
    assert row.input_ids.tolist() == expected(cases, "B01_double_bos")["input_ids"][1:]


def test_b02_pad_is_eos(cases: Path, smollm2: Any) -> None:
    encoder = encoder_for(smollm2)
    rows = [only(encoder.encode(row)) for row in rows_of(cases, "B02_pad_is_eos")]
    right = expected(cases, "B02_pad_is_eos")["rows"]
    for row, wanted in zip(rows, right, strict=True):
        assert row.input_ids.tolist() == wanted["input_ids"]
        assert row.labels.tolist() == wanted["labels"]
        assert row.labels[-1] == 2
    assert [int((row.labels >= 0).sum()) for row in rows] == [4, 14]
    assert rows[0].labels.tolist().count(2) == 1  # B22: the end is written once


def test_b04_metaspace(cases: Path, shared: Path) -> None:
    tokenizer = load(shared / "tok-meta")
    (conversation,) = rows_of(cases, "B04_metaspace")
    row, right = only(encoder_for(tokenizer).encode(conversation)), expected(cases, "B04_metaspace")
    assert row.input_ids.tolist() == right["input_ids"]
    assert row.labels.tolist() == right["labels"]
    assert tokenizer.decode(row.input_ids) == right["decode_right"]


def test_b09_template_drops_thinking(cases: Path, shared: Path) -> None:
    tokenizer = load(shared / "tok-think")
    encoder = encoder_for(tokenizer)
    (conversation,) = rows_of(cases, "B09_template_drops_thinking")
    (outcome,) = encoder.encode_batch([conversation])
    first, second = outcome.rows
    assert tokenizer.decode(first.input_ids) == "<turn>user\nq1</turn>\n<turn>assistant\n<think>one</think>a1</turn>"
    assert tokenizer.decode(second.input_ids) == (
        "<turn>user\nq1</turn>\n<turn>assistant\na1</turn>\n"
        "<turn>user\nq2</turn>\n<turn>assistant\n<think>two</think>a2</turn>"
    )
    assert [learnt(tokenizer, row) for row in outcome.rows] == [
        ["<think>one</think>a1</turn>"],
        ["<think>two</think>a2</turn>"],
    ]
    for row, sent in ((first, 1), (second, 3)):
        assert row.input_ids[: spans(row)[0][0]].tolist() == chat_ids(tokenizer, conversation.messages[:sent])
    assert REWRITES in outcome.notes


def test_b10_no_generation_tags(cases: Path, smollm2: Any) -> None:
    (conversation,) = rows_of(cases, "B10_no_generation_tags")
    row, right = only(encoder_for(smollm2).encode(conversation)), expected(cases, "B10_no_generation_tags")
    assert row.input_ids.tolist() == right["input_ids"]
    assert row.labels.tolist() == right["labels"]
    assert row.labels[row.labels >= 0].tolist() == [19556, 30, 2, 7574, 346, 30, 2]


def test_b11_default_system(cases: Path, smollm2: Any) -> None:
    encoder = encoder_for(smollm2)
    for conversation, rendered in zip(
        rows_of(cases, "B11_default_system"), expected(cases, "B11_default_system")["rendered"], strict=True
    ):
        row = only(encoder.encode(conversation))
        # The case counts the newline after the last turn end, which is never learnt: the row ends before it.
        assert smollm2.decode(row.input_ids) + "\n" == rendered
        prompt = encoder.prompt_ids(conversation.messages[:-1])
        assert row.input_ids[: len(prompt)].tolist() == prompt == chat_ids(smollm2, conversation.messages[:-1])
    lengths = [len(only(encoder.encode(row)).input_ids) for row in rows_of(cases, "B11_default_system")]
    assert lengths == [33, 17, 20]
    assert encoder.template.default_system == SMOLLM_SYSTEM
    assert len(encoder.template.notices()) == 1


def test_b12_added_tokens(cases: Path) -> None:
    tokenizer = load(cases / "B12_added_tokens" / "model")
    with pytest.raises(ModelError, match="tokenizer has 342 ids, model has 340 rows"):
        check_vocabulary(tokenizer, 340)
    check_vocabulary(tokenizer, 342)
    check_vocabulary(tokenizer, 384)  # padded tables are fine
    check_vocabulary(tokenizer, 340, max_used_id=339)
    (conversation,) = rows_of(cases, "B12_added_tokens")
    row = only(encoder_for(tokenizer).encode(conversation))
    assert row.input_ids.max() == 341


def test_b13_b21_no_template(cases: Path, shared: Path, tmp_path: Path) -> None:
    tokenizer = load(shared / "tok-plain")
    encoder = encoder_for(tokenizer)
    assert (encoder.template.source, encoder.template.reason) == (
        "built-in plain",
        "the tokenizer has no chat template",
    )
    (conversation,) = rows_of(cases, "B13_no_template")
    row = only(encoder.encode(conversation))
    assert tokenizer.decode(row.input_ids) == "### User\nname a fruit\n### Assistant\npear</s>"
    assert learnt(tokenizer, row) == ["pear</s>"]
    assert row.labels[-1] == 1
    tokenizer.save_pretrained(tmp_path)
    saved = load(tmp_path)
    prompt = chat_ids(saved, conversation.messages[:-1])
    assert prompt == row.input_ids[: spans(row)[0][0]].tolist()


def test_b14_no_max_length(cases: Path, smollm2: Any) -> None:
    class Config:
        max_position_embeddings = 8192

    limit, why = length_limit(None, smollm2, Config())
    assert (limit, why) == (8192, "the model's max_position_embeddings")
    assert length_limit(512, smollm2, Config()) == (512, "as asked")
    asked_too_much = "the model's max_position_embeddings; you asked for 10,000"
    assert length_limit(10_000, smollm2, Config()) == (8192, asked_too_much)
    encoder = encoder_for(smollm2, max_length=limit)
    path = str(cases / "B14_no_max_length" / "train.jsonl")
    result = encode_files([path], encoder, num_workers=0)
    (bad,) = result.bad
    assert (bad.line, bad.reason) == (1, "too long (9033 tokens, limit 8192)")  # 9031 of the prompt, 2 of the answer
    assert [row.line for row in result.dataset] == [2]
    report = overlength_report(result)
    assert (report.count, report.share, report.worst) == (1, 0.5, ((f"{path}:1", 9033),))


def test_b15_turn_end_not_eos(cases: Path, shared: Path) -> None:
    tokenizer = load(shared / "tok-turn")
    encoder = encoder_for(tokenizer)
    (conversation,) = rows_of(cases, "B15_turn_end_not_eos")
    row, right = only(encoder.encode(conversation)), expected(cases, "B15_turn_end_not_eos")
    assert row.input_ids.tolist() == right["input_ids"]
    assert row.labels[-1] == right["turn_end_id"]
    assert turn_end_ids(tokenizer, encoder.template) == [2]
    generation = json.loads((cases / "B15_turn_end_not_eos" / "generation_config.json").read_text(encoding="utf-8"))
    stops = generation_stop_ids(tokenizer, encoder.template, generation["eos_token_id"])
    assert stops == right["stop_ids_for_chat"] == [1, 2]


def test_b16_unknown_chars(cases: Path, shared: Path) -> None:
    encoder = encoder_for(load(shared / "tok-meta"))
    bad, good = rows_of(cases, "B16_unknown_chars")
    assert reason(encoder.encode(bad)) == "the answer holds characters that the tokenizer cannot write ('你好')"
    assert learnt(encoder.tokenizer, only(encoder.encode(good))) == ["hi there</s>"]


def test_b17_strict_roles(cases: Path, shared: Path) -> None:
    encoder = encoder_for(load(shared / "tok-trim"))
    first, second, third = (encoder.encode(row) for row in rows_of(cases, "B17_strict_roles"))
    words = "the template refuses the conversation (turns must go user, assistant, user, ...)"
    assert isinstance(first, BadRow)
    assert isinstance(second, BadRow)
    assert [(bad.line, bad.reason) for bad in (first, second)] == [(1, words), (2, words)]
    assert learnt(encoder.tokenizer, only(third)) == ["c</turn>"]


def test_b17_trimming_is_said(shared: Path) -> None:
    encoder = encoder_for(load(shared / "tok-trim"))
    (outcome,) = encoder.encode_batch([chat("  a ", " c\n", "d", "e ")])
    assert learnt(encoder.tokenizer, outcome.rows[0]) == ["c</turn>", "e</turn>"]
    assert outcome.notes == (TRIMMED,)


def test_b23_chat_that_begins_with_the_assistant(shared: Path, smollm2: Any) -> None:
    messages = [
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "c"},
    ]
    row = only(encoder_for(smollm2).encode(example(messages)))
    assert learnt(smollm2, row) == ["hi<|im_end|>", "c<|im_end|>"]


def test_a16_turn_orders_that_the_template_renders_are_kept(cases: Path, smollm2: Any) -> None:
    found = iter_examples([str(cases / "A16_turn_order" / "train.jsonl")])
    encoder = encoder_for(smollm2)
    kept = {row.line: encoder.encode(row) for row in found if isinstance(row, Example)}
    answers = {
        line: learnt(smollm2, only(outcome)) for line, outcome in kept.items() if not isinstance(outcome, BadRow)
    }
    end = "<|im_end|>"
    assert answers[4] == ["a4" + end]
    assert {2, 3, 5, 9} <= answers.keys()
    assert all(text != end for texts in answers.values() for text in texts)


def test_encoder_survives_pickling(shared: Path) -> None:
    import pickle

    encoder = encoder_for(load(shared / "tok-bos"))
    encoder.encode(chat("a", "b"))
    copy: Encoder = pickle.loads(pickle.dumps(encoder))
    assert (
        only(copy.encode(chat("a", "b"))).input_ids.tolist() == only(encoder.encode(chat("a", "b"))).input_ids.tolist()
    )
