"""Chat templates: the tokenizer's own, three built-in ones, or the user's file; rendered by transformers' sandbox.

Built-in layouts ({start} and {end} are the tokenizer's start and end tokens):

    atom    {start}Human: USER\\n{end}{start}Assistant:ANSWER{end}       (Atom-7B-Chat; a system text and a newline
            stand before the first user's text)
    chatml  <|im_start|>ROLE\\nTEXT<|im_end|>\\n                         (no system text of its own)
    plain   SYSTEM\\n\\n### User\\nUSER\\n### Assistant\\nANSWER{end}\\n    (for bases without a template; {start} in
            front where the tokenizer itself puts one before a text)
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from espalier.encode.transparent import only_copies
from espalier.errors import ModelError, TemplateError

Message = Mapping[str, Any]

ATOM = (
    "{% for m in messages %}"
    "{% set after_system = loop.index0 == 1 and messages[0]['role'] == 'system' %}"
    "{% if m['role'] == 'system' %}"
    "{% if not loop.first %}{{ raise_exception('template atom: the system text must come first') }}{% endif %}"
    "{% elif m['role'] == 'user' %}"
    "{{ bos_token + 'Human: ' }}"
    "{% if after_system %}{% if messages[0]['content'] %}{{ messages[0]['content'] + '\\n' }}{% endif %}{% endif %}"
    "{{ m['content'] + '\\n' + eos_token }}"
    "{% elif m['role'] == 'assistant' %}"
    "{% if after_system %}{{ raise_exception('template atom: a user turn must follow the system text') }}{% endif %}"
    "{{ bos_token + 'Assistant:' + m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('template atom: unknown role ' + m['role']) }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ bos_token + 'Assistant:' }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PLAIN = (
    "{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ m['content'] + '\\n\\n' }}"
    "{% elif m['role'] == 'user' %}{{ '### User\\n' + m['content'] + '\\n' }}"
    "{% elif m['role'] == 'assistant' %}{{ '### Assistant\\n' + m['content'] + eos_token + '\\n' }}"
    "{% else %}{{ raise_exception('template plain: unknown role ' + m['role']) }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant\\n' }}{% endif %}"
)
BUILT_IN = {"atom": ATOM, "chatml": CHATML, "plain": PLAIN}

# What stands between an instruction and its input: nothing but a newline, or one of the two sentences that were
# published with Atom-7B-Chat's recipe.
INPUT_SENTENCES = {
    "none": "\n",
    "en": "Please answer the user's question: ",
    "zh": "请回答用户问题: ",
}


def input_joiner(name_or_text: str) -> str:
    """The text between instruction and input: a preset of INPUT_SENTENCES by name, any other text as it stands."""
    return INPUT_SENTENCES.get(name_or_text, name_or_text)


@dataclass(frozen=True, eq=False)
class ChatTemplate:
    """A chat template bound to its tokenizer. `source` says whose it is, `reason` why it was taken."""

    tokenizer: Any
    source: str
    reason: str
    _skeletons: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        state = {key: value for key, value in self.__dict__.items() if not isinstance(value, re.Pattern)}
        return {**state, "_skeletons": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def render(self, messages: Sequence[Message], *, generation_prompt: bool = False, tools: Sequence[Any] = ()) -> str:
        """The text of a conversation. Raises TemplateError with the template's own words where it refuses."""
        import jinja2

        try:
            text = self.tokenizer.apply_chat_template(
                list(messages), tools=list(tools) or None, add_generation_prompt=generation_prompt, tokenize=False
            )
        except jinja2.TemplateError as error:
            raise TemplateError(str(error)) from error
        except Exception as error:
            # A template is a program: it may add None to a text, ask for a key that the message lacks, divide by 0.
            raise TemplateError(f"{type(error).__name__}: {error}") from error
        return str(text)

    def try_render(self, messages: Sequence[Message]) -> str:
        """As render with the generation prompt, or the template's refusal as text."""
        try:
            return self.render(messages, generation_prompt=True)
        except TemplateError as error:
            return error.what

    @cached_property
    def special_pattern(self) -> re.Pattern[str]:
        """Matches each special token of the tokenizer, the longest first."""
        tokenizer = self.tokenizer
        tokens = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        tokens |= set(tokenizer.all_special_tokens)
        return re.compile("|".join(re.escape(t) for t in sorted(tokens, key=lambda t: (-len(t), t))) or "(?!)")

    @cached_property
    def _end_pattern(self) -> re.Pattern[str]:
        return re.compile(rf"(?:(?:{self.special_pattern.pattern})\s*)+\Z")

    def turn_end(self, text: str) -> int | None:
        """Where a turn ends in a text that ends with it: after the first of the special tokens that close `text`.

        'Sure.<|im_end|>\\n' -> after <|im_end|>; 'Sure.<|end|>\\n<|endoftext|>' -> after <|end|>. None without one.
        """
        run = self._end_pattern.search(text)
        if run is None:
            return None
        first = self.special_pattern.match(text, run.start())
        assert first is not None
        return first.end()

    @cached_property
    def only_copies(self) -> bool:
        """True where the template is known not to look into the texts that it lays out."""
        source = self.tokenizer.chat_template
        return isinstance(source, str) and only_copies(source)

    @cached_property
    def default_system(self) -> str | None:
        """The system text that the template adds where a conversation has none, as far as it can be seen, or None.

        Seen by rendering one user turn without and with an empty system text: what only the first one holds.
        """
        user = {"role": "user", "content": "\ue0000\ue001"}
        try:
            without = self.render([user])
            with_empty = self.render([{"role": "system", "content": ""}, user])
        except TemplateError:
            return None
        extra = without[common_prefix_length(without, with_empty) :]
        extra = extra[: len(extra) - common_prefix_length(extra[::-1], with_empty[::-1])].strip()
        return extra or None

    def notices(self) -> list[str]:
        """What the user should know about this template, one sentence each."""
        found = []
        if self.default_system:
            found.append(f"the template adds a system text of its own where a row has none: {self.default_system!r}")
        if "strftime_now" in str(self.tokenizer.chat_template):
            found.append("the template writes today's date into the prompt: training and chat differ by the day")
        return found


