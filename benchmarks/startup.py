"""From the command to the end of step 1: where the time goes.

    python benchmarks/startup.py --data rows.jsonl [--model_path smollm2-135m] [further options of `espalier train`]

A first process fills the cache of encoded rows, a second one is timed, from its start by the operating system. Prints
the seconds of each stage: importing, preparing (config, tokenizer, rows), the base, the adapter and trainer, the
rehearsal of a checkpoint, the self-check, step 1.
"""

from __future__ import annotations

import argparse
import functools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BEGAN = "ESPALIER_STARTUP_BEGAN"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    args, options = parser.parse_known_args()
    if BEGAN in os.environ:
        timed(args.data, options, float(os.environ[BEGAN]))
        return
    for show in (False, True):
        environment = {**os.environ, BEGAN: str(time.time())}
        out = subprocess.run([sys.executable, *sys.argv], env=environment, check=True, capture_output=not show)
        assert out.returncode == 0


def timed(data: Path, options: list[str], began: float) -> None:
    """One step in this process, with a line for each stage."""
    stages: list[tuple[str, float, float]] = []
    last, last_cpu = began, 0.0

    def mark(name: str) -> None:
        nonlocal last, last_cpu
        now, now_cpu = time.time(), time.process_time()
        stages.append((name, now - last, now_cpu - last_cpu))
        last, last_cpu = now, now_cpu

    def after(owner: Any, function: str, name: str, before: str | None = None) -> None:
        original: Callable[..., Any] = getattr(owner, function)

        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if before:
                mark(before)
            result = original(*args, **kwargs)
            mark(name)
            return result

        setattr(owner, function, wrapped)

    from espalier.flags import parse_flags
    from espalier.model import load
    from espalier.runfile import build_config
    from espalier.training import rehearsal, run, trainer

    mark("import")
    after(run, "prepare", "prepare: config, tokenizer, rows")
    after(load, "load_model", "base")
    after(run, "build_trainer", "adapter and trainer")
    after(rehearsal, "rehearse", "rehearsal", before="companions, optimizer")
    after(trainer, "self_check", "self-check", before="first batch")
    after(trainer.LoraTrainer, "training_step", "step 1")
    with tempfile.TemporaryDirectory() as folder:
        given = ["--dataset_path", str(data), "--output_dir", f"{folder}/run", "--max_steps", "1", *options]
        raw, file = parse_flags(given)
        run.train(build_config(raw, file))
    total = 0.0
    print("seconds, their sum, processor seconds of all threads:")
    for name, seconds, cpu in stages:
        total += seconds
        print(f"{seconds:6.2f}  {total:6.2f}  {cpu:6.2f}  {name}")
        if name == "step 1":
            break


if __name__ == "__main__":
    main()
