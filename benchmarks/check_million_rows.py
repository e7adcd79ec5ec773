"""Claim: `espalier check` finds the one cut row of a million by its line, in under 60 s and 500 MiB on 2 cores.

    python benchmarks/check_million_rows.py [--rows 1000000] [--bad_line 654321]

Writes a JSON Lines file of rows of about 200 bytes into a temporary folder and reads it, one after the other in fresh
processes, with ours and with `datasets.load_dataset`. Prints one JSON object a line: seconds of wall time (imports
included), processor seconds, peak resident memory in MiB (the largest of the process and its children), and what was
said.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time

OURS = """
import sys
from espalier.data.check import check_files, exit_code
report = check_files([sys.argv[1]])
said = {"read": report.read, "kept": report.kept, "exit_code": exit_code(report)}
said["left_out"] = [f"line {row.line}: {row.reason}" for row in report.left_out]
said["warnings"] = [warning.kind for warning in report.warnings]
"""
THEIRS = """
import sys, datasets
datasets.disable_progress_bars()
try:
    rows = datasets.load_dataset("json", data_files=sys.argv[1], split="train", cache_dir=sys.argv[2])
    said = {"rows": len(rows)}
except Exception as error:
    cause = error.__cause__ or error
    said = {"error": f"{type(cause).__name__}: {cause}"[:300]}
"""
MEASURE = """
import resource, json
used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
cpu = sum(one.ru_utime + one.ru_stime for one in used)
peak = max(one.ru_maxrss for one in used)
print(json.dumps({"cpu_seconds": round(cpu, 1), "peak_mib": round(peak / 1024, 1), "said": said}))
"""


def write_rows(path: str, rows: int, bad_line: int) -> None:
    """Rows of about 200 bytes; the one at `bad_line` (1-based) is cut inside its answer."""
    chance = random.Random(0)
    words = ["how", "many", "red", "blue", "tickets", "the", "small", "shop", "sells", "before", "noon", "with", "rain"]
    with open(path, "w", encoding="utf-8") as file:
        for line in range(1, rows + 1):
            question, answer = (" ".join(chance.choices(words, k=count)) for count in (10, 18))
            text = json.dumps({"instruction": f"{line}. {question}?", "input": "", "output": f"{answer}."})
            file.write((text[:-20] if line == bad_line else text) + "\n")


def measure(name: str, code: str, arguments: list[str]) -> dict[str, object]:
    """Runs the code in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code + MEASURE, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - start
    if done.returncode:
        return {"tool": name, "seconds": round(seconds, 1), "failed": done.stderr.strip()[-300:]}
    return {"tool": name, "seconds": round(seconds, 1), **json.loads(done.stdout.splitlines()[-1])}


def main() -> None:
    """Generates, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--bad_line", type=int, default=654_321)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="espalier-bench-") as folder:
        path = os.path.join(folder, "rows.jsonl")
        write_rows(path, options.rows, options.bad_line)
        facts = {"rows": options.rows, "bytes": os.path.getsize(path), "bad_line": options.bad_line}
        print(json.dumps({**facts, "cores": os.cpu_count(), "python": platform.python_version()}), flush=True)
        print(json.dumps(measure("espalier check", OURS, [path])), flush=True)
        print(json.dumps(measure("datasets.load_dataset", THEIRS, [path, folder])), flush=True)


if __name__ == "__main__":
    main()
