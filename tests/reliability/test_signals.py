"""A signal during an evaluation and during a save; a second one; one before step 1. Real signals to this process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from espalier.training.checkpoint import CheckpointKeeper, damage
from espalier.training.trainer import LoraTrainer
from reliability.kills import Setting, command
from reliability.small import in_process, log_of, write_rows

ADAPTER = "adapter_model.safetensors"
SETTINGS: dict[str, Any] = {
    "max_steps": 6,
    "lora_dropout": 0.1,
    "eval_fraction": 0.3,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_steps": 2,
    "load_best_model_at_end": True,
}


def untimed(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in e.items() if "per_second" not in k and "runtime" not in k} for e in log_of(folder)]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("step", [4, 6])
def test_during_an_evaluation(step: int, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The evaluation is broken off, the step saved; the resumed run makes up for it first. Step 6 is the last one."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    in_process(rows, whole, **SETTINGS)
    loop = LoraTrainer.evaluation_loop

    def interrupted(self: LoraTrainer, dataloader: Any, *arguments: Any, **named: Any) -> Any:
        if self.state.global_step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return loop(self, dataloader, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(LoraTrainer, "evaluation_loop", interrupted)
        with pytest.raises(SystemExit) as stopped:
            in_process(rows, out, **SETTINGS)
    assert stopped.value.code == 143
    assert damage(out / f"checkpoint-{step}") is None
    assert [e["step"] for e in log_of(out) if "eval_loss" in e] == list(range(2, step, 2))
    in_process(rows, out, resume_from_checkpoint="last", **SETTINGS)
    assert (out / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes()
    assert untimed(out) == untimed(whole)


def test_during_a_save(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The save is finished first, and not done twice."""
    whole, out, saves = tmp_path / "whole", tmp_path / "out", []
    in_process(rows, whole, **SETTINGS)
    save = CheckpointKeeper.save

    def interrupted(self: CheckpointKeeper, trainer: Any, *arguments: Any, **named: Any) -> Path:
        saves.append(trainer.state.global_step)
        if trainer.state.global_step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return save(self, trainer, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointKeeper, "save", interrupted)
        with pytest.raises(SystemExit) as stopped:
            in_process(rows, out, **SETTINGS)
    assert stopped.value.code == 130
    assert saves == [2, 4]
    assert damage(out / "checkpoint-4") is None
    in_process(rows, out, resume_from_checkpoint="last", **SETTINGS)
    assert (out / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes()
    assert untimed(out) == untimed(whole)


def test_before_step_1(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is saved, and the folder is free for the next try."""
    out, step = tmp_path / "out", LoraTrainer.training_step

    def interrupted(self: LoraTrainer, *arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(LoraTrainer, "training_step", interrupted)
        with pytest.raises(SystemExit) as stopped:
            in_process(rows, out, max_steps=2)
    assert stopped.value.code == 143
    assert not out.exists() or not list(out.iterdir())
    in_process(rows, out, max_steps=2)


def test_a_second_signal_exits_at_once(tmp_path: Path) -> None:
    """The first one waits for a micro-step that never ends here; the second one does not."""
    rows, out = write_rows(tmp_path / "rows.jsonl"), tmp_path / "out"
    script = tmp_path / "endless.py"
    script.write_text(
        "import sys, time\n"
        "from espalier.training.trainer import LoraTrainer\n"
        "def endless(self, model, part):\n"
        "    print('in the micro-step', flush=True)\n"
        "    while True: time.sleep(0.05)\n"
        "LoraTrainer.part_loss = endless\n"
        "from espalier.cli import main\n"
        "main()\n"
    )
    arguments = [sys.executable, str(script), *command(rows, out, Setting())[3:]]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    said = ""
    while "in the micro-step" not in said:
        line = process.stdout.readline()
        assert line, said
        said += line
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert time.monotonic() - started < 5
    process.stdout.close()
