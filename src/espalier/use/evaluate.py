"""`espalier evaluate`: what an adapter does to held-out rows, next to its base, and what of it may be chance."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from espalier.config import RunConfig
from espalier.data.output import check_outputs
from espalier.data.rows import silent
from espalier.encode.dataset import EncodedDataset
from espalier.errors import DataError, ModelError, UsageError
from espalier.model.adapter_settings import CONFIG, TAKE_FROM_BASE, read_json
from espalier.model.load import ModelPath
from espalier.use.adapter_base import Layout, adapter_layout, find_base
from espalier.use.bootstrap import DRAWS, Comparison, Ratio, compare
from espalier.use.generate import Generated, generate
from espalier.use.metrics import AnswerScore, Question, RowScores, question_of, score_answer, score_rows

if TYPE_CHECKING:
    from espalier.training.report import Header

RAMBLE = 8  # tokens that an answer may be longer than the longest wanted one, unless --max_new_tokens says otherwise


@dataclass(frozen=True)
class Evaluation:
    """All that is settled before a weight is read. files: where the rows are from, in words; num_left_out: rows of the
    files that cannot be used, or are longer than the model holds."""

    folder: Path
    base: ModelPath
    config: RunConfig
    layout: Layout
    rows: EncodedDataset
    files: tuple[str, ...]
    num_left_out: int

    @cached_property
    def questions(self) -> list[Question]:
        """Of each row, its last answer and what stands before it."""
        return [question_of(row, self.layout.tokenizer, self.layout.stop_ids) for row in self.rows]

    @cached_property
    def longest_answer(self) -> int:
        return max(question.num_tokens for question in self.questions)

    def units(self) -> npt.NDArray[np.int64]:
        """int64 [rows]: number of the file's row that each row is of; one conversation may give several."""
        numbers: dict[tuple[str, int], int] = {}
        return np.array([numbers.setdefault((row.file, row.line), len(numbers)) for row in self.rows], np.int64)


@dataclass(frozen=True)
class Side:
    """What one model does: its losses, and with --generate its answers and what they are worth."""

    scores: RowScores
    answers: tuple[Generated, ...] = ()
    answer_scores: tuple[AnswerScore, ...] = ()


@dataclass(frozen=True)
class Result:
    """Both models on the same rows. metrics: by name, each with intervals; max_new_tokens: None without answers."""

    evaluation: Evaluation
    base: Side
    adapter: Side
    metrics: dict[str, Comparison]
    device: str
    dtype: str
    max_new_tokens: int | None
    draws: int
    seed: int
    seconds: float


def open_evaluation(
    adapter: str | Path,
    files: Sequence[str] = (),
    *,
    say: Header,
    model_path: str | None = None,
    trust_remote_code: bool = False,
    **settings: Any,
) -> Evaluation:
    """Read and encode the rows as the adapter was trained; without files the run's own held-out rows.

    settings: options of RunConfig that differ from the run's (template, format, columns, max_seq_length, ...). Raises
    EspalierError: no adapter, no base, no rows, bad rows (all of them named).
    """
    from espalier.encode.encode import Encoder
    from espalier.encode.length import length_limit
    from espalier.model.load import check_causal_lm, load_config
    from espalier.model.load_adapter import check_adapter_folder, load_adapter
    from espalier.model.lora import empty_model
    from espalier.use.heldout import heldout_rows, run_config

    folder = check_adapter_folder(adapter)
    config = dataclasses.replace(run_config(folder), **{k: v for k, v in settings.items() if v is not None})
    base = find_base(folder, model_path)
    say("adapter", str(folder))
    say("base", base.said)
    layout, notices = adapter_layout(folder, base, settings.get("template"), trust_remote_code)
    for notice in notices:
        say("", notice)
    model_config = load_config(base, trust_remote_code)
    check_causal_lm(model_config, base.said)
    skeleton = empty_model(model_config, trust_remote_code=trust_remote_code)
    load_adapter(skeleton, folder, notice=silent)  # names and shapes of its tensors, before the weights
    limit, limit_reason = length_limit(config.max_seq_length, layout.tokenizer, model_config)
    encoder = Encoder(
        layout.tokenizer, layout.template, max_length=limit, overlength=config.overlength, train_on=config.train_on
    )
    rows, names, num_left_out = heldout_rows(folder, config, list(files), encoder, limit_reason, say)
    if not len(rows):
        raise DataError(
            "no row is left to evaluate",
            where=", ".join(names),
            todo="`espalier check FILE` says why each row was left out.",
        )
    return Evaluation(folder, base, config, layout, rows, tuple(names), num_left_out)


