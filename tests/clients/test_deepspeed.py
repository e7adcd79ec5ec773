"""ZeRO stage 2 and 3 train what one process trains: in an environment with DeepSpeed, which ours does not need."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import ADAPTER, MODEL, assert_same_run, log_of, processes_of, settings, torchrun
from peft import PeftModel
from test_equality import EVALUATION, write_rows
from test_failures import exit_codes
from transformers import AutoModelForCausalLM

from espalier.training.run import train

pytestmark = pytest.mark.clients
STAGES = (2, 3)
# Rows of each step: 8. Of 33 rows, the last step of an epoch is a single one: a rank has none then.
KINDS: dict[str, dict[str, Any]] = {
    "packs": {
        "max_tokens_per_pack": 48,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "self_check": "on",
    },
    "padded rows": {"tree": "off", "gradient_checkpointing": True, **EVALUATION},
    "head and LoRA+": {"target_modules": ["all-linear", "lm_head"], "loraplus_lr_ratio": 4.0, "max_grad_norm": 0.0},
}
RESUMED = {"lr_scheduler_type": "constant", "save_steps": 4, "lora_dropout": 0.1}
SKIPPED = {"on_nonfinite": "skip"}
NAN = {"kind": "nan", "rank": 1, "step": 3}


@pytest.fixture(scope="session")
def python(client_python: Any) -> Path:
    """With the versions that run here, so that a difference is DeepSpeed's."""
    same = [f"{name}=={version(name).split('+')[0]}" for name in ("torch", "transformers", "peft", "safetensors")]
    others = ("accelerate", "filelock", "gguf", "jinja2", "numpy", "pyarrow", "PyYAML", "rich", "typer", "zstandard")
    found: Path = client_python("deepspeed", *same, *others, "deepspeed>=0.19.8")
    return found


@pytest.fixture(scope="session")
def runs(python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of runs: one-<kind> in one process, <stage>-<kind> in two; all of the latter in one torchrun."""
    folder = tmp_path_factory.mktemp("deepspeed")
    rows = write_rows(folder / "rows.jsonl")
    entries: list[dict[str, Any]] = []

    def add(name: str, stage: int | None = None, fault: dict[str, Any] | None = None, **options: Any) -> None:
        file = None if stage is None else str(folder / f"zero-{stage}.json")
        entries.append({"options": settings(rows, folder / name, deepspeed=file, **options), "fault": fault})

    for stage in STAGES:
        # Without a threshold below which parameters stay whole: all of these are small.
        more = {"stage3_param_persistence_threshold": 0} if stage == 3 else {"overlap_comm": False}
        zero = {"zero_optimization": {"stage": stage, **more}, "train_batch_size": "auto"}
        (folder / f"zero-{stage}.json").write_text(json.dumps(zero), encoding="utf-8")
        for kind, options in KINDS.items():
            add(f"{stage}-{kind}", stage, **options)
        add(f"{stage}-whole", stage, **RESUMED)
        add(f"{stage}-resumed", stage, **{**RESUMED, "max_steps": 6})
        add(f"{stage}-resumed", stage, **RESUMED, resume_from_checkpoint="last")
        add(f"{stage}-skipped", stage, NAN, **SKIPPED)
    add("none-skipped", None, NAN, **SKIPPED)
    mixed = {"lr_scheduler_type": "constant"}
    for last, (stage, steps) in enumerate([(None, 3), (2, 6), (3, 8), (None, 10)]):
        add("mixed", stage, **mixed, max_steps=steps, resume_from_checkpoint="last" if last else None)
    for kind, options in {**KINDS, "mixed": mixed}.items():
        rows_a_micro_step = 2 * options.get("per_device_train_batch_size", 4)
        one = {**options, "per_device_train_batch_size": rows_a_micro_step}
        train(**settings(rows, folder / f"one-{kind}", **one))
    done = torchrun(folder, entries, python=python, timeout=900)
    assert done.returncode == 0, done.stdout
    (folder / "said").write_text(done.stdout, encoding="utf-8")
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", STAGES)
def test_zero_matches_one_process(stage: int, kind: str, runs: Path) -> None:
    assert_same_run(runs / f"one-{kind}", runs / f"{stage}-{kind}")


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_is_the_whole_run_bit_for_bit(stage: int, runs: Path) -> None:
    whole, resumed = (log_of(runs / f"{stage}-{name}") for name in ("whole", "resumed"))
    assert [(a["loss"], a["grad_norm"]) for a in whole] == [(b["loss"], b["grad_norm"]) for b in resumed]
    assert len(whole) == 10
    assert (runs / f"{stage}-whole" / ADAPTER).read_bytes() == (runs / f"{stage}-resumed" / ADAPTER).read_bytes()
    for name in ("optimizer.safetensors", ADAPTER):
        files = [runs / f"{stage}-{run}" / "checkpoint-8" / name for run in ("whole", "resumed")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_checkpoints_are_the_same_with_and_without_zero(runs: Path) -> None:
    """Without, stage 2, stage 3, without: each goes on from the checkpoint of the one before."""
    assert_same_run(runs / "one-mixed", runs / "mixed")


@pytest.mark.parametrize("stage", STAGES)
def test_a_skipped_step_leaves_no_trace(stage: int, runs: Path) -> None:
    """That of a loss which is not a number: the other rank's gradients of the step are forgotten too."""
    assert_same_run(runs / "none-skipped", runs / f"{stage}-skipped")
    assert [entry["step"] for entry in log_of(runs / f"{stage}-skipped") if entry.get("nonfinite_steps")] == [3]


def test_one_rank_speaks_and_says_what_lies_in_pieces(runs: Path) -> None:
    said = (runs / "said").read_text(encoding="utf-8")
    assert said.count("2 layers of 0.1 MB, the adapter, optimizer state and gradients of the adapter in 2 pieces") == 8
    assert said.count("ZeRO stage 2)") == 8
    assert said.count("self-check on ") == 2
    assert "deepspeed_shm" not in said
    assert "[WARNING]" not in said


@pytest.mark.parametrize("stage", STAGES)
def test_the_adapter_loads_in_peft_alone(stage: int, runs: Path) -> None:
    logits = []
    for name in ("one-packs", f"{stage}-packs"):
        base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, runs / name).eval()
        with torch.no_grad():
            logits.append(model(input_ids=torch.arange(1, 9)[None]).logits)
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_one_rank_fails_and_all_stop(stage: int, python: Path, runs: Path, tmp_path: Path) -> None:
    """In the middle of a step, where the other rank waits for this one's gradients or weights."""
    options = settings(runs / "rows.jsonl", tmp_path / "out", deepspeed=str(runs / f"zero-{stage}.json"), save_steps=2)
    fault = {"kind": "error", "rank": 1, "step": 3}
    done = torchrun(tmp_path, [{"options": options, "fault": fault}], python=python)
    assert done.returncode != 0
    assert done.stdout.count("error: ") == 1, done.stdout
    assert "error: rank 1, rows.jsonl:7: the row cannot be used" in done.stdout
    codes = exit_codes(done.stdout)
    # Stage 3: torch aborts the rank that has failed once its message is out, over a gather that is under way.
    assert codes in ([2, 2], [2, -6]) if stage == 3 else codes == [2, 2], done.stdout
    assert processes_of(tmp_path) == []
    assert (tmp_path / "out" / "checkpoint-2").is_dir()
