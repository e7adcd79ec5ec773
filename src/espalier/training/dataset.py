"""Rows in memory, as `LoraTrainer` is given them, to an EncodedDataset."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from espalier.encode.encode import IGNORE_INDEX, Encoded
from espalier.encode.store import EncodedDataset
from espalier.errors import DataError, UsageError


def as_encoded(rows: Any, *, tokenizer: Any, model: Any, template: str | None, max_length: int | None) -> Any:
    """None stays None; an EncodedDataset stays itself; other rows are encoded.

    rows: an iterable of mappings, with `input_ids` and `labels` (taken as they are), or with columns that
    `examples_from_records` understands. Raises DataError that lists all rows which cannot be used.
    """
    if rows is None or isinstance(rows, EncodedDataset):
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