def evaluate(
    evaluation: Evaluation,
    *,
    say: Header,
    answers: bool = False,
    max_new_tokens: int | None = None,
    use_cpu: bool = False,
    trust_remote_code: bool = False,
    tree: bool = True,
    draws: int = DRAWS,
    seed: int = 0,
) -> Result:
    """Base first, then the adapter on it. answers: also greedy answers to every row's prompt.

    max_new_tokens: longest answer; None: the longest wanted one and RAMBLE more. Raises EspalierError.
    """
    import torch

    from espalier.model.fast_lora import fast_lora
    from espalier.model.load import choose_device, choose_dtype, load_model
    from espalier.model.load_adapter import check_base, load_adapter
    from espalier.tree.attention import choose_attention
    from espalier.tree.support import tree_support

    started = time.perf_counter()
    device, device_reason = choose_device(use_cpu)
    dtype, dtype_reason = choose_dtype(device)
    name = str(dtype).removeprefix("torch.")
    say("device", f"{device}: {device_reason}; {name}: {dtype_reason}")
    if answers and max_new_tokens is None:
        max_new_tokens = evaluation.longest_answer + RAMBLE
        say("answers", f"at most {max_new_tokens} tokens: the longest wanted one has {evaluation.longest_answer}")
    model: Any = load_model(evaluation.base, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    support = tree_support(model.config)
    if tree and support.mode != "tree":
        say("tree", f"off: {support.reason}")
    attention, _ = choose_attention(model.config, device)

    def judge(who: str) -> Side:
        begun = time.perf_counter()
        model.eval()
        with torch.no_grad():
            scores = score_rows(model, evaluation.rows, tree=tree and support.mode == "tree", attention=attention)
            _check_finite(who, scores, evaluation)
            total = int(evaluation.rows.lengths.sum())
            say(who, f"loss in {time.perf_counter() - begun:.1f} s: {scores.computed_tokens:,} of {total:,} tokens")
            if not answers:
                return Side(scores)
        begun = time.perf_counter()
        side = _answered(model, evaluation, scores, max_new_tokens or 1)
        say("", f"{len(side.answers):,} answers in {time.perf_counter() - begun:.1f} s")
        return side

    if _changes_base(evaluation.folder):
        check_base(evaluation.folder, model, silent)
        base = judge("base")
        model = load_adapter(model, evaluation.folder)
    else:
        model = load_adapter(model, evaluation.folder)
        with model.disable_adapter():
            base = judge("base")
    fast_lora(model)
    adapter = judge("adapter")
    metrics = compare(_ratios(evaluation.units(), base, adapter), draws=draws, seed=seed)
    seconds = time.perf_counter() - started
    return Result(evaluation, base, adapter, metrics, device, name, max_new_tokens, draws, seed, seconds)


def _check_finite(who: str, scores: RowScores, evaluation: Evaluation) -> None:
    bad = np.flatnonzero(~np.isfinite(scores.loss))
    if len(bad):
        rows = [evaluation.rows[int(i)] for i in bad[:5]]
        raise ModelError(
            f"the {who} gives a loss that is not a number on {len(bad)} of {len(evaluation.rows)} rows",
            where=", ".join(f"{row.file}:{row.line}" for row in rows),
            todo="Check the adapter with `espalier verify`.",
        )


def _answered(model: Any, evaluation: Evaluation, scores: RowScores, max_new_tokens: int) -> Side:
    layout, questions = evaluation.layout, evaluation.questions
    answers = generate(
        model,
        layout.tokenizer,
        [question.prompt for question in questions],
        max_new_tokens=max_new_tokens,
        stop_ids=layout.stop_ids,
    )
    judged = [score_answer(answer.text, question.wanted) for answer, question in zip(answers, questions, strict=True)]
    return Side(scores, tuple(answers), tuple(judged))


def _ratios(units: npt.NDArray[np.int64], base: Side, adapter: Side) -> dict[str, Ratio]:
    """The metrics as sums by row of the file."""

    def by_unit(values: Any) -> npt.NDArray[np.float64]:
        sums = np.bincount(units, weights=np.asarray(values, np.float64), minlength=int(units.max()) + 1)
        return sums.astype(np.float64, copy=False)

    def both(of: Any, count: Any, **kwargs: bool) -> Ratio:
        return Ratio(by_unit(of(base)), by_unit(of(adapter)), by_unit(count), **kwargs)

    weight, supervised = base.scores.weight, base.scores.supervised
    ratios = {
        "loss": both(lambda side: side.scores.loss, weight, higher_is_better=False),
        "perplexity": both(lambda side: side.scores.loss, weight, higher_is_better=False, exponential=True),
        "token_accuracy": both(lambda side: side.scores.correct, supervised),
    }
    if base.answer_scores:
        judged = base.answer_scores
        ratios["exact_match"] = both(lambda side: [s.exact for s in side.answer_scores], np.ones(len(judged)))
        is_json = [score.valid is not None for score in judged]
        ratios["json_valid"] = both(lambda side: [bool(s.valid) for s in side.answer_scores], is_json)
        fields = [len(score.fields) for score in judged]
        ratios["json_fields"] = both(lambda side: [sum(s.fields.values()) for s in side.answer_scores], fields)
    return ratios


def _changes_base(folder: Path) -> bool:
    """True where putting the adapter on takes a part out of the base's weights (PiSSA, OLoRA)."""
    start = str(read_json(folder / CONFIG).get("init_lora_weights")).lower()
    return start.startswith(TAKE_FROM_BASE)


def run_evaluate(
    adapter: str,
    files: Sequence[str],
    *,
    answers: bool,
    max_new_tokens: int | None,
    as_json: bool,
    html: str | None,
    draws: int,
    seed: int,
    model_path: str | None,
    use_cpu: bool,
    tree: bool,
    trust_remote_code: bool,
    **settings: Any,
) -> int:
    """The command. The result goes to standard output, what is decided on the way to standard error. Returns 0."""
    from rich.console import Console

    from espalier.model.embedded import quiet_transformers
    from espalier.training.report import Header
    from espalier.use.evaluate_html import page
    from espalier.use.evaluate_report import print_json, print_tables, write_page

    wrong = []
    if max_new_tokens is not None and max_new_tokens < 1:
        wrong.append(f"--max_new_tokens {max_new_tokens}: must be 1 or more")
    if max_new_tokens is not None and not answers:
        wrong.append(f"--max_new_tokens {max_new_tokens}: changes nothing without --generate")
    if draws < 100:
        wrong.append(f"--draws {draws}: must be 100 or more for an interval")
    if seed < 0:
        wrong.append(f"--seed {seed}: must be 0 or more")
    if wrong:
        raise UsageError("these options cannot be used", details=wrong)
    check_outputs({"--html": html}, files)
    say = Header(Console(stderr=True, highlight=False))
    with quiet_transformers():
        evaluation = open_evaluation(
            adapter, files, say=say, model_path=model_path, trust_remote_code=trust_remote_code, **settings
        )
        check_outputs({"--html": html}, evaluation.config.dataset_path + evaluation.config.eval_dataset_path)
        result = evaluate(
            evaluation,
            say=say,
            answers=answers,
            max_new_tokens=max_new_tokens,
            use_cpu=use_cpu,
            trust_remote_code=trust_remote_code,
            tree=tree,
            draws=draws,
            seed=seed,
        )
    if html is not None:
        write_page(html, page(result))
        say("page", html)
    if as_json:
        print_json(result)
    else:
        print_tables(result, Console(highlight=False))
    return 0
