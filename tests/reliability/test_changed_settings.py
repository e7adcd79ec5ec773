"""docs/resume.md is true: what may change between stop and resume, and what a finished run does."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from espalier.config import RunConfig, options
from espalier.errors import CheckpointError
from espalier.training.checkpoint import damage
from espalier.training.resume import MAY_CHANGE, check_record, compare_settings
from reliability.small import in_process, log_of, write_rows

PAGE = Path(__file__).parent.parent.parent / "docs" / "resume.md"
ADAPTER = "adapter_model.safetensors"
STORED = RunConfig(
    output_dir="out", lora_rank=4, per_device_train_batch_size=8, gradient_accumulation_steps=1, max_steps=10
)
CHANGES: dict[str, dict[str, Any]] = {
    "`--lora_rank`": {"lora_rank": 8},
    "`--target_modules`": {"target_modules": ["q_proj"]},
    "`--per_device_train_batch_size`, other rows a step": {"per_device_train_batch_size": 24},
    "`--per_device_train_batch_size` and `--gradient_accumulation_steps`, as many rows a step": {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
    },
    "`--seed`": {"seed": 1},
    "`--learning_rate`": {"learning_rate": 1e-3},
    "`--max_seq_length`": {"max_seq_length": 64},
    "`--num_train_epochs`": {"num_train_epochs": 5.0},
    "`--max_steps`": {"max_steps": 20},
    "`--save_steps`": {"save_steps": 7.0},
    "`--logging_steps`": {"logging_steps": 1.0},
}
RECORD: dict[str, Any] = {
    "base": {"name": "base", "fingerprint": {"weights": "a"}},
    "fingerprints": {"tokenizer": "t", "template": "c"},
    "data": {"fingerprint": "r"},
}
RECORD_CHANGES: dict[str, dict[str, Any]] = {
    "other rows in `--dataset_path`": {"data": {"fingerprint": "s"}},
    "another base in `--model_path`": {"base": {"name": "other", "fingerprint": {"weights": "b"}}},
}


def table() -> dict[str, str]:
    rows = re.findall(r"^\| (.*?) \| (refused|accepted) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) >= 12
    return dict(rows)


def test_the_page_lists_every_change_that_is_tried() -> None:
    assert table().keys() == {**CHANGES, **RECORD_CHANGES}.keys()


@pytest.mark.parametrize("change", CHANGES)
def test_settings_are_answered_as_documented(change: str, tmp_path: Path) -> None:
    given = dataclasses.replace(STORED, **CHANGES[change])
    if table()[change] == "accepted":
        compare_settings(STORED, given, tmp_path, where="run.yaml")
        return
    with pytest.raises(CheckpointError) as error:
        compare_settings(STORED, given, tmp_path, where="run.yaml")
    (name, new), *_ = CHANGES[change].items()
    assert error.value.details[0] == f"--{name}: {getattr(STORED, name)} -> {new}"


@pytest.mark.parametrize("change", RECORD_CHANGES)
def test_contents_are_answered_as_documented(change: str) -> None:
    check_record(RECORD, RECORD, where="espalier.json")
    with pytest.raises(CheckpointError) as error:
        check_record(RECORD, {**RECORD, **RECORD_CHANGES[change]}, where="espalier.json")
    assert len(error.value.details) == 1


def test_tokenizer_and_template_are_named() -> None:
    now = {**RECORD, "fingerprints": {"tokenizer": "u", "template": "d"}}
    with pytest.raises(CheckpointError) as error:
        check_record(RECORD, now, where="espalier.json")
    assert error.value.details == ("the tokenizer", "the template")


def test_the_page_lists_what_is_free_to_change() -> None:
    paragraph = PAGE.read_text(encoding="utf-8").split("Free to change: ")[1].split("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", paragraph)) == MAY_CHANGE


def test_every_option_is_decided_on_purpose() -> None:
    """An option that is added must be put on one side: this list is those that change what is trained."""
    fixed = {f.name for f in options()} - MAY_CHANGE
    assert fixed == {
        "bf16", "checkpoint", "columns", "continue_training", "encoding", "eval_dataset_path", "eval_fraction",
        "format", "fp16", "fp32", "gradient_accumulation_steps", "group_by_prefix", "init_lora_weights",
        "input_sentence", "layers_to_transform", "learning_rate", "load_in_4bit", "load_in_8bit", "lora_alpha",
        "lora_dropout", "lora_rank", "loraplus_lr_ratio", "lr_scheduler_type", "max_grad_norm", "max_seq_length",
        "modules_to_save", "optim", "overlength", "per_device_train_batch_size", "seed", "streaming",
        "streaming_window", "target_modules", "template", "train_on", "use_cpu", "use_dora", "use_rslora",
        "warmup_steps", "weight_decay",
    }  # fmt: skip


def test_c05_the_refusal_counts_in_rows(cases: Path, tmp_path: Path) -> None:
    """800 rows, stopped after 400 in steps of 8; a batch of 24 rows would make 17 steps of the rest, not 50."""
    scenario = json.loads((cases / "C05_resume_changed" / "scenario.json").read_text())
    saved, wanted = scenario["saved_with"], scenario["resume_with"]
    rows_a_step = [s["devices"] * s["per_device_batch"] * s["grad_accum"] for s in (saved, wanted)]
    assert rows_a_step == [8, 24]
    checkpoint = tmp_path / "checkpoint-50"
    checkpoint.mkdir()
    position = {"position": {"seed": 42, "epoch": 0, "rows": saved["rows_seen"]}}
    (checkpoint / "progress.json").write_text(json.dumps(position))
    (tmp_path / "espalier.json").write_text(json.dumps({"data": {"trained": scenario["rows"]}}))
    given = dataclasses.replace(STORED, per_device_train_batch_size=rows_a_step[1])
    with pytest.raises(CheckpointError) as error:
        compare_settings(STORED, given, tmp_path, where="run.yaml")
    assert error.value.details == (
        "--per_device_train_batch_size: 8 -> 24",
        "rows a step: 8 -> 24: 400 of 800 rows of epoch 1 are done, the 400 left would be 17 steps instead of 50, "
        "under another schedule: only another number of processes may change them",
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(rows, folder) of a run of 4 steps, 3 steps an epoch, with a checkpoint every second step."""
    folder = tmp_path_factory.mktemp("finished")
    rows = write_rows(folder / "rows.jsonl")
    in_process(rows, folder / "out", max_steps=4, save_steps=2)
    return rows, folder / "out"


