"""Exact label spans under published chat templates (re-stated in tests/fixtures/templates) and the built-in ones.

The byte-level tokenizer of the cases, with each template's special tokens added, decodes exactly and is always there;
the published tokenizers (scripts/fetch_test_assets.py) are used where they are in place.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from encoding import chat, chat_ids, encoder_for, example, learnt, load, spans
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from espalier.data.formats import Example
from espalier.data.read import BadRow
from espalier.encode.align import NORMALISED, SPLIT_MERGE, UNKNOWN_IN_PROMPT
from espalier.encode.encode import Encoder
from espalier.encode.spans import EMPTY_ANSWER, REWRITES
from espalier.encode.stops import turn_end_ids
from espalier.encode.template import INPUT_SENTENCES, input_joiner, resolve_template
from espalier.errors import ModelError, TemplateError

TEMPLATES = Path(__file__).parent.parent / "fixtures" / "templates"
ASSETS = Path(__file__).parent.parent.parent / ".assets"
FIRST, SECOND = "Hello!", "Bye, 再见 😀"
CONVERSATION = chat("Hi there", FIRST, "And now?", SECOND, system="Be brief.")


@dataclass(frozen=True)
class Case:
    """A template, its special tokens, and the text of the conversation above with the learnt parts in ⟦⟧.

    Two texts where the template rewrites earlier turns. `published` names the published tokenizer to try as well.
    """

    name: str
    specials: tuple[str, ...]
    bos: str | None
    eos: str
    texts: tuple[str, ...]
    published: str


CASES = [
    Case(
        "llama2",
        (),
        "<s>",
        "</s>",
        (
            "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi there [/INST]⟦ Hello! </s>⟧"
            "<s>[INST] And now? [/INST]⟦ Bye, 再见 😀 </s>⟧",
        ),
        "llama2",
    ),
    Case(
        "llama3",
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|begin_of_text|>",
        "<|eot_id|>",
        (
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nHi there<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Hello!<|eot_id|>⟧"
            "<|start_header_id|>user<|end_header_id|>\n\nAnd now?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Bye, 再见 😀<|eot_id|>⟧",
        ),
        "qwen3",
    ),
    Case(
        "qwen2_5",
        ("<|im_start|>", "<|im_end|>"),
        None,
        "<|im_end|>",
        (
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi there<|im_end|>\n"
            "<|im_start|>assistant\n⟦Hello!<|im_end|>⟧\n<|im_start|>user\nAnd now?<|im_end|>\n"
            "<|im_start|>assistant\n⟦Bye, 再见 😀<|im_end|>⟧",
        ),
        "qwen3",
    ),
    Case(
        "qwen3",
        ("<|im_start|>", "<|im_end|>"),
        None,
        "<|im_end|>",
        (
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi there<|im_end|>\n"
            "<|im_start|>assistant\n⟦<think>\n\n</think>\n\nHello!<|im_end|>⟧",
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi there<|im_end|>\n"
            "<|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\nAnd now?<|im_end|>\n"
            "<|im_start|>assistant\n⟦<think>\n\n</think>\n\nBye, 再见 😀<|im_end|>⟧",
        ),
        "qwen3",
    ),
    Case(
        "mistral",
        ("[INST]", "[/INST]"),
        "<s>",
        "</s>",
        (
            "<s>[INST] Be brief.\n\nHi there[/INST]⟦ Hello!</s>⟧",
            "<s>[INST] Hi there[/INST] Hello!</s>[INST] Be brief.\n\nAnd now?[/INST]⟦ Bye, 再见 😀</s>⟧",
        ),
        "llama2",
    ),
    Case(
        "gemma3",
        ("<bos>", "<start_of_turn>", "<end_of_turn>"),
        "<bos>",
        "<end_of_turn>",
        (
            "<bos><start_of_turn>user\nBe brief.\n\nHi there<end_of_turn>\n"
            "<start_of_turn>model\n⟦Hello!<end_of_turn>⟧\n<start_of_turn>user\nAnd now?<end_of_turn>\n"
            "<start_of_turn>model\n⟦Bye, 再见 😀<end_of_turn>⟧",
        ),
        "qwen3",
    ),
    Case(
        "phi3",
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"),
        None,
        "<|endoftext|>",
        (
            "<|system|>\nBe brief.<|end|>\n<|user|>\nHi there<|end|>\n<|assistant|>\n⟦Hello!<|end|>⟧\n"
            "<|user|>\nAnd now?<|end|>\n<|assistant|>\n⟦Bye, 再见 😀<|end|>⟧",
        ),
        "llama2",
    ),
    Case(
        "chatml",
        ("<|im_start|>", "<|im_end|>"),
        None,
        "<|im_end|>",
        (
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi there<|im_end|>\n"
            "<|im_start|>assistant\n⟦Hello!<|im_end|>⟧\n<|im_start|>user\nAnd now?<|im_end|>\n"
            "<|im_start|>assistant\n⟦Bye, 再见 😀<|im_end|>⟧",
        ),
        "qwen3",
    ),
    Case(
        "deepseek",
        ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        (
            "<｜begin▁of▁sentence｜>Be brief.<｜User｜>Hi there<｜Assistant｜>⟦Hello!<｜end▁of▁sentence｜>⟧"
            "<｜User｜>And now?<｜Assistant｜>⟦Bye, 再见 😀<｜end▁of▁sentence｜>⟧",
        ),
        "qwen3",
    ),
    Case(
        "zephyr",
        (),
        "<s>",
        "</s>",
        (
            "<|system|>\nBe brief.</s>\n<|user|>\nHi there</s>\n<|assistant|>\n⟦Hello!</s>⟧\n"
            "<|user|>\nAnd now?</s>\n<|assistant|>\n⟦Bye, 再见 😀</s>⟧",
        ),
        "llama2",
    ),
    Case(
        "atom",
        (),
        "<s>",
        "</s>",
        (
            "<s>Human: Be brief.\nHi there\n</s><s>Assistant:⟦Hello!</s>⟧"
            "<s>Human: And now?\n</s><s>Assistant:⟦Bye, 再见 😀</s>⟧",
        ),
        "llama2",
    ),
    Case(
        "plain",
        (),
        "<s>",
        "</s>",
        (
            "Be brief.\n\n### User\nHi there\n### Assistant\n⟦Hello!</s>⟧\n"
            "### User\nAnd now?\n### Assistant\n⟦Bye, 再见 😀</s>⟧",
        ),
        "llama2",
    ),
]


def encoder_of(case: Case, tokenizer: Any) -> Encoder:
    """An encoder for the case's template, its special tokens added to the tokenizer."""
    named: dict[str, Any] = {"eos_token": case.eos, "additional_special_tokens": list(case.specials)}
    if case.bos is not None:
        named["bos_token"] = case.bos
    tokenizer.add_special_tokens(named)
    path = TEMPLATES / f"{case.name}.jinja"
    return encoder_for(tokenizer, str(path) if path.exists() else case.name)


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    found = request.param
    assert isinstance(found, Case)
    return found


