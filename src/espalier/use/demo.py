"""`espalier demo`: train the default model on the example rows and count what changed on rows that it has not seen."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from espalier.config import DEFAULT_MODEL, RunConfig
from espalier.errors import DataError

if TYPE_CHECKING:
    from espalier.use.evaluate import Result

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


def run_demo(output_dir: str | None = None, *, resume_from_checkpoint: str | None = None, tree: str = "on") -> None:
    """Train, judge base and adapter, and print both side by side. Nothing is tuned to the held-out rows."""
    from espalier.training.report import Header
    from espalier.training.run import check_run_folder, quiet_libraries, train
    from espalier.use.evaluate import evaluate, open_evaluation
    from espalier.use.evaluate_report import print_tables

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
    train(config, console=console)
    console.print("Before and after: rows that it has not seen, through the base and through the adapter ...")
    with quiet_libraries():
        say = Header(console)
        evaluation = open_evaluation(folder, [str(data / "heldout.jsonl")], say=say)
        result = evaluate(evaluation, say=say, answers=True, tree=tree == "on")
    print_tables(result, console)
    _print_answers(console, data / "heldout.jsonl", result)
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


def _new_folder(resuming: bool) -> str:
    """runs/demo, or where that exists the first free runs/demo-2, -3, ...; to resume, the last one that exists."""
    names = ["runs/demo", *(f"runs/demo-{number}" for number in range(2, 1000))]
    free = next(index for index, name in enumerate(names) if not Path(name).exists())
    return names[max(0, free - 1)] if resuming else names[free]


def _print_answers(console: Console, file: Path, result: Result) -> None:
    """Some tickets, what was wanted, and the answers of both models."""
    from espalier.data.formats import read_examples

    tickets = [str(example.messages[-2]["content"]).rsplit("\n", 1)[-1] for example in read_examples(str(file))]
    table = Table(title="Five of them", title_justify="left", show_lines=True)
    for name in ("ticket", "wanted", "base", "adapter"):
        table.add_column(name, overflow="fold")
    questions = result.evaluation.questions
    for i in range(0, len(questions), max(1, len(questions) // NUM_SHOWN))[:NUM_SHOWN]:
        answers = (side.answers[i].text.strip() for side in (result.base, result.adapter))
        table.add_row(*map(Text, (tickets[i], questions[i].wanted, *answers)))
    console.print(table)
