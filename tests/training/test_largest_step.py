"""The largest step of a run is tried before step 1 where memory is tight, and the run is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import log_of, run, write_rows

from espalier.errors import TrainingError
from espalier.training import largest_step
from espalier.training.memory_guard import MemoryGuard
from espalier.training.micro_steps import MicroSteps
from espalier.training.trainer import LoraTrainer

OPTIONS: dict[str, Any] = {"max_steps": 5, "save_steps": 2, "lora_dropout": 0.1, "self_check": "on"}
SAME = ("adapter_model.safetensors", "checkpoint-4/optimizer.safetensors", "checkpoint-4/random.safetensors")


def without_speed(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in entry.items() if "per_second" not in k} for entry in log]


@pytest.mark.parametrize("tree", ["on", "off"])
def test_trying_it_changes_no_byte_of_the_run(
    tree: str, tmp_path: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 18)
    batches: list[Any] = []
    stock = MicroSteps.within_memory

    def see(self: MicroSteps, model: Any, batch: Any, random: Any) -> Any:
        batches.append(batch)
        return stock(self, model, batch, random)

    monkeypatch.setattr(MicroSteps, "within_memory", see)
    _, said = run(tiny_llama_dir, rows, tmp_path / "plain", tree=tree, **OPTIONS)
    assert "was tried" not in said
    assert len(batches) == 5
    monkeypatch.setattr(largest_step, "TIGHT", 0.0)
    _, said = run(tiny_llama_dir, rows, tmp_path / "tried", tree=tree, **OPTIONS)
    assert "memory: the largest step, 4 rows of " in said
    assert " % of what there is: it fits\n" in said.replace("%", " %")
    assert len(batches) == 5 + 6
    sizes = [max([pack.num_tokens for pack in b.packs] or [len(p) for p in b.parts]) for b in batches]
    assert sizes[5] == max(sizes)
    for name in SAME:
        assert (tmp_path / "tried" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes(), name
    assert without_speed(log_of(tmp_path / "tried")) == without_speed(log_of(tmp_path / "plain"))


def test_a_smaller_plan_is_made_before_step_1(
    tmp_path: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    run(tiny_llama_dir, rows, tmp_path / "plain", max_steps=3, save_strategy="no")
    stock = LoraTrainer.part_loss

    def failing(self: LoraTrainer, model: Any, part: Any) -> Any:
        if not self.guard.is_reduced:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return stock(self, model, part)

    monkeypatch.setattr(LoraTrainer, "part_loss", failing)
    monkeypatch.setattr(largest_step, "TIGHT", 0.0)
    _, said = run(tiny_llama_dir, rows, tmp_path / "out", max_steps=3, save_strategy="no")
    failed = said.index("memory: an allocation failed (2.00 GiB): the step runs again")
    assert failed < said.index("it fits with packs of up to") < said.index("step 1/3")
    assert said.count("an allocation failed") == 1
    losses = [[e["loss"] for e in log_of(tmp_path / name) if "loss" in e] for name in ("plain", "out")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert len(losses[0]) == 3


def test_a_run_that_cannot_fit_ends_before_step_1(
    tmp_path: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(self: LoraTrainer, model: Any, part: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(LoraTrainer, "part_loss", failing)
    monkeypatch.setattr(largest_step, "TIGHT", 0.0)
    rows = write_rows(tmp_path / "rows.jsonl")
    with pytest.raises(TrainingError, match="a step could not be allocated"):
        run(tiny_llama_dir, rows, tmp_path / "out", max_steps=3)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("device", "tight", "limit", "known", "reason"),
    [
        ("cuda:0", 0.1, None, True, "on a GPU it is known only by trying"),
        ("cuda:0", 0.1, None, False, None),
        ("cpu", 0.1, None, True, None),
        ("cpu", 0.9, None, True, "it is predicted to take 90% of what there is"),
        ("cpu", None, None, True, None),
        ("cpu", None, 1 << 30, True, "nothing is predicted for this model, and there is a limit"),
    ],
)
def test_when_it_is_tried(device: str, tight: float | None, limit: int | None, known: bool, reason: str | None) -> None:
    from types import SimpleNamespace

    from espalier.training.memory_guard import StepPlan

    guard = MemoryGuard(StepPlan(64), 2, device=device, limit=limit, tight=tight)
    guard.largest = SimpleNamespace(weight_sum=3.0) if known else None  # type: ignore[assignment]
    trainer: Any = SimpleNamespace(guard=guard, in_lockstep=False)
    assert largest_step.why_try(trainer) == reason
