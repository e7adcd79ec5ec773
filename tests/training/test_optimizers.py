"""Optimizers besides the default: LoRA+, and those of bitsandbytes with their packed state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from small_runs import run, write_rows
from transformers import TrainingArguments

from espalier.config import RunConfig
from espalier.errors import CheckpointError, UsageError
from espalier.model.load import load_model
from espalier.training.arguments import check_optimizer
from espalier.training.step import StepOptions
from espalier.training.trainer import LoraTrainer

ROW = {"input_ids": [1, 5, 6, 7], "labels": [-100, -100, 6, 7]}


def lora_plus(tiny_llama_dir: Path, output: Path, **arguments: Any) -> LoraTrainer:
    model = load_model(tiny_llama_dir, device="cpu", dtype=torch.float32)
    args = TrainingArguments(output_dir=str(output), use_cpu=True, learning_rate=1e-3, report_to=[], **arguments)
    lora = LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"])
    return LoraTrainer(model, args, [ROW], peft_config=lora, options=StepOptions(loraplus_lr_ratio=16.0))


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*")
def test_lora_plus_rates(tiny_llama_dir: Path, tmp_path: Path) -> None:
    trainer = lora_plus(tiny_llama_dir, tmp_path, weight_decay=0.1)
    optimizer = trainer.create_optimizer()
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == 6
    for name, rate in rates.items():
        assert rate == (1.6e-2 if "lora_B" in name else 1e-3), name
    assert {g["weight_decay"] for g in optimizer.param_groups if g["params"]} == {0.1}


SETTINGS: dict[str, dict[str, Any]] = {
    "lora_plus": {"loraplus_lr_ratio": 4.0},
    "adamw_bnb_8bit": {"optim": "adamw_bnb_8bit", "lora_rank": 160},  # of few numbers its state has 32 bits
    "lion_8bit": {"optim": "lion_8bit", "lora_rank": 160, "learning_rate": 1e-3},
    "both": {"optim": "adamw_bnb_8bit", "lora_rank": 160, "loraplus_lr_ratio": 4.0},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_resumed_to_the_bit(name: str, tmp_path: Path, tiny_llama_dir: Path) -> None:
    settings = SETTINGS[name]
    if "optim" in settings:
        pytest.importorskip("bitsandbytes")
    rows, out = write_rows(tmp_path / "rows.jsonl"), tmp_path / "out"
    run(tiny_llama_dir, rows, out, max_steps=4, save_steps=2, **settings)
    finished = load_file(out / "adapter_model.safetensors")
    if "optim" in settings:
        state = load_file(out / "checkpoint-4" / "optimizer.safetensors")
        dtypes = [t.dtype for key, t in state.items() if key.endswith(".state1")]
        assert dtypes.count(torch.uint8) > len(dtypes) / 2
    (out / "checkpoint-4").rename(tmp_path / "aside")
    (out / "adapter_model.safetensors").unlink()
    run(tiny_llama_dir, rows, out, max_steps=4, save_steps=2, resume_from_checkpoint="last", **settings)
    again = load_file(out / "adapter_model.safetensors")
    assert again.keys() == finished.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in finished.items())
    if name == "lora_plus":
        with pytest.raises(CheckpointError) as caught:
            run(tiny_llama_dir, rows, out, max_steps=6, resume_from_checkpoint="last", loraplus_lr_ratio=8.0)
        assert "--loraplus_lr_ratio: 4.0 -> 8.0" in caught.value.details


def test_lora_plus_is_another_run(tmp_path: Path, tiny_llama_dir: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    found = {}
    for ratio in (None, 1.0, 4.0):
        run(tiny_llama_dir, rows, tmp_path / str(ratio), max_steps=2, loraplus_lr_ratio=ratio)
        found[ratio] = load_file(tmp_path / str(ratio) / "adapter_model.safetensors")
    assert all(torch.allclose(found[1.0][key], tensor, atol=1e-7) for key, tensor in found[None].items())
    changed = [key for key, tensor in found[None].items() if not torch.allclose(found[4.0][key], tensor, atol=1e-4)]
    assert any("lora_B" in key for key in changed)


def test_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="no optimizer 'adamw_8bits'") as caught:
        check_optimizer(RunConfig(optim="adamw_8bits"))
    assert "adamw_8bit" in caught.value.todo
    pytest.importorskip("bitsandbytes")
    with pytest.raises(UsageError, match="there is no GPU") as caught:
        check_optimizer(RunConfig(optim="paged_adamw_8bit", use_cpu=True))
    assert caught.value.todo == "Use adamw_bnb_8bit."
    check_optimizer(RunConfig(optim="adamw_bnb_8bit", use_cpu=True))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="bitsandbytes is not installed"):
        check_optimizer(RunConfig(optim="adamw_bnb_8bit"))
    check_optimizer(RunConfig())


def test_a_ratio_must_be_positive(tmp_path: Path, tiny_llama_dir: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    with pytest.raises(UsageError) as caught:
        run(tiny_llama_dir, rows, tmp_path / "out", loraplus_lr_ratio=0.0)
    assert "--loraplus_lr_ratio: 0.0 is not above 0" in caught.value.details
