"""Names on the command line to byte streams: globs, standard input, compression, encodings, what is no data at all.

A `Source` is a regular file that can be opened again and again; standard input and pipes are copied to a temporary
file first, and UTF-16 is rewritten as UTF-8 there, so that all readers see one kind of thing.
"""

from __future__ import annotations

import codecs
import contextlib
import glob
import gzip
import io
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import zstandard

from espalier.data.rows import Notice
from espalier.errors import DataError, UsageError

HEAD_BYTES = 1 << 20  # what decides a file's kind; also the size of one read
PARQUET_MAGIC = b"PAR1"
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_MARKS = [  # the longest first: UTF-32's little-endian mark begins as UTF-16's
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
]
_NOT_DATA = [  # first bytes, what it is, what to do
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself", "Run `git lfs pull` in its repository."),
    (b"PK\x03\x04", "a zip archive (or an Excel workbook)", "Unpack it, or save the sheet as CSV (UTF-8)."),
    (b"%PDF", "a PDF document", "Give a JSON, JSONL, CSV or Parquet file."),
    (b"BZh", "compressed with bzip2", "Unpack it, or compress it with gzip or zstd."),
    (b"\xfd7zXZ", "compressed with xz", "Unpack it, or compress it with gzip or zstd."),
    (b"ARROW1", "an Arrow IPC file", "Save it as Parquet or JSONL."),
    (b"\x80\x04\x95", "a Python pickle, which is never read", "Save it as JSONL or Parquet."),
    (b"SQLite format 3", "an SQLite database", "Export the table as CSV or JSONL."),
]


@dataclass(slots=True)
class Source:
    """One file. name: as the user wrote it; path: what is opened; head: its first decompressed bytes, mark removed."""

    name: str
    path: str
    encoding: str = "utf-8"
    compression: str = ""
    mark: int = 0  # bytes of the byte order mark, skipped on opening
    head: bytes = b""
    temporary: list[str] = field(default_factory=list)

    @contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """The decompressed bytes after the mark. Damage of the compressed stream raises DataError."""
        try:
            with open(self.path, "rb") as raw:
                stream = _decompress(raw, self.compression)
                stream.read(self.mark)
                yield stream
        except (gzip.BadGzipFile, zlib.error, EOFError, zstandard.ZstdError) as error:
            raise DataError(
                f"the {self.compression} data is damaged or cut short ({error})",
                where=self.name,
                todo="Copy or download the file again.",
            ) from error
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror or error}", where=self.name) from error

    @property
    def suffix(self) -> str:
        """The extension that tells the kind ('.csv' of 'a.csv.gz'), in lower case."""
        path = Path(self.name.lower())
        return path.with_suffix("").suffix if path.suffix in (".gz", ".zst", ".zstd") else path.suffix


class _ZstdReader(io.RawIOBase):
    """Decompressed zstd frames as a raw stream. The library's own stream reader takes a cut file for a finished one."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw, self._frame, self._ready = raw, zstandard.ZstdDecompressor().decompressobj(), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            if self._frame.eof:
                data = self._frame.unused_data or self._raw.read(1 << 17)
                if not data:
                    return 0
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            else:
                data = self._raw.read(1 << 17)
                if not data:
                    raise EOFError("the last frame is not complete")
            self._ready = self._frame.decompress(data)
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


def _decompress(raw: IO[bytes], compression: str) -> IO[bytes]:
    if compression == "gzip":
        return cast("IO[bytes]", gzip.open(raw, "rb"))
    if compression == "zstd":
        return io.BufferedReader(_ZstdReader(raw), HEAD_BYTES)
    return raw


def check_encoding(encoding: str) -> str:
    """The codec's own name. Raises UsageError for a name that Python does not know as a text encoding."""
    try:
        b"".decode(encoding)
        name = codecs.lookup(encoding).name
        return "utf-8" if name == "utf-8-sig" else name  # a mark is looked for in every file
    except (LookupError, ValueError) as error:
        raise UsageError(
            f"unknown encoding {encoding!r}",
            where="--encoding",
            todo="For example utf-8, gb18030, utf-16, cp1252, big5.",
        ) from error


