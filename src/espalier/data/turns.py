"""The turns of a conversation: roles, texts, which answers are learnt.

The rules, for every format:

* Roles are told without letter case: human, user -> user; gpt, assistant, chatgpt, model, bot -> assistant; system;
  developer; tool, observation, function, ipython -> tool; function_call -> an assistant turn with a tool call. Any
  other role makes the row bad.
* A turn has its role under `role` or `from` and its text under `content` or `value`, whichever pair the file uses.
* No turn is dropped, save one kind, which is counted aloud: turns after the last answer, which nothing can be learnt
  from. No two turns are joined, whatever their order; a template that cannot render an order says so itself.
* An empty answer is never learnt, because it would teach to stop at once; the row is kept if another answer remains.
* `"train": false` or `"weight": 0` on an answer leaves it as context. Other weights multiply the loss of its tokens,
  and a weight of the row multiplies them all. On other turns a weight has no meaning and is not looked at.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from espalier.data.json_lines import type_name
from espalier.data.json_text import parse
from espalier.data.rows import Number, plain_values

_ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "ipython": "tool",
    "function_call": "function_call",
}
Turns = tuple[tuple[dict[str, Any], ...], tuple[bool, ...], tuple[float, ...]]


class Refused(ValueError):
    """Why a row is no example."""


class Said:
    """Counts of what was decided for rows that are kept, told in one sentence each."""

    def __init__(self) -> None:
        self.numbers = self.missing = self.empty_answers = self.cut = 0
        self.cut_lines: list[int] = []

    def cut_turns(self, line: int) -> None:
        self.cut += 1
        if len(self.cut_lines) < 5:
            self.cut_lines.append(line)

    def sentences(self) -> list[str]:
        lines = []
        if self.numbers:
            lines.append(f"{self.numbers} answers were numbers or true/false; kept as spelt")
        if self.missing:
            lines.append(f"{self.missing} values were NaN, which is no JSON; read as missing")
        if self.empty_answers:
            lines.append(f"{self.empty_answers} empty answers are kept as context and not learnt")
        if self.cut:
            where = ", ".join(map(str, self.cut_lines)) + (", ..." if self.cut > len(self.cut_lines) else "")
            lines.append(f"{self.cut} rows end with turns that nobody answers; these turns are cut off (lines {where})")
        return lines


def text_of(value: Any, key: str, said: Said, *, answer: bool = False) -> str:
    """A value as text, verbatim: null and absent are '', numbers as spelt. Raises Refused for lists and objects."""
    if type(value) is str:
        return value
    if value is None:
        return ""
    if isinstance(value, Number):
        said.numbers += answer
        return str(value)
    if isinstance(value, bool):
        said.numbers += answer
        return "true" if value else "false"
    if isinstance(value, float):
        if math.isnan(value):
            said.missing += 1
            return ""
        raise Refused(f"infinity where text is expected ({key!r})")
    raise Refused(f"{type_name(value)} where text is expected ({key!r})")


def number_of(value: Any, key: str) -> float:
    """A weight; absent is 1. Raises Refused for what is no number of at least 0."""
    if value is None or value == "":
        return 1.0
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # a CSV file has numbers as texts
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or number < 0:
        raise Refused(
            f"{key} is {value if isinstance(value, Number) else repr(value)} (a number of at least 0 is expected)"
        )
    return number


def _listed(value: Any, key: str) -> Any:
    """A list that a CSV or Parquet file holds as JSON text."""
    if type(value) is str and value.lstrip()[:1] in ("[", "{"):
        try:
            return parse(value)
        except (ValueError, RecursionError):
            raise Refused(f"{key!r} is a text that is no JSON list") from None
    return value


def tool_list(value: Any) -> tuple[dict[str, Any], ...]:
    """The `tools` column: a list of objects, or the same as JSON text."""
    value = _listed(value, "tools")
    if value is None or value == "" or value == []:
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise Refused("'tools' is no list of objects")
    return tuple(plain_values(tool) for tool in value)


def pairs(history: Any) -> list[tuple[str, Any]]:
    """The alpaca `history` column, [[question, answer], ...], as turns."""
    history = _listed(history, "history")
    if history is None or history == "":
        return []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise Refused("'history' is no list of [question, answer] pairs")
    return [turn for question, answer in history for turn in (("user", question), ("assistant", answer))]


def from_columns(turns: Sequence[tuple[str, Any]], fields: Mapping[str, Any], said: Said) -> Turns:
    """Turns of the alpaca and prompt/completion columns; the last is an answer that is known not to be empty."""
    system = text_of(fields.get("system"), "system", said)
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": role, "content": text_of(text, "history", said)} for role, text in turns]
    train = []
    for message in messages:
        learnt = message["role"] == "assistant" and bool(message["content"].strip())
        said.empty_answers += message["role"] == "assistant" and not learnt
        train.append(learnt)
    return tuple(messages), tuple(train), _weights([1.0] * len(messages), train, fields)


def conversation(value: Any, fields: Mapping[str, Any], said: Said, line: int, *, first: int = 0) -> Turns:
    """A list of turns. Only answers from turn number `first` (0-based) on can be learnt."""
    turns = _listed(value, "messages")
    if not isinstance(turns, list):
        raise Refused(f"{type_name(turns)} where a list of messages is expected")
    if not turns:
        raise Refused("no messages (an empty list)")
    messages, train, weights = [], [], []
    system = text_of(fields.get("system"), "system", said)
    if system:
        messages, train, weights = [{"role": "system", "content": system}], [False], [1.0]
    empty = 0
    for index, turn in enumerate(turns):
        message, wanted, weight = _turn(turn, index + 1, said)
        if system and message["role"] == "system":
            raise Refused("a system text given twice (in 'system' and in a message)")
        is_answer = message["role"] == "assistant"
        has_text = bool(message["content"].strip()) or bool(message.get("tool_calls"))
        empty += is_answer and not has_text
        messages.append(message)
        train.append(is_answer and wanted and has_text and weight > 0 and index >= first)
        weights.append(weight if is_answer else 1.0)
    _check_learnable(messages, train, empty)
    end = max(index for index, message in enumerate(messages) if message["role"] == "assistant") + 1
    if end < len(messages):
        said.cut_turns(line)
    said.empty_answers += empty
    return tuple(messages[:end]), tuple(train[:end]), _weights(weights[:end], train[:end], fields)


def _check_learnable(messages: Sequence[Mapping[str, Any]], train: Sequence[bool], empty: int) -> None:
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise Refused("nothing to learn (no assistant turn)")
    if not any(train):
        why = "every answer is empty" if empty == len(answers) else "no answer is marked for training"
        raise Refused(f"nothing to learn ({why})")
    if not any(m["role"] != "assistant" and (m["content"].strip() or m["role"] == "tool") for m in messages):
        raise Refused("no prompt (every turn before the answer is empty)")


def _weights(weights: Sequence[float], train: Sequence[bool], fields: Mapping[str, Any]) -> tuple[float, ...]:
    """One factor a message, the row's weight multiplied in; empty where all that count are 1."""
    row = number_of(fields.get("weight"), "weight")
    if row == 1 and weights.count(1.0) == len(weights):
        return ()
    if row == 0:
        raise Refused("nothing to learn (the row has weight 0)")
    factors = tuple(row * weight if learnt else 1.0 for weight, learnt in zip(weights, train, strict=True))
    return () if all(factor == 1 for factor in factors) else factors


