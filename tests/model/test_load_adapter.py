"""Adapters onto a base: each fault is one clear error, each repair is said, and nothing is loaded in part."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from espalier.errors import AdapterError
from espalier.model.fingerprint import base_fingerprint
from espalier.model.load import load_model
from espalier.model.load_adapter import check_adapter_folder, load_adapter, recorded_base

IDS = torch.tensor([[0, 51, 28, 279, 287]])


@pytest.fixture
def base(tiny_llama_dir: Path) -> Any:
    return load_model(tiny_llama_dir, device="cpu", dtype=torch.float32)


@pytest.fixture
def adapter(tmp_path: Path, adapter_good_dir: Path) -> Path:
    return Path(shutil.copytree(adapter_good_dir, tmp_path / "adapter"))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS.to(model.device)).logits


def rewrite(folder: Path, change: Any) -> None:
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def refuse(line: str) -> None:
    raise AssertionError(f"unexpected notice: {line}")


def test_good_adapter_equals_peft(base: Any, tiny_llama_dir: Path, adapter_good_dir: Path) -> None:
    from peft import PeftModel

    said: list[str] = []
    ours = logits(load_adapter(base, adapter_good_dir, notice=said.append))
    plain = load_model(tiny_llama_dir, device="cpu", dtype=torch.float32)
    before = logits(plain)
    theirs = logits(PeftModel.from_pretrained(plain, str(adapter_good_dir)))
    assert torch.equal(ours, theirs)
    assert (ours - before).abs().max() > 1
    assert len(said) == 1
    assert "no fingerprint of its base: made by another tool" in said[0]


def test_frozen_unless_asked(base: Any, adapter_good_dir: Path) -> None:
    model = load_adapter(base, adapter_good_dir)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 0
    assert not model.training


def test_trainable_when_asked(base: Any, adapter_good_dir: Path) -> None:
    model = load_adapter(base, adapter_good_dir, is_trainable=True)
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trainable) == 896
    assert {p.dtype for p in trainable} == {torch.float32}
    assert model.training


def test_empty_adapter(base: Any, cases: Path) -> None:
    with pytest.raises(AdapterError, match="the adapter holds 0 of 8 tensors that its settings ask for"):
        load_adapter(base, cases / "C18_empty_adapter" / "adapter")


def test_adapter_saved_in_part(base: Any, adapter: Path) -> None:
    rewrite(adapter, lambda tensors: dict(list(tensors.items())[:5]))
    with pytest.raises(AdapterError, match="holds 5 of 8 tensors") as caught:
        load_adapter(base, adapter)
    assert len(caught.value.details) == 3


def test_compile_prefix_is_repaired(base: Any, tiny_llama_dir: Path, cases: Path, adapter_good_dir: Path) -> None:
    said: list[str] = []
    repaired = load_adapter(base, cases / "C19_compile_prefix" / "adapter", notice=said.append)
    assert said[1].endswith("keys of the adapter's tensors repaired (they held _orig_mod)")
    good = load_adapter(load_model(tiny_llama_dir, device="cpu", dtype=torch.float32), adapter_good_dir)
    assert torch.equal(logits(repaired), logits(good))


@pytest.mark.parametrize(
    ("spoil", "held"),
    [
        (lambda key: "base_model.model." + key, "base_model.model twice"),
        (lambda key: key.replace("base_model.model.", "base_model.model.module."), "module"),
        (lambda key: key.replace(".weight", ".default.weight"), "default"),
    ],
)
def test_other_spoilt_keys_are_repaired(base: Any, adapter: Path, spoil: Any, held: str) -> None:
    rewrite(adapter, lambda tensors: {spoil(key): tensor for key, tensor in tensors.items()})
    said: list[str] = []
    before = logits(base)
    model = load_adapter(base, adapter, notice=said.append)
    assert said[1].endswith(f"repaired (they held {held})")
    assert (logits(model) - before).abs().max() > 1


def test_larger_embedding_table(base: Any, cases: Path) -> None:
    said: list[str] = []
    model = load_adapter(base, cases / "D04_resized_embeddings" / "adapter", notice=said.append)
    assert said[1].endswith("the adapter carries 342 embedding rows, the base has 340: enlarged to 342")
    table = model.get_input_embeddings().weight
    assert table.shape == (342, 32)
    assert torch.equal(table[340:], torch.ones(2, 32))
    assert model.config.vocab_size == 342
    assert logits(model).shape == (1, 5, 342)


def test_smaller_embedding_table_is_refused(base: Any, adapter: Path) -> None:
    key = "base_model.model.model.embed_tokens.weight"
    rewrite(adapter, lambda tensors: tensors | {key: torch.zeros(300, 32)})
    with pytest.raises(AdapterError, match=r"tables of \[300\] rows, the base has 340"):
        load_adapter(base, adapter)


def test_trained_head_on_a_tied_base(shared: Path, cases: Path) -> None:
    tied = load_model(shared / "tiny-llama-tied", device="cpu", dtype=torch.float32)
    before = logits(tied)
    assert not torch.equal(logits(load_adapter(tied, cases / "D06_tied_head" / "adapter")), before)


def test_other_rank_than_configured(base: Any, adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"r": 8}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match="8 of the adapter's 8 tensors have another shape") as caught:
        load_adapter(base, adapter)
    assert caught.value.details[0].endswith("lora_A.weight: adapter [4, 32], base needs [8, 32]")


def test_base_of_another_family(shared: Path, adapter_good_dir: Path) -> None:
    phi3 = load_model(shared / "tiny-phi3", device="cpu", dtype=torch.float32)
    with pytest.raises(AdapterError, match=r"the adapter does not fit this base: .*q_proj"):
        load_adapter(phi3, adapter_good_dir)


def test_base_with_fewer_layers(base: Any, adapter: Path) -> None:
    key = "base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"
    rewrite(adapter, lambda tensors: tensors | {key: torch.zeros(4, 32)})
    with pytest.raises(AdapterError, match="1 of the adapter's 9 tensors fit nothing in this base"):
        load_adapter(base, adapter)


def test_values_that_are_not_finite(base: Any, adapter: Path) -> None:
    rewrite(adapter, lambda tensors: {key: tensor * float("nan") for key, tensor in tensors.items()})
    with pytest.raises(AdapterError, match="8 of the adapter's 8 tensors hold values that are not finite"):
        load_adapter(base, adapter)


def test_adapter_without_effect_is_said(base: Any, adapter: Path) -> None:
    rewrite(adapter, lambda tensors: {key: torch.zeros_like(tensor) for key, tensor in tensors.items()})
    said: list[str] = []
    load_adapter(base, adapter, notice=said.append)
    assert said[1].endswith("every lora_B is zero: this adapter changes nothing")


def test_base_of_the_same_shape_is_told_apart(shared: Path, cases: Path, tmp_path: Path, base: Any) -> None:
    folder = Path(shutil.copytree(cases / "D03_wrong_base" / "adapter", tmp_path / "a"))
    record = {"base": {"name": "tiny-llama", "fingerprint": base_fingerprint(base)}}
    (folder / "espalier.json").write_text(json.dumps(record))
    load_adapter(base, folder, notice=refuse)
    other = load_model(shared / "tiny-llama-other", device="cpu", dtype=torch.float32)
    with pytest.raises(AdapterError, match="trained on another base: same shape, other weights") as caught:
        load_adapter(other, folder)
    assert caught.value.todo == "Give the base that it was trained on, 'tiny-llama', as --model_path."


def test_base_path_of_another_machine_loads_with_the_right_base(base: Any, cases: Path) -> None:
    folder = cases / "D05_local_base_path" / "adapter"
    assert recorded_base(folder) == "/home/sam/old-laptop/models/base-v3"
    before = logits(base)
    assert (logits(load_adapter(base, folder)) - before).abs().max().item() == pytest.approx(3.581, abs=5e-4)


def test_legacy_bin_file(base: Any, adapter: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    torch.save(tensors, adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    before = logits(base)
    assert (logits(load_adapter(base, adapter)) - before).abs().max() > 1


def test_bin_file_with_code_in_it_is_refused(base: Any, adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({"x": Path}, adapter / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"the file asks for pathlib\.\S*Path, which is no tensor"):
        load_adapter(base, adapter)


def test_adapter_on_the_embeddings_is_frozen(base: Any, tiny_llama_dir: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    plain = load_model(tiny_llama_dir, device="cpu", dtype=torch.float32)
    made = get_peft_model(plain, LoraConfig(task_type="CAUSAL_LM", target_modules=["embed_tokens"], r=2))
    made.save_pretrained(tmp_path / "a", save_embedding_layers=False)
    assert not any(p.requires_grad for p in load_adapter(base, tmp_path / "a").parameters())


def test_cut_off_file(base: Any, adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:900])
    with pytest.raises(AdapterError, match=r"damaged or cut off \(900 bytes\)"):
        load_adapter(base, adapter)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "there is no such adapter folder"),
        (lambda folder: folder.write_text(""), "this is a file, not an adapter's folder"),
        (lambda folder: folder.mkdir(), "the folder has no adapter_config.json, so it is no adapter"),
    ],
)
def test_no_adapter_there(tmp_path: Path, make: Any, message: str) -> None:
    make(tmp_path / "x")
    with pytest.raises(AdapterError, match=message):
        check_adapter_folder(tmp_path / "x")


def test_whole_model_in_place_of_an_adapter(tiny_llama_dir: Path) -> None:
    with pytest.raises(AdapterError, match="holds a whole model, not an adapter"):
        check_adapter_folder(tiny_llama_dir)


def test_checkpoints_below_are_named(tmp_path: Path, adapter_good_dir: Path) -> None:
    shutil.copytree(adapter_good_dir, tmp_path / "checkpoint-10")
    with pytest.raises(AdapterError, match=r"Adapters below it: .*checkpoint-10"):
        check_adapter_folder(tmp_path)


def test_config_without_weights(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match="the adapter has no weights"):
        check_adapter_folder(adapter)


def test_adapter_of_another_kind(base: Any, adapter: Path) -> None:
    (adapter / "adapter_config.json").write_text('{"peft_type": "PREFIX_TUNING"}')
    with pytest.raises(AdapterError, match="the adapter is of kind 'PREFIX_TUNING'"):
        load_adapter(base, adapter)
