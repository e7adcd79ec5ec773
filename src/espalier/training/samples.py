"""Answers to a few fixed prompts at every evaluation: on the console, and in samples.jsonl with the step.

Nothing of it touches the run: greedy, in eval mode, with a random state of its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from espalier.training.checkpoint_files import replace_text
from espalier.use.generate import Generated, generate
from espalier.use.metrics import Question, question_of

if TYPE_CHECKING:
    from espalier.encode.dataset import EncodedDataset
    from espalier.training.prepare import Prepared
    from espalier.training.trainer import LoraTrainer

SAMPLES = "samples.jsonl"
MAX_NEW_TOKENS = 64
SHOWN_CHARS = 100  # of a text on the console


@dataclass(frozen=True, slots=True)
class Probe:
    """A prompt to answer: its ids, a text to name it by, and the wanted answer where there is one."""

    prompt: tuple[int, ...]
    text: str
    wanted: str | None


def probes_of(prepared: Prepared) -> list[Probe]:
    """--probe_prompts, else --eval_samples held-out rows. Raises DataError for a file that holds no prompt."""
    config, tokenizer = prepared.config, prepared.tokenizer
    if config.eval_strategy == "no" or not config.eval_samples:
        return []
    if config.probe_prompts is not None:
        from espalier.use.prompts import from_file

        conversations = from_file(config.probe_prompts, None)
        return [
            Probe(tuple(prepared.encoder.prompt_ids(messages)), str(messages[-1]["content"]), None)
            for messages in conversations
        ]
    rows = prepared.eval_rows
    return [] if rows is None else [_probe(q, tokenizer) for q in _chosen(rows, prepared, config.eval_samples)]


def _chosen(rows: EncodedDataset, prepared: Prepared, count: int) -> list[Question]:
    """The first rows in the order of a hash of their prompts: the same ones whatever their order in the file."""
    keys = rows.prompt_keys.tolist()
    order = sorted(range(len(keys)), key=lambda i: hashlib.blake2b(int(keys[i]).to_bytes(8, "little")).digest())
    distinct: dict[int, int] = {}
    for i in order:
        distinct.setdefault(keys[i], i)
    chosen = list(distinct.values())[:count]
    return [question_of(rows[i], prepared.tokenizer, prepared.stop_ids) for i in chosen]


def _probe(question: Question, tokenizer: Any) -> Probe:
    from espalier.use.generate import decode

    return Probe(question.prompt, decode(tokenizer, question.prompt).strip(), question.wanted.strip())


class Samples(TrainerCallback):
    """Answers the probes after each evaluation, on rank 0.

    resumed_at: samples of later steps are taken out of an old file.
    """

    def __init__(
        self,
        trainer: LoraTrainer,
        probes: Sequence[Probe],
        stop_ids: Sequence[int],
        folder: Path,
        notice: Callable[[str], None],
        *,
        resumed_at: int | None,
    ):
        self.trainer, self.probes, self.stop_ids, self.notice = trainer, list(probes), tuple(stop_ids), notice
        self.file = folder / SAMPLES
        if resumed_at is not None and trainer.ranks.leads and self.file.is_file():
            lines = self.file.read_text(encoding="utf-8").splitlines(keepends=True)
            replace_text(self.file, "".join(line for line in lines if _step_of(line) <= resumed_at))

    def answers(self, count: int | None = None, max_new_tokens: int = MAX_NEW_TOKENS) -> list[Generated]:
        """Greedy answers to the (first `count`) probes by the model as it is now."""
        prompts = [probe.prompt for probe in self.probes[:count]]
        tokenizer: Any = self.trainer.processing_class
        return generate(self.trainer.model, tokenizer, prompts, max_new_tokens=max_new_tokens, stop_ids=self.stop_ids)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.ranks.led(lambda: self._write(state.global_step))

    def _write(self, step: int) -> None:
        lines = []
        for probe, answer in zip(self.probes, self.answers(), strict=True):
            entry = {"step": step, "prompt": probe.text, "wanted": probe.wanted, "answer": answer.text}
            lines.append(json.dumps(entry, ensure_ascii=False) + "\n")
            wanted = "" if probe.wanted is None else f"  (wanted: {_short(probe.wanted)})"
            self.notice(f"  {_short(probe.text, end=True)}  ->  {_short(answer.text)}{wanted}")
        try:
            with open(self.file, "a", encoding="utf-8", errors="backslashreplace") as handle:
                handle.writelines(lines)
        except OSError as error:
            self.notice(f"warning: {self.file} cannot be written: {error.strerror}")


def _short(text: str, *, end: bool = False) -> str:
    """One line; of a long prompt its end, where the question stands."""
    line = " ".join(text.split())
    if len(line) <= SHOWN_CHARS:
        return line
    return "..." + line[-SHOWN_CHARS:] if end else line[:SHOWN_CHARS] + "..."


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 1 << 62  # a line cut by a kill