def _turn(turn: Any, number: int, said: Said) -> tuple[dict[str, Any], bool, float]:
    """(message, is it wanted for training, weight). `number` is 1-based, for messages."""
    if not isinstance(turn, dict):
        raise Refused(f"turn {number} is {type_name(turn)}, not an object")
    role = _role(_one_of(turn, "role", "from", number), number)
    content = _content(
        _one_of(turn, "content", "value", number, needed=not turn.get("tool_calls")),
        number,
        said,
        answer=role == "assistant",
    )
    message: dict[str, Any] = {"role": role, "content": content}
    for key, value in turn.items():
        if value is not None and key not in ("role", "from", "content", "value", "train", "weight"):
            message[key] = plain_values(value)
    if role == "function_call":
        message.update(role="assistant", content="", tool_calls=_function_calls(content, number))
    calls = message.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise Refused(f"turn {number}: 'tool_calls' is no list of objects")
    if calls == []:
        del message["tool_calls"]
    wanted = _wanted(turn.get("train"), number)
    if wanted and message["role"] != "assistant":
        raise Refused(f"turn {number}: 'train' is true on a turn of {role!r} (only answers can be learnt)")
    is_answer = message["role"] == "assistant"
    weight = number_of(turn.get("weight"), f"turn {number}: weight") if is_answer else 1.0
    return message, wanted is not False, weight


def _wanted(value: Any, number: int) -> bool | None:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Number) and value in ("0", "1"):
        return value == "1"
    raise Refused(f"turn {number}: 'train' is {value!r} (true or false is expected)")


def _one_of(turn: Mapping[str, Any], name: str, other: str, number: int, *, needed: bool = True) -> Any:
    both = name in turn and other in turn and turn[name] is not None and turn[other] is not None
    if both and turn[name] != turn[other]:
        raise Refused(f"turn {number} has both {name!r} and {other!r}, and they differ")
    if name not in turn and other not in turn and needed:
        raise Refused(f"turn {number} has no {name!r} (found {', '.join(map(repr, turn)) or 'nothing'})")
    value = turn.get(name)
    return turn.get(other) if value is None else value


def _role(value: Any, number: int) -> str:
    if type(value) is not str:
        raise Refused(f"turn {number}: the role is {type_name(value)}, not a text")
    role = _ROLES.get(value) or _ROLES.get(value.casefold())
    if role is None:
        near = difflib.get_close_matches(value.casefold(), _ROLES, n=1)
        raise Refused(f"unknown role {value!r}{f': did you mean {near[0]!r}?' if near else ''} (turn {number})")
    return role


def _content(value: Any, number: int, said: Said, *, answer: bool) -> str:
    """The text of a turn; parts {"type": "text", "text": ...} are put one behind the other."""
    if not isinstance(value, list):
        return text_of(value, f"turn {number}", said, answer=answer)
    texts = []
    for part in value:
        if type(part) is str:
            texts.append(part)
        elif isinstance(part, dict) and part.get("type", "text") == "text" and "text" in part:
            texts.append(text_of(part["text"], f"turn {number}", said))
        else:
            kind = part.get("type") if isinstance(part, dict) else type_name(part)
            raise Refused(f"a content part of type {kind!r} (turn {number}; only text can be trained)")
    return "".join(texts)


def _function_calls(text: str, number: int) -> list[dict[str, Any]]:
    """The calls of a ShareGPT `function_call` turn: its text is {"name": ..., "arguments": ...} or a list of these."""
    try:
        value = parse(text)
    except (ValueError, RecursionError):
        value = None
    calls = value if isinstance(value, list) else [value]
    if not calls or not all(isinstance(call, dict) and "name" in call for call in calls):
        raise Refused(f"a function_call that is no JSON object with a 'name' (turn {number})")
    return [{"type": "function", "function": plain_values(call)} for call in calls]
