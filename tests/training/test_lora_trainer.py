"""LoraTrainer as a library class: what TRL's SFTTrainer takes, it takes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from espalier import LoraTrainer
from espalier.errors import DataError, UsageError

PAIRS = [("say pear", "pear"), ("say fig twice", "fig fig"), ("say plum", "plum plum plum")]
SHAPES: dict[str, list[dict[str, Any]]] = {
    "prompt-completion": [{"prompt": p, "completion": c} for p, c in PAIRS],
    "conversational": [
        {"prompt": [{"role": "user", "content": p}], "completion": [{"role": "assistant", "content": c}]}
        for p, c in PAIRS
    ],
    "messages": [{"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": c}]} for p, c in PAIRS],
    "alpaca": [{"instruction": p, "input": "", "output": c} for p, c in PAIRS],
}


def trainer(model_dir: Path, out: Path, rows: Any, **options: Any) -> LoraTrainer:
    args = TrainingArguments(
        output_dir=str(out), per_device_train_batch_size=2, num_train_epochs=1, use_cpu=True, disable_tqdm=True,
        save_strategy="no", logging_steps=1,
    )  # fmt: skip
    settings: dict[str, Any] = {
        "model": AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32),
        "args": args,
        "train_dataset": rows,
        "processing_class": AutoTokenizer.from_pretrained(model_dir),
        "peft_config": LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"]),
    }
    return LoraTrainer(**{**settings, **options})


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("container", [list, Dataset.from_list])
def test_same_rows_in_every_shape(shape: str, container: Any, tmp_path: Path, tiny_llama_dir: Path) -> None:
    made = trainer(tiny_llama_dir, tmp_path / "out", container(SHAPES[shape]))
    expected = trainer(tiny_llama_dir, tmp_path / "out", SHAPES["messages"])
    assert len(made.train_dataset) == 3
    for row, other in zip(made.train_dataset, expected.train_dataset, strict=True):
        assert row.input_ids.tolist() == other.input_ids.tolist()
        assert row.labels.tolist() == other.labels.tolist()
    answer = made.train_dataset[1].labels
    text = made.processing_class.decode(answer[answer >= 0], skip_special_tokens=False)
    assert text == " fig fig</s>"  # the template's generation prompt ends with a colon: the blank is the answer's


def test_it_trains_saves_and_loads_with_peft_alone(tmp_path: Path, tiny_llama_dir: Path) -> None:
    made = trainer(tiny_llama_dir, tmp_path / "out", SHAPES["messages"], eval_dataset=SHAPES["messages"][:1])
    result = made.train()
    assert result.global_step == 2
    metrics = made.evaluate()
    assert set(metrics) >= {"eval_loss", "eval_perplexity", "eval_token_accuracy"}
    made.save_model()
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.suffix in (".bin", ".pt", ".pth")) == []
    base = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    ids = torch.tensor([made.train_dataset[0].input_ids.tolist()])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, made.model.eval()(ids).logits, rtol=0, atol=1e-5)
    with loaded.disable_adapter(), torch.no_grad():
        base_logits = loaded(ids).logits
    with torch.no_grad():
        assert not torch.equal(loaded(ids).logits, base_logits)


def test_the_users_arguments_are_not_changed(tmp_path: Path, tiny_llama_dir: Path) -> None:
    args = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=3, save_total_limit=1,
        use_cpu=True,
    )  # fmt: skip
    made = trainer(tiny_llama_dir, tmp_path, SHAPES["messages"], args=args)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps, args.save_total_limit) == (2, 3, 1)
    assert made.rows_per_step == 6


def test_refusals(tmp_path: Path, tiny_llama_dir: Path) -> None:
    with pytest.raises(UsageError, match="LoraTrainer trains an adapter"):
        trainer(tiny_llama_dir, tmp_path, SHAPES["messages"], peft_config=None)
    with pytest.raises(DataError, match="the dataset is empty"):
        trainer(tiny_llama_dir, tmp_path, [])
    with pytest.raises(DataError) as error:
        trainer(tiny_llama_dir, tmp_path, [*SHAPES["alpaca"], {"instruction": "a", "output": ""}])
    assert "train_dataset:4" in str(error.value)
    adapted = trainer(tiny_llama_dir, tmp_path, SHAPES["messages"]).model
    with pytest.raises(UsageError, match="the model has an adapter already"):
        trainer(tiny_llama_dir, tmp_path, SHAPES["messages"], model=adapted)


def test_rows_that_are_tokens_already(tmp_path: Path, tiny_llama_dir: Path) -> None:
    rows = [{"input_ids": [5, 6, 7, 0], "labels": [5, -100, 7, -100], "attention_mask": [1, 1, 1, 0]}]
    made = trainer(tiny_llama_dir, tmp_path, rows)
    assert made.train_dataset[0].input_ids.tolist() == [5, 6, 7]
    assert made.train_dataset[0].labels.tolist() == [-100, -100, 7]
    with pytest.raises(DataError, match="no token of this row has a label"):
        trainer(tiny_llama_dir, tmp_path, [{"input_ids": [5, 6], "labels": [-100, -100]}])


def test_rows_left_out_are_listed_in_the_runs_folder(tmp_path: Path, tiny_llama_dir: Path) -> None:
    """--on_bad_row skip, on the rows of case A08."""
    from small_runs import run

    data = Path(__file__).parent.parent / "cases" / "A08_null_empty" / "train.jsonl"
    _, said = run(tiny_llama_dir, data, tmp_path / "out", max_steps=1, on_bad_row="skip")
    assert "8 read, 3 kept, 5 left out" in said
    assert "the rows left out are listed in left_out.jsonl" in said
    listed = [json.loads(line) for line in (tmp_path / "out" / "left_out.jsonl").read_text().splitlines()]
    assert [row["line"] for row in listed] == [3, 4, 5, 7, 8]
    assert all(row["reason"] and row["text"].startswith("{") and row["file"] == str(data) for row in listed)
    with pytest.raises(DataError, match="A08_null_empty"):
        run(tiny_llama_dir, data, tmp_path / "strict", max_steps=1)
    assert not (tmp_path / "strict").exists()


def test_the_end_of_a_run_says_what_verify_finds(tmp_path: Path, tiny_llama_dir: Path) -> None:
    from small_runs import run, write_rows

    _, text = run(tiny_llama_dir, write_rows(tmp_path / "rows.jsonl"), tmp_path / "r", lora_rank=32)
    lines = text.rstrip().splitlines()
    assert lines[-3] == "note: vLLM: rank 32 is over its default limit of 16, so the limit is set"
    checked = r"checked: \d of 4 likeliest next tokens differ from the base's; largest logit difference [\d.e-]+; "
    assert re.fullmatch(checked + f"who serves it, by which command: espalier verify {tmp_path / 'r'}", lines[-2])
    assert lines[-1] == f"try it: espalier chat --adapter {tmp_path / 'r'}"


def test_a_check_that_fails_does_not_end_the_run(
    tmp_path: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from small_runs import run, write_rows

    from espalier.errors import ModelError
    from espalier.use import verify

    def broken(*_: Any) -> None:
        raise ModelError("its tokenizer cannot be loaded")

    monkeypatch.setattr(verify, "verify_trained", broken)
    _, text = run(tiny_llama_dir, write_rows(tmp_path / "rows.jsonl"), tmp_path / "r")
    said = "warning: the finished adapter could not be checked: its tokenizer cannot be loaded"
    assert text.rstrip().splitlines()[-2] == said
