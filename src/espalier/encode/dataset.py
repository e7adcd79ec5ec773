"""Encoded rows as a sequence over flat arrays, in memory or memory-mapped.

ids      int32   input_ids of all rows, one after another    labels   int32   their labels
weights  float32 their weights, only where some row has any  offsets  int64   where each row begins, and the end
files    int32   each row's file, as an index into a list    lines    int64   its line
keys     uint64  its prompt's key (equal prompts, equal keys)
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from espalier.encode.encode import Encoded
from espalier.errors import DataError

DTYPES: dict[str, np.dtype[Any]] = {  # little-endian, as they stand in a folder
    "ids": np.dtype("<i4"),
    "labels": np.dtype("<i4"),
    "weights": np.dtype("<f4"),
    "offsets": np.dtype("<i8"),
    "files": np.dtype("<i4"),
    "lines": np.dtype("<i8"),
    "keys": np.dtype("<u8"),
}

Arrays = dict[str, npt.NDArray[Any]]


class EncodedDataset(Sequence[Encoded]):
    """A sequence of Encoded rows; slices and `select` share the arrays. Picklable: memory-mapped rows by their path."""

    def __init__(self, arrays: Arrays, files: Sequence[str], index: npt.NDArray[np.int64] | None = None):
        self._arrays, self._files, self._index = arrays, list(files), index
        self._folder: Path | None = None

    @classmethod
    def from_rows(cls, rows: Sequence[Encoded]) -> EncodedDataset:
        """A dataset in memory. Equal prompts are those whose ids before the first label are equal."""
        packed = pack(rows, [_prompt_ids_key(row) for row in rows])
        return cls(joined([packed]), packed.files)

    @classmethod
    def open(cls, folder: Path, files: Sequence[str]) -> EncodedDataset:
        """Maps the arrays of a folder (see cache.py), unchecked."""
        arrays: Arrays = {}
        for name, dtype in DTYPES.items():
            path = folder / f"{name}.bin"
            if path.exists():
                empty = path.stat().st_size == 0  # an empty file cannot be mapped
                arrays[name] = np.zeros(0, dtype) if empty else np.memmap(path, dtype, mode="r")
        dataset = cls(arrays, files)
        dataset._folder = folder
        return dataset

    def __getstate__(self) -> dict[str, Any]:
        if self._folder is not None:
            return {"_folder": self._folder, "_files": self._files, "_index": self._index}
        return dict(self.__dict__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state["_folder"] is not None:
            self.__dict__.update(self.open(state["_folder"], state["_files"]).__dict__)
        self.__dict__.update(state)

    def __len__(self) -> int:
        return len(self._arrays["offsets"]) - 1 if self._index is None else len(self._index)

    @overload
    def __getitem__(self, index: int) -> Encoded: ...
    @overload
    def __getitem__(self, index: slice) -> EncodedDataset: ...
    def __getitem__(self, index: int | slice) -> Encoded | EncodedDataset:
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        place = int(self._places()[index])
        begin, end = (int(i) for i in self._arrays["offsets"][place : place + 2])
        weights = self._arrays.get("weights")
        row_weights = None
        if weights is not None and not np.all(weights[begin:end] == 1):
            row_weights = np.asarray(weights[begin:end])
        return Encoded(
            np.asarray(self._arrays["ids"][begin:end]),
            np.asarray(self._arrays["labels"][begin:end]),
            row_weights,
            self._files[int(self._arrays["files"][place])],
            int(self._arrays["lines"][place]),
        )

    def __iter__(self) -> Iterator[Encoded]:
        return (self[i] for i in range(len(self)))

    def _places(self) -> npt.NDArray[np.int64] | range:
        return range(len(self)) if self._index is None else self._index

    def select(self, indices: Sequence[int] | npt.NDArray[np.integer[Any]]) -> EncodedDataset:
        """The rows at these indices, in this order."""
        chosen = np.asarray(indices, dtype=np.int64)
        dataset = EncodedDataset(self._arrays, self._files, chosen if self._index is None else self._index[chosen])
        dataset._folder = self._folder
        return dataset

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each row: int64 [len(self)]."""
        offsets = np.asarray(self._arrays["offsets"], dtype=np.int64)
        lengths = offsets[1:] - offsets[:-1]
        return lengths if self._index is None else lengths[self._index]

    @property
    def all_ids(self) -> npt.NDArray[np.int32]:
        """Ids of all stored rows, one after another (of a selection: those of the rows it was selected from)."""
        return np.asarray(self._arrays["ids"])

    @property
    def prompt_keys(self) -> npt.NDArray[np.uint64]:
        """Equal for rows with the same prompt: uint64 [len(self)]."""
        keys = np.asarray(self._arrays["keys"], dtype=np.uint64)
        return keys if self._index is None else keys[self._index]

    @property
    def num_supervised_tokens(self) -> int:
        """Labels of all rows together."""
        return sum(int((row.labels >= 0).sum()) for row in self)


