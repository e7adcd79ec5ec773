"""How fast rows are encoded with labels, against the bare tokenizer's batch speed on the same rendered texts.

    python benchmarks/encode_throughput.py FOLDER [--rows 20000] [--turns 1] [--template NAME]

FOLDER holds a tokenizer (and a chat template, or name one with --template). The rows are made up here: English words
with some Chinese, about 60 words a question and 100 an answer. Both sides use the same number of cores: the
tokenizer in Rust threads, ours as encode_files does (--workers, 0: threads of this process). Reading the file,
rendering, the checks by decode and the labels count for ours. CPU time tells the same on a machine with other load.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SENTENCE = (
    "the quick brown fox jumps over lazy dogs while seventeen engineers discuss gradient descent and 你好 世界 "
    "learning rates, momentum; however nobody (really) asked: why? It's 2,026 already."
)
WORDS = SENTENCE.split()


def make_rows(path: Path, num_rows: int, num_turns: int) -> None:
    """Writes conversations of our own as JSONL."""
    draw = random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(num_rows):
            messages = []
            for _ in range(num_turns):
                messages.append({"role": "user", "content": " ".join(draw.choices(WORDS, k=60))})
                messages.append({"role": "assistant", "content": " ".join(draw.choices(WORDS, k=100))})
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def best_seconds(works: dict[str, Callable[[], Any]], repeats: int = 5) -> dict[str, tuple[float, float]]:
    """The best (wall, CPU) seconds of each; taken in turns, so that other load on the machine meets all alike."""
    best = dict.fromkeys(works, (float("inf"), float("inf")))
    for _ in range(repeats):
        for name, work in works.items():
            wall, cpu = time.perf_counter(), time.process_time()
            work()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            best[name] = (min(best[name][0], wall), min(best[name][1], cpu))
    return best


def main() -> None:
    """Prints both speeds in rows and tokens a second, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--template")
    parser.add_argument("--workers", type=int, default=0)
    args = parser.parse_args()

    from transformers import AutoTokenizer

    from espalier.data.formats import Example, iter_examples
    from espalier.encode.encode import Encoder
    from espalier.encode.store import encode_files
    from espalier.encode.template import resolve_template

    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    template = resolve_template(tokenizer, args.template)
    encoder = Encoder(tokenizer, template)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        make_rows(path, args.rows, args.turns)
        examples = [example for example in iter_examples([str(path)]) if isinstance(example, Example)]
        texts = [template.render(example.messages) for example in examples]

        def bare() -> None:
            for start in range(0, len(texts), 1000):
                tokenizer(texts[start : start + 1000], add_special_tokens=False)

        def ours() -> None:
            encode_files([str(path)], encoder, num_workers=args.workers)

        tokens = int(encode_files([str(path)], encoder, num_workers=0).lengths.sum())
        times = best_seconds({"bare tokenizer": bare, "encode_files": ours})
    print(
        f"{os.cpu_count()} cores, {args.rows} rows, {tokens} tokens, {args.workers} workers, template {template.source}"
    )
    for name, (wall, cpu) in times.items():
        speed = f"{args.rows / wall:9.0f} rows/s {tokens / wall:11.0f} tokens/s"
        print(f"{name:15s} {wall:7.2f} s {cpu:7.2f} s of CPU {speed}")
    wall, cpu = (a / b for a, b in zip(times["bare tokenizer"], times["encode_files"], strict=True))
    print(f"ratio {wall:.2f} by wall time, {cpu:.2f} by CPU time (of this process: without worker processes)")


if __name__ == "__main__":
    main()
