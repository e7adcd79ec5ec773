"""A run goes on with another number of processes: as many rows a step, or other ones, from the row where it stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from launch import assert_same_run, log_of, settings, torchrun
from test_equality import write_rows

from espalier.errors import CheckpointError
from espalier.training.run import train


def test_two_processes_go_on_as_one(tmp_path: Path) -> None:
    two = settings(write_rows(tmp_path / "rows.jsonl"), tmp_path / "out")
    done = torchrun(tmp_path, [{"options": two, "fault": {"kind": "stop", "rank": 1, "step": 6}}])
    assert (tmp_path / "out" / "checkpoint-5").is_dir(), done.stdout
    resumed = {**two, "resume_from_checkpoint": "last"}
    with pytest.raises(CheckpointError) as refused:
        train(**{**resumed, "per_device_train_batch_size": 2})  # 2 rows a step instead of 8, and not by processes alone
    assert "rows a step: 8 -> 2: 0 of 33 rows of epoch 2 are done" in str(refused.value)
    assert "only another number of processes may change them" in str(refused.value)
    train(**{**resumed, "per_device_train_batch_size": 8})
    train(**{**two, "output_dir": str(tmp_path / "one"), "per_device_train_batch_size": 8})
    assert_same_run(tmp_path / "one", tmp_path / "out")


STREAM = {"streaming": True, "streaming_window": 16}


@pytest.mark.parametrize("kind", [{}, STREAM], ids=["rows", "stream"])
def test_a_run_goes_on_with_other_rows_a_step(kind: dict[str, Any], tmp_path: Path) -> None:
    options = settings(write_rows(tmp_path / "rows.jsonl"), tmp_path / "out", **kind)
    resumed = {**options, "resume_from_checkpoint": "last"}

    def phase(options: dict[str, Any], num_ranks: int, last: int | None) -> tuple[str, list[list[int]]]:
        """What is said, and the rows of each step that `num_ranks` processes have computed up to step `last`."""
        folder = tmp_path / f"rows-{len(list(tmp_path.glob('rows-*')))}"
        folder.mkdir()
        fault = None if last is None else {"kind": "stop", "rank": num_ranks - 1, "step": last + 1}
        entry = {"options": options, "fault": fault, "rows": str(folder)}
        said = torchrun(tmp_path, [entry], num_ranks=num_ranks).stdout
        steps: dict[int, list[int]] = {}
        for file in sorted(folder.glob("rank-*")):
            for line in file.read_text(encoding="utf-8").splitlines():
                step, rows = json.loads(line)
                steps.setdefault(step, []).extend(rows)
        assert list(steps) == list(range(min(steps), max(steps) + 1)), said
        return said, list(steps.values())

    said, first = phase(options, 2, 2)  # 16 of 33 rows
    assert list(map(len, first)) == [8, 8], said
    said, then = phase(resumed, 1, 5)  # 12 more, 4 a step
    total = 20 if kind else 18  # of a stream the rows of 10 steps count, else their 2 epochs
    assert (
        f"8 rows a step before, 4 now: 16 rows of epoch 1 are done, so 4 of {total} such steps; {total - 4} are left, "
        f"the learning rate goes on at 4/{total} of its schedule, and the count of steps at 2, up to {total - 2}\n"
        in said
    )
    assert list(map(len, then)) == [4, 4, 4], said
    said, last = phase(resumed, 2, None)  # 28 are no whole number of steps of 8
    assert "28 rows of epoch 1 are done, so 3 of 10 such steps and 4 rows of the next; 7 are left" in said, said
    assert "the count of steps at 5, up to 12\n" in said
    epoch = [*first, *then, *last[:2]]
    assert list(map(len, last)) == ([4, 1] if kind else [4, 1, 8, 8, 8, 8, 1]), said
    assert sorted(line for step in epoch for line in step) == list(range(1, 34))  # none twice, none left out
    if not kind:
        assert sorted(line for step in last[2:] for line in step) == list(range(1, 34))
    log = log_of(tmp_path / "out")
    assert [entry["step"] for entry in log] == list(range(1, 8 if kind else 13))
    rates = [entry["learning_rate"] / 1e-2 for entry in log]
    fractions = [0, 1 / 10, 4 / total, 5 / total, 6 / total, *(step / 10 for step in range(3, 10))]
    assert rates == pytest.approx([1 - done for done in fractions[: len(rates)]])
