"""Formats and turns: what each kind of row becomes, and every reason to refuse one."""

from __future__ import annotations

from typing import Any

import pytest

from espalier.data.formats import Example, FormatOptions, examples_from_records, read_examples, to_example
from espalier.data.rows import BadRow, Number, RawRow, json_values
from espalier.errors import DataError, UsageError


def one(options: FormatOptions | None = None, /, **fields: Any) -> Example:
    result = to_example(RawRow(json_values(fields), "f", 1), options=options)
    assert isinstance(result, Example), result
    return result


def reason(options: FormatOptions | None = None, /, **fields: Any) -> str:
    result = to_example(RawRow(json_values(fields), "f", 1), options=options)
    assert isinstance(result, BadRow), result
    return result.reason


def turns(example: Example) -> list[tuple[str, str, bool]]:
    return [(m["role"], m["content"], t) for m, t in zip(example.messages, example.train, strict=True)]


USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def test_alpaca_with_everything() -> None:
    example = one(system="s", history=[["h1", "a1"], ["h2", ""]], instruction="i", input="x", output="o")
    assert turns(example) == [
        ("system", "s", False),
        ("user", "h1", False),
        ("assistant", "a1", True),
        ("user", "h2", False),
        ("assistant", "", False),
        ("user", "i\nx", False),
        ("assistant", "o", True),
    ]
    assert turns(one(FormatOptions(input_joiner=" | "), instruction="i", input="x", output="o"))[0][1] == "i | x"


@pytest.mark.parametrize("role", ["human", "Human", "user", "USER"])
@pytest.mark.parametrize("answer", ["gpt", "assistant", "chatgpt", "model", "bot"])
def test_sharegpt_roles(role: str, answer: str) -> None:
    example = one(conversations=[{"from": role, "value": "q"}, {"from": answer, "value": "a"}])
    assert turns(example) == [("user", "q", False), ("assistant", "a", True)]


def test_tool_calls() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"x": 5, "y": 0.5, "z": None}}}
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"n": 1}}}]
    example = one(
        messages=[
            USER,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "6", "tool_call_id": "c1"},
            ANSWER | {"tool_calls": None},
        ],
        tools=tools,
    )
    # Numbers of structures are numbers again, because templates write them out; null members are left out.
    function = {"name": "add", "arguments": {"x": 5, "y": 0.5}}
    assert example.messages[1] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": function}],
    }
    assert type(example.messages[1]["tool_calls"][0]["function"]["arguments"]["x"]) is int
    assert example.messages[2] == {"role": "tool", "content": "6", "tool_call_id": "c1"}
    assert example.messages[3] == ANSWER
    assert example.train == (False, True, False, True)
    assert example.tools == tuple(tools)


def test_sharegpt_function_call() -> None:
    call = '{"name": "add", "arguments": {"x": 1}}'
    example = one(
        conversations=[
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": call},
            {"from": "observation", "value": "1"},
            {"from": "gpt", "value": "a"},
        ],
        tools='[{"name": "add"}]',
    )
    assert [message["role"] for message in example.messages] == ["user", "assistant", "tool", "assistant"]
    assert example.messages[1]["tool_calls"] == [
        {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
    ]
    assert example.train == (False, True, False, True)
    assert example.tools == ({"name": "add"},)


def test_content_parts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": " b "}]
    assert turns(one(messages=[{"role": "user", "content": parts}, ANSWER]))[0][1] == "a b "
    image = [{"type": "image_url", "image_url": {"url": "x"}}]
    assert reason(messages=[{"role": "user", "content": image}, ANSWER]) == (
        "a content part of type 'image_url' (turn 1; only text can be trained)"
    )


def test_prompt_completion() -> None:
    assert turns(one(prompt="q", completion="a")) == [("user", "q", False), ("assistant", "a", True)]
    listed = one(prompt=[USER, ANSWER, USER], completion=[ANSWER])
    assert listed.train == (False, False, False, True)  # answers of the prompt are context
    assert (
        reason(prompt="q", completion=[ANSWER]) == "prompt and completion must be both texts or both lists of messages"
    )


def test_train_and_weight() -> None:
    row = [USER, ANSWER | {"train": False}, USER, ANSWER | {"weight": 0.5}, USER, ANSWER, USER, ANSWER | {"weight": 0}]
    example = one(messages=row, weight=2)
    assert example.train == (False, False, False, True, False, True, False, False)
    assert example.weights == (1.0, 1.0, 1.0, 1.0, 1.0, 2.0, 1.0, 1.0)
    assert one(messages=[USER, ANSWER | {"weight": 1}]).weights == ()
    assert one(prompt="q", completion="a", weight="0.25").weights == (1.0, 0.25)  # as a CSV file has it
    assert one(text="x", weight=3).weights == (3.0,)


@pytest.mark.parametrize("weight", [-1, float("nan"), float("inf"), "heavy", True, [1]])
def test_bad_weights(weight: Any) -> None:
    assert reason(messages=[USER, ANSWER | {"weight": weight}]).startswith("turn 2: weight is ")
    assert reason(prompt="q", completion="a", weight=weight).startswith("weight is ")


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ("text", "a text where a list of messages is expected"),
        ([], "no messages (an empty list)"),
        (["x"], "turn 1 is a text, not an object"),
        ([USER, {"role": 3, "content": "x"}], "turn 2: the role is a number, not a text"),
        ([{"content": "x"}], "turn 1 has no 'role' (found 'content')"),
        ([USER, {"role": "assistant", "content": "  "}], "nothing to learn (every answer is empty)"),
        ([USER, ANSWER | {"train": False}], "nothing to learn (no answer is marked for training)"),
        ([USER | {"train": True}, ANSWER], "turn 1: 'train' is true on a turn of 'user' (only answers can be learnt)"),
        ([USER, ANSWER | {"train": "yes"}], "turn 2: 'train' is 'yes' (true or false is expected)"),
        ([ANSWER], "no prompt (every turn before the answer is empty)"),
        ([USER | {"content": " "}, ANSWER], "no prompt (every turn before the answer is empty)"),
        ([USER, ANSWER | {"value": "b"}], "turn 2 has both 'content' and 'value', and they differ"),
        ([USER, ANSWER | {"content": {"a": 1}}], "an object where text is expected ('turn 2')"),
        ([USER, ANSWER | {"tool_calls": "x"}], "turn 2: 'tool_calls' is no list of objects"),
        (
            [USER, {"role": "function_call", "content": "x"}],
            "a function_call that is no JSON object with a 'name' (turn 2)",
        ),
    ],
)
def test_bad_turns(messages: Any, expected: str) -> None:
    assert reason(messages=messages) == expected


