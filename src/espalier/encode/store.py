"""Files to encoded rows: read, encode on all cores, count what happened, cache the result."""

from __future__ import annotations

import gc
import heapq
import multiprocessing
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from espalier.data.formats import Example, FormatOptions, iter_examples
from espalier.data.read import BadRow
from espalier.data.source import expand
from espalier.encode.cache import FolderWriter, cache_key, load
from espalier.encode.dataset import EncodedDataset, Packed, joined, pack, split_heldout
from espalier.encode.encode import Encoded, Encoder

__all__ = ["EncodeResult", "EncodedDataset", "OverlengthReport", "encode_files", "overlength_report", "split_heldout"]

CHUNK = 512  # examples a piece of work
NUM_WORST = 5  # rows over the limit that a report names
# Processes pay where the Python part of the work (a quarter of it) holds up the tokenizer's threads, and where there is
# more data than they need time to start: each imports transformers anew.
MIN_CORES_FOR_WORKERS = 4
MIN_BYTES_FOR_WORKERS = 24 * 2**20

T = TypeVar("T")


@dataclass
class Counts:
    """What was read, and what became of it: num_read = num_kept + len(bad)."""

    num_read: int = 0
    num_kept: int = 0
    num_over: int = 0  # rows longer than the limit, whatever the length policy made of them
    bad: list[BadRow] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)  # sentence -> rows that it is true of
    worst: list[tuple[int, str, int]] = field(default_factory=list)  # (tokens, file, line), the longest first

    def update(self, other: Counts) -> None:
        """Adds the counts of the rows that follow."""
        self.num_read += other.num_read
        self.num_kept += other.num_kept
        self.num_over += other.num_over
        self.bad += other.bad
        self.notes.update(other.notes)
        self.worst = heapq.nlargest(NUM_WORST, self.worst + other.worst)


@dataclass(frozen=True)
class EncodeResult:
    """The rows of some files and what is to be said about them.

    max_length: the limit that held, in tokens; cached: whether the rows were found in the cache.
    """

    dataset: EncodedDataset
    counts: Counts
    max_length: int | None
    cached: bool = False

    @property
    def bad(self) -> list[BadRow]:
        """The rows left out, in file order."""
        return self.counts.bad

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each row: int64 [len(dataset)]."""
        return self.dataset.lengths

    @property
    def max_used_id(self) -> int:
        """The largest token id of any row, -1 without rows."""
        ids = self.dataset.all_ids
        return int(ids.max()) if len(ids) else -1

    def notices(self) -> list[str]:
        """What happened to how many rows, one sentence each."""
        return [f"{count} row{'s' if count > 1 else ''}: {note}" for note, count in self.counts.notes.items()]


@dataclass(frozen=True, slots=True)
class OverlengthReport:
    """Rows longer than the limit, before the length policy. worst: (file:line, tokens), the longest first."""

    count: int
    share: float
    limit: int | None
    worst: tuple[tuple[str, int], ...]

    def lines(self) -> list[str]:
        """The report for people; empty where no row is over the limit."""
        if not self.count:
            return []
        head = f"{self.count} rows ({self.share:.1%}) are longer than {self.limit} tokens; the longest:"
        return [head, *(f"  {place}: {tokens} tokens" for place, tokens in self.worst)]


def overlength_report(result: EncodeResult) -> OverlengthReport:
    """How many rows are longer than the limit, and the five longest."""
    counts = result.counts
    worst = tuple((f"{file}:{line}", tokens) for tokens, file, line in counts.worst)
    return OverlengthReport(counts.num_over, counts.num_over / max(1, counts.num_read), result.max_length, worst)


def encode_files(
    files: Sequence[str],
    encoder: Encoder,
    format_options: FormatOptions | None = None,
    *,
    cache_dir: str | Path | None = None,
    num_workers: int | None = None,
    progress: Callable[[int], None] | None = None,
    notice: Callable[[str], None] | None = None,
) -> EncodeResult:
    """All rows of the files, encoded, in file order; the same for any number of workers.

    cache_dir: rows are kept there memory-mapped, and taken from there when data, tokenizer, template, options and our
    code are the same; in memory without it. num_workers: processes that encode, 0 for this one alone, None to choose
    by cores and the size of the data. progress is told the number of rows read so far; notice gets sentences about
    the files.

    Raises DataError for files that cannot be read. Bad rows are in the result: whether to stop is the caller's choice.
    """
    options = format_options or FormatOptions()
    names = expand(files)
    key = cache_key(names, encoder, options) if cache_dir is not None else None
    folder = Path(cache_dir) / key if cache_dir is not None and key is not None else None
    if folder is not None and (manifest := load(folder)) is not None:
        return EncodeResult(EncodedDataset.open(folder, manifest["files"]), _counts(manifest), encoder.max_length, True)
    if num_workers is None:
        num_workers = _choose_workers(names)
    examples = iter_examples(names, options, notice=notice)
    results = _encoded_chunks(_chunks(examples, CHUNK), encoder, num_workers)
    # A row makes hundreds of objects, so the collector runs often; it need not look at all that was there before
    # (a tenth of the time where torch and transformers are loaded).
    gc.freeze()
    try:
        if folder is None:
            return _collect(results, encoder, progress)
        return _write(results, encoder, folder, progress)
    finally:
        gc.unfreeze()


def _collect(
    results: Iterator[tuple[Packed, Counts]], encoder: Encoder, progress: Callable[[int], None] | None
) -> EncodeResult:
    counts, files, parts = Counts(), _FileNames(), []
    for part, part_counts in results:
        parts.append(files.agree(part))
        counts.update(part_counts)
        if progress:
            progress(counts.num_read)
    return EncodeResult(EncodedDataset(joined(parts), files.names), counts, encoder.max_length)


def _write(
    results: Iterator[tuple[Packed, Counts]],
    encoder: Encoder,
    folder: Path,
    progress: Callable[[int], None] | None,
) -> EncodeResult:
    counts, files = Counts(), _FileNames()
    writer = FolderWriter(folder)
    try:
        for part, part_counts in results:
            writer.add(files.agree(part))
            counts.update(part_counts)
            if progress:
                progress(counts.num_read)
        summary = {
            "files": files.names,
            "num_read": counts.num_read,
            "num_kept": counts.num_kept,
            "num_over": counts.num_over,
            "notes": counts.notes,
            "worst": counts.worst,
        }
        writer.finish(counts.bad, summary)
    except BaseException:
        writer.discard()
        raise
    return EncodeResult(EncodedDataset.open(folder, files.names), counts, encoder.max_length)


def _counts(manifest: dict[str, Any]) -> Counts:
    worst = [(tokens, file, line) for tokens, file, line in manifest["worst"]]
    numbers = (manifest["num_read"], manifest["num_kept"], manifest["num_over"])
    return Counts(*numbers, manifest["bad"], Counter(manifest["notes"]), worst)


class _FileNames:
    """Gives the pieces' file indices one meaning."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def agree(self, part: Packed) -> Packed:
        for name in part.files:
            if name not in self.names:
                self.names.append(name)
        places = np.array([self.names.index(name) for name in part.files], dtype=np.int32)
        files = places[part.arrays["files"]] if len(places) else part.arrays["files"]
        return Packed({**part.arrays, "files": files}, self.names)


