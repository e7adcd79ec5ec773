"""The cases of group (d), after training.

D03   model/test_load_adapter.py test_base_of_the_same_shape_is_told_apart; test_merge.py test_wrong_base_is_refused_...
D04   here
D05   here (no network); model/test_load_adapter.py, test_chat.py: test_base_path_of_another_machine...
D06   here; test_merge.py test_adapter_on_a_tied_head_unties_it
D07   test_verify.py test_d07_servers
D08   here
D09   test_generate.py test_stream_decoder_gives_whole_characters
D10   test_merge.py test_quantised_base_is_refused
D11   here (merged folder); test_verify.py test_what_is_missing_is_named
D12   here; test_chat.py test_prompt_ids_are_those_of_training_...; test_verify.py test_other_template_than_trained
D13   here; test_modelfile.py; clients/test_go_template.py
D14   here; test_chat.py test_stops_at_the_trained_turn_end_too
D15   test_verify.py test_adapter_without_effect
D16   here; model/test_load_adapter.py test_smaller_embedding_table_is_refused
D17   here
D18   test_chat.py test_same_question_twice_gives_the_same_answer; test_verify.py test_asked_twice_it_says_the_same
D19   test_chat.py test_prompt_ids_are_those_of_training_and_of_the_saved_folder
"""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from small_runs import run, write_rows
from transformers import AutoTokenizer

from espalier.data.formats import read_examples
from espalier.encode.encode import Encoder
from espalier.encode.template import resolve_template
from espalier.errors import AdapterError
from espalier.model.load import load_model, load_tokenizer
from espalier.model.load_adapter import load_adapter
from espalier.use.export import export_gguf
from espalier.use.layout import layout_of
from espalier.use.merge import merge
from espalier.use.modelfile import go_template, modelfile
from espalier.use.probes import prompt_ids

IDS = torch.tensor([[0, 51, 28, 279, 287]])
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def loaded(folder: Path) -> Any:
    return load_model(folder, device="cpu", dtype=torch.float32)


def test_d04_resized_embeddings(cases: Path, tiny_llama_dir: Path, tmp_path: Path) -> None:
    adapter = cases / "D04_resized_embeddings" / "adapter"
    found = merge(adapter, tmp_path / "m", str(tiny_llama_dir))
    assert json.loads((tmp_path / "m" / "config.json").read_text())["vocab_size"] == 342
    table = load_file(tmp_path / "m" / "model.safetensors")["model.embed_tokens.weight"]
    assert table.shape == (342, 32)
    assert torch.equal(table[340:], torch.ones(2, 32))
    expected = logits(load_adapter(loaded(tiny_llama_dir), adapter))
    assert (logits(loaded(tmp_path / "m")) - expected).abs().max() < 1e-4
    assert found.notes[-1].endswith("the adapter carries 342 embedding rows, the base has 340: enlarged to 342")


def test_d06_tied_head(cases: Path, shared: Path, tmp_path: Path) -> None:
    base, adapter = shared / "tiny-llama-tied", cases / "D06_tied_head" / "adapter"
    found = merge(adapter, tmp_path / "m", str(base))
    expected = logits(load_adapter(loaded(base), adapter))
    assert (logits(loaded(tmp_path / "m")) - expected).abs().max() < 1e-4
    assert json.loads((tmp_path / "m" / "config.json").read_text())["tie_word_embeddings"] is False
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    assert not torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    assert found.comparison.difference < 1e-4


def test_d08_merge_dtype(cases: Path, shared: Path, tmp_path: Path) -> None:
    base, adapter = shared / "tiny-llama-bf16", cases / "D08_merge_dtype" / "adapter"
    rounded = merge(adapter, tmp_path / "bf16", str(base))
    assert rounded.dtype == "bfloat16"
    assert rounded.unchanged[Q_PROJ] == pytest.approx(0.79, abs=0.005)
    assert rounded.comparison.lost > 0.5
    warning = rounded.lines()[-1]
    assert warning.startswith(
        "warning: rounding to bfloat16 takes 75 % of the adapter's effect: 84 % of the weights of "
    )
    assert warning.endswith("do not change at all. --dtype float32 keeps it.")
    exact = merge(adapter, tmp_path / "fp32", str(base), "float32")
    assert exact.unchanged[Q_PROJ] == 0.0
    assert exact.comparison.difference <= 1e-5
    assert not any(line.startswith("warning") for line in exact.lines())