def check_rows(encoder: Encoder, conversation: Example, case: Case, wanted: list[list[str]]) -> list[str]:
    """Asserts that each row's spans read `wanted` and that its prompts are what chat sends; returns the notes."""
    (outcome,) = encoder.encode_batch([conversation])
    assert outcome.bad is None, outcome.bad
    tokenizer = encoder.tokenizer
    assert [learnt(tokenizer, row) for row in outcome.rows] == wanted
    turns = [i for i, message in enumerate(conversation.messages) if message["role"] == "assistant"]
    starts = [(row, start) for row in outcome.rows for start, _ in spans(row)]
    for turn, (row, start) in zip(turns, starts, strict=True):
        sent = chat_ids(tokenizer, conversation.messages[:turn], tools=list(conversation.tools) or None)
        assert (
            row.input_ids[:start].tolist()
            == sent
            == encoder.prompt_ids(conversation.messages[:turn], conversation.tools)
        )
    return list(outcome.notes)


def spans_in(text: str) -> list[str]:
    return [part.split("⟧")[0] for part in text.split("⟦")[1:]]


def test_exact_text_and_spans(case: Case, shared: Path) -> None:
    encoder = encoder_of(case, load(shared / "tok-plain"))
    notes = check_rows(encoder, CONVERSATION, case, [spans_in(text) for text in case.texts])
    rows = encoder.encode(CONVERSATION)
    assert not isinstance(rows, BadRow)
    assert [encoder.tokenizer.decode(row.input_ids) for row in rows] == [
        text.replace("⟦", "").replace("⟧", "") for text in case.texts
    ]
    assert notes == ([REWRITES] if len(case.texts) > 1 else [])
    end = encoder.tokenizer.convert_tokens_to_ids(spans_in(case.texts[0])[0].replace(FIRST, "").strip().split("\n")[-1])
    assert turn_end_ids(encoder.tokenizer, encoder.template) == [end]
    assert all(row.labels[-1] == end for row in rows)


