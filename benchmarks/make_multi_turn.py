"""Write conversations of 8 turns and about 1,500 tokens with long answers, for step_time.py: the same for every run.

    python benchmarks/make_multi_turn.py OUT.jsonl [--rows 64]

The sentences are put together from a few words: what is measured is the time of a step, not what is learnt. No two
rows begin alike, so nothing is shared but the template's own system text.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

WHO = ["the gardener", "a neighbour", "our teacher", "the old mill", "every visitor", "a careful cook", "the harbour"]
DOES = ["carries", "mends", "looks for", "writes about", "remembers", "paints", "measures", "gives away", "waits for"]
WHAT = ["the pears", "a long ladder", "two letters", "the blue door", "a map of the valley", "warm bread", "the clock"]
WHEN = ["in the morning", "after the rain", "before supper", "on a quiet Sunday", "when the market opens", "in autumn"]
TURNS, QUESTION_SENTENCES, ANSWER_SENTENCES = 4, 2, 30


def sentence(draw: random.Random) -> str:
    """One sentence of about thirteen tokens."""
    parts = [draw.choice(words) for words in (WHO, DOES, WHAT, WHEN)]
    return f"{parts[0].capitalize()} {parts[1]} {parts[2]} {parts[3]}."


def conversation(number: int) -> dict[str, list[dict[str, str]]]:
    """Row `number`: four questions and four answers."""
    draw = random.Random(number)
    messages = []
    for turn in range(TURNS):
        question = " ".join(sentence(draw) for _ in range(QUESTION_SENTENCES))
        answer = " ".join(sentence(draw) for _ in range(ANSWER_SENTENCES))
        messages.append({"role": "user", "content": f"Story {number}, part {turn + 1}. {question} What comes next?"})
        messages.append({"role": "assistant", "content": answer})
    return {"messages": messages}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=int, default=64)
    args = parser.parse_args()
    args.out.write_text("".join(json.dumps(conversation(n)) + "\n" for n in range(args.rows)), encoding="utf-8")


if __name__ == "__main__":
    main()
