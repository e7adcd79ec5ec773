"""What `espalier verify` says of adapters that are whole, that lack something, and that servers refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from espalier.cli import app
from espalier.errors import AdapterError
from espalier.model.load import load_config
from espalier.use.verify import Finding, servers, verify
from whole_adapter import whole


def test_whole_adapter_has_no_problem(shared: Path, tmp_path: Path) -> None:
    found = verify(whole(shared, tmp_path / "a"), str(shared / "tiny-llama"), use_cpu=True)
    assert {entry.level for entry in found} == {"ok"}
    texts = [entry.text for entry in found]
    assert "generation_config.json lists the end tokens [1]" in texts
    assert "tokenizer and template are those of training: the same prompts, token for token" in texts
    assert "the base is the one that it was trained on (fingerprint)" in texts
    assert any(text.startswith("4 of 4 greedy answers differ from the base's") for text in texts)


def test_what_is_missing_is_named(shared: Path, tmp_path: Path) -> None:
    folder = whole(shared, tmp_path / "a")
    (folder / "chat_template.jinja").unlink()
    (folder / "generation_config.json").unlink()
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    found = verify(folder, str(shared / "tiny-llama"), use_cpu=True)
    assert [entry.text for entry in found if entry.level == "problem"] == [
        "no tokenizer.json: servers will use the base's tokenizer",
        "no chat template: servers will use the base's own layout",
        "no generation_config.json with end tokens: a server may never stop",
    ]


def test_other_template_than_trained(shared: Path, tmp_path: Path) -> None:
    folder = whole(shared, tmp_path / "a")
    text = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.jinja").write_text(text + "\n")
    found = verify(folder, str(shared / "tiny-llama"), use_cpu=True)
    assert Finding("problem", "not those of training: template; prompts get other tokens") in found


def test_adapter_without_effect(shared: Path, tmp_path: Path) -> None:
    """Case D15."""
    folder = whole(shared, tmp_path / "a")
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    file.unlink()
    save_file({name: tensor * ("lora_A" in name) for name, tensor in tensors.items()}, file)
    found = verify(folder, str(shared / "tiny-llama"), use_cpu=True)
    nothing = "0 of 4 greedy answers differ from the base's; largest logit difference 0"
    assert Finding("problem", nothing) in found


def test_wrong_base(shared: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="trained on another base"):
        verify(whole(shared, tmp_path / "a"), str(shared / "tiny-llama-other"), use_cpu=True)


def test_d07_servers(cases: Path) -> None:
    folder = cases / "D07_server_rejects" / "rank64"
    found = servers(json.loads((folder / "adapter_config.json").read_text()), folder, "base")
    assert Finding("note", "vLLM: rank 64 is over its default limit of 16, so the limit is set") in found
    command = f"vLLM: vllm serve base --enable-lora --lora-modules rank64={folder} --max-lora-rank 64"
    assert Finding("ok", command) in found
    folder = cases / "D07_server_rejects" / "modules_to_save"
    found = servers(json.loads((folder / "adapter_config.json").read_text()), folder, "base")
    refusal = next(entry.text for entry in found if entry.level == "note")
    assert refusal.startswith("vLLM: does not take whole tensors in the adapter (modules_to_save); merge first: ")


def test_names_that_servers_do_not_find(cases: Path, shared: Path) -> None:
    """C19: what loads here by repair would be the base in PEFT and vLLM. D04: a table is no LoRA tensor for vLLM."""
    folder = cases / "C19_compile_prefix" / "adapter"
    found = verify(folder, str(shared / "tiny-llama"), use_cpu=True)[-2:]
    plain = f"espalier import {folder} --output_dir adapter-plain"
    text = "Transformers, vLLM: they find no tensor under these names, and answer as the base; make it plain"
    assert found[0] == Finding("note", f"{text}: {plain}")
    assert found[1].text.startswith("llama.cpp: espalier merge --adapter ")
    folder = cases / "D04_resized_embeddings" / "adapter"
    notes = [line.text for line in verify(folder, str(shared / "tiny-llama"), use_cpu=True) if line.level == "note"]
    assert notes[-1].startswith("vLLM: does not take whole tensors in the adapter (modules_to_save); merge first: ")


def test_fused_layers_and_unknown_types(shared: Path, tmp_path: Path) -> None:
    """Phi 3's qkv_proj for vLLM, and no command for llama.cpp that would be refused."""
    config = load_config(shared / "tiny-phi3")
    found = servers(
        {"r": 8, "target_modules": ["o_proj", "model.layers.0.self_attn.qkv_proj"]}, tmp_path, "base", config
    )
    notes = [entry.text for entry in found if entry.level == "note"]
    assert notes[0].startswith(
        "vLLM: several layers in one (qkv_proj) are taken for some models only; if not, merge first: "
    )
    assert notes[1].startswith("llama.cpp: no GGUF can be written for models of type 'phi3'")
    assert len(notes) == 2
    found = servers(
        {"r": 8, "target_modules": r".*\.(q_proj|v_proj)"}, tmp_path, "base", load_config(shared / "tiny-llama")
    )
    assert {entry.level for entry in found} == {"ok"}
    assert found[-1].text.startswith("llama.cpp: espalier merge --adapter ")


def test_command(shared: Path, tmp_path: Path) -> None:
    folder = whole(shared, tmp_path / "a")
    argv = ["verify", str(folder), "--model_path", str(shared / "tiny-llama"), "--use_cpu", "--json"]
    result = CliRunner().invoke(app, argv)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)[0] == {"level": "ok", "text": "tokenizer.json is beside it"}


def test_asked_twice_it_says_the_same(shared: Path, tmp_path: Path) -> None:
    """Case D18: greedy, eval mode, no dropout."""
    folder = whole(shared, tmp_path / "a")
    first, second = (verify(folder, str(shared / "tiny-llama"), use_cpu=True) for _ in range(2))
    assert first == second