def test_d11_d14_merged_folder_is_whole(cases: Path, shared: Path, tmp_path: Path) -> None:
    """Tokenizer, template, and a generation config that lists every turn end, also one that is not eos (case B15)."""
    adapter = Path(shutil.copytree(shared / "adapter-good", tmp_path / "a"))
    for file in (shared / "tok-turn").iterdir():
        shutil.copyfile(file, adapter / file.name)
    merge(adapter, tmp_path / "m", str(shared / "tiny-llama"))
    names = {file.name for file in (tmp_path / "m").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"} <= names
    assert json.loads((tmp_path / "m" / "generation_config.json").read_text())["eos_token_id"] == [1, 2]
    turns = [{"role": "user", "content": "a pear"}]
    trained, merged = (load_tokenizer(folder) for folder in (adapter, tmp_path / "m"))
    ids = prompt_ids(trained, resolve_template(trained), turns)
    assert merged.apply_chat_template(turns, add_generation_prompt=True, return_dict=False) == ids


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What reaches for the network, with the hub's own switch for offline work off."""
    import huggingface_hub.constants

    found: list[str] = []

    def refused(*args: Any, **_: Any) -> None:
        found.append(str(args))
        raise OSError("no network in this test")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    monkeypatch.setattr(socket.socket, "connect", refused)
    return found


def test_d05_a_path_of_another_machine_is_not_looked_up(cases: Path, tmp_path: Path, calls: list[str]) -> None:
    with pytest.raises(AdapterError, match="'/home/sam/old-laptop/models/base-v3' is not found here"):
        merge(cases / "D05_local_base_path" / "adapter", tmp_path / "m")
    assert calls == []


def test_d12_prompts_of_training_chat_and_folder(cases: Path, smollm2_dir: Path, tmp_path: Path) -> None:
    """B11's rows: the ids before each answer in training, in chat, and from the saved folder alone."""
    tokenizer = load_tokenizer(smollm2_dir)
    tokenizer.save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    encoder = Encoder(tokenizer, resolve_template(tokenizer))
    rows = read_examples([str(cases / "B11_default_system" / "train.jsonl")])
    assert len(rows) == 3
    for row in rows:
        turns = [dict(message) for message in row.messages[:-1]]
        [encoded] = encoder.encode_batch([row])[0].rows
        trained = encoded.input_ids[: int((encoded.labels >= 0).argmax())].tolist()
        assert trained == prompt_ids(saved, resolve_template(saved), turns)
        assert trained == saved.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)


def test_d13_modelfile(cases: Path, shared: Path, smollm2_dir: Path, tmp_path: Path) -> None:
    """FROM, TEMPLATE and stop lines that give B11's prompts; the merged model is the default route."""
    adapter = Path(shutil.copytree(shared / "adapter-good", tmp_path / "a"))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(shared / "tiny-llama" / name, adapter / name)
    export_gguf(adapter, tmp_path / "g", str(shared / "tiny-llama"))
    lines = (tmp_path / "g" / "Modelfile").read_text().splitlines()
    assert lines[0] == "FROM ./model-f16.gguf"
    assert lines[1].startswith('TEMPLATE """{{ range $i, $m := .Messages')
    assert lines[-1] == 'PARAMETER stop "</s>"'
    template = resolve_template(load_tokenizer(smollm2_dir))
    text, _ = modelfile("./m.gguf", None, template, ["<|im_end|>"])
    assert text.endswith('"""\nPARAMETER stop "<|im_end|>"\n')
    layout = layout_of(template)
    assert layout is not None
    assert f'TEMPLATE """{go_template(layout)}"""' in text
    for row in read_examples([str(cases / "B11_default_system" / "train.jsonl")]):
        turns = [dict(message) for message in row.messages[:-1]]
        assert layout.render(turns) == template.render(turns, generation_prompt=True)


def test_d16_padded_vocabulary_is_not_shrunk(shared: Path, tmp_path: Path) -> None:
    """A table of 384 rows under a tokenizer of 340 ids stays 384, through training's adapter and the merge."""
    base = loaded(shared / "tiny-llama")
    base.resize_token_embeddings(384, mean_resizing=False)
    base.save_pretrained(tmp_path / "base")
    load_tokenizer(shared / "tiny-llama").save_pretrained(tmp_path / "base")
    adapter = tmp_path / "a"
    get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False)).save_pretrained(
        adapter, save_embedding_layers=False
    )
    merge(adapter, tmp_path / "m", str(tmp_path / "base"))
    assert json.loads((tmp_path / "m" / "config.json").read_text())["vocab_size"] == 384
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    assert tensors["model.embed_tokens.weight"].shape == tensors["lm_head.weight"].shape == (384, 32)


def test_d17_saving_stays_offline_and_small(shared: Path, tmp_path: Path, calls: list[str]) -> None:
    """No network, though the name might be a hub's; only what was trained, 4 bytes a number; its size is said."""
    _, text = run(shared / "tiny-llama", write_rows(tmp_path / "rows.jsonl"), tmp_path / "r")
    assert json.loads((tmp_path / "r" / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny-llama"
    assert calls == []
    file = tmp_path / "r" / "adapter_model.safetensors"
    tensors = load_file(file)
    assert all("lora_A" in name or "lora_B" in name for name in tensors)
    with open(file, "rb") as data:
        header = 8 + int.from_bytes(data.read(8), "little")
    trained = sum(tensor.numel() for tensor in tensors.values())
    assert file.stat().st_size == header + 4 * trained
    assert f"{trained:,} trainable" in text
    assert f"adapter of {file.stat().st_size / 1e6:.1f} MB in " in text
