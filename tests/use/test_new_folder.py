"""A folder of a result appears whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from espalier.errors import AdapterError, RunFolderError
from espalier.use.new_folder import new_folder


def test_it_appears_when_the_block_ends_well(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "out"
    with new_folder(output) as (scratch, ready):
        (scratch / "note").write_text("gone afterwards")
        (ready / "model").write_text("whole")
        assert not output.exists()
    assert [p.name for p in output.iterdir()] == ["model"]
    assert [p.name for p in output.parent.iterdir()] == ["out"]


def test_nothing_is_left_where_it_does_not(tmp_path: Path) -> None:
    def half() -> None:
        with new_folder(tmp_path / "out") as (_, ready):
            (ready / "model").write_text("half")
            raise AdapterError("not the trained one")

    with pytest.raises(AdapterError, match="not the trained one"):
        half()
    assert list(tmp_path.iterdir()) == []


def test_what_is_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for output, words in (
        (tmp_path, "this folder is not empty"),
        (tmp_path / "file", "this is a file"),
        (tmp_path / "file" / "out", "cannot be written"),
    ):
        with pytest.raises(RunFolderError, match=words) as error, new_folder(output):
            pass
        assert error.value.where == str(output)
    assert (tmp_path / "file").read_text() == "mine"
