"""`espalier chat`: talk to an adapter in the layout that it was trained in, or compare it with its base."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from espalier.encode.template import ChatTemplate
from espalier.errors import EspalierError, UsageError
from espalier.model.load import choose_device, choose_dtype, load_model
from espalier.model.load_adapter import check_adapter_folder, load_adapter, to_stderr
from espalier.use.adapter_base import adapter_layout
from espalier.use.adapter_base import find_base as find_base  # also from here
from espalier.use.generate import Generated, Sampling, generate, stream
from espalier.use.probes import prompt_ids
from espalier.use.prompts import Conversation, from_file, from_stdin, from_texts

HELP = "Type a message; /clear begins anew, /exit (or Ctrl-D) ends, Ctrl-C stops an answer."


@dataclass(frozen=True, slots=True)
class Chat:
    """A loaded adapter with all that an answer needs."""

    model: Any
    tokenizer: Any
    template: ChatTemplate
    stop_ids: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling

    def prompt_ids(self, messages: Conversation) -> list[int]:
        """The ids that training put before the answer of this conversation."""
        return prompt_ids(self.tokenizer, self.template, messages)

    def answers(self, conversations: Sequence[Conversation]) -> list[Generated]:
        return generate(
            self.model,
            self.tokenizer,
            [self.prompt_ids(messages) for messages in conversations],
            max_new_tokens=self.max_new_tokens,
            stop_ids=self.stop_ids,
            sampling=self.sampling,
        )

    def print_answer(self, messages: Conversation) -> Generated:
        """Stream one answer to standard output."""
        pieces = stream(
            self.model,
            self.tokenizer,
            self.prompt_ids(messages),
            max_new_tokens=self.max_new_tokens,
            stop_ids=self.stop_ids,
            sampling=self.sampling,
        )
        while True:
            try:
                print(next(pieces), end="", flush=True)
            except StopIteration as end:
                print(flush=True)
                answer: Generated = end.value
                self.say_cut([answer])
                return answer

    def say_cut(self, answers: Sequence[Generated]) -> None:
        """Say it where an answer did not end by itself."""
        cut = sum(not answer.stopped for answer in answers)
        if cut:
            which = "the answer was" if len(answers) == 1 else f"{cut} of {len(answers)} answers were"
            to_stderr(f"({which} cut off: --max_new_tokens {self.max_new_tokens}, or the model's length)")


def run_chat(
    adapter: str | Path,
    model_path: str | None = None,
    prompts: Sequence[str] | None = None,
    prompts_file: str | None = None,
    compare: bool = False,
    system: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    trust_remote_code: bool = False,
    use_cpu: bool = False,
    template: str | None = None,
) -> int:
    """Answer prompts from the arguments, a file or standard input; a terminal without prompts gives a conversation.

    Answers go to standard output, all else to standard error. Greedy unless a temperature is given. Returns the exit
    code 0; raises EspalierError. Arguments and prompts are checked before the model is loaded.
    """
    _check_options(max_new_tokens, temperature, top_p, seed, bool(prompts and prompts_file))
    folder = check_adapter_folder(adapter)
    interactive = not prompts and not prompts_file and sys.stdin.isatty()
    if interactive and compare:
        raise UsageError("--compare needs prompts", todo="Give them as arguments, with --prompts_file, or on stdin.")
    if prompts_file:
        conversations = from_file(prompts_file, system)
    elif prompts:
        conversations = from_texts(prompts, system)
    else:
        conversations = [] if interactive else from_stdin(system)
    with contextlib.suppress(AttributeError):  # a console that lacks a character must not end the answer
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    sampling = Sampling(temperature, top_p, seed)
    chat = _load(folder, model_path, template, max_new_tokens, sampling, trust_remote_code, use_cpu)
    if interactive:
        _converse(chat, system)
    elif compare:
        _compare(chat, conversations)
    else:
        _answer_all(chat, conversations)
    return 0


def _check_options(max_new_tokens: int, temperature: float, top_p: float, seed: int, both: bool) -> None:
    wrong = []
    if max_new_tokens < 1:
        wrong.append(f"--max_new_tokens {max_new_tokens}: must be 1 or more")
    if not 0 <= temperature < math.inf:
        wrong.append(f"--temperature {temperature}: must be 0 (greedy) or more")
    if temperature == 0 and 0 < top_p < 1:
        wrong.append(f"--top_p {top_p}: changes nothing without a --temperature above 0")
    if not 0 < top_p <= 1:
        wrong.append(f"--top_p {top_p}: must be above 0 and at most 1")
    if not 0 <= seed < 2**63:
        wrong.append(f"--seed {seed}: must be from 0 to 2^63 - 1")
    if both:
        wrong.append("prompts were given as arguments and with --prompts_file: one of them")
    if wrong:
        raise UsageError(
            wrong[0] if len(wrong) == 1 else f"{len(wrong)} options are wrong", details=wrong[1:] and wrong
        )


def _load(
    folder: Path,
    model_path: str | None,
    template_name: str | None,
    max_new_tokens: int,
    sampling: Sampling,
    trust_remote_code: bool,
    use_cpu: bool,
) -> Chat:
    base = find_base(folder, model_path)
    layout, notices = adapter_layout(folder, base, template_name, trust_remote_code)
    device, device_reason = choose_device(use_cpu)
    dtype, dtype_reason = choose_dtype(device)
    to_stderr(f"base: {base.said}; device: {device} ({device_reason}); {str(dtype).split('.')[-1]} ({dtype_reason})")
    for line in notices:
        to_stderr(line)
    model = load_model(base, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    adapted = load_adapter(model, folder)
    return Chat(adapted, layout.tokenizer, layout.template, layout.stop_ids, max_new_tokens, sampling)


def _answer_all(chat: Chat, conversations: list[Conversation]) -> None:
    """Streamed on a terminal or for one prompt; else in batches, which computes a shared beginning once."""
    if len(conversations) == 1:
        chat.print_answer(conversations[0])
        return
    if sys.stdout.isatty():
        for messages in conversations:
            print(f"> {messages[-1]['content']}")
            chat.print_answer(messages)
            print()
        return
    answers = chat.answers(conversations)
    for messages, answer in zip(conversations, answers, strict=True):
        print(f"> {messages[-1]['content']}\n{answer.text}\n")
    chat.say_cut(answers)


def _compare(chat: Chat, conversations: list[Conversation]) -> None:
    """Base and adapter side by side: columns on a terminal, lines elsewhere."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    with chat.model.disable_adapter():
        before = chat.answers(conversations)
    after = chat.answers(conversations)
    rows = [(m[-1]["content"], b.text, a.text) for m, b, a in zip(conversations, before, after, strict=True)]
    if sys.stdout.isatty():
        table = Table("prompt", "base", "adapter", show_lines=True, expand=True)
        for row in rows:
            table.add_row(*map(Text, row))
        Console().print(table)
    else:
        for prompt, base, adapted in rows:
            print(f"> {prompt}\nbase:    {base}\nadapter: {adapted}\n")
    same = sum(b.ids == a.ids for b, a in zip(before, after, strict=True))
    to_stderr(f"{len(rows) - same} of {len(rows)} answers differ from the base's")
    chat.say_cut(after)


def _converse(chat: Chat, system: str | None) -> None:
    """A conversation of many turns on a terminal."""
    with contextlib.suppress(ImportError):  # line editing for input(), where the platform has it
        import readline  # noqa: F401

    to_stderr(HELP)
    start: Conversation = [] if system is None else [{"role": "system", "content": system}]
    messages = list(start)
    while True:
        try:
            text = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if text.strip() == "/exit":
            return
        if text.strip() == "/clear":
            messages = list(start)
        elif text.strip():
            asked = [*messages, {"role": "user", "content": text}]
            try:
                answer = chat.print_answer(asked)
                messages = [*asked, {"role": "assistant", "content": answer.text}]
            except KeyboardInterrupt:
                print("\n(stopped; this turn is forgotten)")
            except EspalierError as error:  # a conversation that has grown too long, or an order that is refused
                to_stderr(f"{error}\n  /clear begins anew.")
