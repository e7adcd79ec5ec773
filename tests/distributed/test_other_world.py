"""A run goes on with another number of processes where the rows of a step stay as many, and is refused where not."""

from __future__ import annotations

from pathlib import Path

import pytest
from launch import assert_same_run, settings, torchrun
from test_equality import write_rows

from espalier.errors import CheckpointError
from espalier.training.run import train


def test_two_processes_go_on_as_one(tmp_path: Path) -> None:
    two = settings(write_rows(tmp_path / "rows.jsonl"), tmp_path / "out")
    done = torchrun(tmp_path, [{"options": two, "fault": {"kind": "stop", "rank": 1, "step": 6}}])
    assert (tmp_path / "out" / "checkpoint-5").is_dir(), done.stdout
    resumed = {**two, "resume_from_checkpoint": "last"}
    with pytest.raises(CheckpointError) as refused:
        train(**resumed)  # 4 rows a step instead of 8
    assert "rows a step: 8 -> 4: 0 of 33 rows of epoch 2 are done" in str(refused.value)
    train(**{**resumed, "per_device_train_batch_size": 8})
    train(**{**two, "output_dir": str(tmp_path / "one"), "per_device_train_batch_size": 8})
    assert_same_run(tmp_path / "one", tmp_path / "out")
