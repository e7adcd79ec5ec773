"""Encoded rows in memory or memory-mapped on disk."""

from __future__ import annotations

from collections.abc import Sequence

from espalier.encode.encode import Encoded


class EncodedDataset:
    """A sequence of Encoded rows."""

    def __init__(self, rows: Sequence[Encoded]):
        self._rows = list(rows)

    @classmethod
    def from_rows(cls, rows: Sequence[Encoded]) -> EncodedDataset:
        """A dataset in memory."""
        return cls(rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Encoded:
        return self._rows[index]
