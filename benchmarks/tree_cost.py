"""Claim: behind a fixed prompt, a step costs a straight line in the number of rows: the cost of their own tokens.

    python benchmarks/tree_cost.py [--prompt 512] [--own 32] [--rows 8,16,32,64,128,256] [--svg tree_cost.svg]

A random Llama (hidden 256, 4 layers, LoRA r 8) takes steps of rows that share `prompt` tokens and have `own` each.
The same rows without the prompt (one shared token) give the slope of the rows' own tokens, and plain padded rows
the cost without a tree. Prints one JSON line a size (median processor seconds of all threads, which other work on the
machine disturbs less than wall time) and one line with both fits.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from espalier.encode.encode import IGNORE_INDEX, Encoded
from espalier.tree.collate import to_tensors
from espalier.tree.loss import plain_loss, tree_loss
from espalier.tree.plan import plan_step
from line_chart import draw

VOCABULARY = 8192


def build_model() -> torch.nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    model = get_peft_model(
        LlamaForCausalLM(config), LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    return model.train()


def build_rows(count: int, prompt: int, own: int) -> list[Encoded]:
    """Rows of prompt + own computed tokens; the first own token differs, the last half of them is learnt."""
    rng = np.random.default_rng(count)
    shared = rng.integers(3, VOCABULARY, prompt)
    rows = []
    for number in range(count):
        ids = np.concatenate([shared, [number + 3], rng.integers(3, VOCABULARY, own)]).astype(np.int32)
        labels = np.full(len(ids), IGNORE_INDEX, np.int32)
        labels[-own // 2 :] = ids[-own // 2 :]
        rows.append(Encoded(ids, labels))
    return rows


def cost(step: Callable[[], torch.Tensor], repeats: int) -> float:
    """Median processor seconds of forward and backward, after one step of warming up."""
    seconds = []
    for _ in range(repeats + 1):
        begin = time.process_time()
        step().backward()
        seconds.append(time.process_time() - begin)
    return statistics.median(seconds[1:])


def tree_step(model: torch.nn.Module, rows: list[Encoded]) -> tuple[Callable[[], torch.Tensor], int]:
    plan = plan_step(rows, max_tokens=1 << 20, min_shared_tokens=1, min_saving=0.0)
    (tensors,) = (to_tensors(pack) for pack in plan.packs)
    return lambda: tree_loss(model, tensors, attention="merged").loss_sum, plan.unique_tokens


def fit(rows: list[int], seconds: list[float]) -> dict[str, float]:
    slope, offset = np.polyfit(rows, seconds, 1)
    residual = np.array(seconds) - (slope * np.array(rows) + offset)
    spread = np.array(seconds) - np.mean(seconds)
    return {
        "ms_a_row": round(1e3 * float(slope), 3),
        "ms_at_no_row": round(1e3 * float(offset), 1),
        "r_squared": round(1 - float((residual**2).sum() / (spread**2).sum()), 5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--own", type=int, default=32)
    parser.add_argument("--rows", default="8,16,32,64,128,256")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--plain_up_to", type=int, default=32, help="largest number of rows to compute plainly too")
    parser.add_argument("--svg", help="write a picture there")
    options = parser.parse_args()
    sizes = [int(size) for size in options.rows.split(",")]
    model = build_model()
    with_prompt, own_only = [], []
    for count in sizes:
        rows = build_rows(count, options.prompt, options.own)
        step, unique = tree_step(model, rows)
        with_prompt.append(cost(step, options.repeats))
        own_only.append(cost(tree_step(model, build_rows(count, 1, options.own))[0], options.repeats))
        line = {
            "rows": count,
            "unique_tokens": unique,
            "logical_tokens": sum(len(row.input_ids) for row in rows),
            "cpu_seconds": round(with_prompt[-1], 4),
            "cpu_seconds_own_tokens_alone": round(own_only[-1], 4),
        }
        if count <= options.plain_up_to:
            line["cpu_seconds_plain"] = round(cost(lambda rows=rows: plain_loss(model, rows, 0).loss_sum, 1), 4)
        print(json.dumps(line), flush=True)
    result = {
        "fit": fit(sizes, with_prompt),
        "fit_own_tokens_alone": fit(sizes, own_only),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(),
    }
    print(json.dumps(result))
    if options.svg:
        lines = {"behind the prompt": with_prompt, "own tokens alone": own_only}
        draw(options.svg, "rows a step", "processor seconds a step", sizes, lines)


if __name__ == "__main__":
    main()
