"""Two processes train what one process trains with the same rows a step: losses, gradient norms and adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from launch import assert_same_run, log_of, settings, torchrun

from espalier.training.run import train

# Rows of each step: 8. Of 33 rows, the last step of an epoch is a single one: a rank has none then.
EVALUATION = {"eval_fraction": 0.2, "eval_strategy": "steps", "eval_steps": 5, "per_device_eval_batch_size": 3}
KINDS: dict[str, dict[str, Any]] = {
    "unequal packs": {"max_tokens_per_pack": 48, **EVALUATION},
    "accumulation": {"gradient_accumulation_steps": 2},
    "padded rows": {"tree": "off"},
    "streaming": {"streaming": True, "streaming_window": 16, "max_steps": 4, "logging_steps": 0.25},
    "sharded streaming": {
        "fsdp": True,
        "self_check": "on",
        "streaming": True,
        "streaming_window": 16,
        "max_steps": 4,
        "logging_steps": 0.25,
    },
    "sharded": {"fsdp": True, "max_tokens_per_pack": 48, "self_check": "on", **EVALUATION},
    "sharded padded rows": {"fsdp": True, "tree": "off"},
    "skipped step": {"on_nonfinite": "skip"},
}


def write_rows(path: Path, count: int = 33) -> Path:
    """Alpaca rows: a few long prompts that many rows share, one that none does, answers of unequal lengths."""
    shared = "count the pears and the plums of the garden and say which are more, in the order of their number"
    rows = [
        {"instruction": f"{shared} {i % 3}" if i % 4 else f"say fig {i}", "output": " ".join(["fig"] * (1 + i % 5))}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with one-<kind> and two-<kind>: all kinds in one process, and all in one torchrun of two processes."""
    folder = tmp_path_factory.mktemp("equality")
    rows = write_rows(folder / "rows.jsonl")
    fault = {"skipped step": {"kind": "nan", "rank": 1, "step": 3}}
    entries = []
    for kind, options in KINDS.items():
        accumulation = options.get("gradient_accumulation_steps", 1)
        two = settings(rows, folder / f"two-{kind}", per_device_train_batch_size=4 // accumulation, **options)
        entries.append({"options": two, "fault": fault.get(kind)})
        one = {**two, "fsdp": False, "output_dir": str(folder / f"one-{kind}")}
        one["per_device_train_batch_size"] = 8 // accumulation
        if kind not in fault:
            train(**one)
    done = torchrun(folder, entries)
    assert done.returncode == 0, done.stdout
    (folder / "said").write_text(done.stdout, encoding="utf-8")
    return folder


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "skipped step" and "streaming" not in kind])
def test_two_ranks_match_one(kind: str, runs: Path) -> None:
    assert_same_run(runs / f"one-{kind}", runs / f"two-{kind}")


@pytest.mark.parametrize("kind", ["streaming", "sharded streaming"])
def test_two_ranks_stream_what_one_does(kind: str, runs: Path) -> None:
    one, two = (log_of(runs / f"{name}-{kind}") for name in ("one", "two"))
    assert [entry["supervised_tokens"] for entry in one] == [entry["supervised_tokens"] for entry in two]
    assert [entry["logical_tokens"] for entry in one] == [entry["logical_tokens"] for entry in two]
    for name in ("loss", "grad_norm"):
        assert [entry[name] for entry in one] == pytest.approx([entry[name] for entry in two], rel=1e-5, abs=1e-5)
    assert len(one) == 4


def test_a_bad_loss_on_one_rank_is_skipped_by_all(runs: Path) -> None:
    log = log_of(runs / "two-skipped step")
    assert [entry["step"] for entry in log if entry.get("nonfinite_steps")] == [3]
    assert all(0 < entry["loss"] < 100 for entry in log if "loss" in entry)
    said = (runs / "said").read_text(encoding="utf-8")
    assert said.count("step 3 is skipped (1 in a row, at most 5): the loss is nan on rank 1; rows: ") == 1


def test_rank_0_speaks_alone(runs: Path) -> None:
    said = (runs / "said").read_text(encoding="utf-8")
    assert said.count("espalier 0.") == len(KINDS)
    assert said.count("read back and equal") == len(KINDS)
    assert said.count("of 8 rows (4 x accumulation 1 x 2 processes)") == len(KINDS) - 1
    assert said.count("of 8 rows (2 x accumulation 2 x 2 processes)") == 1
    assert said.count(" in 2 pieces (FSDP2); embeddings, head and adapter whole on every process") == 3
    assert said.count("self-check on ") == 2
    assert said.count("step 10/10  loss") == len(KINDS) - 2  # the streams have 4 steps