@dataclass(frozen=True, slots=True)
class Packed:
    """Rows of one piece of work in flat arrays: as EncodedDataset's, but with `lengths` for offsets."""

    arrays: Arrays
    files: list[str]


def pack(rows: Sequence[Encoded], keys: Sequence[int]) -> Packed:
    """Flat arrays of rows and their prompts' keys."""
    index = {file: i for i, file in enumerate(dict.fromkeys(row.file for row in rows))}
    arrays: Arrays = {
        "ids": _concatenated([row.input_ids for row in rows], "ids"),
        "labels": _concatenated([row.labels for row in rows], "labels"),
        "lengths": np.array([len(row.input_ids) for row in rows], dtype=DTYPES["offsets"]),
        "files": np.array([index[row.file] for row in rows], dtype=DTYPES["files"]),
        "lines": np.array([row.line for row in rows], dtype=DTYPES["lines"]),
        "keys": np.array(keys, dtype=DTYPES["keys"]),
    }
    if any(row.weights is not None for row in rows):
        weights = [np.ones(len(row.labels)) if row.weights is None else row.weights for row in rows]
        arrays["weights"] = _concatenated(weights, "weights")
    return Packed(arrays, list(index))


def joined(parts: Iterable[Packed]) -> Arrays:
    """The arrays of a dataset from pieces whose file indices already agree."""
    pieces = [part.arrays for part in parts]
    arrays = {
        name: _concatenated([piece[name] for piece in pieces], name)
        for name in ("ids", "labels", "files", "lines", "keys")
    }
    lengths = _concatenated([piece["lengths"] for piece in pieces], "offsets")
    arrays["offsets"] = np.concatenate([np.zeros(1, DTYPES["offsets"]), np.cumsum(lengths)])
    if any("weights" in piece for piece in pieces):
        weights = [piece["weights"] if "weights" in piece else np.ones(len(piece["ids"])) for piece in pieces]
        arrays["weights"] = _concatenated(weights, "weights")
    return arrays


def _concatenated(parts: Sequence[npt.NDArray[Any]], name: str) -> npt.NDArray[Any]:
    whole: npt.NDArray[Any] = np.concatenate([np.zeros(0, DTYPES[name]), *parts])
    return whole.astype(DTYPES[name], copy=False)


def _prompt_ids_key(row: Encoded) -> int:
    prompt = row.input_ids[: int(np.argmax(row.labels >= 0))]
    return int.from_bytes(hashlib.blake2b(prompt.tobytes(), digest_size=8).digest(), "little")


def split_heldout(dataset: EncodedDataset, fraction: float, seed: int = 0) -> tuple[EncodedDataset, EncodedDataset]:
    """(training rows, held-out rows): whole prompts are held out, so that none is on both sides.

    The prompts are ordered by a hash of their content and the seed, and the first of them are held out until they
    hold `fraction` of the rows (at least one prompt for a fraction above 0). Depends on the rows and the seed alone.
    Raises DataError where all rows have the same prompt.
    """
    keys = dataset.prompt_keys
    distinct, counts = np.unique(keys, return_counts=True)
    if fraction <= 0 or len(dataset) == 0:
        return dataset, dataset[:0]
    if len(distinct) < 2:
        raise DataError(
            f"no rows can be held out: all {len(dataset)} rows have the same prompt",
            todo="Give a file of its own with --eval_dataset_path, or leave --eval_fraction out.",
        )
    salt = seed.to_bytes(8, "little", signed=True)
    order = sorted(range(len(distinct)), key=lambda i: hashlib.blake2b(distinct[i].tobytes() + salt).digest())
    reached = np.cumsum(counts[order])
    wanted = min(int(np.searchsorted(reached, fraction * len(dataset))) + 1, len(distinct) - 1)
    held = np.isin(keys, distinct[order[:wanted]])
    return dataset.select(np.flatnonzero(~held)), dataset.select(np.flatnonzero(held))
