"""The run's losses against a loop over plain PyTorch and PEFT, and against the curve that the repository holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small_runs import log_of, run, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from espalier.training.step import StepSampler

STEPS = 20
GOLDEN = Path(__file__).parent.parent / "golden" / "loss_curve.json"


def plain_losses(model_dir: Path, rows: Path) -> list[float]:
    """The same training by hand: padded batches, full logits, AdamW, a linear schedule."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    data = [json.loads(line) for line in rows.read_text().splitlines()]
    set_seed(42)
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=32, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    losses: list[float] = []
    sampler = StepSampler(len(data), 4, 42)
    while len(losses) < STEPS:
        for step in sampler:
            prompts, texts = [], []
            for i in step:
                user = [{"role": "user", "content": data[i]["instruction"]}]
                answer = [{"role": "assistant", "content": data[i]["output"]}]
                prompts.append(tokenizer.apply_chat_template(user, add_generation_prompt=True, return_dict=False))
                texts.append(tokenizer.apply_chat_template(user + answer, return_dict=False))
            end = tokenizer.eos_token_id  # the turn's end; what the template writes after it is not learnt
            texts = [ids[: len(ids) - ids[::-1].index(end)] for ids in texts]
            width = max(map(len, texts))
            ids = torch.tensor([t + [0] * (width - len(t)) for t in texts])
            labels = torch.tensor(
                [[-100] * len(p) + t[len(p) :] + [-100] * (width - len(t)) for p, t in zip(prompts, texts, strict=True)]
            )
            mask = torch.tensor([[1] * len(t) + [0] * (width - len(t)) for t in texts])
            logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 * (STEPS - len(losses)) / STEPS
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if len(losses) == STEPS:
                break
        sampler.set_epoch(sampler.epoch + 1)
    return losses


@pytest.mark.parametrize("tree", ["on", "off"])
def test_losses_match_plain_loop(tree: str, tmp_path: Path, tiny_llama_dir: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    run(tiny_llama_dir, rows, tmp_path / "out", max_steps=STEPS, tree=tree)
    ours = [entry["loss"] for entry in log_of(tmp_path / "out")]
    plain = plain_losses(tiny_llama_dir, rows)
    assert len(ours) == STEPS
    assert ours == pytest.approx(plain, abs=1e-5)
    assert ours[-1] < ours[0] - 1  # it did learn: the comparison is not of two idle runs


def test_golden_loss_curve(tmp_path: Path, tiny_llama_dir: Path) -> None:
    """Written by scripts/write_golden.py; a change of the curve is a change for every user."""
    golden = json.loads(GOLDEN.read_text())
    rows = write_rows(tmp_path / "rows.jsonl")
    run(tiny_llama_dir, rows, tmp_path / "out", max_steps=STEPS)
    log = log_of(tmp_path / "out")
    assert [entry["step"] for entry in log] == list(range(1, STEPS + 1))
    assert [entry["loss"] for entry in log] == pytest.approx(golden["loss"], abs=2e-4)
    assert [entry["learning_rate"] for entry in log] == pytest.approx(golden["learning_rate"], rel=1e-9)
    assert [entry["supervised_tokens"] for entry in log] == golden["supervised_tokens"]


def test_a_short_run_has_a_log_line_too(tmp_path: Path, tiny_llama_dir: Path) -> None:
    result, said = run(
        tiny_llama_dir, write_rows(tmp_path / "rows.jsonl"), tmp_path / "out", max_steps=3, logging_steps=10
    )
    assert [entry["step"] for entry in log_of(tmp_path / "out")] == [3]
    assert result.metrics["loss"] == log_of(tmp_path / "out")[0]["loss"]
    assert "step 3/3  loss " in said
