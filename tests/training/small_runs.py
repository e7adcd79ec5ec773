"""Small runs for the tests of training: a tiny model of the cases, a few rows, float32."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from espalier.training.run import RunResult, train

WORDS = ("pear", "fig", "plum", "kiwi", "lime", "date")


def write_rows(path: Path, count: int = 12) -> Path:
    """Alpaca rows with answers of unequal lengths."""
    rows = [
        {"instruction": f"say {WORDS[i % 6]} in row {i}", "output": " ".join([WORDS[i % 6]] * (1 + i % 4))}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(model: Path, rows: Path, output: Path, **options: Any) -> tuple[RunResult, str]:
    """`train` with small settings; the result and all that was printed."""
    console = Console(record=True, width=200, file=io.StringIO())
    settings: dict[str, Any] = {
        "dataset_path": [str(rows)],
        "model_path": str(model),
        "output_dir": str(output),
        "fp32": True,
        "lora_rank": 4,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "self_check": "off",
    }
    result = train(console=console, **{**settings, **options})
    return result, console.export_text()


def log_of(folder: Path) -> list[dict[str, Any]]:
    """The objects of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