def test_spans_with_published_tokenizer(case: Case) -> None:
    folder = ASSETS / f"tokenizer-{case.published}"
    if not folder.exists():
        pytest.skip("scripts/fetch_test_assets.py has not run")
    encoder = encoder_of(case, load(folder))
    check_rows(encoder, CONVERSATION, case, [spans_in(text) for text in case.texts])


def test_train_on_last_flags_and_weights(case: Case, shared: Path) -> None:
    encoder = encoder_of(case, load(shared / "tok-plain"))
    last = spans_in(case.texts[-1])[-1]
    encoder.train_on = "last"
    rows = encoder.encode(CONVERSATION)
    assert not isinstance(rows, BadRow)
    assert [learnt(encoder.tokenizer, row) for row in rows] == [[last]]
    encoder.train_on = "all"
    flagged = example(list(CONVERSATION.messages), train=(False, False, False, False, True), weights=(1, 1, 1, 1, 0.5))
    (row,) = encoder.encode(flagged)
    assert learnt(encoder.tokenizer, row) == [last]
    assert row.weights is not None
    assert set(row.weights[row.labels >= 0].tolist()) == {0.5}
    assert set(row.weights[row.labels < 0].tolist()) <= {1.0}


TOOL_CHAT = [
    {"role": "user", "content": "Weather in Rome?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}],
    },
    {"role": "tool", "content": "sunny"},
    {"role": "assistant", "content": "It is sunny."},
]
TOOLS = ({"type": "function", "function": {"name": "weather", "parameters": {}}},)


def test_tool_calls_are_learnt_and_results_are_not(shared: Path) -> None:
    case = next(case for case in CASES if case.name == "qwen2_5")
    encoder = encoder_of(case, load(shared / "tok-plain"))
    wanted = [
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>',
        "It is sunny.<|im_end|>",
    ]
    check_rows(encoder, example(TOOL_CHAT, tools=TOOLS), case, [wanted])
    spoken = [dict(message) for message in TOOL_CHAT]
    spoken[1]["content"] = "Let me look."
    check_rows(encoder, example(spoken, tools=TOOLS), case, [["Let me look.\n" + wanted[0], wanted[1]]])


def test_tool_calls_with_qwen3s_own_template() -> None:
    folder = ASSETS / "tokenizer-qwen3"
    if not folder.exists():
        pytest.skip("scripts/fetch_test_assets.py has not run")
    tokenizer = load(folder)
    encoder = encoder_for(tokenizer)
    (outcome,) = encoder.encode_batch([example(TOOL_CHAT, tools=TOOLS)])
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>'
    assert [learnt(tokenizer, row) for row in outcome.rows] == [
        ["<think>\n\n</think>\n\n" + call],
        ["<think>\n\n</think>\n\nIt is sunny.<|im_end|>"],
    ]


