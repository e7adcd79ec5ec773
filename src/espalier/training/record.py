"""espalier.json, which travels with an adapter: what ties it to its base, its template and its rows."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from espalier import __version__

if TYPE_CHECKING:
    from espalier.training.prepare import Prepared
    from espalier.training.trainer import LoraTrainer


def record(prepared: Prepared, trainer: LoraTrainer) -> dict[str, Any]:
    """What ties an adapter to its base, its template and its rows; written as espalier.json beside it."""
    tokenizer = prepared.tokenizer
    return {
        "espalier_version": __version__,
        "run": trainer.keeper.run,
        "processes": trainer.ranks.world,
        "steps_of": prepared.steps_of,
        "base": {
            "name": prepared.model.name,
            "fingerprint": trainer.base_fingerprint,
            **({"held_as": prepared.quantization} if prepared.quantization else {}),
        },
        "template": prepared.template.source,
        "stop_ids": prepared.stop_ids,
        "fingerprints": {
            "tokenizer": _digest(tokenizer.backend_tokenizer.to_str()),
            "template": _digest(str(tokenizer.chat_template)),
        },
        "data": {
            "files": list(prepared.data_files),
            # Of a stream nobody knows how many rows it has.
            "read": prepared.result.counts.num_read if prepared.result else None,
            "trained": len(prepared.train_rows) if prepared.result else None,
            "held_out": len(prepared.eval_rows) if prepared.eval_rows is not None else 0,
            "fingerprint": prepared.rows_digest,
        },
    }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
