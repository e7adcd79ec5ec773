"""A folder of encoded rows: written beside its place and moved there when whole, checked before it is trusted.

It holds the arrays of dataset.py as <name>.bin, bad.jsonl (the rows left out) and manifest.json (counts, notes, file
names, and the size and sha256 of each other file). A folder that differs from its manifest is built anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from espalier.data.formats import FormatOptions
from espalier.data.read import BadRow
from espalier.encode.dataset import DTYPES, Packed
from espalier.encode.encode import Encoder

LAYOUT = 1  # of the folder; counts up when it changes
MANIFEST = "manifest.json"


class FolderWriter:
    """Appends pieces to a folder that becomes visible under its name only with `finish`."""

    def __init__(self, folder: Path):
        folder.parent.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._work = Path(tempfile.mkdtemp(prefix=f".{folder.name[:16]}-", dir=folder.parent))
        self._num_tokens = 0
        self._files: dict[str, Any] = {}
        self._digests: dict[str, Any] = {}
        self._write("offsets", np.zeros(1))

    def add(self, part: Packed) -> None:
        """Appends rows whose file indices already agree with those before."""
        for name in ("ids", "labels", "files", "lines", "keys"):
            self._write(name, part.arrays[name])
        self._write("offsets", self._num_tokens + np.cumsum(part.arrays["lengths"]))
        weighted = "weights" in part.arrays
        if weighted or "weights" in self._files:
            if "weights" not in self._files:
                self._write("weights", np.ones(self._num_tokens))  # earlier rows had none
            self._write("weights", part.arrays["weights"] if weighted else np.ones(len(part.arrays["ids"])))
        self._num_tokens += len(part.arrays["ids"])

    def _write(self, name: str, values: Any) -> None:
        if name not in self._files:
            self._files[name] = open(self._work / f"{name}.bin", "wb")  # noqa: SIM115 (open until finish)
            self._digests[name] = hashlib.sha256()
        data = values.astype(DTYPES[name], copy=False).tobytes()
        self._files[name].write(data)
        self._digests[name].update(data)

    def finish(self, bad: Sequence[BadRow], summary: Mapping[str, Any]) -> None:
        """Writes the rows left out and the manifest with `summary`, and moves the folder to its place."""
        self.close()
        lines = "".join(json.dumps(asdict(row), ensure_ascii=True) + "\n" for row in bad)
        (self._work / "bad.jsonl").write_text(lines, encoding="utf-8")
        digests = {f"{name}.bin": digest.hexdigest() for name, digest in self._digests.items()}
        digests["bad.jsonl"] = hashlib.sha256(lines.encode()).hexdigest()
        sizes = {name: (self._work / name).stat().st_size for name in digests}
        manifest = {"layout": LAYOUT, "sha256": digests, "bytes": sizes, **summary}
        (self._work / MANIFEST).write_text(json.dumps(manifest, ensure_ascii=True, indent=1), encoding="utf-8")
        if self._folder.exists():  # damaged: nobody calls this for a good one
            shutil.rmtree(self._folder)
        os.replace(self._work, self._folder)

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def discard(self) -> None:
        """Removes what was written; for a run that was stopped."""
        self.close()
        shutil.rmtree(self._work, ignore_errors=True)


def load(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder whose every file is whole, with "bad": the rows left out. None for any other."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["layout"] != LAYOUT:
            return None
        for name, digest in manifest["sha256"].items():
            if (folder / name).stat().st_size != manifest["bytes"][name] or file_digest(folder / name) != digest:
                return None
        lines = (folder / "bad.jsonl").read_text(encoding="utf-8").splitlines()
        manifest["bad"] = [BadRow(**json.loads(line)) for line in lines]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return manifest


def file_digest(path: Path | str) -> str:
    """sha256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def cache_key(files: Sequence[str], encoder: Encoder, options: FormatOptions) -> str | None:
    """Names one encoding: data bytes, tokenizer, template, options and our own code. None where no file can be hashed.

    Hub datasets and standard input have no bytes that can be read twice.
    """
    if any(name == "-" or name.startswith("hub:") or not os.path.isfile(name) for name in files):
        return None
    tokenizer = encoder.tokenizer
    probe = [{"role": "user", "content": "a"}]
    parts = [
        _own_code(),
        *(f"{name} {version(name)}" for name in ("tokenizers", "transformers", "jinja2")),
        tokenizer.backend_tokenizer.to_str(),
        repr(sorted(tokenizer.special_tokens_map.items(), key=str)),
        repr(tokenizer.chat_template),
        encoder.template.try_render(probe),  # a template may write today's date
        repr((encoder.max_length, encoder.overlength, encoder.train_on)),
        repr(sorted(asdict(options).items(), key=str)),
        repr([(name, file_digest(name)) for name in files]),
    ]
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", errors="backslashreplace")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def _own_code() -> str:
    """A hash of the sources that decide what a row becomes, so that no version number can be forgotten."""
    package = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for path in sorted([*package.glob("data/*.py"), *package.glob("encode/*.py")]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
