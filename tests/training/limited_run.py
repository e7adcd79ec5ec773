"""Runs under a real limit on a process's memory (RLIMIT_DATA), in a process of their own: `limited_run.py FOLDER`.

plain: no limit. planned: a limit below what the header predicts. forward, backward: nothing is predicted, and an
allocation really fails there. resumed: "forward", stopped and then allowed more. "forward" tries its largest step
before step 1, "backward" does not. Prints one JSON object.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from small_runs import log_of, run
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from espalier.model.hardware import data_bytes
from espalier.training import memory_plan
from espalier.training.memory_guard import MemoryGuard
from espalier.training.trainer import LoraTrainer

TOKENIZER = Path(__file__).parent.parent / "cases" / "_shared" / "tiny-llama"
STEPS = 4
seen: dict[str, Any] = {}


def make_model(folder: Path) -> Path:
    """Two wide layers: what a step keeps is a hundred times the model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=340, hidden_size=64, intermediate_size=2048, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=1024,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
    return folder


def make_rows(file: Path) -> Path:
    """Rows of about one length that share little, so that all steps are alike."""
    words = ("pear", "fig", "plum", "kiwi", "lime", "date")
    texts = [f"{100 + i} " + " ".join(words[(i * (k + 3) + k * k) % 6] for k in range(40)) for i in range(36)]
    rows = [{"instruction": text, "output": words[i % 6] * 3} for i, text in enumerate(texts)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def watch(*, once: bool = False) -> None:
    """Note what is mapped when a run's training begins and after the forward of a part, and where a part failed.

    once: the limit holds until a part has failed.
    """
    start, part_loss, smaller = MemoryGuard.start, LoraTrainer.part_loss, MemoryGuard.smaller

    def see_start(self: MemoryGuard, model: Any) -> None:
        start(self, model)
        seen.update(held=data_bytes(), forward=0, failed_in=[], predicted=self.said)

    def see_forward(self: LoraTrainer, model: Any, part: Any) -> Any:
        seen["in_backward"] = False
        output = part_loss(self, model, part)
        seen["in_backward"] = True
        seen["forward"] = max(seen["forward"], data_bytes())
        return output

    def see_failure(self: MemoryGuard, *args: Any) -> Any:
        seen["failed_in"].append("backward" if seen["in_backward"] else "forward")
        if once:
            self.limit = None  # or chance decides at which step the heap is too full again
        return smaller(self, *args)

    MemoryGuard.start, LoraTrainer.part_loss, MemoryGuard.smaller = see_start, see_forward, see_failure  # type: ignore[method-assign]


def one_run(
    folder: Path, name: str, *, room: int | None = None, try_largest: bool = True, **options: Any
) -> dict[str, Any]:
    """A run in a fork, so that all begin with the same memory. room: bytes that it may take more than it has when its
    training begins; it then predicts nothing, and allocations really fail. try_largest: before step 1."""
    child = os.fork()
    if child == 0:
        try:
            (folder / f"{name}.json").write_text(
                json.dumps(_run(folder, name, room, try_largest, options)), encoding="utf-8"
            )
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    found: dict[str, Any] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return found


def _run(folder: Path, name: str, room: int | None, try_largest: bool, options: dict[str, Any]) -> dict[str, Any]:
    if room is not None:
        start = MemoryGuard.start

        def limited_start(self: MemoryGuard, model: Any) -> None:
            start(self, model)
            self.limit = self.held + room
            self.largest = self.largest if try_largest else None

        def not_predicted(*args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError("a test")

        MemoryGuard.start = limited_start  # type: ignore[method-assign]
        memory_plan.MemoryModel = not_predicted  # type: ignore[assignment,misc]
    watch(once=try_largest)
    _, said = run(
        folder / "model", folder / "rows.jsonl", folder / name, max_steps=STEPS, save_steps=1,
        per_device_train_batch_size=12, **options,
    )  # fmt: skip
    plans = [
        json.loads((folder / name / f"checkpoint-{step}" / "progress.json").read_text())["memory"]
        for step in range(1, STEPS + 1)
    ]
    losses = [entry["loss"] for entry in log_of(folder / name) if "loss" in entry]
    return {"losses": losses, "said": said, "plans": plans, **seen}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    make_model(folder / "model")
    make_rows(folder / "rows.jsonl")
    plain = one_run(folder, "plain")
    limit = f"{(plain['predicted'] - 30_000_000) // 1000}KB"  # of some 110 MB that the largest step takes
    found = {"plain": plain, "planned": one_run(folder, "planned", memory_limit=limit)}
    kept = plain["forward"] - plain["held"]  # most that is mapped after a forward
    found["forward"] = one_run(folder, "forward", room=int(0.6 * kept))
    for percent in range(125, 95, -5):  # how much the backward takes on top differs from machine to machine
        found["backward"] = one_run(folder, f"backward-{percent}", room=kept * percent // 100, try_largest=False)
        if found["backward"]["failed_in"][:1] == ["backward"]:
            break
    shutil.copytree(folder / "forward", folder / "resumed")
    plans = found["forward"]["plans"]
    stop = 1 + plans.index(plans[-1])  # memory is what it is: the step after which the plan stayed as it was
    for step in range(stop + 1, STEPS + 1):
        shutil.rmtree(folder / "resumed" / f"checkpoint-{step}")
    (folder / "resumed" / "adapter_model.safetensors").unlink()
    found["resumed"] = one_run(folder, "resumed", room=2 * kept, resume_from_checkpoint="last")
    found["resumed"]["stop"] = stop
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
