"""`espalier chat`: the trained layout, the right base, prompts from everywhere, and clear refusals."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from espalier.encode.encode import Encoder
from espalier.encode.template import resolve_template
from espalier.errors import AdapterError, DataError, TemplateError, UsageError
from espalier.model.fingerprint import base_fingerprint
from espalier.model.load import load_tokenizer
from espalier.use import chat as module
from espalier.use.chat import find_base, run_chat
from espalier.use.prompts import from_file


@pytest.fixture
def adapter(tmp_path: Path, adapter_good_dir: Path, tiny_llama_dir: Path) -> Path:
    """An adapter's folder as a run of ours leaves it: with tokenizer, generation config and record."""
    folder = Path(shutil.copytree(adapter_good_dir, tmp_path / "run"))
    load_tokenizer(tiny_llama_dir).save_pretrained(folder)
    shutil.copy(tiny_llama_dir / "generation_config.json", folder)
    record = {
        "base": {"name": str(tiny_llama_dir), "fingerprint": base_fingerprint(tiny_llama_dir)},
        "stop_ids": [1],
    }
    (folder / "espalier.json").write_text(json.dumps(record))
    return folder


def load(folder: Path, model_path: str | None = None, template: str | None = None) -> module.Chat:
    return module._load(folder, model_path, template, 8, module.Sampling(), trust_remote_code=False, use_cpu=True)


