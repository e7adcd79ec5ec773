"""Seconds a step and peak memory, against what a user would pick instead, on the same rows in one sitting.

    python benchmarks/step_time.py --data rows.jsonl --ours-only
    python benchmarks/step_time.py --data rows.jsonl --peer-script peer_step_time.py --peer-python PEER/bin/python

Each side is a process of its own: SmolLM2-135M, bfloat16, LoRA rank 8 and alpha 32 on all linear layers, batch 16,
learning rate 1e-4, the first steps x batch rows of the file. `--peer-script` is a program with the options --peer
(trl, best, seed), --model, --data, --steps and --batch that prints a JSON line a step and a last one with the median;
it runs in an environment of its own that holds the peer. Both sides get the same allocator settings.

Prints one JSON line a side: median, minimum and processor seconds of the steps after the first three, peak resident
memory, and for ours the tokens behind them and the gradient norm; then one line with the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WARM_UP = 3
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "99999999999"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tree", choices=["on", "off"], default="on")
    parser.add_argument("--ours-only", action="store_true")
    parser.add_argument("--peers", nargs="+", default=["trl", "best", "seed"])
    parser.add_argument("--peer-script", type=Path)
    parser.add_argument("--peer-tokens", action="store_true", help="give the peer ids and labels: peer_tokens.py")
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--train-option", nargs="*", default=[], help="further options of ours, as lora_forward=peft")
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.in_process:
        print(json.dumps(ours(args)), flush=True)
        return
    lines = [run([sys.executable, __file__, *sys.argv[1:], "--in-process"])]
    if not args.ours_only:
        if args.peer_script is None:
            parser.error("--peer-script is needed, or --ours-only")
        from espalier.model.load import resolve_model

        data = tokens_of(args) if args.peer_tokens else args.data
        common = ["--model", str(resolve_model(args.model).path), "--data", str(data)]
        common += ["--steps", str(args.steps), "--batch", str(args.batch)]
        for peer in args.peers:
            try:
                lines.append(run([args.peer_python, str(args.peer_script), "--peer", peer, *common]))
            except subprocess.CalledProcessError as error:
                print(
                    json.dumps({"peer": peer, "data": args.data.name, "error": f"exit {error.returncode}"}), flush=True
                )
        mine = lines[0]
        ratios = {
            line["peer"]: {
                "times_faster": round(line["median_seconds"] / mine["median_seconds"], 2),
                "memory_share": round(mine["peak_rss_gib"] / line["peak_rss_gib"], 3),
            }
            for line in lines[1:]
        }
        print(json.dumps({"ratios": ratios}), flush=True)


def tokens_of(args: argparse.Namespace) -> Path:
    """A file with the ids and labels of the rows that are run, for a peer that cannot lay them out."""
    from rows import encoded_rows

    path = Path(tempfile.mkdtemp()) / "tokens.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for _, row in zip(range(args.steps * args.batch), encoded_rows(args.data, args.model), strict=False):
            file.write(json.dumps({"input_ids": row.input_ids.tolist(), "labels": row.labels.tolist()}) + "\n")
    return path


def run(command: list[str]) -> dict[str, Any]:
    """The last JSON line that a process prints, which is printed here too."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **ALLOCATOR}, check=True)
    last: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(last), flush=True)
    return last


def ours(args: argparse.Namespace) -> dict[str, Any]:
    """`espalier.train` on the rows, with a callback that takes the time of each step."""
    from transformers import TrainerCallback

    import espalier.training.run as training_run
    from espalier.config import RunConfig

    times: list[tuple[float, float]] = []
    work: list[tuple[int, int, int]] = []  # unique tokens, (query, key) pairs, positions with a label

    class StepTimes(TrainerCallback):
        def __init__(self, trainer: Any):
            self.trainer = trainer

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.start = time.perf_counter(), time.process_time()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append((time.perf_counter() - self.start[0], time.process_time() - self.start[1]))
            packs = self.trainer._batch.packs
            pairs, labels = sum(pack.num_pairs for pack in packs), sum(len(pack.target_ids) for pack in packs)
            work.append((sum(pack.num_tokens for pack in packs), pairs, labels))

    build = training_run.build_trainer

    def build_with_times(*given: Any) -> Any:
        trainer = build(*given)
        trainer.add_callback(StepTimes(trainer))
        return trainer

    training_run.build_trainer = build_with_times
    from rich.console import Console

    with tempfile.TemporaryDirectory() as scratch:
        rows = Path(scratch) / "rows.jsonl"
        with open(args.data, encoding="utf-8") as file:
            lines = [line for line, _ in zip(file, range(args.steps * args.batch), strict=False)]
        rows.write_text("".join(lines), encoding="utf-8")
        options: dict[str, Any] = dict(option.split("=", 1) for option in args.train_option)
        config = RunConfig(
            dataset_path=[str(rows)],
            model_path=args.model,
            output_dir=str(Path(scratch) / "run"),
            max_steps=args.steps,
            per_device_train_batch_size=args.batch,
            logging_steps=1.0,
            save_strategy="no",
            self_check="off",
            tree=args.tree,
            **{name: int(value) if value.isdigit() else value for name, value in options.items()},
        )
        training_run.train(config, console=Console(stderr=True, highlight=False))
        log = [json.loads(line) for line in (Path(scratch) / "run" / "metrics.jsonl").read_text().splitlines()]
    late, late_log = times[WARM_UP:] or times, log[WARM_UP:] or log
    seconds = sum(wall for wall, _ in late)

    def rate(name: str) -> float:
        return round(sum(entry[name] for entry in late_log) / seconds, 1)

    return {
        "peer": "espalier" if args.tree == "on" else "espalier --tree off",
        "data": args.data.name,
        "median_seconds": round(statistics.median(wall for wall, _ in late), 2),
        "min_seconds": round(min(wall for wall, _ in late), 2),
        "unique_tokens": statistics.median(tokens for tokens, _, _ in work[WARM_UP:] or work),
        "attention_pairs": statistics.median(pairs for _, pairs, _ in work[WARM_UP:] or work),
        "label_positions": statistics.median(labels for _, _, labels in work[WARM_UP:] or work),
        "median_cpu_seconds": round(statistics.median(cpu for _, cpu in late), 2),
        "peak_rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "prompt_share": round(1 - rate("unique_tokens") / rate("logical_tokens"), 4),
        "rows_per_second": round(args.batch * len(late) / seconds, 2),
        "supervised_tokens_per_second": rate("supervised_tokens"),
        "logical_tokens_per_second": rate("logical_tokens"),
        "unique_tokens_per_second": rate("unique_tokens"),
        "grad_norm": [round(entry["grad_norm"], 4) for entry in log],
        "loss": [round(entry["loss"], 4) for entry in log],
    }


if __name__ == "__main__":
    main()
