"""What one rank meets ends all ranks, with one message and the error's own exit code; a lost rank too."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from launch import ADAPTER, assert_same_run, processes_of, settings, torchrun
from test_equality import write_rows

from espalier.training.run import train

SHARDED = pytest.mark.parametrize("fsdp", [False, True], ids=["whole", "sharded"])
FAULTS: dict[str, tuple[int, list[str]]] = {
    "error": (2, ["error: rank 1, rows.jsonl:7: the row cannot be used", "Mend it."]),
    # The step is planned again, smaller and smaller, until there is no smaller plan.
    "memory": (1, ["error: rank 1: a step could not be allocated, with the longest row alone in a pack and all 2"]),
    "nan": (1, ["error: rank 1: the loss of step 3 is nan", "rows.jsonl:", "last checkpoint: "]),
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")


def exit_codes(said: str) -> list[int]:
    """Of the ranks, from torchrun's report."""
    return [int(code) for code in re.findall(r"exitcode +: (-?\d+)", said)]


@pytest.mark.parametrize("kind", FAULTS)
def test_one_rank_fails_and_all_stop(kind: str, rows: Path, tmp_path: Path) -> None:
    code, messages = FAULTS[kind]
    fault = {"kind": kind, "rank": 1, "step": 3}
    done = torchrun(tmp_path, [{"options": settings(rows, tmp_path / "out", save_steps=2), "fault": fault}])
    assert done.returncode != 0
    assert done.stdout.count("error: ") == 1, done.stdout
    for message in messages:
        assert message in done.stdout
    assert "in main_loop" not in done.stdout
    assert exit_codes(done.stdout) == [code, code], done.stdout
    assert processes_of(tmp_path) == []
    assert (tmp_path / "out" / "checkpoint-2").is_dir()
    assert not (tmp_path / "out" / ".lock").exists()


def test_one_rank_fails_where_others_wait_for_its_pieces(rows: Path, tmp_path: Path) -> None:
    options = settings(rows, tmp_path / "out", fsdp=True, max_tokens_per_pack=48)
    done = torchrun(tmp_path, [{"options": options, "fault": {"kind": "error", "rank": 1, "step": 3}}])
    assert done.stdout.count("error: ") == 1, done.stdout
    assert "error: rank 1, rows.jsonl:7: the row cannot be used" in done.stdout
    assert exit_codes(done.stdout) == [2, 2], done.stdout
    assert processes_of(tmp_path) == []


@SHARDED
def test_a_lost_rank_ends_the_job_which_then_goes_on(fsdp: bool, rows: Path, tmp_path: Path) -> None:
    options = settings(rows, tmp_path / "out", save_steps=4, lora_dropout=0.1, fsdp=fsdp)
    started = time.monotonic()
    done = torchrun(tmp_path, [{"options": options, "fault": {"kind": "kill", "rank": 1, "step": 6}}], timeout=110)
    assert time.monotonic() - started < 100  # of which starting two processes may take half, where cores are few
    assert done.stdout.count("error: ") == 1, done.stdout
    assert "error: rank 1 of the run is lost" in done.stdout
    assert f"Last checkpoint: {tmp_path / 'out' / 'checkpoint-4'}. Go on with the same command and" in done.stdout
    assert sorted(exit_codes(done.stdout)) == [-9, 1]
    assert processes_of(tmp_path) == []
    whole = {"options": {**options, "output_dir": str(tmp_path / "whole")}}
    done = torchrun(tmp_path, [{"options": {**options, "resume_from_checkpoint": "last"}}, whole])
    assert done.returncode == 0, done.stdout
    assert "from checkpoint-4, step 4" in done.stdout
    assert (tmp_path / "out" / ADAPTER).read_bytes() == (tmp_path / "whole" / ADAPTER).read_bytes()


def test_the_launcher_starts_again_and_the_run_goes_on(rows: Path, tmp_path: Path) -> None:
    options = settings(rows, tmp_path / "out", save_steps=4)
    fault = {"kind": "kill", "rank": 0, "step": 6}
    done = torchrun(tmp_path, [{"options": options, "fault": fault}], "--max-restarts", "1")
    assert done.returncode == 0, done.stdout
    assert "number 1 by the launcher: the run goes on" in done.stdout
    assert "from checkpoint-4, step 4" in done.stdout
    train(**{**options, "output_dir": str(tmp_path / "one"), "per_device_train_batch_size": 8})
    assert_same_run(tmp_path / "one", tmp_path / "out")


def test_a_signal_to_one_rank_saves_one_checkpoint(rows: Path, tmp_path: Path) -> None:
    options = settings(rows, tmp_path / "out")
    fault = {"kind": "stop", "rank": 1, "step": 6}
    done = torchrun(tmp_path, [{"options": options, "fault": fault}])
    assert done.stdout.count(f"stopped after step 5; checkpoint: {tmp_path / 'out' / 'checkpoint-5'}") == 1, done.stdout
    assert exit_codes(done.stdout) == [143, 143]
    names = {p.name for p in (tmp_path / "out" / "checkpoint-5").iterdir()}
    assert {"random.json", "random-1.json"} <= names


def test_a_bad_row_is_said_once_before_a_model_is_loaded(tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"instruction": "a", "output": "b"}\n{"instruction": 1}\n', encoding="utf-8")
    done = torchrun(tmp_path, [{"options": settings(bad, tmp_path / "out")}])
    assert done.stdout.count("error: ") == 1, done.stdout
    assert "bad.jsonl:2" in done.stdout
    assert exit_codes(done.stdout) == [2, 2]
    assert not (tmp_path / "out").exists()


def test_a_bad_row_of_a_stream_ends_all_with_its_line(tmp_path: Path) -> None:
    bad = write_rows(tmp_path / "bad.jsonl", 30)
    with open(bad, "a", encoding="utf-8") as file:
        file.write('{"instruction": 1}\n')  # in one rank's share of the fourth step
    options = settings(bad, tmp_path / "out", streaming=True, streaming_window=8, max_steps=8)
    done = torchrun(tmp_path, [{"options": options}])
    assert done.stdout.count("error: ") == 1, done.stdout
    assert "bad.jsonl:31" in done.stdout
    assert "stopped after step 3; checkpoint: " in done.stdout
    assert exit_codes(done.stdout) == [2, 2]
    assert processes_of(tmp_path) == []
