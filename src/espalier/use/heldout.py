"""The rows to evaluate an adapter on: files that are named, or those that its run held out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from espalier.config import RunConfig
from espalier.encode.dataset import EncodedDataset, split_heldout
from espalier.encode.encode import Encoder
from espalier.errors import DataError, UsageError

if TYPE_CHECKING:
    from espalier.training.report import Header

RUN_FILE = "run.yaml"


def run_config(folder: Path) -> RunConfig:
    """The options of the run that made the adapter; another tool's adapter has none."""
    from espalier.runfile import build_config

    file = folder / RUN_FILE
    return build_config({}, str(file)) if file.is_file() else RunConfig()


def heldout_rows(
    folder: Path, config: RunConfig, files: list[str], encoder: Encoder, limit_reason: str, say: Header
) -> tuple[EncodedDataset, list[str], int]:
    """(rows, the files they are from, rows left out). Raises UsageError where no file is named and none was held out,
    DataError for bad rows, or where the run's split cannot be made again."""
    from espalier.training.prepare import encode_rows, say_rows

    names = files or config.eval_dataset_path
    if names:
        if not files:
            say("rows", f"those that the run held out: {', '.join(names)}")
        result = encode_rows(config, names, encoder, say)
        say_rows("rows", result, limit_reason, say)
        return result.dataset, names, len(result.bad)
    if not config.eval_fraction:
        raise UsageError(
            "no rows to evaluate, and the adapter's run held none out",
            where="--dataset_path",
            todo="Give a file of rows that it has not seen.",
        )
    result = encode_rows(config, config.dataset_path, encoder, say)
    trained, heldout = split_heldout(result.dataset, config.eval_fraction, config.seed)
    _check_split(folder, trained, config.dataset_path)
    say("rows", f"the {len(heldout)} rows of {', '.join(config.dataset_path)} that the run held out")
    return heldout, config.dataset_path, len(result.bad)


def _check_split(folder: Path, trained: EncodedDataset, files: list[str]) -> None:
    """The other part of the split must be what was trained: of changed files it may hold what is now held out."""
    from espalier.training.prepare import rows_digest

    record = json.loads((folder / "espalier.json").read_text(encoding="utf-8"))
    if record.get("data", {}).get("fingerprint") != rows_digest(trained):
        raise DataError(
            "these are no longer the rows of the run, so what it held out cannot be told from what it trained on",
            where=", ".join(files),
            todo="Bring them back, or give a file of rows that it has not seen with --dataset_path.",
        )
