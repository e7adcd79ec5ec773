"""Start torchrun for a test, and compare what two runs have left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

WORKER = Path(__file__).parent / "worker.py"
SOURCE = Path(__file__).parents[2] / "src"
MODEL = Path(__file__).parent.parent / "cases" / "_shared" / "tiny-llama"
ADAPTER = "adapter_model.safetensors"


def settings(rows: Path, output: Path, **options: Any) -> dict[str, Any]:
    """Options of a small run in float32 that logs each step."""
    return {
        "dataset_path": [str(rows)],
        "model_path": str(MODEL),
        "output_dir": str(output),
        "fp32": True,
        "use_cpu": True,
        "lora_rank": 4,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "max_steps": 10,
        "self_check": "off",
        **options,
    }


def torchrun(
    folder: Path,
    runs: list[dict[str, Any]],
    *more: str,
    num_ranks: int = 2,
    timeout: float = 180,
    python: Path | str = sys.executable,
) -> subprocess.CompletedProcess[str]:
    """The runs in `num_ranks` processes; stdout and stderr are one text. python: that of another environment, which
    finds our source by its path."""
    file = folder / f"runs-{len(list(folder.glob('runs-*.json')))}.json"
    file.write_text(json.dumps(runs), encoding="utf-8")
    command = [str(python), "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_ranks)]
    return subprocess.run(
        [*command, *more, str(WORKER), str(file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SOURCE)},
    )


def log_of(folder: Path) -> list[dict[str, Any]]:
    """The objects of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def assert_same_run(one: Path, several: Path, *, tolerance: float = 1e-5) -> None:
    """Losses, gradient norms and counts at each log line, evaluations, and the adapters agree."""
    logs = log_of(one), log_of(several)
    assert len(logs[0]) == len(logs[1]) >= 10
    for a, b in zip(*logs, strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() & {"loss", "grad_norm", "eval_loss", "eval_token_accuracy", "token_accuracy"}:
            assert abs(a[key] - b[key]) <= tolerance * max(1.0, abs(a[key])), (key, a, b)
        for key in a.keys() & {"step", "supervised_tokens", "logical_tokens", "eval_supervised_tokens"}:
            assert a[key] == b[key], (key, a, b)
    adapters = load_file(one / ADAPTER), load_file(several / ADAPTER)
    assert adapters[0].keys() == adapters[1].keys()
    for name, tensor in adapters[0].items():
        assert np.abs(tensor - adapters[1][name]).max() <= tolerance, name
    assert any(np.abs(tensor).max() > 1e-3 for name, tensor in adapters[0].items() if "lora_B" in name)


def processes_of(folder: Path) -> list[int]:
    """Living processes with a path of `folder` in their command line."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder).encode() in entry.read_bytes() and int(entry.parent.name) != os.getpid():
                found.append(int(entry.parent.name))
        except OSError:  # it has ended meanwhile
            continue
    return found
