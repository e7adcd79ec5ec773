"""The gradient of a step does not depend on how its rows are cut into micro-steps (design decision 5)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from small_runs import write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments, set_seed

from espalier import LoraTrainer
from espalier.training.step import StepOptions

SPLITS = [(8, 1), (4, 2), (2, 4), (1, 8)]


def gradients(model_dir: Path, rows: Path, out: Path, batch: int, accumulation: int, tree: bool) -> list[torch.Tensor]:
    """Adapter gradients of the first step, taken before clipping and update."""
    set_seed(0)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    args = TrainingArguments(
        output_dir=str(out),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        learning_rate=0.0,
        max_grad_norm=0.0,
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = LoraTrainer(
        model=model,
        args=args,
        train_dataset=[json.loads(line) for line in rows.read_text().splitlines()],
        processing_class=AutoTokenizer.from_pretrained(model_dir),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False),
        options=StepOptions(tree=tree, self_check=False),
    )
    batch_of_step = next(iter(trainer.get_train_dataloader()))
    if not tree:
        assert len(batch_of_step.parts) == accumulation
    trainer.training_step(trainer.model, batch_of_step)
    return [p.grad.clone() for p in trainer.model.parameters() if p.requires_grad]


@pytest.mark.parametrize("tree", [False, True])
def test_accumulation_matches_large_batch(tree: bool, tmp_path: Path, tiny_llama_dir: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 8)
    whole, *others = [gradients(tiny_llama_dir, rows, tmp_path / "out", b, a, tree) for b, a in SPLITS]
    assert max(float(g.abs().max()) for g in whole) > 1e-3
    for split in others:
        for one, other in zip(whole, split, strict=True):
            torch.testing.assert_close(other, one, rtol=0, atol=1e-6)
