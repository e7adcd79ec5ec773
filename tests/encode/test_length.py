"""The length policy: no answer is cut, none is lost without a word, and every row fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from encoding import chat, chat_ids, encoder_for, example, learnt, load, spans
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from espalier.data.read import BadRow
from espalier.encode.encode import Encoder, Overlength
from espalier.encode.length import ANSWER_LEFT_OUT, SPLIT, TEXT_CUT, TURNS_CUT, length_limit
from espalier.errors import UsageError


@pytest.fixture(scope="module")
def tokenizer(shared_module: Path) -> Any:
    return load(shared_module / "tok-plain")


@pytest.fixture(scope="module")
def shared_module() -> Path:
    return Path(__file__).parent.parent / "cases" / "_shared"


def encoder(tokenizer: Any, limit: int | None, overlength: Overlength) -> Encoder:
    return encoder_for(tokenizer, "atom", max_length=limit, overlength=overlength)


def texts(made: Encoder, conversation: Any) -> tuple[list[str], tuple[str, ...]]:
    """The rows' texts with the learnt parts in ⟦⟧, and the notes."""
    (outcome,) = made.encode_batch([conversation])
    assert outcome.bad is None, outcome.bad
    shown = []
    for row in outcome.rows:
        text, at = "", 0
        for start, end in spans(row):
            text += made.tokenizer.decode(row.input_ids[at:start])
            text += f"⟦{made.tokenizer.decode(row.input_ids[start:end])}⟧"
            at = end
        shown.append(text)
        assert made.max_length is None or len(row.input_ids) <= made.max_length
    return shown, outcome.notes


def tokens(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text.replace("⟦", "").replace("⟧", ""), add_special_tokens=False)["input_ids"])


ONE = "<s>Human: q1 q1\n</s><s>Assistant:⟦a1</s>⟧"
TWO = "<s>Human: q2 q2\n</s><s>Assistant:⟦a2</s>⟧"
THREE = "<s>Human: q3 q3\n</s><s>Assistant:⟦a3</s>⟧"
LONG = chat("q1 q1", "a1", "q2 q2", "a2", "q3 q3", "a3")


def context(text: str) -> str:
    return text.replace("⟦", "").replace("⟧", "")


@pytest.mark.parametrize("overlength", ["drop", "error"])
def test_drop_and_error_leave_the_whole_row_out(tokenizer: Any, overlength: Overlength) -> None:
    length = tokens(tokenizer, ONE + TWO + THREE)
    bad = encoder(tokenizer, length - 1, overlength).encode(LONG)
    assert isinstance(bad, BadRow)
    assert bad.reason == f"too long ({length} tokens, limit {length - 1})"
    assert bad.kind == "too long"
    assert texts(encoder(tokenizer, length, overlength), LONG) == ([ONE + TWO + THREE], ())


def test_split_keeps_every_answer_with_as_much_context_as_fits(tokenizer: Any) -> None:
    limit = tokens(tokenizer, ONE + TWO)
    rows, notes = texts(encoder(tokenizer, limit, "split"), LONG)
    assert rows == [ONE + TWO, context(TWO) + THREE]
    assert notes == (TURNS_CUT, SPLIT)
    rows, _ = texts(encoder(tokenizer, tokens(tokenizer, ONE), "split"), LONG)
    assert rows == [ONE, TWO, THREE]


def test_split_keeps_the_system_text_in_every_row(tokenizer: Any) -> None:
    system = "<s>Human: Be kind.\n"
    rows, _ = texts(
        encoder(tokenizer, tokens(tokenizer, system + "q1 q1\n</s><s>Assistant:a1</s>"), "split"),
        chat("q1 q1", "a1", "q2 q2", "a2", system="Be kind."),
    )
    assert rows == [ONE.replace("<s>Human: ", system, 1), TWO.replace("<s>Human: ", system, 1)]


def test_split_leaves_an_answer_out_that_fits_no_row(tokenizer: Any) -> None:
    made = encoder(tokenizer, tokens(tokenizer, ONE), "split")
    rows, notes = texts(made, chat("q1 q1", "a1", "q2 q2 and much more", "a2", "q3 q3", "a3"))
    assert rows == [ONE, THREE]
    assert ANSWER_LEFT_OUT in notes
    assert isinstance(made.encode(chat("q2 q2 and much more", "a2")), BadRow)


def test_truncate_prompt_cuts_the_beginning_of_the_users_text(tokenizer: Any) -> None:
    made = encoder(tokenizer, tokens(tokenizer, ONE), "truncate_prompt")
    conversation = chat("zz zz zz zz zz q1 q1", "a1")
    rows, notes = texts(made, conversation)
    (row,) = rows
    assert row.startswith("<s>Human: ")  # the start token and the layout stay
    assert row.endswith(" q1\n</s><s>Assistant:⟦a1</s>⟧")
    assert notes == (TEXT_CUT,)
    (encoded,) = made.encode(conversation)
    assert made.max_length is not None
    assert made.max_length - 2 <= len(encoded.input_ids) <= made.max_length  # a token at the cut may become shorter
    user = row.removeprefix("<s>Human: ").split("\n</s>")[0]
    assert encoded.input_ids[: spans(encoded)[0][0]].tolist() == chat_ids(tokenizer, chat(user).messages)


def test_truncate_prompt_never_cuts_an_answer(tokenizer: Any) -> None:
    made = encoder(tokenizer, 20, "truncate_prompt")
    bad = made.encode(chat("q", "a long answer that is much longer than twenty tokens"))
    assert isinstance(bad, BadRow)
    assert bad.kind == "too long"


def test_text_rows_are_left_out_whole(tokenizer: Any) -> None:
    bad = encoder(tokenizer, 10, "truncate_prompt").encode(
        example([], text="<s>Human: hello there\n</s><s>Assistant: hi\n</s>")
    )
    assert isinstance(bad, BadRow)
    assert bad.kind == "too long"


def test_limit_below_one_is_refused(tokenizer: Any) -> None:
    with pytest.raises(UsageError, match="0 is not 1 or more"):
        length_limit(0, tokenizer)
    assert length_limit(None, tokenizer) == (None, "no limit: neither you, the model nor the tokenizer names one")


def test_unknown_policy_is_refused(tokenizer: Any) -> None:
    with pytest.raises(UsageError, match="overlength is 'cut'"):
        encoder(tokenizer, 10, "cut")  # type: ignore[arg-type]


WORDS = st.text("abc é😀", min_size=1, max_size=12).filter(str.strip)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts_=st.lists(WORDS, min_size=2, max_size=8).filter(lambda found: len(found) % 2 == 0),
    limit=st.integers(10, 120),
    overlength=st.sampled_from(["split", "truncate_prompt"]),
)
def test_every_answer_is_learnt_once_or_said_to_be_left_out(
    tokenizer: Any, texts_: list[str], limit: int, overlength: Overlength
) -> None:
    made = encoder(tokenizer, limit, overlength)
    (outcome,) = made.encode_batch([chat(*texts_)])
    answers = [text + "</s>" for text in texts_[1::2]]
    found = [text for row in outcome.rows for text in learnt(tokenizer, row)]
    assert all(len(row.input_ids) <= limit for row in outcome.rows)
    if outcome.bad is not None:
        assert not found
    elif ANSWER_LEFT_OUT in outcome.notes:
        assert len(found) < len(answers)
        rest = iter(answers)
        assert all(text in rest for text in found)  # a subsequence
    else:
        assert found == answers