def test_qwen3_thinking_is_learnt_where_it_is_written(shared: Path) -> None:
    case = next(case for case in CASES if case.name == "qwen3")
    encoder = encoder_of(case, load(shared / "tok-plain"))
    conversation = chat("q1", "<think>\none\n</think>\n\na1", "q2", "<think>\ntwo\n</think>\n\na2")
    check_rows(
        encoder,
        conversation,
        case,
        [["<think>\none\n</think>\n\na1<|im_end|>"], ["<think>\ntwo\n</think>\n\na2<|im_end|>"]],
    )


def test_reasoning_that_the_prompt_opens_is_continued(shared: Path) -> None:
    deepseek = next(case for case in CASES if case.name == "deepseek")
    encoder = encoder_of(replace(deepseek, name="deepseek_r1"), load(shared / "tok-plain"))
    conversation = chat("q1", "<think>\none\n</think>\n\na1", "q2", "<think>\ntwo\n</think>\n\na2")
    end = deepseek.eos
    wanted = [["one\n</think>\n\na1" + end], ["two\n</think>\n\na2" + end]]
    notes = check_rows(encoder, conversation, deepseek, wanted)
    assert REWRITES in notes
    rows = encoder.encode(conversation)
    assert not isinstance(rows, BadRow)
    assert encoder.tokenizer.decode(rows[1].input_ids) == (
        f"{deepseek.bos}<｜User｜>q1<｜Assistant｜>\n\na1{end}<｜User｜>q2<｜Assistant｜><think>\ntwo\n</think>\n\na2{end}"
    )
    bad = encoder.encode(chat("q1", "no reasoning"))
    assert isinstance(bad, BadRow)
    assert bad.reason == "the template's prompt does not begin the conversation that it renders"


@pytest.mark.parametrize("name", ["llama2", "mistral"])
def test_refusals_carry_the_templates_words(name: str, shared: Path) -> None:
    case = next(case for case in CASES if case.name == name)
    encoder = encoder_of(case, load(shared / "tok-plain"))
    twice = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]
    bad = encoder.encode(example(twice, line=7))
    assert isinstance(bad, BadRow)
    assert (bad.line, bad.kind) == (7, "the template refuses the conversation")
    assert "roles must alternate" in bad.reason


def test_tokens_that_swallow_the_newline_after_them(shared: Path) -> None:
    """Phi-3's tokenizer marks its headers so: the newline after a header is part of the token."""
    from tokenizers import AddedToken

    tokenizer = load(shared / "tok-plain")
    names = ("<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>")
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken(name, rstrip=True, special=True) for name in names]}
    )
    tokenizer.eos_token = "<|endoftext|>"
    encoder = encoder_for(tokenizer, str(TEMPLATES / "phi3.jinja"))
    (row,) = encoder.encode(chat("Hi", "Yo", "a", "b"))
    assert learnt(tokenizer, row) == ["Yo<|end|>", "b<|end|>"]
    assert row.input_ids[: spans(row)[0][0]].tolist() == chat_ids(tokenizer, chat("Hi").messages)
    # An answer that begins with a newline would lose it there: it is tokenised apart, in a row of its own.
    (outcome,) = encoder.encode_batch([chat("Hi", "\nYo", "a", "b")])
    assert [learnt(tokenizer, row) for row in outcome.rows] == [["\nYo<|end|>"], ["b<|end|>"]]
    assert outcome.notes == (SPLIT_MERGE,)
    assert outcome.rows[0].input_ids[: spans(outcome.rows[0])[0][0]].tolist() == chat_ids(
        tokenizer, chat("Hi").messages
    )


