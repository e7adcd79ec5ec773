"""Which templates are known to only copy the texts, and that rows by pieces equal rows by rendering."""

from __future__ import annotations

from pathlib import Path

import pytest
from encoding import chat, encoder_for, load

from espalier.encode.spans import render_rows
from espalier.encode.template import BUILT_IN, ChatTemplate
from espalier.encode.transparent import only_copies

TEMPLATES = Path(__file__).parent.parent / "fixtures" / "templates"
LOOP = "{% for m in messages %}"


@pytest.mark.parametrize(
    "source",
    [
        *BUILT_IN.values(),
        LOOP + "{{ m.role + ': ' + m.content ~ eos_token }}{% endfor %}",
        "{{ messages[0]['content'] }}" + LOOP + "{% if m['content'] %}{{ m['content'] }}{% endif %}{% endfor %}",
        "{% for m in messages[1:] %}{{ m.content }}{% endfor %}{{ messages | length }}",
    ],
)
def test_templates_that_only_copy(source: str) -> None:
    assert only_copies(source)


@pytest.mark.parametrize(
    "body",
    [
        "{{ m.content | trim }}",
        "{{ m.content.strip() }}",
        "{% if '<think>' in m.content %}{% endif %}",
        "{% if m.content | length > 3 %}{% endif %}",
        "{{ m.get('content') }}",
        "{% set text = m.content %}{{ text }}",
        "{{ m }}",
        "{{ m | tojson }}",
        "{% set n = m %}{{ n.content }}",
        "{{ loop.previtem.content }}",
        "{{ m[key] }}",
        "{% filter trim %}{{ m.content }}{% endfilter %}",
        "{% macro show(t) %}{{ t }}{% endmacro %}{{ show(m.content) }}",
        "{{ m.content if m.content == 'x' else '' }}",
        "{{ 'a' * (m.content | length) }}",
        "{{ m.items() | list }}",
        "{% set rest = messages[1:] %}{{ rest }}",
        "{% unknown %}",
    ],
)
def test_templates_that_may_look_into_texts(body: str) -> None:
    assert not only_copies(LOOP + body + "{% endfor %}")


def test_rows_by_pieces_match_rows_by_rendering(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conversation = chat("one", "two", "three <x>", "four", system="five")
    for name in ("atom", "chatml", "plain"):
        tokenizer = load(shared / "tok-plain")
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        template = encoder_for(tokenizer, name).template
        assert template.only_copies
        (by_pieces,) = render_rows(template, conversation)
        rendered = ChatTemplate(tokenizer, template.source, template.reason)
        monkeypatch.setitem(rendered.__dict__, "only_copies", False)
        (by_rendering,) = render_rows(rendered, conversation)
        assert by_pieces == by_rendering


def test_renderings_grow_linearly_with_the_turns(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load(shared / "tok-trim")
    template = encoder_for(tokenizer).template
    count = 0
    render = ChatTemplate.render

    def counted(self: ChatTemplate, *args: object, **kwargs: object) -> str:
        nonlocal count
        count += 1
        return render(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(ChatTemplate, "render", counted)
    counts = []
    for turns in (10, 20, 40):
        texts = ["q", " a "] * turns
        count = 0
        render_rows(template, chat(*texts))  # trimmed: rendered turn by turn
        counts.append(count)
    assert counts[1] - counts[0] == (counts[2] - counts[1]) / 2
    assert counts[2] < 5 * 40
    count = 0
    plain = ["q", "a"] * 40
    render_rows(template, chat(*plain))
    assert count == 2  # the pieces are known by now
