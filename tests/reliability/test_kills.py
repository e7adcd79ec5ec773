"""SIGKILL at any instant: the resumed run is the uninterrupted run, and nothing half-written is ever seen."""

from __future__ import annotations

from pathlib import Path

import pytest

from reliability.kills import Setting, campaign

PERTURBED = (("MALLOC_PERTURB_", "165"),)  # glibc fills freed and fresh memory with this byte: no result may notice


def test_killed_three_times(tmp_path: Path) -> None:
    figures = campaign(tmp_path, Setting(), kills=3, seed=1, kills_a_chain=3)
    assert figures.kills >= 3
    assert figures.equal == figures.chains


@pytest.mark.slow
@pytest.mark.parametrize("setting", [Setting(0), Setting(0, PERTURBED), Setting(2, PERTURBED)], ids=str)
def test_killed_often(setting: Setting, tmp_path: Path) -> None:
    figures = campaign(tmp_path, setting, kills=12, seed=2)
    print(figures)
    assert figures.kills >= 12
    assert figures.equal == figures.chains
    assert figures.in_a_save > 0
