"""`hub:owner/name[:split]`: rows of a dataset of the Hugging Face hub, streamed."""

from __future__ import annotations

import re
from collections.abc import Iterator

from espalier.data.rows import Notice, RawRow, json_values
from espalier.errors import DataError, UsageError

_NAME = re.compile(r"hub:([\w.-]+(?:/[\w.-]+)?)(?::([\w.\[\]%:-]+))?")


def read_hub(name: str, notice: Notice) -> Iterator[RawRow]:
    """Rows of the split (default `train`); a row's line is its number.

    Raises UsageError where `datasets` is not installed, DataError where the dataset cannot be reached.
    """
    found = _NAME.fullmatch(name)
    if not found:
        raise UsageError(f"{name!r} is no dataset name", todo="Write hub:owner/name or hub:owner/name:split.")
    try:
        import datasets
    except ImportError:
        raise UsageError(
            "reading from the hub needs the package 'datasets'", where=name, todo="pip install espalier-lm[hub]"
        ) from None
    split = found[2] or "train"
    if not found[2]:
        notice(f"{name}: split 'train'")
    number = 0
    try:
        for fields in datasets.load_dataset(found[1], split=split, streaming=True):
            number += 1
            yield RawRow(json_values(dict(fields)), name, number)
    except Exception as error:  # the library and its transports raise many kinds; each is 'not reached' to the user
        first = str(error).strip().partition("\n")[0]
        raise DataError(
            f"the dataset could not be read{f' after row {number}' if number else ''}: {type(error).__name__}: {first}",
            where=name,
            todo="Check the name, the split, the network and `hf auth login`; or download it and give the files.",
        ) from error
