"""The cases of group (d), after training.

D03   model/test_load_adapter.py test_base_of_the_same_shape_is_told_apart; test_merge.py test_wrong_base_is_refused_...
D04   here
D05   model/test_load_adapter.py, test_chat.py: test_base_path_of_another_machine...
D06   here; test_merge.py test_adapter_on_a_tied_head_unties_it
D07   test_verify.py test_d07_servers
D08   here
D09   test_generate.py test_stream_decoder_gives_whole_characters
D10   test_merge.py test_quantised_base_is_refused
D11   here (merged folder); test_verify.py test_what_is_missing_is_named
D12   test_chat.py test_prompt_ids_are_those_of_training_...; test_verify.py test_other_template_than_trained
D13   not yet: no Modelfile is written
D14   here; test_chat.py test_stops_at_the_trained_turn_end_too
D15   test_verify.py test_adapter_without_effect
D16   model/test_load_adapter.py test_smaller_embedding_table_is_refused
D17   not yet a test of its own
D18   test_chat.py test_same_question_twice_gives_the_same_answer; test_verify.py test_asked_twice_it_says_the_same
D19   test_chat.py test_prompt_ids_are_those_of_training_and_of_the_saved_folder
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from espalier.model.load import load_model
from espalier.model.load_adapter import load_adapter
from espalier.use.merge import merge

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
    import shutil

    adapter = Path(shutil.copytree(shared / "adapter-good", tmp_path / "a"))
    for file in (shared / "tok-turn").iterdir():
        shutil.copyfile(file, adapter / file.name)
    merge(adapter, tmp_path / "m", str(shared / "tiny-llama"))
    names = {file.name for file in (tmp_path / "m").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"} <= names
    assert json.loads((tmp_path / "m" / "generation_config.json").read_text())["eos_token_id"] == [1, 2]