@pytest.fixture
def out(finished: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished[1], tmp_path / "out"))


def test_c24_nothing_left_is_an_error(finished: tuple[Path, Path], out: Path) -> None:
    before = (out / ADAPTER).read_bytes()
    with pytest.raises(CheckpointError) as error:
        in_process(finished[0], out, max_steps=4, save_steps=2, resume_from_checkpoint="last")
    assert str(error.value) == (
        f"{out}: nothing is left to do: all 4 steps are done and the adapter is saved\n"
        "  Give more --num_train_epochs or --max_steps, or start a new run from its adapter with --continue_training."
    )
    assert (out / ADAPTER).read_bytes() == before


def test_killed_before_the_adapter_was_saved(finished: tuple[Path, Path], out: Path) -> None:
    """Step 4 is inside epoch 2: no step is done again or besides."""
    before = (out / ADAPTER).read_bytes()
    (out / ADAPTER).unlink()
    result, _ = in_process(finished[0], out, max_steps=4, save_steps=2, resume_from_checkpoint="last")
    assert result.num_steps == 4
    assert (out / ADAPTER).read_bytes() == before
    assert [entry["step"] for entry in log_of(out)] == [1, 2, 3, 4]


def test_accepted_changes_take_effect(finished: tuple[Path, Path], out: Path) -> None:
    """More steps, other intervals, another accumulation; checkpoints hold the adapter of their own step."""
    _, said = in_process(
        finished[0],
        out,
        max_steps=7,
        save_steps=1,
        logging_steps=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        resume_from_checkpoint="last",
    )
    assert "7 steps in all, 4 before: the learning rate follows the new plan" in said
    assert sorted(p.name for p in out.glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (2, 4, 5, 6, 7)]
    assert [entry["step"] for entry in log_of(out)] == [1, 2, 3, 4, 6, 7]
    # The rates of steps 6 and 7 of 7.
    assert [e["learning_rate"] for e in log_of(out)[-2:]] == pytest.approx([1e-2 * 2 / 7, 1e-2 / 7])
    adapters = [(out / f"checkpoint-{n}" / ADAPTER).read_bytes() for n in (4, 5, 6, 7)]
    assert len(set(adapters)) == 4
    assert adapters[-1] == (out / ADAPTER).read_bytes()