def expand(files: Sequence[str]) -> list[str]:
    """Names to files: globs are expanded and sorted. Raises one DataError that lists all names that are no file."""
    found: list[str] = []
    wrong: list[tuple[str, str]] = []
    for name in files:
        if name == "-" or name.startswith("hub:") or os.path.exists(name):
            matches = [name]
        elif glob.has_magic(name):
            matches = sorted(path for path in glob.glob(name, recursive=True) if not os.path.isdir(path))
            if not matches:
                wrong.append((name, "no file matches"))
        else:
            matches = []
            wrong.append((name, f"no such file{_near(name)}"))
        for path in matches:
            if os.path.isdir(path):
                wrong.append((path, f"is a folder{_inside(path)}"))
            elif path != "-" and not path.startswith("hub:") and not os.access(path, os.R_OK):
                wrong.append((path, "may not be read (permission denied)"))
        found += matches
    if len(wrong) == 1:
        raise DataError(wrong[0][1], where=wrong[0][0])
    if wrong:
        raise DataError(f"{len(wrong)} data files cannot be read", details=[f"{name}: {what}" for name, what in wrong])
    if not found:
        raise DataError("no data file given")
    return found


def _near(name: str) -> str:
    """A file of the same folder that is spelt alike."""
    import difflib

    folder = os.path.dirname(name)
    try:
        close = difflib.get_close_matches(os.path.basename(name), os.listdir(folder or "."), n=1)
    except OSError:
        return ""
    return f" (did you mean {os.path.join(folder, close[0])}?)" if close else ""


def _inside(folder: str) -> str:
    endings = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".gz", ".zst")
    try:
        names = sorted(name for name in os.listdir(folder) if name.lower().endswith(endings))
    except OSError:
        return ""
    if not names:
        return " (without data files)"
    pattern = os.path.join(folder, "*" + os.path.splitext(names[0])[1])
    return f" (give its files, for example '{pattern}', which matches {names[0]})"


@contextmanager
def opened(name: str, encoding: str | None, notice: Notice) -> Iterator[Source]:
    """A `Source` for a name, its head read and its encoding known; temporary copies are removed on leaving."""
    source = Source(name, name, encoding or "utf-8")
    try:
        if name == "-" or not os.path.isfile(name):
            with contextlib.nullcontext(sys.stdin.buffer) if name == "-" else open(name, "rb") as stream:
                source.path = _spool(source, stream)
        _look(source)
        if source.head.startswith(PARQUET_MAGIC):
            if source.compression:  # Parquet is read from its end, which a compressed stream cannot give
                with source.open() as stream:
                    source.path = _spool(source, stream)
                source.compression = ""
            yield source
            return
        _find_mark(source, encoding, notice)
        if b"{}\n".decode(source.encoding, errors="replace") != "{}\n":  # lines cannot be found by their bytes
            _rewrite_as_utf8(source)
        yield source
    finally:
        for path in source.temporary:
            os.unlink(path)


def _spool(source: Source, stream: IO[bytes]) -> str:
    handle, path = tempfile.mkstemp(prefix="espalier-")
    source.temporary.append(path)
    with os.fdopen(handle, "wb") as copy:
        shutil.copyfileobj(stream, copy, HEAD_BYTES)
    return path


def _look(source: Source) -> None:
    """Fills compression and head, and refuses what is no data at all."""
    with source.open() as stream:
        start = stream.read(4)
    source.compression = "gzip" if start.startswith(_GZIP) else "zstd" if start == _ZSTD else ""
    with source.open() as stream:
        source.head = stream.read(HEAD_BYTES)
    if not source.head:
        raise DataError("empty file (0 bytes)", where=source.name)
    for magic, what, todo in _NOT_DATA:
        if source.head.startswith(magic):
            raise DataError(f"this is {what}", where=source.name, todo=todo)
    text = source.head[:2000].lstrip(codecs.BOM_UTF8).lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<body")):
        kind = "an XML document" if text.startswith(b"<?xml") and b"<html" not in text else "an HTML page"
        raise DataError(
            f"this is {kind}, not a data file",
            where=source.name,
            todo="A download may have needed a login: fetch it again.",
        )


