"""An adapter's folder as our training leaves it, made without training."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import torch

from espalier.model.fingerprint import base_fingerprint
from espalier.model.load import load_model, load_tokenizer


def whole(shared: Path, folder: Path) -> Path:
    """adapter-good with all that our training writes beside it."""
    shutil.copytree(shared / "adapter-good", folder)
    base = shared / "tiny-llama"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copyfile(base / name, folder / name)
    tokenizer = load_tokenizer(base)
    prints = {"tokenizer": tokenizer.backend_tokenizer.to_str(), "template": tokenizer.chat_template}
    record = {
        "base": {
            "name": "tiny-llama",
            "fingerprint": base_fingerprint(load_model(base, device="cpu", dtype=torch.float32)),
        },
        "stop_ids": [1],
        "fingerprints": {name: hashlib.sha256(text.encode()).hexdigest() for name, text in prints.items()},
    }
    (folder / "espalier.json").write_text(json.dumps(record))
    return folder
