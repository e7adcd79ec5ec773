"""One thread for the runs of this folder."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Sums in one fixed order, so that losses compare from machine to machine."""
    import torch

    torch.set_num_threads(1)
