"""Ollama's Modelfile beside a GGUF: FROM, ADAPTER, TEMPLATE in Go's template language, stop lines.

The language is that of Go's text/template; the names in it (.Messages, .Role, .Content) and how a Modelfile is read are
those of Ollama's packages `template` and `parser`.
"""

from __future__ import annotations

from collections.abc import Iterable

from espalier.encode.template import ChatTemplate
from espalier.use.layout import Layout, layout_of, trims

FILE = "Modelfile"
TRIPLE = '"""'


def modelfile(from_: str, adapter: str | None, template: ChatTemplate, stops: Iterable[str]) -> tuple[str, str]:
    """(a Modelfile, what to say about its TEMPLATE in one sentence).

    from_, adapter: paths, relative to the Modelfile. stops: the texts at which an answer ends. A TEMPLATE is written
    only where it was seen to give the trained prompts.
    """
    layout = layout_of(template)
    lines = [f"FROM {from_}", *([] if adapter is None else [f"ADAPTER {adapter}"])]
    if layout is None:
        said = (
            "its Modelfile has no TEMPLATE: the chat template is more than fixed texts around turns. Ollama then takes "
            "the GGUF's own chat template, or, in older versions, the likest of those that it knows"
        )
    else:
        lines.append(f"TEMPLATE {TRIPLE}{go_template(layout)}{TRIPLE}")
        said = "the TEMPLATE of its Modelfile gives the trained prompts, compared on conversations of up to five turns"
        if trims(template):
            said += "; blanks at the ends of a text, which the chat template takes off, stay"
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    return "\n".join(lines) + "\n", said


def go_template(layout: Layout) -> str:
    """The layout for Ollama. What it has no place for (a system text that was not trained, tools) is an error there."""
    if layout.system is None:
        system, after_system = _refusal("the chat template takes no system text"), ""
    else:
        system, after_system = f"{_literal(layout.system)}{{{{ .Content }}}}", _literal(str(layout.after_system))
        if layout.empty_system != f"{layout.system}{layout.after_system}":
            empty = _literal(str(layout.empty_system))
            system = f"{{{{ if .Content }}}}{system}{{{{ end }}}}"
            after_system = f"{{{{ if (index $.Messages 0).Content }}}}{after_system}{{{{ else }}}}{empty}{{{{ end }}}}"
    # Line breaks stand inside the actions, where they mean nothing.
    return (
        "{{ range $i, $m := .Messages\n"
        '}}{{ if eq .Role "user"\n'
        f"}}}}{{{{ if eq $i 0 }}}}{_literal(layout.start)}"
        f'{{{{ else if and (eq $i 1) (eq (index $.Messages 0).Role "system") }}}}{after_system}'
        f"{{{{ else }}}}{_literal(layout.answered)}{{{{ end }}}}{{{{ .Content\n"
        f"}}}}{{{{ if eq (len (slice $.Messages $i)) 1 }}}}{_literal(layout.open)}"
        f"{{{{ else }}}}{_literal(layout.asked)}{{{{ end\n"
        '}}{{ else if eq .Role "assistant" }}{{ .Content\n'
        f'}}}}{{{{ else if and (eq .Role "system") (eq $i 0) }}}}{system}'
        f"{{{{ else }}}}{_refusal('roles are user and assistant in turn, and a system text in front')}"
        "{{ end }}{{ end }}"
    )


def _refusal(what: str) -> str:
    """Go's own error for a template that is not defined carries `what`; Ollama answers with it."""
    return f'{{{{ template "{what}" $ }}}}'


def _literal(text: str) -> str:
    """`text` in a Go template in a Modelfile, whose reader drops what is not printable."""
    escaped = text.replace("{{", '{{ "{{" }}').replace(TRIPLE, '{{ "\\"\\"\\"" }}')
    return "".join(
        character if character.isprintable() or character in "\n\t" else f'{{{{ "\\U{ord(character):08x}" }}}}'
        for character in escaped
    )