def test_position_and_fingerprints_are_in_each_checkpoint(finished: tuple[Path, Path]) -> None:
    _, folder = finished
    progress = json.loads((folder / "checkpoint-4" / "progress.json").read_text())
    assert progress["position"] == {"seed": 42, "epoch": 1, "rows": 4}
    record = json.loads((folder / "checkpoint-4" / "espalier.json").read_text())
    assert record == json.loads((folder / "espalier.json").read_text())
    assert len(record["fingerprints"]["tokenizer"]) == len(record["fingerprints"]["template"]) == 64
    assert (folder / "checkpoint-4" / "run.yaml").is_file()
    assert json.loads((folder / "checkpoint-4" / "manifest.json").read_text())["run"] == record["run"]


def test_c16_checkpoints_of_another_run_are_left_alone(finished: tuple[Path, Path], out: Path) -> None:
    foreign = out / "checkpoint-3"
    shutil.copytree(out / "checkpoint-2", foreign)
    manifest = json.loads((foreign / "manifest.json").read_text()) | {"run": "another"}
    (foreign / "manifest.json").write_text(json.dumps(manifest))
    newer = shutil.copytree(foreign, out / "checkpoint-99")
    _, said = in_process(finished[0], out, max_steps=7, save_steps=1, save_total_limit=1, resume_from_checkpoint="last")
    assert "from checkpoint-4, step 4" in said
    assert sorted(p.name for p in out.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-7", "checkpoint-99"]
    assert damage(Path(newer)) is None
    with pytest.raises(CheckpointError, match="it belongs to another run"):
        in_process(finished[0], out, max_steps=9, save_steps=1, resume_from_checkpoint=str(newer))


def test_a_manifest_that_names_files_elsewhere(out: Path) -> None:
    manifest = json.loads((out / "checkpoint-4" / "manifest.json").read_text())
    manifest["files"]["../run.yaml"] = {"bytes": 1, "sha256": "0"}
    (out / "checkpoint-4" / "manifest.json").write_text(json.dumps(manifest))
    assert damage(out / "checkpoint-4") == "manifest.json names '../run.yaml', which is not in the folder"


EVALUATED: dict[str, Any] = {
    "eval_fraction": 0.3,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_steps": 1,
    "greater_is_better": True,  # so that a falling loss counts as worse, and patience runs out
    "metric_for_best_model": "loss",
    "load_best_model_at_end": True,
}


def test_early_stopping_survives_a_resume(finished: tuple[Path, Path], tmp_path: Path) -> None:
    rows, out = finished[0], tmp_path / "out"
    whole, _ = in_process(rows, out, max_steps=12, early_stopping_patience=3, **EVALUATED)
    assert whole.num_steps < 12
    ended, adapter = whole.num_steps, (out / ADAPTER).read_bytes()
    # Killed two steps before: the count in the checkpoint goes on.
    for step in (ended - 1, ended):
        shutil.rmtree(out / f"checkpoint-{step}")
    (out / ADAPTER).unlink()
    again, said = in_process(
        rows, out, max_steps=12, early_stopping_patience=3, resume_from_checkpoint="last", **EVALUATED
    )
    assert f"from checkpoint-{ended - 2}," in said
    assert again.num_steps == ended
    assert (out / ADAPTER).read_bytes() == adapter
    # Ended by early stopping: nothing is left, unless there is more patience.
    with pytest.raises(CheckpointError, match="nothing is left to do"):
        in_process(rows, out, max_steps=12, early_stopping_patience=3, resume_from_checkpoint="last", **EVALUATED)
    longer, _ = in_process(
        rows, out, max_steps=12, early_stopping_patience=5, resume_from_checkpoint="last", **EVALUATED
    )
    assert longer.num_steps > ended
