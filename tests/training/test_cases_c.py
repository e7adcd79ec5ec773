"""Every case of group (c): training, saving, resuming. A case stands for its kind.

| case | where |
|---|---|
| C03, C04, C06, C08, C09, C12, C13, C15, C18-C23, C25-C27 | here |
| C05, C16, C24 | reliability/test_changed_settings.py: rows left, checkpoints of another run, nothing left to do |
| C07 | reliability/test_numbers.py; here: rows without a label |
| C10 | model/test_load.py: test_quantised_base_that_cannot_be_trained |
| C11, C14, C17, also C13, C16, C26 | test_resume.py; C11 also reliability/test_kills.py |
| C18, C19 when loading | model/test_load_adapter.py |
| C23 with each part of the key | encode/test_store.py: test_cache_is_not_used_for_anything_else |
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from small_runs import log_of, run, write_rows
from transformers import AutoTokenizer, TrainingArguments

from espalier import LoraTrainer, train
from espalier.config import RunConfig
from espalier.encode.encode import Encoded
from espalier.errors import AdapterError, CheckpointError, DataError, UsageError
from espalier.model.load import load_config, load_model
from espalier.model.load_adapter import load_adapter
from espalier.model.lora import add_adapter, check_targets, describe_adapter, empty_model, lora_config
from espalier.runfile import build_config
from espalier.training.arguments import training_arguments
from espalier.training.checkpoint_files import load_random, plain_random, random_state, save_random
from espalier.training.prepare import count_steps
from espalier.training.readback import check_forward, read_back
from espalier.training.step import StepCollator, StepOptions

ADAPTER = "adapter_model.safetensors"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl")


def trainer_for(model: Any, data: Any, out: Path, tokenizer: Any = None, **options: Any) -> LoraTrainer:
    settings = {
        "per_device_train_batch_size": 4,
        "max_steps": 1,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
    }
    return LoraTrainer(
        model=model,
        args=TrainingArguments(output_dir=str(out), **{**settings, **options}),
        train_dataset=data,
        processing_class=tokenizer,
    )


def adapted(folder: Path, **options: Any) -> Any:
    torch.manual_seed(0)
    base = load_model(folder, device="cpu", dtype=options.pop("dtype", torch.float32))
    return add_adapter(base, lora_config(**{"rank": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj"], **options}))


# ---- C03 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("a_none_match", ["'c_attn' matches nothing", "'W_pack' matches nothing", "q_proj k_proj v_proj o_proj"]),
        ("b_some_match", ["'v_porj' matches nothing: did you mean v_proj?"]),
        ("c_fused_model", ["'q_proj' matches nothing", "'k_proj'", "'v_proj'", "qkv_proj"]),
        ("e_one_layer", ["layer 5 does not exist: layers are 0-1"]),
    ],
)
def test_c03_targets_that_match_nothing(setting: str, words: list[str], cases: Path, shared: Path) -> None:
    given = json.loads((cases / "C03_target_modules" / "configs.json").read_text())[setting]
    skeleton = empty_model(load_config(shared / given["model"]))
    with pytest.raises(UsageError) as error:
        check_targets(skeleton, given["target_modules"], given.get("layers_to_transform", ()))
    for word in words:
        assert word in str(error.value)


def test_c03_all_linear_counts_modules(shared: Path) -> None:
    report = describe_adapter(adapted(shared / "tiny-phi3", target_modules=["all-linear"]))
    assert sum(report.modules.values()) == 8
    assert report.num_trainable == 2944
    assert "qkv_proj x2" in str(report)


# ---- C04 -------------------------------------------------------------------------------------------------------------


def test_c04_generation_config_is_repaired_before_step_1(
    cases: Path, tiny_llama_dir: Path, rows: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(tiny_llama_dir, tmp_path / "base"))
    shutil.copyfile(
        cases / "C04_unsavable_generation_config" / "generation_config.json", base / "generation_config.json"
    )
    _, said = run(base, rows, tmp_path / "out", max_steps=1)
    assert said.count("generation config: dropped temperature=0.9, top_p=0.6") == 1
    saved = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert not {"temperature", "top_p"} & saved.keys()
    assert (tmp_path / "out" / "checkpoint-1" / "generation_config.json").is_file()


def test_c04_saving_is_tried_before_step_1(
    tiny_llama_dir: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from espalier.training import checkpoint_files

    def refuse(*arguments: Any) -> None:
        raise OSError(30, "Read-only file system")

    steps = []
    step = LoraTrainer.training_step
    monkeypatch.setattr(LoraTrainer, "training_step", lambda self, *a: (steps.append(1), step(self, *a))[1])
    monkeypatch.setattr(checkpoint_files, "save_optimizer", refuse)
    with pytest.raises(Exception, match="could not be saved, tried before step 1: Read-only file system"):
        run(tiny_llama_dir, rows, tmp_path / "out", max_steps=1)
    assert steps == []
    assert not (tmp_path / "out").exists()


def test_c04_a_metric_that_does_not_exist_is_found_out_before_step_1(
    tiny_llama_dir: Path, rows: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as error:
        run(
            tiny_llama_dir, rows, tmp_path / "out", max_steps=2, metric_for_best_model="rouge", eval_fraction=0.3,
            eval_strategy="steps", eval_steps=1, save_steps=1, load_best_model_at_end=True,
        )  # fmt: skip
    assert error.value.what == "'rouge' is no result of an evaluation"
    assert "loss, perplexity, token_accuracy" in str(error.value.todo)


# ---- C06, C07, C08, C09 ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_c06_the_adapter_is_float32_whatever_the_base(dtype: torch.dtype, tiny_llama_dir: Path) -> None:
    model = adapted(tiny_llama_dir, dtype=dtype)
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert trainable
    assert {p.dtype for p in trainable} == {torch.float32}


def test_c06_modules_trained_in_full_need_a_float32_base(tiny_llama_dir: Path, rows: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="modules that are trained in full need a float32 base"):
        run(tiny_llama_dir, rows, tmp_path / "out", fp32=False, bf16=True, max_steps=1, modules_to_save=["lm_head"])


def test_c07_a_row_without_a_label_never_reaches_the_model(tiny_llama_dir: Path, tmp_path: Path) -> None:
    data = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [1, 2, 3], "labels": [-100] * 3}]
    with pytest.raises(DataError, match="no token of this row has a label") as error:
        trainer_for(adapted(tiny_llama_dir), data, tmp_path)
    assert error.value.where == "train_dataset:2"


def test_c08_recomputation_gives_every_lora_b_its_gradient(tiny_llama_dir: Path, tmp_path: Path) -> None:
    data = [{"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, 7, 8, 9]}] * 4
    found = []
    for recompute in (False, True):
        model = adapted(tiny_llama_dir)
        trainer = trainer_for(model, data, tmp_path)
        if recompute:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        trainer.training_step(model, next(iter(trainer.get_train_dataloader())))
        gradients = {n: p.grad for n, p in model.named_parameters() if "lora_B" in n}
        assert len(gradients) == 4
        assert all(g is not None and g.abs().max() > 0 for g in gradients.values())
        found.append(gradients)
    for name, plain in found[0].items():
        torch.testing.assert_close(found[1][name], plain, rtol=0, atol=1e-6)


def test_c09_training_one_of_two_tied_tables_is_said(shared: Path, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    _, said = run(shared / "tiny-llama-tied", rows, out, max_steps=1, modules_to_save=["lm_head"])
    assert "warning: lm_head and the embeddings are one tensor in this base" in said
    _, said = run(shared / "tiny-llama-tied", rows, tmp_path / "plain", max_steps=1)
    assert "one tensor" not in said
    base = load_model(shared / "tiny-llama-tied", device="cpu", dtype=torch.float32)
    load_adapter(base, out)  # it can be used again


# ---- C12, C13, C15 ---------------------------------------------------------------------------------------------------


def test_c12_a_loaded_adapter_goes_on_learning(
    tiny_llama_dir: Path, adapter_good_dir: Path, rows: Path, tmp_path: Path
) -> None:
    options = {"continue_training": True, "checkpoint": str(adapter_good_dir), "max_steps": 1}
    _, said = run(tiny_llama_dir, rows, tmp_path / "out", **options)
    assert "896 trainable numbers" in said
    before, after = (load_file(str(f / ADAPTER)) for f in (adapter_good_dir, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert all(name.count("base_model.model.") == 1 for name in after)


def test_a_run_that_started_from_an_adapter_can_be_resumed(
    tiny_llama_dir: Path, adapter_good_dir: Path, rows: Path, tmp_path: Path
) -> None:
    """By its own run file, which says continue_training: bit for bit the uninterrupted run."""
    options = {
        "continue_training": True, "checkpoint": str(adapter_good_dir), "lr_scheduler_type": "constant",
        "use_cpu": True,
        "dataset_path": [str(rows)], "model_path": str(tiny_llama_dir), "fp32": True, "per_device_train_batch_size": 2,
    }  # fmt: skip
    train(build_config({**options, "max_steps": 4, "output_dir": str(tmp_path / "whole")}))
    train(build_config({**options, "max_steps": 2, "output_dir": str(tmp_path / "part")}))
    train(build_config({"resume_from_checkpoint": "last", "max_steps": 4}, str(tmp_path / "part" / "run.yaml")))
    assert (tmp_path / "whole" / ADAPTER).read_bytes() == (tmp_path / "part" / ADAPTER).read_bytes()
    with pytest.raises(UsageError, match="--continue_training starts a new run"):
        build_config({**options, "resume_from_checkpoint": "last"})


def test_c13_a_second_wrap_is_refused(tiny_llama_dir: Path, rows: Path, tmp_path: Path) -> None:
    data = [json.loads(line) for line in rows.read_text().splitlines()]
    with pytest.raises(UsageError, match="peft_config would wrap it again"):
        LoraTrainer(
            model=adapted(tiny_llama_dir),
            args=TrainingArguments(output_dir=str(tmp_path / "t"), use_cpu=True),
            train_dataset=data,
            processing_class=AutoTokenizer.from_pretrained(tiny_llama_dir),
            peft_config=LoraConfig(r=4),
        )


@pytest.mark.parametrize("spoil", ["missing", "cut", "other"])
def test_c15_random_states_are_plain_and_never_skipped(spoil: str, tmp_path: Path) -> None:
    save_random([plain_random(random_state())], tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["random.json", "random.safetensors"]
    before = random_state()["torch"]
    assert torch.equal(load_random(tmp_path)["torch"], before)
    file = tmp_path / "random.safetensors"
    if spoil == "missing":
        file.unlink()
    elif spoil == "cut":
        file.write_bytes(file.read_bytes()[:50])
    else:
        save_file({"torch": before}, str(file))
    with pytest.raises(CheckpointError, match="its random states cannot be read"):
        load_random(tmp_path)


# ---- C18, C19 --------------------------------------------------------------------------------------------------------


def rewritten(folder: Path, change: Any) -> None:
    save_file(change(load_file(str(folder / ADAPTER))), str(folder / ADAPTER))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: {}, "it holds 0 of 8 tensors"),
        (lambda tensors: dict(list(tensors.items())[1:]), "is missing"),
        (
            lambda tensors: {k.replace("model.model.", "model._orig_mod.model."): t for k, t in tensors.items()},
            "prefix",
        ),
        (lambda tensors: {k: t + 1 for k, t in tensors.items()}, "differs from the trained tensor"),
        (lambda tensors: {k: t * float("nan") for k, t in tensors.items()}, "differs from the trained tensor"),
    ],
)
def test_c18_c19_what_was_saved_is_read_back(change: Any, words: str, tiny_llama_dir: Path, tmp_path: Path) -> None:
    model = adapted(tiny_llama_dir)
    model.save_pretrained(str(tmp_path))
    read_back(model, tmp_path)
    rewritten(tmp_path, change)
    with pytest.raises(AdapterError) as error:
        read_back(model, tmp_path)
    assert words in str(error.value)


def test_c18_one_forward_of_the_file_equals_the_live_model(tiny_llama_dir: Path, tmp_path: Path) -> None:
    model = adapted(tiny_llama_dir)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(str(tmp_path))
    live = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    check_forward(model, tmp_path, np.array([5, 6, 7, 8]))
    assert all(torch.equal(p, live[n]) for n, p in model.named_parameters() if p.requires_grad)
    rewritten(tmp_path, lambda tensors: {k: t * 1.01 for k, t in tensors.items()})
    with pytest.raises(AdapterError, match="the saved adapter does not compute what the trained one did"):
        check_forward(model, tmp_path, np.array([5, 6, 7, 8]))


def test_c18_an_adapter_without_effect_is_an_error(tiny_llama_dir: Path, rows: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="every lora_B is zero after training"):
        run(tiny_llama_dir, rows, tmp_path / "out", max_steps=1, learning_rate=0.0)


# ---- C20, C21, C22 ---------------------------------------------------------------------------------------------------


def test_c20_the_evaluation_is_a_mean_over_tokens_and_keeps_no_logits(
    tiny_llama_dir: Path, rows: Path, tmp_path: Path
) -> None:
    losses = []
    for size in (None, 1, 3):
        out = tmp_path / f"out-{size}"
        run(
            tiny_llama_dir, rows, out, max_steps=1, eval_dataset_path=[str(rows)], eval_strategy="steps", eval_steps=1,
            per_device_eval_batch_size=size,
        )  # fmt: skip
        entry = log_of(out)[-1]
        losses.append(entry["eval_loss"])
        assert entry["eval_supervised_tokens"] == log_of(tmp_path / "out-None")[-1]["eval_supervised_tokens"]
    assert losses[1:] == pytest.approx([losses[0]] * 2, abs=1e-5)
    assert training_arguments(RunConfig(output_dir="o")).per_device_eval_batch_size == 16  # as in training


def test_c21_further_columns_and_wrapped_signatures_do_no_harm(tiny_llama_dir: Path, tmp_path: Path) -> None:
    data = [{"prompt": f"say {n}", "completion": "fig", "id": n, "source": "web"} for n in range(4)]
    trainer = trainer_for(adapted(tiny_llama_dir), data, tmp_path, AutoTokenizer.from_pretrained(tiny_llama_dir))
    batch = next(iter(trainer.get_train_dataloader()))
    assert len(batch.rows) == 4
    assert all(isinstance(row, Encoded) for row in batch.rows)
    trainer.train()
    assert trainer.state.global_step == 1


def test_c22_tiny_data_and_long_warm_ups() -> None:
    said: list[str] = []
    three = RunConfig(per_device_train_batch_size=1, gradient_accumulation_steps=4, num_train_epochs=1.0)
    assert count_steps(three, 3, lambda topic, text: said.append(text)) == 1
    assert said[-1].startswith("1 (1 epochs x 1) of 3 rows (1 x accumulation 4)")
    both = RunConfig(per_device_train_batch_size=1, max_steps=5, num_train_epochs=3.0)
    assert count_steps(both, 3, lambda topic, text: said.append(text)) == 5
    assert "the smaller of --max_steps 5 and 3 epochs x 3" in said[-1]
    long = RunConfig(per_device_train_batch_size=1, max_steps=14, warmup_steps=100.0)
    assert count_steps(long, 3, lambda topic, text: said.append(text)) == 14
    assert said[-1] == "warning: the warm-up of 100 steps is as long as the run: the learning rate is never reached"


# ---- C23, C25, C26, C27 ----------------------------------------------------------------------------------------------


def test_c23_one_letter_of_the_data_is_noticed(tiny_llama_dir: Path, rows: Path, tmp_path: Path) -> None:
    """Same file name, size and time of change."""
    prints = []
    time = os.stat(rows).st_mtime_ns
    for letter in "pq":
        rows.write_text(rows.read_text().replace("say pear", f"say {letter}ear"))
        os.utime(rows, ns=(time, time))
        run(tiny_llama_dir, rows, tmp_path / letter, max_steps=1)
        prints.append(json.loads((tmp_path / letter / "espalier.json").read_text())["data"])
    assert prints[0]["files"][0]["bytes"] == prints[1]["files"][0]["bytes"]
    assert prints[0]["fingerprint"] != prints[1]["fingerprint"]


def test_c25_no_prompt_and_no_network(
    tiny_llama_dir: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **named: Any) -> Any:
        raise AssertionError("a run without trackers asked for the network or the user")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("builtins.input", refuse)
    monkeypatch.setattr("sys.stdin", None)
    run(tiny_llama_dir, rows, tmp_path / "out", max_steps=1)
    assert training_arguments(RunConfig(output_dir="o")).report_to == []


def test_c26_what_goes_to_a_worker_can_be_pickled(tiny_llama_dir: Path, rows: Path, tmp_path: Path) -> None:
    data = [json.loads(line) for line in rows.read_text().splitlines()]
    trainer = trainer_for(adapted(tiny_llama_dir), data, tmp_path, AutoTokenizer.from_pretrained(tiny_llama_dir))
    collator = pickle.loads(pickle.dumps(StepCollator(StepOptions(), 4)))
    dataset = pickle.loads(pickle.dumps(trainer.train_dataset))
    ours, theirs = collator([dataset[i] for i in range(4)]), trainer.data_collator(trainer.train_dataset[:4])
    assert ours.unique_tokens == theirs.unique_tokens
    assert [row.line for row in ours.rows] == [row.line for row in theirs.rows]
    assert RunConfig().dataloader_num_workers == 0


def test_c27_what_is_left_out_is_counted_by_reason(cases: Path, tiny_llama_dir: Path, tmp_path: Path) -> None:
    files = [str(cases / name / "train.jsonl") for name in ("A07_misspelt", "A08_null_empty")]
    with pytest.raises(DataError, match="9 of 13 rows cannot be used") as error:
        run(tiny_llama_dir, Path("unused"), tmp_path / "out", dataset_path=files, max_steps=1)
    assert any(":2: key 'instrution': did you mean 'instruction'?" in line for line in error.value.details)
    _, said = run(tiny_llama_dir, Path("unused"), tmp_path / "out", dataset_path=files, max_steps=1, on_bad_row="skip")
    assert "13 read, 4 kept, 9 left out" in said
    assert f"{files[1]}:3, 4, 5, 8: no answer" in said
