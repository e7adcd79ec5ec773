"""Write the files of tests/golden: 20 steps of a tiny model in float32 on one thread, and the help of train."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch

root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root / "tests" / "training"))

from small_runs import log_of, run, write_rows  # noqa: E402

torch.set_num_threads(1)
with tempfile.TemporaryDirectory() as scratch:
    folder = Path(scratch)
    run(
        root / "tests" / "cases" / "_shared" / "tiny-llama",
        write_rows(folder / "rows.jsonl"),
        folder / "out",
        max_steps=20,
    )
    log = log_of(folder / "out")
names = ("loss", "learning_rate", "supervised_tokens")
curve = {name: [entry[name] for entry in log] for name in names}
(root / "tests" / "golden" / "loss_curve.json").write_text(json.dumps(curve, indent=1) + "\n")

from typer.testing import CliRunner  # noqa: E402

from espalier.cli import app  # noqa: E402

text = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "100", "TERM": "dumb"}).output
(root / "tests" / "golden" / "train_help.txt").write_text(text, encoding="utf-8")
