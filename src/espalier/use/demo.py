"""`espalier demo`: train the default model on the example rows and count what changed on rows that it has not seen."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from espalier.config import DEFAULT_MODEL, MAX_TOKENS_PER_PACK, RunConfig
from espalier.errors import DataError

NUM_SHOWN = 5
SETTINGS: dict[str, Any] = {
    "num_train_epochs": 4.0,
    "learning_rate": 5e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 5.0,
    "logging_steps": 5.0,
    "save_steps": 20.0,
    "save_total_limit": 2,
}


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a model does with the held-out rows: mean loss of the answers' tokens, and its own greedy answers."""

    loss: float
    answers: tuple[str, ...]

    def exact(self, wanted: tuple[str, ...]) -> int:
        """How many answers are the wanted text, to the character."""
        return sum(answer == text for answer, text in zip(self.answers, wanted, strict=True))


def run_demo(output_dir: str | None = None, *, resume_from_checkpoint: str | None = None, tree: str = "on") -> None:
    """Judge the base, train, judge the adapter, and print both side by side. Nothing is tuned to the held-out rows."""
    from espalier.training.run import check_run_folder, quiet_libraries, train

    console = Console(highlight=False)
    started = time.perf_counter()
    data = example_folder()
    folder = output_dir or _new_folder(resume_from_checkpoint is not None)
    config = RunConfig(
        dataset_path=[str(data / "train.jsonl")],
        model_path=DEFAULT_MODEL,
        output_dir=folder,
        resume_from_checkpoint=resume_from_checkpoint,
        tree="on" if tree == "on" else "off",
        **SETTINGS,
    )
    check_run_folder(config)
    console.print(f"The demo trains {DEFAULT_MODEL} on {data / 'train.jsonl'} and needs some minutes on two cores.")
    heldout = _Heldout(data / "heldout.jsonl")
    with quiet_libraries():
        console.print(f"Before: {heldout.num_rows} held-out rows through the base model ...")
        before = heldout.judge()
    train(config, console=console)
    with quiet_libraries():
        console.print(f"After: the same rows through {folder} ...")
        after = heldout.judge(folder)
    _print_result(console, heldout, before, after)
    minutes = (time.perf_counter() - started) / 60
    console.print(f"\n{minutes:.1f} minutes in all. Ask it yourself, the policy and a ticket a prompt:", soft_wrap=True)
    console.print(f"espalier chat --adapter {folder} --prompts_file {data / 'heldout.jsonl'}", soft_wrap=True)


def example_folder() -> Path:
    """The triage rows: beside the source in a checkout, under the environment's share/ in an installation."""
    places = (
        Path(__file__).resolve().parents[3] / "examples" / "triage",
        Path(sys.prefix) / "share" / "espalier" / "triage",
    )
    for place in places:
        if (place / "train.jsonl").is_file():
            return place
    raise DataError(
        "the example rows are missing", where=", ".join(map(str, places)), todo="Run the demo from a checkout."
    )


class _Heldout:
    """The held-out rows, encoded once, with the texts of prompts and answers."""

    def __init__(self, file: Path):
        from espalier.data.formats import read_examples
        from espalier.encode.encode import Encoder
        from espalier.encode.template import resolve_template
        from espalier.model.load import load_tokenizer, resolve_model

        self.model_path = resolve_model(DEFAULT_MODEL)
        self.tokenizer = load_tokenizer(self.model_path)
        self.examples = read_examples([str(file)])
        self.encoder = Encoder(self.tokenizer, resolve_template(self.tokenizer))
        self.rows = [row for outcome in self.encoder.encode_batch(self.examples) for row in outcome.rows]
        self.prompts = [self.encoder.prompt_ids(example.messages[:-1]) for example in self.examples]
        self.wanted = tuple(str(example.messages[-1]["content"]) for example in self.examples)
        self.num_rows = len(self.rows)

    def judge(self, adapter: str | None = None) -> Judgement:
        """The base, or the base with an adapter, on all rows."""
        import torch

        from espalier.encode.stops import generation_stop_ids
        from espalier.model.load import choose_device, choose_dtype, load_model
        from espalier.model.load_adapter import load_adapter
        from espalier.tree.attention import choose_attention
        from espalier.tree.collate import to_tensors
        from espalier.tree.loss import tree_loss
        from espalier.tree.plan import plan_step
        from espalier.use.generate import generate

        device, _ = choose_device()
        model: Any = load_model(self.model_path, device=device, dtype=choose_dtype(device)[0])
        if adapter is not None:
            model = load_adapter(model, adapter)
        model.eval()
        stop_ids = generation_stop_ids(self.tokenizer, self.encoder.template, model.generation_config.eos_token_id)
        # A wrong answer may ramble on: it is cut a little after the longest right one.
        longest = max(int((row.labels >= 0).sum()) for row in self.rows)
        answers = generate(model, self.tokenizer, self.prompts, max_new_tokens=longest + 8, stop_ids=stop_ids)
        attention, _ = choose_attention(model.config, device)
        loss_sum, weight_sum = 0.0, 0.0
        with torch.no_grad():
            for pack in plan_step(self.rows, max_tokens=MAX_TOKENS_PER_PACK).packs:
                output = tree_loss(model, to_tensors(pack, device), attention=attention)
                loss_sum, weight_sum = loss_sum + float(output.loss_sum), weight_sum + output.weight_sum
        return Judgement(loss_sum / weight_sum, tuple(answer.text for answer in answers))


def _new_folder(resuming: bool) -> str:
    """runs/demo, or where that exists the first free runs/demo-2, -3, ...; to resume, the last one that exists."""
    names = ["runs/demo", *(f"runs/demo-{number}" for number in range(2, 1000))]
    free = next(index for index, name in enumerate(names) if not Path(name).exists())
    return names[max(0, free - 1)] if resuming else names[free]


def _print_result(console: Console, heldout: _Heldout, before: Judgement, after: Judgement) -> None:
    count = heldout.num_rows
    table = Table(title=f"{count} held-out rows", title_justify="left")
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    table.add_row("loss", f"{before.loss:.4f}", f"{after.loss:.4f}")
    exact = [judgement.exact(heldout.wanted) for judgement in (before, after)]
    table.add_row("exact match", *(f"{number} of {count} ({100 * number / count:.1f} %)" for number in exact))
    console.print(table)
    answers = Table(title="Five of them", title_justify="left", show_lines=True)
    for name in ("ticket", "wanted", "before", "after"):
        answers.add_column(name, overflow="fold")
    for index in range(0, count, max(1, count // NUM_SHOWN))[:NUM_SHOWN]:
        ticket = str(heldout.examples[index].messages[-2]["content"]).rsplit("\n", 1)[-1]
        answers.add_row(ticket, heldout.wanted[index], before.answers[index].strip(), after.answers[index].strip())
    console.print(answers)
