"""TRL's SFTTrainer on rows that are tokens already, for rows that peer scripts cannot lay out alike (several turns).

    PEER/bin/python benchmarks/peer_tokens.py --peer trl --model DIR --data TOKENS.jsonl --steps 8 --batch 4

TOKENS.jsonl holds {"input_ids": [...], "labels": [...]}, as `step_time.py --peer-tokens` writes them; runs in an
environment that holds TRL, and is called by `step_time.py --peer-script`. TRL's own defaults but for what is compared:
rank 8, alpha 32 on all linear layers, learning rate 1e-4, loss at the labels alone. Prints what step_time.py reads.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

WARM_UP = 3


class StepTimes(TrainerCallback):
    """Wall seconds of each step."""

    def __init__(self) -> None:
        self.steps: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps.append(time.perf_counter() - self.start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=["trl"], default="trl")
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4)
    args = parser.parse_args()
    torch.manual_seed(0)
    with open(args.data, encoding="utf-8") as file:
        rows = [json.loads(line) for _, line in zip(range(args.steps * args.batch), file, strict=False)]
    columns = [
        {"input_ids": row["input_ids"], "completion_mask": [int(label >= 0) for label in row["labels"]]} for row in rows
    ]
    times = StepTimes()
    with tempfile.TemporaryDirectory() as scratch:
        settings = SFTConfig(
            output_dir=scratch,
            per_device_train_batch_size=args.batch,
            max_steps=args.steps,
            learning_rate=1e-4,
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            max_length=None,
            completion_only_loss=True,
        )
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16),
            args=settings,
            train_dataset=Dataset.from_list(columns),
            processing_class=AutoTokenizer.from_pretrained(args.model),
            peft_config=LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=32, target_modules="all-linear"),
            callbacks=[times],
        )
        trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    line = {
        "peer": args.peer,
        "median_seconds": round(statistics.median(times.steps[WARM_UP:] or times.steps), 2),
        "peak_rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "loss": [round(float(entry["loss"]), 4) for entry in log],
        "grad_norm": [round(float(entry["grad_norm"]), 4) for entry in log],
    }
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
