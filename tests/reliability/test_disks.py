"""A full disk, a folder that cannot be written to, a folder that vanishes: the run lives, and nothing is lost.

The disk is a tmpfs of a few hundred kilobytes, mounted for the test; skipped where mounting is not permitted.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from espalier.errors import RunFolderError, TrainingError
from espalier.training import run as run_module
from espalier.training.checkpoint import damage
from reliability.small import in_process, log_of, write_rows

ADAPTER = "adapter_model.safetensors"


def mount(*arguments: str) -> str | None:
    """None, or why it is not permitted."""
    if shutil.which("mount") is None or not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "mounting a tmpfs needs root"
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else f"mount: {done.stderr.strip()}"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 600 kB: room for a few checkpoints of about 90 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    problem = mount("-t", "tmpfs", "-o", "size=600k", "tmpfs", str(folder))
    if problem:
        pytest.skip(problem)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


class AtStep(TrainerCallback):
    """Does something at the end of given steps, before the step is saved."""

    def __init__(self, deeds: dict[int, Callable[[], Any]]):
        self.deeds = deeds

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.deeds:
            self.deeds[state.global_step]()


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[int, Callable[[], Any]]], None]:
    """Make the next run do things at the end of given steps."""
    build = run_module.build_trainer

    def arrange(deeds: dict[int, Callable[[], Any]]) -> None:
        def with_deeds(*arguments: Any) -> Any:
            trainer = build(*arguments)
            trainer.add_callback(AtStep(deeds))
            return trainer

        monkeypatch.setattr(run_module, "build_trainer", with_deeds)

    return arrange


def fill(folder: Path) -> None:
    """Take all the room there is, to the last byte."""
    with open(folder / "filler", "wb", buffering=0) as handle:
        for size in (4096, 1):
            try:
                while True:
                    handle.write(b"x" * size)
            except OSError:
                continue


def steps_of(folder: Path) -> list[int]:
    return sorted(int(p.name.split("-")[1]) for p in folder.glob("checkpoint-*"))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl")


@pytest.fixture
def whole(rows: Path, tmp_path: Path) -> bytes:
    """The adapter's bytes of a run with all the room it wants."""
    in_process(rows, tmp_path / "whole", max_steps=6, save_steps=2)
    return (tmp_path / "whole" / ADAPTER).read_bytes()


def test_full_disk_at_a_save(disk: Path, rows: Path, whole: bytes, at_step: Any) -> None:
    out = disk / "out"
    at_step({3: lambda: fill(disk), 5: (disk / "filler").unlink})
    _, said = in_process(rows, out, max_steps=6, save_steps=2, save_total_limit=2)
    assert steps_of(out) == [2, 6]
    assert damage(out / "checkpoint-2") is None
    assert damage(out / "checkpoint-6") is None
    assert (
        f"warning: {out}: the checkpoint of step 4 could not be saved: No space left on device\n"
        "  The last whole checkpoint is checkpoint-2.\n"
        "  The run goes on, and tries again at the next save."
    ) in said
    assert said.count("could not be saved") == 1
    assert (out / ADAPTER).read_bytes() == whole
    assert [entry["step"] for entry in log_of(out)] == [1, 2, 3, 4, 5, 6]  # lines that did not fit were kept
    assert not list(out.glob(".*"))


def test_full_disk_at_the_end(disk: Path, rows: Path, whole: bytes, at_step: Any) -> None:
    out = disk / "out"
    at_step({5: lambda: fill(disk)})
    with pytest.raises(TrainingError) as error:
        in_process(rows, out, max_steps=6, save_steps=2)
    assert error.value.exit_code == 1
    assert str(error.value) == (
        f"{out}: all 6 steps are done, but the adapter could not be saved: No space left on device\n"
        "  The last whole checkpoint is checkpoint-4. Make room, then: "
        f"espalier train --config {out / 'run.yaml'} --resume_from_checkpoint last"
    )
    assert steps_of(out) == [2, 4]
    assert damage(out / "checkpoint-4") is None
    (disk / "filler").unlink()
    at_step({})
    in_process(rows, out, max_steps=6, save_steps=2, resume_from_checkpoint="last")
    assert (out / ADAPTER).read_bytes() == whole


def test_read_only_folder(disk: Path, rows: Path, whole: bytes, at_step: Any) -> None:
    """A read-only file system comes to lie over the folder: a real remount is refused while the run's lock is open."""
    out = disk / "out"
    at_step(
        {
            3: lambda: mount("-t", "tmpfs", "-o", "ro", "tmpfs", str(out)),
            5: lambda: subprocess.run(["umount", str(out)], check=True),
        }
    )
    _, said = in_process(rows, out, max_steps=6, save_steps=2)
    assert "the checkpoint of step 4 could not be saved: Read-only file system" in said
    assert steps_of(out) == [2, 6]
    assert (out / ADAPTER).read_bytes() == whole


def test_no_room_is_found_out_before_step_1(disk: Path, rows: Path, at_step: Any) -> None:
    (disk / "other").write_bytes(b"x" * 480_000)
    with pytest.raises(RunFolderError) as error:
        in_process(rows, disk / "out", max_steps=6, save_steps=2)
    assert "tried before step 1: No space left on device" in str(error.value) or "MB are free" in str(error.value)
    assert not list(disk.glob("out/*"))


def test_vanished_folder(rows: Path, tmp_path: Path, whole: bytes, at_step: Any) -> None:
    """Mid-run a warning, and the next save finds the folder again; at the end the adapter is saved all the same."""
    out, away = tmp_path / "out", tmp_path / "away"
    at_step({3: lambda: out.rename(away), 5: lambda: away.rename(out)})
    _, said = in_process(rows, out, max_steps=6, save_steps=2)
    assert "the checkpoint of step 4 could not be saved: the run's folder is gone" in said
    assert steps_of(out) == [2, 6]
    assert (out / ADAPTER).read_bytes() == whole


def test_folder_that_stays_away(rows: Path, tmp_path: Path, whole: bytes, at_step: Any) -> None:
    out = tmp_path / "out"
    at_step({3: lambda: shutil.rmtree(out)})
    in_process(rows, out, max_steps=6, save_steps=2)
    assert (out / ADAPTER).read_bytes() == whole
    assert (out / "tokenizer.json").is_file()


def test_two_runs_into_one_folder(rows: Path, tmp_path: Path, at_step: Any) -> None:
    out, refused = tmp_path / "out", []

    def second_run() -> None:
        with pytest.raises(RunFolderError) as error:
            in_process(rows, out, max_steps=6, resume_from_checkpoint="last")
        refused.append(error.value.what)

    at_step({3: second_run})
    in_process(rows, out, max_steps=6)
    assert refused == ["another run is writing to this folder"]