def _find_mark(source: Source, encoding: str | None, notice: Notice) -> None:
    """A byte order mark decides the encoding, also against `--encoding`: no other encoding begins like that."""
    for mark, found in _MARKS:
        if source.head.startswith(mark):
            source.mark, source.encoding, source.head = len(mark), found, source.head[len(mark) :]
            if found != "utf-8":
                shown = " ".join(f"{byte:02X}" for byte in mark)
                notice(f"{source.name}: read as {found.upper()} (starts with {shown})")
            elif encoding and codecs.lookup(encoding).name != "utf-8":
                notice(f"{source.name}: read as UTF-8, not {encoding} (it starts with the UTF-8 mark)")
            if found != "utf-8":  # which byte order: the mark is gone by the time the text is decoded
                source.encoding += "-le" if mark in (codecs.BOM_UTF16_LE, codecs.BOM_UTF32_LE) else "-be"
            return
    zeros = source.head[:200].count(0)
    if encoding is None and zeros > len(source.head[:200]) // 4:
        order = "utf-16-le" if source.head[1:2] == b"\0" else "utf-16-be"
        raise DataError(
            "looks like UTF-16 without a byte order mark (every other byte is zero)",
            where=source.name,
            todo=f"Save it as UTF-8, or pass --encoding {order}.",
        )


def _rewrite_as_utf8(source: Source) -> None:
    decoder = codecs.getincrementaldecoder(source.encoding)()
    handle, path = tempfile.mkstemp(prefix="espalier-")
    source.temporary.append(path)
    done = source.mark
    try:
        with source.open() as stream, os.fdopen(handle, "wb") as copy:
            while True:
                block = stream.read(HEAD_BYTES)
                copy.write(decoder.decode(block, final=not block).encode())
                if not block:
                    break
                done += len(block)
    except UnicodeError as error:
        raise DataError(
            f"not valid {source.encoding.upper()} (near byte {done})", where=source.name, todo="Save it as UTF-8."
        ) from error
    source.path, source.encoding, source.compression, source.mark = path, "utf-8", "", 0
    with source.open() as stream:
        source.head = stream.read(HEAD_BYTES)
    if source.head.startswith(codecs.BOM_UTF8):  # utf-16-le named by the user leaves the mark in the text
        source.mark, source.head = 3, source.head[3:]


def not_utf8(error: UnicodeDecodeError, offset: int, encoding: str = "utf-8") -> str:
    """The reason for bytes that do not decode; `offset` is where in the file `error.object` begins."""
    shown = f"byte 0x{error.object[error.start]:02X} at offset {offset + error.start}"
    if encoding != "utf-8":
        return f"not {encoding} ({shown})"
    try:
        error.object.decode("gb18030")
    except UnicodeDecodeError:
        return f"not UTF-8 ({shown}; save the file as UTF-8, or pass its encoding, for example --encoding cp1252)"
    return f"not UTF-8 ({shown}; looks like GBK/GB18030 - pass the encoding: --encoding gb18030)"


def check_head_encoding(source: Source) -> None:
    """Refuses a file whose beginning is mostly not UTF-8: one message instead of one for every row.

    A file with some good non-ASCII lines is UTF-8 with bad rows in it, and is read row by row.
    """
    if codecs.lookup(source.encoding).name != "utf-8":
        return
    offset, lines, wrong, first = source.mark, 0, 0, ""
    complete = source.head if len(source.head) < HEAD_BYTES else source.head.rpartition(b"\n")[0]
    for line in complete.splitlines(keepends=True):
        try:
            if line.decode().isascii():
                lines += bool(line.strip())
            else:
                return
        except UnicodeDecodeError as error:
            lines, wrong = lines + 1, wrong + 1
            first = first or not_utf8(error, offset)
        offset += len(line)
    if wrong and 2 * wrong >= lines:
        raise DataError(first, where=source.name)