def test_atom_ids_by_hand() -> None:
    """Three rows in the manner of the recipe's data, under --template atom with a sentencepiece tokenizer."""
    folder = ASSETS / "tokenizer-llama2"
    if not folder.exists():
        pytest.skip("scripts/fetch_test_assets.py has not run")
    tokenizer = load(folder)
    encoder = encoder_for(tokenizer, "atom")
    vocabulary = tokenizer.get_vocab()

    def pieces(text: str) -> list[int]:
        """Chinese has no merges in this vocabulary: a character is one piece, or else its UTF-8 bytes."""
        ids = []
        for char in text:
            ids += [vocabulary[char]] if char in vocabulary else [vocabulary[f"<0x{b:02X}>"] for b in char.encode()]
        return ids

    start, end, newline = 1, 2, vocabulary["<0x0A>"]
    human = [start, vocabulary["▁Human"], vocabulary[":"], vocabulary["▁"]]
    assistant = [newline, end, start, vocabulary["▁Assistant"], vocabulary[":"]]
    for question, answer in (("你好", "我是甄嬛。"), ("你是谁？", "家父是大理寺少卿。"), ("今天吃什么", "粥😀")):
        (row,) = encoder.encode(chat(question, answer))
        prompt_ids = human + pieces(question) + assistant
        answer_ids = [*pieces(answer), end]
        assert row.input_ids.tolist() == prompt_ids + answer_ids
        assert row.labels.tolist() == [-100] * len(prompt_ids) + answer_ids
    (row,) = encoder.encode(chat("你好", "我是甄嬛。"))
    prompt_ids = [1, 10649, 28747, 28705, 29383, 29530, 13, 2, 1, 21631, 28747]
    answer_ids = [29242, 28971, 234, 151, 135, 232, 175, 158, 28944, 2]
    assert row.input_ids.tolist() == prompt_ids + answer_ids


def test_text_rows_of_the_atom_layout(shared: Path) -> None:
    tokenizer = load(shared / "tok-plain")
    encoder = encoder_for(tokenizer, "atom")
    text = "<s>Human: hi\n</s><s>Assistant: hello\n</s><s>Human: bye\n</s><s>Assistant: see you\n</s>\n"
    for given_text in (text, text.removeprefix("<s>"), "<s>" + text):
        (row,) = encoder.encode(example([], text=given_text))
        assert tokenizer.decode(row.input_ids) == text.rstrip("\n")
        assert learnt(tokenizer, row) == [" hello\n</s>", " see you\n</s>"]
    bad = encoder.encode(example([], text="Question: hi Answer: ho"))
    assert isinstance(bad, BadRow)
    assert bad.reason == "no answer (the text holds no '<s>Assistant:' with a text after it)"
    bad = encoder.encode(example([], text="<s>Human: hi\n</s><s>Assistant: hel"))
    assert isinstance(bad, BadRow)
    assert bad.reason == "no end token (an answer has no '</s>' after it)"


def test_empty_answers_are_not_learnt(shared: Path) -> None:
    encoder = encoder_for(load(shared / "tok-plain"), "atom")
    (outcome,) = encoder.encode_batch([chat("a", "", "b", "c")])
    assert [learnt(encoder.tokenizer, row) for row in outcome.rows] == [["c</s>"]]
    assert outcome.notes == (EMPTY_ANSWER,)
    bad = encoder.encode(chat("a", " \n"))
    assert isinstance(bad, BadRow)
    assert bad.kind == "no answer"


def test_end_token_inside_an_answer_is_refused(shared: Path) -> None:
    encoder = encoder_for(load(shared / "tok-plain"), "atom")
    bad = encoder.encode(chat("a", "stop </s> here"))
    assert isinstance(bad, BadRow)
    assert bad.reason == "the answer holds the end token ('</s>')"


