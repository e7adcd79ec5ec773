"""Only our errors come of damaged and hostile files: 2,000 inputs here, 100,000 in the long form."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

# A mutated template, tokenizer or adapter may hang or fill the memory: a process of its own, with limits.
PROGRAM = Path(__file__).parent / "fuzz.py"


def fuzz(inputs: int, folder: Path, seed: int) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    options = ["--inputs", str(inputs), "--seed", str(seed), "--keep", str(folder / "failures")]
    arguments = [sys.executable, str(PROGRAM), *options]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


def test_a_few_thousand_inputs(tmp_path: Path) -> None:
    said = fuzz(2000, tmp_path, seed=1)
    total = re.search(r"^(\d+) inputs, 0 failures, peak memory (\d+) MB$", said, re.MULTILINE)
    assert total is not None, said
    assert int(total[1]) >= 2000
    assert int(total[2]) < 2000
    assert "'accepted'" in said  # not all is refused


@pytest.mark.slow
def test_a_hundred_thousand_inputs(tmp_path: Path) -> None:
    said = fuzz(100_000, tmp_path, seed=2)
    print(said)
    assert "100000 inputs, 0 failures" in said