def common_prefix_length(a: str, b: str) -> int:
    """Number of characters that two texts have in common at their beginning."""
    length = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        length += 1
    return length


def resolve_template(tokenizer: Any, name_or_path: str | None = None) -> ChatTemplate:
    """The chat template to use: a built-in name, a jinja file, or None for the tokenizer's own (`plain` without one).

    A template that is not the tokenizer's own is set on the tokenizer, so that saving the tokenizer saves it.
    Raises TemplateError for an unknown name, a file that cannot be read, a template that renders nothing usable, and
    ModelError for a tokenizer without a fast form.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"the tokenizer {type(tokenizer).__name__} has no fast form (tokenizer.json), which labels need",
            todo="Convert it once with AutoTokenizer.from_pretrained(...).save_pretrained(...) from a fast class.",
        )
    if name_or_path is None and tokenizer.chat_template:
        template = ChatTemplate(tokenizer, "tokenizer's own", "the tokenizer brings a chat template")
    elif name_or_path is None or name_or_path in BUILT_IN:
        name = name_or_path or "plain"
        reason = "asked for" if name_or_path else "the tokenizer has no chat template"
        text = BUILT_IN[name]
        if name == "plain" and starts_with_bos(tokenizer):
            text = "{{ bos_token }}" + text
        tokenizer.chat_template = text
        template = ChatTemplate(tokenizer, f"built-in {name}", reason)
    else:
        tokenizer.chat_template = _read_template(name_or_path)
        template = ChatTemplate(tokenizer, name_or_path, "asked for")
    _check_turn_end(template)
    return template


def starts_with_bos(tokenizer: Any) -> bool:
    """True where the tokenizer itself puts its start token before a text."""
    ids = tokenizer("a", add_special_tokens=True)["input_ids"]
    return tokenizer.bos_token_id is not None and bool(ids) and ids[0] == tokenizer.bos_token_id


def _read_template(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TemplateError(
            f"no built-in template is called {path!r}, and no template file can be read there ({error})",
            todo=f"Built-in templates: {', '.join(BUILT_IN)}. Or give the path of a jinja file.",
        ) from error


def _check_turn_end(template: ChatTemplate) -> None:
    """An answer must end with a token that chat can stop at; a template that refuses the probe is judged row by row."""
    probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        text = template.render(probe)
    except TemplateError:
        return
    if template.turn_end(text) is None:
        raise TemplateError(
            f"the chat template ({template.source}) writes no end token after an answer: ...{text[-20:]!r}",
            todo="A model trained on it would never stop. Let the template write {{ eos_token }} after each answer, "
            "or pass --template plain.",
        )
