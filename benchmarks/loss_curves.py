"""Claim: trained by the tree, a model takes the same course as by plain padded rows, within bfloat16's own spread.

    python benchmarks/loss_curves.py --data rows.jsonl [--steps 100] [--batch 4] [--svg curves.svg]

Trains SmolLM2-135M in bfloat16 three times from the same start on the same rows a step: by the tree, by plain padded
rows, and by plain rows once more with the rows of each batch in reverse order. What the two plain runs differ by is
the spread of the precision itself. The last 64 rows of the file are held out. Prints a JSON line a run, then one with
the differences (largest and mean over the steps, and of the held-out loss).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

import espalier.training.run as training_run
from espalier.config import RunConfig
from espalier.encode.encode import Encoded
from espalier.training.step import StepBatch, StepCollator
from line_chart import draw

HELD_OUT = 64


class Reversed(StepCollator):
    """The rows of each step from the last to the first."""

    def __call__(self, rows: Sequence[Encoded]) -> StepBatch:
        return super().__call__(rows[::-1])


def curve(name: str, data: Path, heldout: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Losses of one run, and its held-out loss at the end."""
    build = training_run.build_trainer

    def build_reversed(*given: Any) -> Any:
        trainer = build(*given)
        trainer.data_collator = Reversed(trainer.options, trainer.micro_batch_rows)
        return trainer

    if name == "plain, rows reversed":
        training_run.build_trainer = build_reversed
    with tempfile.TemporaryDirectory() as scratch:
        config = RunConfig(
            dataset_path=[str(data)],
            eval_dataset_path=[str(heldout)],
            eval_strategy="steps",
            eval_steps=float(args.steps),
            output_dir=str(Path(scratch) / "run"),
            max_steps=args.steps,
            per_device_train_batch_size=args.batch,
            logging_steps=1.0,
            save_strategy="no",
            self_check="off",
            tree="on" if name == "tree" else "off",
        )
        training_run.train(config, console=Console(stderr=True, highlight=False))
        log = [json.loads(line) for line in (Path(scratch) / "run" / "metrics.jsonl").read_text().splitlines()]
    training_run.build_trainer = build
    result = {
        "run": name,
        "heldout_loss": next(entry["eval_loss"] for entry in log if "eval_loss" in entry),
        "loss": [entry["loss"] for entry in log if "loss" in entry],
        "grad_norm": [round(entry["grad_norm"], 5) for entry in log if "loss" in entry],
    }
    print(json.dumps(result), flush=True)
    return result


def difference(one: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """How far two runs are apart."""
    gaps = [abs(a - b) for a, b in zip(one["loss"], other["loss"], strict=True)]
    heldout = abs(one["heldout_loss"] - other["heldout_loss"])
    return {"largest": max(gaps), "mean": statistics.fmean(gaps), "heldout": heldout}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--svg")
    args = parser.parse_args()
    lines = args.data.read_text(encoding="utf-8").splitlines(keepends=True)
    with tempfile.TemporaryDirectory() as scratch:
        data, heldout = Path(scratch) / "train.jsonl", Path(scratch) / "heldout.jsonl"
        data.write_text("".join(lines[: args.steps * args.batch]), encoding="utf-8")
        heldout.write_text("".join(lines[-HELD_OUT:]), encoding="utf-8")
        names = ("tree", "plain", "plain, rows reversed")
        runs = {name: curve(name, data, heldout, args) for name in names}
    tree, plain, reverse = (runs[name] for name in names)
    spread, gap = difference(plain, reverse), difference(tree, plain)
    print(json.dumps({"plain against plain": spread, "tree against plain": gap}))
    if args.svg:
        steps = list(range(1, args.steps + 1))
        draw(args.svg, "step", "loss", steps, {name: run["loss"] for name, run in runs.items()})


if __name__ == "__main__":
    main()
