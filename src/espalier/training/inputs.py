"""Model, tokenizer and rows as `LoraTrainer` is given them, made ready."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from espalier.encode.encode import IGNORE_INDEX, Encoded
from espalier.encode.store import EncodedDataset
from espalier.errors import DataError, UsageError
from espalier.training.streaming import StreamedSteps


def as_encoded(rows: Any, *, tokenizer: Any, model: Any, template: str | None, max_length: int | None) -> Any:
    """None stays None; an EncodedDataset or a stream stays itself; other rows are encoded.

    rows: an iterable of mappings, with `input_ids` and `labels` (taken as they are), or with columns that
    `examples_from_records` understands. Raises DataError that lists all rows which cannot be used.
    """
    if rows is None or isinstance(rows, EncodedDataset | StreamedSteps):
        return rows
    first = next(iter(rows), None)
    if first is None:
        raise DataError("the dataset is empty", where="train_dataset", todo="Pass rows.")
    if isinstance(first, Encoded):
        return EncodedDataset.from_rows(list(rows))
    if not isinstance(first, Mapping):
        raise DataError(
            f"its rows are {type(first).__name__}, not mappings",
            where="train_dataset",
            todo="Pass rows with prompt/completion, messages, instruction/output, or input_ids and labels.",
        )
    if "input_ids" in first:
        return EncodedDataset.from_rows(list(_ready_rows(rows)))
    return EncodedDataset.from_rows(_encode(rows, tokenizer, model, template, max_length))


def _ready_rows(rows: Any) -> Iterator[Encoded]:
    """Rows that are tokens already; the attention mask, if there is one, cuts padding away."""
    for index, row in enumerate(rows, start=1):
        ids = np.asarray(row["input_ids"], np.int32)
        if "labels" not in row:
            raise DataError(
                "input_ids without labels", where=f"train_dataset:{index}", todo="Give labels, -100 where not learnt."
            )
        labels = np.array(row["labels"], np.int32)
        if len(labels) != len(ids):
            raise DataError(f"{len(ids)} input_ids but {len(labels)} labels", where=f"train_dataset:{index}")
        if "attention_mask" in row:
            keep = np.asarray(row["attention_mask"], bool)
            ids, labels = ids[keep], labels[keep]
        labels[:1] = IGNORE_INDEX  # nothing predicts a row's first token
        if (labels == IGNORE_INDEX).all():
            raise DataError("no token of this row has a label", where=f"train_dataset:{index}")
        yield Encoded(ids, labels, None, "train_dataset", index)


def _encode(rows: Any, tokenizer: Any, model: Any, template: str | None, max_length: int | None) -> list[Encoded]:
    from espalier.data.formats import bad_rows_error, examples_from_records
    from espalier.data.rows import BadRow
    from espalier.encode.encode import Encoder
    from espalier.encode.length import length_limit
    from espalier.encode.template import resolve_template

    if tokenizer is None:
        raise UsageError("rows of text need a tokenizer", todo="Pass processing_class=tokenizer to LoraTrainer.")
    limit, _ = length_limit(max_length, tokenizer, model.config)
    encoder = Encoder(tokenizer, resolve_template(tokenizer, template), max_length=limit)
    encoded: list[Encoded] = []
    bad: list[BadRow] = []
    read = 0
    for example in examples_from_records(rows, "train_dataset"):
        read += 1
        outcome = example if isinstance(example, BadRow) else encoder.encode(example)
        if isinstance(outcome, BadRow):
            bad.append(outcome)
        else:
            encoded += outcome
    if bad:
        raise bad_rows_error(bad, read)
    return encoded


def model_and_tokenizer(model: Any, tokenizer: Any, peft_config: Any) -> tuple[Any, Any]:
    """(model with an adapter, its tokenizer). model: a model, a PeftModel, or a name for `resolve_model`.

    Raises UsageError where there is no model, or none or two adapters.
    """
    from peft import PeftModel

    from espalier.model.load import choose_device, choose_dtype, load_model, load_tokenizer, resolve_model
    from espalier.model.lora import add_adapter

    if isinstance(model, (str, Path)):
        ref = resolve_model(model)
        device = choose_device()[0]
        model = load_model(ref, device=device, dtype=choose_dtype(device)[0])
        tokenizer = tokenizer if tokenizer is not None else load_tokenizer(ref)
    if model is None:
        raise UsageError("LoraTrainer needs a model", todo="Pass model=, a model or its name.")
    if isinstance(model, PeftModel):
        if peft_config is not None:
            raise UsageError(
                "the model has an adapter already, and peft_config would wrap it again",
                todo="Leave peft_config out, or pass the base model.",
            )
        return model, tokenizer
    if peft_config is None:
        raise UsageError("LoraTrainer trains an adapter", todo="Pass peft_config=LoraConfig(...), or a PeftModel.")
    return add_adapter(model, peft_config), tokenizer


def pad_id(tokenizer: Any, model: Any) -> int:
    """Any id will do: padding is masked by position, never by its id (case B02)."""
    for owner, names in (
        (tokenizer, ("pad_token_id", "eos_token_id")),
        (model.config, ("pad_token_id", "eos_token_id")),
    ):
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, int) and value >= 0:
                return value
    return 0