def test_texts_that_the_tokenizer_cannot_give_back_are_refused() -> None:
    folder = ASSETS / "tokenizer-llama2"
    if not folder.exists():
        pytest.skip("scripts/fetch_test_assets.py has not run")
    bad = encoder_for(load(folder), "atom").encode(chat("q", "a▁b"))  # U+2581 is sentencepiece's sign for a space
    assert isinstance(bad, BadRow)
    assert bad.reason == "the tokenizer does not give the answer's text back ('a▁b</s>' comes back as 'a b</s>')"


def test_other_unicode_form_is_said() -> None:
    folder = ASSETS / "tokenizer-qwen3"
    if not folder.exists():
        pytest.skip("scripts/fetch_test_assets.py has not run")
    encoder = encoder_for(load(folder), "chatml")
    (outcome,) = encoder.encode_batch([chat("q", "cafe\u0301")])
    assert [learnt(encoder.tokenizer, row) for row in outcome.rows] == [["caf\u00e9<|im_end|>"]]
    assert outcome.notes == (NORMALISED,)


def test_unknown_characters_in_a_prompt_are_said(shared: Path) -> None:
    (outcome,) = encoder_for(load(shared / "tok-meta")).encode_batch([chat("你好", "hi there")])
    assert len(outcome.rows) == 1
    assert outcome.notes == (UNKNOWN_IN_PROMPT,)


def test_unknown_template_names_those_there_are(shared: Path) -> None:
    with pytest.raises(TemplateError, match=r"atomm.*\n.*atom, chatml, plain"):
        resolve_template(load(shared / "tok-plain"), "atomm")


def test_template_without_end_token_is_refused(shared: Path, tmp_path: Path) -> None:
    path = tmp_path / "endless.jinja"
    path.write_text("{% for m in messages %}{{ m['content'] }}\n{% endfor %}", encoding="utf-8")
    with pytest.raises(TemplateError, match="no end token"):
        resolve_template(load(shared / "tok-plain"), str(path))


def test_tokenizer_without_fast_form_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ModelError, match="no fast form"):
        resolve_template(Slow())


def test_input_joiner_presets() -> None:
    assert input_joiner("none") == "\n"
    assert input_joiner("en") == INPUT_SENTENCES["en"] == "Please answer the user's question: "
    assert input_joiner("zh") == "请回答用户问题: "
    assert input_joiner(" | ") == " | "


TEXTS = st.text(st.characters(blacklist_categories=["Cs"]), min_size=1, max_size=30)


@pytest.mark.parametrize("name", ["atom", "chatml", "plain", "llama3", "qwen3", "gemma3", "zephyr", "mistral"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_conversations(name: str, data: st.DataObject, shared: Path) -> None:
    """Labels read the answers with one turn end each, and every prompt has the ids that chat sends."""
    case = next(case for case in CASES if case.name == name)
    encoder = encoder_of(case, load(shared / "tok-plain"))
    texts = data.draw(st.lists(TEXTS, min_size=2, max_size=6).filter(lambda texts: len(texts) % 2 == 0))
    conversation = chat(*texts, system=data.draw(st.none() | TEXTS))
    (outcome,) = encoder.encode_batch([conversation])
    if outcome.bad is not None:
        assert outcome.bad.kind in ("no answer", "the answer holds the end token")
        return
    turns = [i for i, m in enumerate(conversation.messages) if m["role"] == "assistant" and m["content"].strip()]
    starts = [(row, start, end) for row in outcome.rows for start, end in spans(row)]
    for turn, (row, start, end) in zip(turns, starts, strict=True):
        assert row.input_ids[:start].tolist() == chat_ids(encoder.tokenizer, conversation.messages[:turn])
        text = encoder.tokenizer.decode(row.input_ids[start:end])
        answer = conversation.messages[turn]["content"]
        assert answer.strip() in text
        end_id = int(row.input_ids[end - 1])
        assert end_id in turn_end_ids(encoder.tokenizer, encoder.template)
        assert row.input_ids[start:end].tolist().count(end_id) == 1
