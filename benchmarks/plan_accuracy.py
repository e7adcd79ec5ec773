"""`espalier plan` against the real peak of `espalier train`: three token budgets, with and without recomputation.

    python benchmarks/plan_accuracy.py --data rows.jsonl [--model smollm2-135m] [--steps 2] [--budgets 512 1024 2048]

Each run is a process of its own. Prints one line a run: predicted and real peak in GB, and their ratio.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--budgets", type=int, nargs="+", default=[512, 1024, 2048])
    args = parser.parse_args()
    for budget in args.budgets:
        for again in ([], ["--gradient_checkpointing"]):
            options = [
                "--dataset_path", args.data, "--model_path", args.model, "--bf16", "--max_steps", str(args.steps),
                "--max_tokens_per_pack", str(budget), "--save_strategy", "no", "--self_check", "off", *again,
            ]  # fmt: skip
            planned = json.loads(espalier("plan", *options, "--json"))["bytes"]["peak"] / 1e9
            with tempfile.TemporaryDirectory() as scratch:
                said = espalier("train", *options, "--output_dir", str(Path(scratch) / "run"))
            found = re.search(r"at most ([0-9.]+) GB were resident", said)
            assert found, said
            real = float(found[1])
            print(
                f"budget {budget:5}  recompute {'all ' if again else 'none'}  planned {planned:.2f} GB  "
                f"real {real:.2f} GB  {100 * (planned / real - 1):+.1f} %",
                flush=True,
            )


def espalier(*arguments: str) -> str:
    """Standard output of one command, which must succeed (a plan that does not fit ends with 1)."""
    done = subprocess.run([sys.executable, "-m", "espalier", *arguments], capture_output=True, text=True)
    if not done.stdout or "Traceback" in done.stderr:
        raise SystemExit(done.stderr)
    return done.stdout


if __name__ == "__main__":
    main()
