"""Ollama's Modelfile: FROM, TEMPLATE, stop lines; a template that is more than fixed texts is not translated.

That Go itself renders the trained prompts from it: clients/test_go_template.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from espalier.encode.template import ChatTemplate, resolve_template
from espalier.model.load import load_tokenizer
from espalier.use.export import export_gguf
from espalier.use.layout import Layout, layout_of, prompt_without_bos, server_adds_bos
from espalier.use.modelfile import go_template, modelfile
from whole_adapter import whole

TURN = "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + eos_token }}{% endfor %}"
ASK = "{% if add_generation_prompt %}<assistant>{% endif %}"


def bound(shared: Path, tmp_path: Path, text: str, tokenizer: str = "tok-bos") -> ChatTemplate:
    (tmp_path / "t.jinja").write_text(text)
    return resolve_template(load_tokenizer(shared / tokenizer), str(tmp_path / "t.jinja"))


def test_whole_text(shared: Path, tmp_path: Path) -> None:
    text, said = modelfile("./m.gguf", "./a.gguf", bound(shared, tmp_path, TURN + ASK), ["</s>", "<end>"])
    assert text == (
        'FROM ./m.gguf\nADAPTER ./a.gguf\nTEMPLATE """{{ range $i, $m := .Messages\n'
        '}}{{ if eq .Role "user"\n'
        '}}{{ if eq $i 0 }}<user>{{ else if and (eq $i 1) (eq (index $.Messages 0).Role "system") }}</s><user>'
        "{{ else }}</s><user>{{ end }}{{ .Content\n"
        "}}{{ if eq (len (slice $.Messages $i)) 1 }}</s><assistant>{{ else }}</s><assistant>{{ end\n"
        '}}{{ else if eq .Role "assistant" }}{{ .Content\n'
        '}}{{ else if and (eq .Role "system") (eq $i 0) }}<system>{{ .Content }}'
        '{{ else }}{{ template "roles are user and assistant in turn, and a system text in front" $ }}'
        '{{ end }}{{ end }}"""\n'
        'PARAMETER stop "</s>"\nPARAMETER stop "<end>"\n'
    )
    assert (
        said == "the TEMPLATE of its Modelfile gives the trained prompts, compared on conversations of up to five turns"
    )


@pytest.mark.parametrize("name", ["atom", "plain", None])
def test_d13_b11_prompts_are_reproduced(shared: Path, cases: Path, name: str | None) -> None:
    """Case D13: the layout that is written as TEMPLATE renders the prompts of B11's rows as the template does."""
    template = resolve_template(load_tokenizer(shared / "tok-bos"), name)
    layout = layout_of(template)
    assert layout is not None
    rows = [json.loads(line) for line in (cases / "B11_default_system" / "train.jsonl").read_text().splitlines()]
    seen = 0
    for row in rows:
        for end, message in enumerate(row["messages"]):
            if message["role"] == "assistant":
                turns = row["messages"][:end]
                assert layout.render(turns) == prompt_without_bos(template, turns)
                seen += 1
    assert seen >= len(rows) > 0


def test_special_characters_survive_the_modelfile() -> None:
    layout = Layout('a"""b', "\u3000{{ x", "", "", None, None, None)
    text = go_template(layout)
    assert '{{ if eq $i 0 }}a{{ "\\"\\"\\"" }}b{{ else' in text
    assert '{{ "\\U00003000" }}{{ "{{" }} x{{ else }}' in text
    assert '{{ template "the chat template takes no system text" $ }}' in text


@pytest.mark.parametrize(
    "text",
    [
        "{{ messages | length }}" + TURN + ASK,
        TURN.replace("m['content']", "m['content'] | upper") + ASK,
        "{{ messages[-1]['content'] }}" + TURN + ASK,
        "{% if messages | length > 4 %}long{% endif %}" + TURN + ASK,
        TURN.replace("+ eos", "+ ('!' if 'Line' in m['content'] else '') + eos") + ASK,
    ],
    ids=["count", "upper", "twice", "long", "looks-into-texts"],
)
def test_what_is_no_layout_gets_no_template(shared: Path, tmp_path: Path, text: str) -> None:
    template = bound(shared, tmp_path, text)
    assert layout_of(template) is None
    made, said = modelfile("./m.gguf", None, template, ["</s>"])
    assert made == 'FROM ./m.gguf\nPARAMETER stop "</s>"\n'
    assert said.startswith("its Modelfile has no TEMPLATE: the chat template is more than fixed texts around turns.")


def test_trimmed_texts_are_said(shared: Path, tmp_path: Path) -> None:
    template = bound(shared, tmp_path, TURN.replace("m['content']", "m['content'].strip(' ')") + ASK)
    assert modelfile("./m.gguf", None, template, [])[1].endswith(
        "; blanks at the ends of a text, which the chat template takes off, stay"
    )


def test_start_token_is_added_once(shared: Path, tmp_path: Path) -> None:
    """tok-bos adds <s> to texts by itself; a layout that was trained without one must be served without one."""
    with_bos, without = bound(shared, tmp_path, "{{ bos_token }}" + TURN + ASK), bound(shared, tmp_path, TURN + ASK)
    assert server_adds_bos(with_bos)
    assert not server_adds_bos(without)
    first = layout_of(with_bos)
    assert first is not None
    assert first == layout_of(without)
    assert first.start == "<user>"


@pytest.mark.parametrize(("quantize", "name"), [("q8_0", "model-q8_0.gguf"), (None, "adapter.gguf")])
def test_written_beside_every_gguf(shared: Path, tmp_path: Path, quantize: Any, name: str) -> None:
    lines = export_gguf(whole(shared, tmp_path / "a"), tmp_path / "g", str(shared / "tiny-llama"), quantize)
    made = (tmp_path / "g" / "Modelfile").read_text().splitlines()
    assert made[: 1 if quantize else 2] == (
        [f"FROM ./{name}"] if quantize else ["FROM ./BASE.gguf", f"ADAPTER ./{name}"]
    )
    assert made[-1] == 'PARAMETER stop "</s>"'
    put = "" if quantize else f"put the base's GGUF into the FROM line of {tmp_path / 'g' / 'Modelfile'}, then "
    assert lines[-1].startswith(f"Ollama: {put}ollama create NAME -f {tmp_path / 'g' / 'Modelfile'}; the TEMPLATE")
