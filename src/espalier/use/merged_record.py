"""espalier.json beside a merged model: what it was made of, a hash of every file, and what it said when it was written.

espalier_version
merged        adapter: the run's id; dtype or quantize; comparison: see merge.Comparison
stop_ids, base, template, fingerprints, data      of the adapter's own record, where it has one
files         file name -> bytes, sha256
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from espalier import __version__
from espalier.model.load_adapter import RECORD

if TYPE_CHECKING:
    import torch

CARRIED = ("base", "template", "fingerprints", "data")


@dataclass(frozen=True, slots=True)
class Probe:
    """What a model says after a prompt: its likeliest token and the logarithm of that token's probability."""

    prompt: tuple[int, ...]
    likeliest: int
    log_prob: float


def probe_of(prompt: Sequence[int], logits: torch.Tensor) -> Probe:
    """logits: float32 [V] after the prompt's last token."""
    log_probs = logits.log_softmax(-1)
    likeliest = int(log_probs.argmax())
    return Probe(tuple(prompt), likeliest, float(log_probs[likeliest]))


def write_record(folder: Path, adapter_record: dict[str, Any], stops: list[int], about: dict[str, Any]) -> None:
    """The record of the files that lie in `folder` now. about: what `merged` says besides the adapter's run."""
    record: dict[str, Any] = {
        "espalier_version": __version__,
        "merged": {"adapter": adapter_record.get("run"), **about},
        "stop_ids": stops,
    }
    record |= {key: adapter_record[key] for key in CARRIED if key in adapter_record}
    record["files"] = file_hashes(folder)
    (folder / RECORD).write_text(json.dumps(record, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def file_hashes(folder: Path) -> dict[str, dict[str, Any]]:
    """File name -> {bytes, sha256} of all files in `folder` but the record itself."""
    found = {}
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.name != RECORD:
            with open(file, "rb") as data:
                digest = hashlib.sha256()
                while block := data.read(1 << 20):
                    digest.update(block)
            found[file.name] = {"bytes": file.stat().st_size, "sha256": digest.hexdigest()}
    return found
