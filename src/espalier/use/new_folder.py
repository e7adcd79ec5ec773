"""A folder that appears whole or not at all: written beside, then renamed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from espalier.errors import RunFolderError


@contextmanager
def new_folder(output: Path) -> Iterator[tuple[Path, Path]]:
    """(scratch folder, folder that becomes `output` where the block ends well); both are gone where it does not.

    Raises RunFolderError: `output` is a file or holds something, or the disk does not take it.
    """
    check_output(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", suffix=".partial", dir=output.parent) as scratch:
            ready = Path(scratch) / "ready"
            ready.mkdir()
            yield Path(scratch), ready
            shutil.rmtree(output, ignore_errors=True)  # an empty folder, as checked
            os.replace(ready, output)
    except OSError as error:
        raise RunFolderError(
            f"cannot be written: {error.strerror or error}",
            where=str(output),
            todo="Make room, or name another folder.",
        ) from error


def check_output(folder: Path) -> None:
    """Raise RunFolderError unless `folder` is new or empty."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        what = "this is a file" if folder.is_file() else "this folder is not empty"
        raise RunFolderError(what, where=str(folder), todo="Name another --output_dir.")
