"""Espalier: LoRA fine-tuning that never computes a prompt twice.

The public names, imported when they are first used, so that `import espalier` costs nothing.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# PEFT and transformers import bitsandbytes where it is installed, and that says which kernels it has not got.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

_PLACES = {
    "EspalierError": "espalier.errors",
    "Example": "espalier.data.formats",
    "Encoded": "espalier.encode.encode",
    "LoraTrainer": "espalier.training.trainer",
    "RunConfig": "espalier.config",
    "read_examples": "espalier.data.formats",
    "train": "espalier.training.run",
}

__all__ = ["Encoded", "EspalierError", "Example", "LoraTrainer", "RunConfig", "__version__", "read_examples", "train"]

if TYPE_CHECKING:
    from espalier.config import RunConfig
    from espalier.data.formats import Example, read_examples
    from espalier.encode.encode import Encoded
    from espalier.errors import EspalierError
    from espalier.training.run import train
    from espalier.training.trainer import LoraTrainer


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module 'espalier' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
