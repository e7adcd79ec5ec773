"""Stop and resume equals the uninterrupted run, bit for bit (cases C11, C13, C14, C16, C17, C24)."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from small_runs import log_of, run, write_rows

from espalier.errors import CheckpointError, RunFolderError
from espalier.training.checkpoint import CheckpointKeeper

FOUR_EPOCHS: dict[str, Any] = {"num_train_epochs": 4, "lora_dropout": 0.1, "logging_steps": 2, "save_steps": 1}
ADAPTER = "adapter_model.safetensors"


def steps_of(folder: Path) -> list[int]:
    return sorted(int(p.name.split("-")[1]) for p in folder.glob("checkpoint-*"))


def without_speed(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in entry.items() if "per_second" not in k} for entry in log]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")


KINDS: dict[str, dict[str, Any]] = {
    "tree": {"tree": "on"},
    "plain": {"tree": "off"},
    "two-workers": {"tree": "on", "dataloader_num_workers": 2},
}
STOPS = {1: "inside epoch 1", 3: "at an epoch's end", 5: "between two log lines", 8: "inside epoch 3"}


@pytest.fixture(scope="module")
def whole(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """kind -> folder of an uninterrupted run: 12 steps in 4 epochs with dropout, a checkpoint after each step."""
    made: dict[str, Path] = {}

    def whole_run(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind) / "out"
            model = Path(__file__).parent.parent / "cases" / "_shared" / "tiny-llama"
            run(model, rows, made[kind], **FOUR_EPOCHS, **KINDS[kind])
        return made[kind]

    return whole_run


@pytest.mark.parametrize(
    ("kind", "stop"),
    [*product(("tree", "plain"), STOPS), ("two-workers", 5), ("two-workers", 8)],  # workers take seconds to start
)
def test_resumed_run_is_the_uninterrupted_run(
    kind: str, stop: int, whole: Callable[[str], Path], rows: Path, tmp_path: Path, tiny_llama_dir: Path
) -> None:
    uninterrupted, out = whole(kind), tmp_path / "out"
    shutil.copytree(uninterrupted, out)
    for step in steps_of(out):
        if step > stop:
            shutil.rmtree(out / f"checkpoint-{step}")
    (out / ADAPTER).unlink()
    _, said = run(tiny_llama_dir, rows, out, resume_from_checkpoint="last", **FOUR_EPOCHS, **KINDS[kind])
    assert f"from checkpoint-{stop}, step {stop}" in said
    assert (out / ADAPTER).read_bytes() == (uninterrupted / ADAPTER).read_bytes()
    assert without_speed(log_of(out)) == without_speed(log_of(uninterrupted))
    for name in ("optimizer.safetensors", "random.safetensors", "scheduler.json"):
        ours, theirs = (folder / "checkpoint-12" / name for folder in (out, uninterrupted))
        assert ours.read_bytes() == theirs.read_bytes(), name


def test_changed_settings_are_named(rows: Path, tmp_path: Path, tiny_llama_dir: Path) -> None:
    out = tmp_path / "out"
    run(tiny_llama_dir, rows, out, max_steps=2, save_steps=1)
    with pytest.raises(CheckpointError) as error:
        run(tiny_llama_dir, rows, out, max_steps=4, save_steps=1, resume_from_checkpoint="last", lora_rank=8, seed=1)
    assert str(error.value) == (
        f"{out / 'run.yaml'}: the run was started with other settings\n"
        "  - --lora_rank: 4 -> 8\n"
        "  - --seed: 42 -> 1\n"
        "  Resume with the run's own settings, or start a new run from its adapter with --continue_training."
    )


def test_changed_rows_are_refused(rows: Path, tmp_path: Path, tiny_llama_dir: Path) -> None:
    out = tmp_path / "out"
    run(tiny_llama_dir, rows, out, max_steps=2, save_steps=1)
    other = write_rows(tmp_path / "other.jsonl", 13)
    with pytest.raises(CheckpointError, match="this is not what the run was started with") as error:
        run(tiny_llama_dir, other, out, max_steps=4, save_steps=1, resume_from_checkpoint="last")
    assert error.value.details == ("the rows as they are encoded: data, tokenizer, template or length policy",)


def test_damaged_checkpoint_is_named_and_passed_over(rows: Path, tmp_path: Path, tiny_llama_dir: Path) -> None:
    out = tmp_path / "out"
    whole_result, _ = run(tiny_llama_dir, rows, tmp_path / "whole", max_steps=3)
    run(tiny_llama_dir, rows, out, max_steps=3, save_steps=1)
    optimizer = out / "checkpoint-3" / "optimizer.safetensors"
    optimizer.write_bytes(optimizer.read_bytes()[:-1])
    (out / "checkpoint-2" / "manifest.json").unlink()
    _, said = run(tiny_llama_dir, rows, out, max_steps=3, save_steps=1, resume_from_checkpoint="last")
    assert "checkpoint-3 is passed over: optimizer.safetensors is not what was written" in said
    assert "from checkpoint-1, step 1" in said
    assert (out / ADAPTER).read_bytes() == (whole_result.output_dir / ADAPTER).read_bytes()


def test_a_run_folder_is_not_overwritten(rows: Path, tmp_path: Path, tiny_llama_dir: Path) -> None:
    out = tmp_path / "out"
    run(tiny_llama_dir, rows, out, max_steps=1)
    before = (out / ADAPTER).read_bytes()
    with pytest.raises(RunFolderError, match="this folder already holds a run"):
        run(tiny_llama_dir, rows, out, max_steps=1)
    with pytest.raises(RunFolderError, match="there is no run to resume here"):
        run(tiny_llama_dir, rows, tmp_path / "none", max_steps=1, resume_from_checkpoint="last")
    assert (out / ADAPTER).read_bytes() == before
    assert not (tmp_path / "none").exists()


def test_save_total_limit_keeps_the_newest(rows: Path, tmp_path: Path, tiny_llama_dir: Path) -> None:
    run(tiny_llama_dir, rows, tmp_path / "out", max_steps=5, save_steps=1, save_total_limit=2)
    assert steps_of(tmp_path / "out") == [4, 5]


def test_best_is_kept_and_loaded_bit_for_bit(rows: Path, tmp_path: Path, tiny_llama_dir: Path) -> None:
    """C16, C17. The largest loss counts as best here, so that the best step is not the last one."""
    out = tmp_path / "out"
    result, said = run(
        tiny_llama_dir,
        rows,
        out,
        max_steps=6,
        metric_for_best_model="loss",
        greater_is_better=True,
        eval_fraction=0.3,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        save_total_limit=1,
        load_best_model_at_end=True,
    )
    evals = {entry["step"]: entry["eval_loss"] for entry in log_of(out) if "eval_loss" in entry}
    best = max(evals, key=lambda step: evals[step])
    assert best < 6, evals
    assert steps_of(out) == [best, 6]
    assert (out / ADAPTER).read_bytes() == (out / f"checkpoint-{best}" / ADAPTER).read_bytes()
    assert f"the adapter is that of step {best}, the best evaluation" in said
    assert result.num_steps == 6


def test_workers_change_nothing(whole: Callable[[str], Path]) -> None:
    """C26: planning in two spawned processes gives the run of planning in this one."""
    assert (whole("two-workers") / ADAPTER).read_bytes() == (whole("tree") / ADAPTER).read_bytes()


def test_a_best_checkpoint_that_could_not_be_saved_is_named(
    rows: Path, tmp_path: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = CheckpointKeeper.save

    def save_but_the_best(self: CheckpointKeeper, trainer: Any, *state: Any) -> Path:
        if trainer.state.global_step == trainer.state.best_global_step:
            raise RunFolderError("no room", where=str(self.folder))
        return save(self, trainer, *state)

    monkeypatch.setattr(CheckpointKeeper, "save", save_but_the_best)
    _, said = run(
        tiny_llama_dir,
        rows,
        tmp_path / "out",
        max_steps=6,
        metric_for_best_model="loss",
        greater_is_better=True,  # the largest loss, which is not that of the last step
        eval_fraction=0.3,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
    )
    assert (tmp_path / "out" / ADAPTER).read_bytes() == (tmp_path / "out" / "checkpoint-6" / ADAPTER).read_bytes()
    assert "could not be saved: the adapter is that of the last step" in said
