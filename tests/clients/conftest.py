"""Environments of their own for the programs that read what we write: made once, kept where $ESPALIER_CLIENTS says."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

ClientPython = Callable[..., Path]


@pytest.fixture(scope="session")
def client_python(tmp_path_factory: pytest.TempPathFactory) -> ClientPython:
    """client_python(name, *packages): the Python of an environment with these packages and nothing of ours.

    without: packages to take out again, where what needs them is not used. The environment is made under
    $ESPALIER_CLIENTS/name, else under the tests' temporary folder. Skips where pip cannot install.
    """
    kept = os.environ.get("ESPALIER_CLIENTS")
    root = Path(kept) if kept else tmp_path_factory.mktemp("clients")

    def made(name: str, *packages: str, without: Sequence[str] = ()) -> Path:
        python = root / name / "bin" / "python"
        ready = root / name / "ready"  # an install that was stopped half-way is done again
        if not ready.exists():
            subprocess.run([sys.executable, "-m", "venv", "--clear", str(root / name)], check=True)
            if subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages], check=False).returncode:
                pytest.skip(f"{' '.join(packages)} cannot be installed here")
            if without:
                subprocess.run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *without], check=True)
            ready.write_text("\n".join(packages) + "\n", encoding="utf-8")
        return python

    return made
