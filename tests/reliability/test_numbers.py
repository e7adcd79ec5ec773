"""Numbers that are not finite: the run stops and says where, or skips the step and counts it; none is ever saved."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from espalier.errors import AdapterError, TrainingError
from espalier.training import run as run_module
from espalier.training.checkpoint import damage
from espalier.training.trainer import LoraTrainer
from reliability.small import in_process, log_of, write_rows

NAN = float("nan")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl")


def spoil_loss(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Make the loss of these steps not a number."""
    part_loss = LoraTrainer.part_loss

    def spoilt(self: LoraTrainer, model: Any, part: Any) -> Any:
        output = part_loss(self, model, part)
        if model.training and self.state.global_step + 1 in steps:
            return dataclasses.replace(output, loss_sum=output.loss_sum * NAN)
        return output

    monkeypatch.setattr(LoraTrainer, "part_loss", spoilt)


def spoil_gradient(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Make one gradient of these steps infinite; their loss stays sound."""
    training_step = LoraTrainer.training_step

    def spoilt(self: LoraTrainer, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        loss = training_step(self, model, inputs, num_items_in_batch)
        if self.state.global_step + 1 in steps:
            next(p for p in model.parameters() if p.grad is not None).grad.fill_(float("inf"))
        return loss

    monkeypatch.setattr(LoraTrainer, "training_step", spoilt)


@pytest.mark.parametrize(
    ("spoil", "what", "value"), [(spoil_loss, "loss", "nan"), (spoil_gradient, "gradient norm", "inf")]
)
def test_stop_names_step_rows_and_checkpoint(
    spoil: Any, what: str, value: str, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, {3})
    out = tmp_path / "out"
    with pytest.raises(TrainingError) as error:
        in_process(rows, out, max_steps=6, save_steps=1)
    assert error.value.exit_code == 1
    assert error.value.what.startswith(f"the {what} of step 3 is {value}")
    places = error.value.details[0].removeprefix("rows of the step: ").split(", ")
    assert len(places) == 4
    assert all(place.startswith(f"{rows}:") for place in places)
    assert f"last checkpoint: {out / 'checkpoint-2'}" in str(error.value)
    assert damage(out / "checkpoint-2") is None
    assert not (out / "checkpoint-3").exists()
    assert not (out / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("spoil", [spoil_loss, spoil_gradient])
def test_skip_changes_no_weight_and_is_counted(
    spoil: Any, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, {3})
    out = tmp_path / "out"
    _, said = in_process(
        rows, out, max_steps=4, save_steps=1, on_nonfinite="skip", max_nonfinite_steps=1, logging_steps=2
    )
    before, after, later = (
        load_file(str(out / f"checkpoint-{step}" / "adapter_model.safetensors")) for step in (2, 3, 4)
    )
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any(not torch.equal(after[name], later[name]) for name in after)
    assert "step 3 is skipped (1 in a row, at most 1): the " in said
    assert f"rows: {rows}:" in said
    assert "1 steps were skipped" in said
    first, second = log_of(out)
    assert "nonfinite_steps" not in first
    assert second["nonfinite_steps"] == 1
    assert 1.0 < second["loss"] < 8.0  # the mean of the steps that have a loss, not half of it


def test_mean_loss_leaves_the_skipped_step_out(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_loss(monkeypatch, {2})
    in_process(rows, tmp_path / "fine", max_steps=4, on_nonfinite="skip", logging_steps=1)
    in_process(rows, tmp_path / "wide", max_steps=4, on_nonfinite="skip", logging_steps=4)
    fine = log_of(tmp_path / "fine")
    assert "loss" not in fine[1]
    assert fine[1]["nonfinite_steps"] == 1
    losses = [entry["loss"] for entry in fine if "loss" in entry]
    assert log_of(tmp_path / "wide")[0]["loss"] == pytest.approx(sum(losses) / 3, abs=1e-6)


def test_too_many_in_a_row_stop_the_run(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_loss(monkeypatch, {2, 3, 4})
    with pytest.raises(TrainingError, match="the loss of step 4 is nan, after 2 skipped steps in a row"):
        in_process(rows, tmp_path / "out", max_steps=6, on_nonfinite="skip", max_nonfinite_steps=2)


def test_skipping_survives_a_resume(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The count in a row goes on where the checkpoint left it."""
    spoil_loss(monkeypatch, {2, 3})
    settings: dict[str, Any] = {"save_steps": 1, "on_nonfinite": "skip", "max_nonfinite_steps": 1}
    out = tmp_path / "out"
    in_process(rows, out, max_steps=2, **settings)
    with pytest.raises(TrainingError, match="the loss of step 3 is nan, after 1 skipped steps in a row"):
        in_process(rows, out, max_steps=4, resume_from_checkpoint="last", **settings)


def test_a_learning_rate_of_1e3_never_saves_nan(rows: Path, tmp_path: Path) -> None:
    """C07: whatever stops the run, no file holds a number that is not finite."""
    out = tmp_path / "out"
    with pytest.raises((TrainingError, AdapterError)):
        in_process(rows, out, max_steps=30, save_steps=1, learning_rate=1e30, max_grad_norm=0)
    for file in out.rglob("*.safetensors"):
        if file.name != "random.safetensors":
            assert all(t.isfinite().all() for t in load_file(str(file)).values()), file


def test_an_adapter_with_nan_is_refused_at_the_save(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = run_module.build_trainer

    def spoilt(*arguments: Any) -> Any:
        trainer = build(*arguments)
        finish = trainer.save_model

        def save(folder: str) -> None:
            next(p for p in trainer.model.parameters() if p.requires_grad).data.fill_(NAN)
            finish(folder)

        trainer.save_model = save
        return trainer

    monkeypatch.setattr(run_module, "build_trainer", spoilt)
    with pytest.raises(AdapterError, match="1 of the adapter's 28 tensors are not finite: nothing is saved of it"):
        in_process(rows, tmp_path / "out", max_steps=2)
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()