def test_one_prompt_prints_the_answer_alone(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_chat(adapter, prompts=["a pear"], max_new_tokens=8, use_cpu=True) == 0
    out, err = capsys.readouterr()
    assert out == load(adapter).answers([[{"role": "user", "content": "a pear"}]])[0].text + "\n"
    assert err.startswith("base: folder ")
    assert "(the answer was cut off: --max_new_tokens 8, or the model's length)" in err


def test_several_prompts_are_named(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_chat(adapter, prompts=["a pear", "x"], max_new_tokens=8, use_cpu=True)
    first, second = load(adapter).answers([[{"role": "user", "content": text}] for text in ("a pear", "x")])
    assert capsys.readouterr().out == f"> a pear\n{first.text}\n\n> x\n{second.text}\n\n"


def test_same_question_twice_gives_the_same_answer(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        run_chat(adapter, prompts=["a pear"], max_new_tokens=8, use_cpu=True)
    out = capsys.readouterr().out
    assert out[: len(out) // 2] * 2 == out


def test_prompts_from_standard_input(
    adapter: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("a pear\n\nx\n"))
    run_chat(adapter, max_new_tokens=2, use_cpu=True)
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("> ")] == ["> a pear", "> x"]


def test_compare_shows_base_and_adapter(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_chat(adapter, prompts=["a pear"], compare=True, max_new_tokens=8, use_cpu=True)
    chat, question = load(adapter), [[{"role": "user", "content": "a pear"}]]
    after = chat.answers(question)[0].text
    with chat.model.disable_adapter():
        before = chat.answers(question)[0].text
    assert before != after
    out, err = capsys.readouterr()
    assert out == f"> a pear\nbase:    {before}\nadapter: {after}\n\n"
    assert "1 of 1 answers differ from the base's" in err


def test_compare_on_a_terminal_has_columns(
    adapter: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "100")
    run_chat(adapter, prompts=["a pear"], compare=True, max_new_tokens=2, use_cpu=True)
    lines = capsys.readouterr().out.splitlines()
    assert any("prompt" in line and "base" in line and "adapter" in line for line in lines)


def test_conversation_on_a_terminal(
    adapter: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter(["a pear", "and an apple", "", "/clear", "x", "/exit"])
    asked: list[list[dict[str, Any]]] = []
    real = module.Chat.print_answer

    def noted(self: module.Chat, messages: list[dict[str, Any]]) -> Any:
        asked.append(messages)
        return real(self, messages)

    monkeypatch.setattr(module.Chat, "print_answer", noted)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert run_chat(adapter, system="Be kind.", max_new_tokens=4, use_cpu=True) == 0
    assert [[message["role"] for message in messages] for messages in asked] == [
        ["system", "user"],
        ["system", "user", "assistant", "user"],
        ["system", "user"],
    ]
    assert module.HELP in capsys.readouterr().err


def test_conversation_that_outgrows_the_model_goes_on(
    adapter: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter(["x" * 300, "/exit"])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert run_chat(adapter, max_new_tokens=4, use_cpu=True) == 0
    err = capsys.readouterr().err
    assert "the model holds 128 tokens, which leaves no room for an answer" in err
    assert "/clear begins anew." in err


def test_ctrl_c_stops_the_answer_only(
    adapter: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: module.Chat, messages: Any) -> Any:
        raise KeyboardInterrupt

    lines = iter(["a pear", "/exit"])
    monkeypatch.setattr(module.Chat, "print_answer", interrupted)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert run_chat(adapter, use_cpu=True) == 0
    assert "(stopped; this turn is forgotten)" in capsys.readouterr().out


def test_prompt_ids_are_those_of_training_and_of_the_saved_folder(adapter: Path) -> None:
    chat = load(adapter)
    saved = load_tokenizer(adapter)
    encoder = Encoder(saved, resolve_template(saved))
    for messages in (
        [{"role": "user", "content": "a pear"}],
        [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}],
        [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": " c\n"},
        ],
    ):
        ids = chat.prompt_ids(messages)
        assert ids == encoder.prompt_ids(messages)
        assert ids == saved.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def test_stops_at_the_trained_turn_end_too(shared: Path, cases: Path, adapter: Path) -> None:
    load_tokenizer(shared / "tok-turn").save_pretrained(adapter)
    shutil.copy(cases / "B15_turn_end_not_eos" / "generation_config.json", adapter)
    (adapter / "espalier.json").unlink()
    assert load(adapter, str(shared / "tiny-llama")).stop_ids == (1, 2)


def test_stop_ids_of_the_record_count(adapter: Path, shared: Path) -> None:
    record = json.loads((adapter / "espalier.json").read_text())
    (adapter / "espalier.json").write_text(json.dumps(record | {"stop_ids": [1, 7]}))
    assert load(adapter).stop_ids == (1, 7)


def test_base_path_of_another_machine(cases: Path) -> None:
    folder = cases / "D05_local_base_path" / "adapter"
    with pytest.raises(AdapterError) as caught:
        find_base(folder, None)
    assert caught.value.what == "the adapter's base '/home/sam/old-laptop/models/base-v3' is not found here"
    assert caught.value.todo == "Give the base with --model_path: a folder, a .gguf file or a hub name."


def test_base_path_of_another_machine_with_the_option(cases: Path, shared: Path) -> None:
    chat = load(cases / "D05_local_base_path" / "adapter", str(shared / "tiny-llama"))
    assert chat.answers([[{"role": "user", "content": "a pear"}]])[0].ids


def test_wrong_base_of_the_same_shape_is_refused(adapter: Path, shared: Path) -> None:
    with pytest.raises(AdapterError, match="trained on another base"):
        run_chat(adapter, str(shared / "tiny-llama-other"), prompts=["x"], use_cpu=True)


def test_foreign_adapter_is_said_to_be_unchecked(
    adapter_good_dir: Path, tiny_llama_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_chat(adapter_good_dir, str(tiny_llama_dir), prompts=["x"], max_new_tokens=1, use_cpu=True)
    assert "no fingerprint of its base: made by another tool" in capsys.readouterr().err


def test_no_template_anywhere(adapter: Path, shared: Path) -> None:
    record = json.loads((adapter / "espalier.json").read_text())
    (adapter / "espalier.json").write_text(json.dumps(record | {"fingerprints": {"template": "that of training"}}))
    (adapter / "chat_template.jinja").unlink()
    with pytest.raises(TemplateError, match="has a chat template"):
        load(adapter)
    assert load(adapter, template="plain").template.source == "built-in plain"


def test_wrong_options_are_told_together(adapter: Path) -> None:
    with pytest.raises(UsageError) as caught:
        run_chat(adapter, prompts=["x"], max_new_tokens=0, temperature=-1, top_p=0)
    assert caught.value.what == "3 options are wrong"
    assert len(caught.value.details) == 3


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_no_prompt_on_standard_input(adapter: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    monkeypatch.setattr(module, "load_model", None)
    with pytest.raises(DataError, match="no prompt on standard input"):
        run_chat(adapter)


def test_missing_adapter_is_told_before_anything_loads(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="there is no such adapter folder"):
        run_chat(tmp_path / "nope", prompts=["x"])


def test_text_file_has_a_prompt_a_line(tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text("\ufefffirst\n\n second \n", encoding="utf-8")
    assert from_file(str(file), None) == [
        [{"role": "user", "content": "first"}],
        [{"role": "user", "content": " second "}],
    ]


def test_rows_become_the_prompts_of_training(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"instruction": "say", "input": "it"},
        {"instruction": "say", "input": "it", "output": "known"},
        {"prompt": "p"},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]},
        {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "known"}]},
        {"conversations": [{"from": "human", "value": "h"}]},
    ]
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    user = [{"role": "user", "content": "say\nit"}]
    system = {"role": "system", "content": "be kind"}
    assert from_file(str(file), "be kind") == [
        [system, *user],
        [system, *user],
        [system, {"role": "user", "content": "p"}],
        [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
        [system, {"role": "user", "content": "u"}],
        [system, {"role": "user", "content": "h"}],
    ]


def test_rows_that_are_no_prompt_are_named(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"instruction": "say"}\n{"instrution": "say"}\n[1]\n')
    with pytest.raises(DataError) as caught:
        from_file(str(file), None)
    text = str(caught.value)
    assert "2" in text
    assert "3" in text
    assert "instrution" in text


def test_prompt_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        from_file(str(tmp_path / "p.txt"), None)


def test_console_without_the_character_does_not_end_the_answer(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding="ascii"))
    monkeypatch.setattr(module, "stream", lambda *args, **kwargs: iter(["a 🤗"]))
    monkeypatch.setattr(module.Chat, "say_cut", lambda self, answers: None)
    run_chat(adapter, prompts=["x"], use_cpu=True)
    assert raw.getvalue() == b"a \\U0001f917\n"


def test_chat_with_the_embedded_model(smollm2_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from peft import LoraConfig, get_peft_model

    from espalier.model.load import load_model

    model: Any = load_model(smollm2_dir, device="cpu", dtype=torch.float32)
    record = {"base": {"name": "smollm2-135m", "fingerprint": base_fingerprint(model)}, "stop_ids": [2]}
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2)).save_pretrained(tmp_path)
    (tmp_path / "espalier.json").write_text(json.dumps(record))
    run_chat(tmp_path, prompts=["What is the capital of France?"], max_new_tokens=24, use_cpu=True)
    out, err = capsys.readouterr()
    assert "Paris" in out
    assert "<|" not in out
    assert "every lora_B is zero: this adapter changes nothing" in err


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": float("nan")}, "--temperature nan: must be 0 (greedy) or more"),
        ({"temperature": float("inf")}, "--temperature inf: must be 0 (greedy) or more"),
        ({"top_p": 0.5}, "--top_p 0.5: changes nothing without a --temperature above 0"),
        ({"seed": -1}, "--seed -1: must be from 0 to 2^63 - 1"),
    ],
)
def test_sampling_that_cannot_be(adapter: Path, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as error:
        run_chat(str(adapter), prompts=["a"], **settings)
    assert str(error.value) == words
