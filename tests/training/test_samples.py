"""Samples at every evaluation: written with the step, and the run is the same run. Early stopping ends it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from small_runs import log_of, run, write_rows

from espalier.errors import DataError, UsageError
from espalier.training import samples as module

EVALUATED: dict[str, Any] = {
    "max_steps": 4,
    "eval_fraction": 0.3,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "lora_dropout": 0.1,
    "save_steps": 1,
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")


def samples_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


def figures(folder: Path) -> list[tuple[Any, ...]]:
    return [(entry["step"], entry.get("loss"), entry.get("eval_loss")) for entry in log_of(folder)]


def test_samples_change_nothing_and_survive_a_resume(rows: Path, tiny_llama_dir: Path, tmp_path: Path) -> None:
    """With samples, without, and stopped and resumed: equal losses with dropout on, equal bytes of the adapter."""
    run(tiny_llama_dir, rows, tmp_path / "without", eval_samples=0, **EVALUATED)
    _, text = run(tiny_llama_dir, rows, tmp_path / "with", **EVALUATED)
    assert figures(tmp_path / "with") == figures(tmp_path / "without")
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("with", "without")]
    assert weights[0] == weights[1]
    assert not (tmp_path / "without" / "samples.jsonl").exists()
    found = samples_of(tmp_path / "with")
    assert [entry["step"] for entry in found] == [2, 2, 2, 4, 4, 4]
    first, second = found[:3], found[3:]
    assert [entry["prompt"] for entry in first] == [entry["prompt"] for entry in second]
    assert all(" in row " in entry["prompt"] and entry["wanted"] for entry in found)
    assert [entry["answer"] for entry in first] != [entry["answer"] for entry in second]
    assert text.count("(wanted: ") == 6

    shutil.copytree(tmp_path / "with", tmp_path / "resumed")
    for step in (3, 4):
        shutil.rmtree(tmp_path / "resumed" / f"checkpoint-{step}")
    (tmp_path / "resumed" / "adapter_model.safetensors").unlink()
    run(tiny_llama_dir, rows, tmp_path / "resumed", resume_from_checkpoint="last", **EVALUATED)
    assert samples_of(tmp_path / "resumed") == found


def test_probe_prompts_of_one_s_own(rows: Path, tiny_llama_dir: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("say pear\n\nsay 梨\n", encoding="utf-8")
    run(tiny_llama_dir, rows, tmp_path / "out", probe_prompts=str(prompts), **EVALUATED)
    found = samples_of(tmp_path / "out")
    assert [(entry["step"], entry["prompt"], entry["wanted"]) for entry in found] == [
        (2, "say pear", None), (2, "say 梨", None), (4, "say pear", None), (4, "say 梨", None)
    ]  # fmt: skip


def test_refusals(rows: Path, tiny_llama_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        run(tiny_llama_dir, rows, tmp_path / "out", probe_prompts="p.txt", eval_samples=-1)
    assert "--eval_samples: -1 is not 0 or more" in str(caught.value)
    assert "--probe_prompts changes nothing: nothing is evaluated during training" in str(caught.value)
    with pytest.raises(DataError, match="cannot be read"):
        run(tiny_llama_dir, rows, tmp_path / "out", probe_prompts=str(tmp_path / "none.txt"), **EVALUATED)
    assert not (tmp_path / "out").exists()


def test_a_sample_is_tried_before_step_1(
    rows: Path, tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise DataError("no answer can be made")

    monkeypatch.setattr(module, "generate", broken)
    with pytest.raises(DataError, match="no answer can be made"):
        run(tiny_llama_dir, rows, tmp_path / "out", **EVALUATED)
    assert not (tmp_path / "out").exists()


def test_early_stopping(rows: Path, tiny_llama_dir: Path, tmp_path: Path) -> None:
    """A learning rate that spoils the model: the held-out loss is not better twice, and the run ends there with the
    adapter of the best evaluation."""
    settings = {**EVALUATED, "max_steps": 40, "eval_steps": 1, "learning_rate": 3.0, "max_grad_norm": 0}
    result, text = run(
        tiny_llama_dir, rows, tmp_path / "out", early_stopping_patience=2, load_best_model_at_end=True, **settings
    )
    losses = [entry["eval_loss"] for entry in log_of(tmp_path / "out") if "eval_loss" in entry]
    best = losses.index(min(losses))
    assert result.num_steps == len(losses) == best + 3 < 40
    assert f"the adapter is that of step {best + 1}, the best evaluation" in text
