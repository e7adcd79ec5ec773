"""Greedy answers for held-out rows: espalier's batched generation against model.generate in a loop over the rows.

Both use the same base and adapter, the same prompts, stop tokens and max_new_tokens; the loop keeps its key-value
cache. The answers are compared token by token.

    python benchmarks/evaluate_speed.py --adapter runs/demo --rows examples/triage/heldout.jsonl [--fp32]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from espalier.model.fast_lora import fast_lora
from espalier.model.load import choose_device, choose_dtype, load_model
from espalier.model.load_adapter import load_adapter
from espalier.training.report import Header
from espalier.use.evaluate import open_evaluation
from espalier.use.generate import generate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--rows", required=True)
    parser.add_argument("--max_new_tokens", type=int, default=24)
    parser.add_argument("--limit", type=int, default=None, help="so many rows only")
    parser.add_argument("--fp32", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    opened = open_evaluation(args.adapter, [args.rows], say=Header(Console(stderr=True)))
    prompts = [question.prompt for question in opened.questions][: args.limit]
    device = choose_device()[0]
    dtype = torch.float32 if args.fp32 else choose_dtype(device)[0]
    model: Any = load_adapter(load_model(opened.base, device=device, dtype=dtype), Path(args.adapter))
    fast_lora(model)
    model.eval()
    stops = list(opened.layout.stop_ids)
    settings: dict[str, Any] = {"max_new_tokens": args.max_new_tokens, "stop_ids": stops}
    generate(model, opened.layout.tokenizer, prompts[:2], **{**settings, "max_new_tokens": 2})  # warm up

    started = time.perf_counter()
    ours = generate(model, opened.layout.tokenizer, prompts, **settings)
    fast = time.perf_counter() - started

    started = time.perf_counter()
    loop = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)], device=device)
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=args.max_new_tokens,
            do_sample=False,
            use_cache=True,
            eos_token_id=stops,
            pad_token_id=stops[0],
        )[0, len(prompt) :].tolist()
        loop.append(tuple(out[: next((i for i, token in enumerate(out) if token in stops), None)]))
    slow = time.perf_counter() - started

    same = sum(a.ids == b for a, b in zip(ours, loop, strict=True))
    print(
        f"{str(dtype).removeprefix('torch.')} on {device}, {args.threads} threads: {len(prompts)} rows, "
        f"{sum(map(len, prompts)):,} prompt tokens, {sum(map(len, loop)):,} answer tokens\n"
        f"loop over rows {slow:.1f} s, batched over a tree {fast:.1f} s: {slow / fast:.1f} times faster; "
        f"{same} of {len(prompts)} answers are the same, token by token"
    )


if __name__ == "__main__":
    main()
