"""Two hosts in network namespaces: the steps of one process; a lost host ends the job, which then goes on bit-equal."""

from __future__ import annotations

from pathlib import Path

import pytest
import two_hosts
from launch import assert_same_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder in which `two` is a run on two hosts that equals `one`."""
    reason = two_hosts.why_not()
    if reason is not None:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("hosts")
    two_hosts.equal(folder)
    return folder


def test_two_hosts_match_one_process(folder: Path) -> None:
    assert_same_run(folder / "one", folder / "two")


@pytest.mark.parametrize("how", ["killed", "unplugged"])
def test_a_lost_host_ends_the_job_which_then_goes_on(how: str, folder: Path) -> None:
    seen = two_hosts.lost(folder, how)
    for number in (1,) if how == "killed" else (1, 2):
        host = seen[f"host {number}"]
        assert 0 <= host["message after"] <= host["ended after"] < 60, seen
        assert "of the run is lost" in host["said"], seen