def test_other_reasons() -> None:
    assert reason(prompt="q", completion=float("inf")) == "infinity where text is expected ('completion')"
    assert reason(prompt=" ", completion="a") == "no prompt ('prompt' is empty)"
    assert reason(prompt="q") == "no answer (key 'completion' is missing)"
    assert reason(text=" ") == "no answer ('text' holds only blanks)"
    assert reason(instruction="i", output="o", history=[["only one"]]) == (
        "'history' is no list of [question, answer] pairs"
    )
    assert reason(messages=[USER, ANSWER], tools=[1]) == "'tools' is no list of objects"
    assert reason(system="s", messages=[{"role": "system", "content": "t"}, USER, ANSWER]) == (
        "a system text given twice (in 'system' and in a message)"
    )


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (("instruction", "outputs"), "key 'outputs': did you mean 'output'?"),
        (("instruction", "output", "inptu"), "key 'inptu': did you mean 'input'?"),
        (("promt", "completion"), "key 'promt': did you mean 'prompt'?"),
        (("Messages",), "key 'Messages': did you mean 'messages'? (letter case)"),
        (("conversation",), "key 'conversation': did you mean 'conversations'?"),
        (("text ",), "key 'text ': did you mean 'text'? (a blank around the name)"),
        (("foo", "bar"), "no known column (found 'foo', 'bar')"),
    ],
)
def test_keys_that_cannot_be_meant(keys: tuple[str, ...], expected: str) -> None:
    assert reason(**dict.fromkeys(keys, "x")) == expected


def test_columns() -> None:
    options = FormatOptions(columns={"prompt": "q", "completion": "a"})
    assert turns(one(options, q="x", a="y", prompt="not this")) == [("user", "x", False), ("assistant", "y", True)]
    assert reason(options, q="x") == "no column 'a', which --columns names (found 'q')"
    with pytest.raises(UsageError, match="unknown name 'question' on the left side"):
        to_example(RawRow({}, "f", 1), options=FormatOptions(columns={"question": "q"}))
    with pytest.raises(UsageError, match="unknown format 'jsonl'"):
        to_example(RawRow({}, "f", 1), "jsonl")


def test_format_is_told_by_what_is_not_null() -> None:
    assert turns(one(messages=None, prompt="q", completion="a")) == [("user", "q", False), ("assistant", "a", True)]
    both = one(prompt="p", messages=[USER, ANSWER], text="t")
    assert both.messages == (USER, ANSWER)
    assert one(FormatOptions(format="text"), instruction="i", output="o", text="t").text == "t"
    assert turns(
        one(
            FormatOptions(format="openai"),
            messages='[{"role":"user","content":"q"},{"role":"assistant","content":"a"}]',
        )
    )[1] == ("assistant", "a", True)


def test_records_in_memory() -> None:
    notices: list[str] = []
    rows = [{"prompt": "q", "completion": 1.5}, {"prompt": "q", "completion": None}, {"prompt": 3, "completion": True}]
    found = list(examples_from_records(rows, "train", notice=notices.append))
    assert [(type(row).__name__, row.file, row.line) for row in found] == [
        ("Example", "train", 1),
        ("BadRow", "train", 2),
        ("Example", "train", 3),
    ]
    assert isinstance(found[2], Example)
    assert turns(found[2]) == [("user", "3", False), ("assistant", "true", True)]
    assert notices == [
        "train: format prompt_completion (prompt, completion)",
        "train: 2 answers were numbers or true/false; kept as spelt",
    ]


def test_read_examples_policies(tmp_path: Any) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "q", "completion": ""}\n' * 30, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_examples(str(file))
    assert caught.value.what == "30 of 30 rows cannot be used"
    assert caught.value.details == (f"{file}:1, 2, 3, 4, 5 and 25 more: no answer",)
    with pytest.raises(DataError, match="no row is left of 30"):
        read_examples([str(file)], on_bad_row="skip")
    with pytest.raises(UsageError, match="on_bad_row is 'drop'"):
        read_examples(str(file), on_bad_row="drop")


def test_number_values() -> None:
    assert (Number("12").value(), Number("0.10").value(), Number("-0").value()) == (12, 0.1, 0)