def _choose_workers(names: Sequence[str]) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    size = sum(os.path.getsize(name) for name in names if os.path.isfile(name))
    return cores if cores >= MIN_CORES_FOR_WORKERS and size >= MIN_BYTES_FOR_WORKERS else 0


def _chunks(items: Iterator[T], size: int) -> Iterator[list[T]]:
    while chunk := list(islice(items, size)):
        yield chunk


def _encoded_chunks(
    chunks: Iterator[list[Example | BadRow]], encoder: Encoder, num_workers: int
) -> Iterator[tuple[Packed, Counts]]:
    """The chunks' results in their order, whoever computed them."""
    pool: Executor
    work: Callable[[list[Example | BadRow]], tuple[Packed, Counts]]
    if num_workers <= 0:
        # Two threads: while one waits for the tokenizer's own threads, the other renders and labels.
        pool, work = ThreadPoolExecutor(2), partial(encode_chunk, encoder)
    else:
        # spawn: a forked tokenizer may hold locks of threads that do not exist in the child.
        context = multiprocessing.get_context("spawn")
        pool, work = ProcessPoolExecutor(num_workers, context, _start_worker, (encoder,)), _work
    with pool:
        waiting: deque[Future[tuple[Packed, Counts]]] = deque()
        for chunk in chunks:
            waiting.append(pool.submit(work, chunk))
            if len(waiting) > 3 * max(1, num_workers):  # bounded: reading must not run ahead of encoding
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


_worker_encoder: Encoder | None = None


def _start_worker(encoder: Encoder) -> None:
    global _worker_encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core a process
    _worker_encoder = encoder


def _work(chunk: list[Example | BadRow]) -> tuple[Packed, Counts]:
    assert _worker_encoder is not None
    return encode_chunk(_worker_encoder, chunk)


def encode_chunk(encoder: Encoder, chunk: Sequence[Example | BadRow]) -> tuple[Packed, Counts]:
    """Encodes the examples of a chunk; rows that are bad already are counted in their place."""
    outcomes = iter(encoder.encode_batch([item for item in chunk if isinstance(item, Example)]))
    counts = Counts(num_read=len(chunk))
    rows: list[Encoded] = []
    keys: list[int] = []
    for item in chunk:
        if isinstance(item, BadRow):
            counts.bad.append(item)
            continue
        outcome = next(outcomes)
        counts.notes.update(outcome.notes)
        if outcome.bad is not None:
            counts.bad.append(outcome.bad)
        else:
            counts.num_kept += 1
            rows += outcome.rows
            keys += [outcome.key] * len(outcome.rows)
        if encoder.max_length is not None and outcome.num_tokens > encoder.max_length:
            counts.num_over += 1
            counts.worst.append((outcome.num_tokens, item.file, item.line))
    counts.worst = heapq.nlargest(NUM_WORST, counts.worst)
    return pack(rows, keys), counts
