"""Small runs in this process, for the tests of this folder: the tiny model of the cases, float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from small_runs import log_of, run, write_rows

from espalier.training.run import RunResult

CASES = Path(__file__).parent.parent / "cases"

__all__ = ["in_process", "log_of", "write_rows"]


def in_process(rows: Path, out: Path, **options: Any) -> tuple[RunResult, str]:
    """`train` of the tiny model; the result and what was said."""
    return run(CASES / "_shared" / "tiny-llama", rows, out, **options)
