"""Ctrl-C and SIGTERM: a message, a checkpoint, the exit code, and a resumed run that equals the uninterrupted one."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_runs import log_of, write_rows


def command(model: Path, rows: Path, out: Path, *more: str) -> list[str]:
    options = {
        "dataset_path": rows,
        "model_path": model,
        "output_dir": out,
        "max_steps": 200,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "lora_rank": 4,
        "lora_dropout": 0.1,
    }
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return [sys.executable, "-m", "espalier", "train", "--fp32", *flags, *more]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_saves_and_the_resumed_run_is_the_same(
    number: signal.Signals, code: int, tmp_path: Path, tiny_llama_dir: Path
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    out, whole = tmp_path / "out", tmp_path / "whole"
    process = subprocess.Popen(
        command(tiny_llama_dir, rows, out), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 120
    while not (out / "metrics.jsonl").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(number)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == code, said
    step = log_of(out)[-1]["step"]
    assert step < 200
    assert f"stopped after step {step}; checkpoint: {out / f'checkpoint-{step}'}" in said
    advice = f"go on with: espalier train --config {out / 'run.yaml'} --resume_from_checkpoint last"
    assert advice in said
    assert "Traceback" not in said
    resume = [sys.executable, "-m", *advice.removeprefix("go on with: ").split()]
    done = subprocess.run(resume, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    subprocess.run(command(tiny_llama_dir, rows, whole), capture_output=True, timeout=300, check=True)
    name = "adapter_model.safetensors"
    assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert [entry["step"] for entry in log_of(out)] == list(range(1, 201))
