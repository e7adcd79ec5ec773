"""Makes small_runs importable from the tests of this folder, and keeps caches out of the user's home."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Sums in one fixed order, so that losses compare from machine to machine."""
    import torch

    torch.set_num_threads(1)
