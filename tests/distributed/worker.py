"""What each process of a test's torchrun does: runs from a JSON file, with a fault on one rank where it asks for one.

    torchrun --nproc_per_node 2 worker.py runs.json

runs.json: a list of {"options": {...}, "fault": {...}, "rows": FOLDER}. A fault is put into `LoraTrainer.part_loss` of
one rank, at one step: kind "error" (a DataError that names a row), "memory", "nan", "kill" (SIGKILL), "stop" (SIGTERM
to itself) or "slow" (a second's pause); rank or step null: every one. Where `rows` is given, each rank appends to
FOLDER/rank-<rank> the line numbers of its rows of each step that it has computed.
A fault holds for the launcher's first attempt only.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from typing import Any

import torch

from espalier.cli import main
from espalier.errors import DataError
from espalier.training.run import train
from espalier.training.trainer import LoraTrainer

plain_part_loss = LoraTrainer.part_loss
plain_training_step = LoraTrainer.training_step
RANK = int(os.environ.get("RANK", "0"))


def with_fault(fault: dict[str, Any]) -> Any:
    """`part_loss` that fails as the fault says."""

    def part_loss(self: LoraTrainer, model: Any, part: Any) -> Any:
        output = plain_part_loss(self, model, part)
        here = fault["rank"] in (RANK, None) and fault["step"] in (self.state.global_step + 1, None)
        if not here or not model.training:
            return output
        kind = fault["kind"]
        if kind == "slow":
            time.sleep(1.0)
        if kind == "error":
            raise DataError("the row cannot be used", where="rows.jsonl:7", todo="Mend it.")
        if kind == "memory":
            raise torch.OutOfMemoryError("out of memory: tried to allocate 2 GiB")
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "stop":
            os.kill(os.getpid(), signal.SIGTERM)
        if kind == "nan":
            object.__setattr__(output, "loss_sum", output.loss_sum * float("nan"))
        return output

    return part_loss


def with_record(folder: str) -> Any:
    """`training_step` that writes down which rows it has computed."""

    def training_step(self: LoraTrainer, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        loss = plain_training_step(self, model, inputs, num_items_in_batch)
        with open(os.path.join(folder, f"rank-{RANK}"), "a", encoding="utf-8") as file:
            file.write(json.dumps([self.state.global_step + 1, [row.line for row in inputs.rows]]) + "\n")
        return loss

    return training_step


def run_all(runs: list[dict[str, Any]]) -> None:
    """The runs of the file, one after the other in these processes."""
    torch.set_num_threads(1)
    for entry in runs:
        fault = entry.get("fault")
        holds = fault is not None and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        LoraTrainer.part_loss = with_fault(fault) if holds else plain_part_loss  # type: ignore[method-assign]
        if entry.get("rows"):
            LoraTrainer.training_step = with_record(entry["rows"])  # type: ignore[method-assign]
        train(**entry["options"])


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as handle:
        wanted = json.load(handle)
    # Through the command's own `main`: what it prints of an error, and its exit code.
    main(lambda: run_all(wanted))
