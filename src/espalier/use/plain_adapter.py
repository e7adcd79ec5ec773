"""An adapter that PiSSA or OLoRA has started, as a plain one.

Both take s B0 A0 out of the base's weight W when they start, and train A and B from A0 and B0. What the model computes
with is W - s B0 A0 + s B A = W + s [B, -B0] [A; A0]: on the base as it is, a LoRA adapter of twice the rank. (The same
identity is behind PEFT's conversion when it saves; papers: PiSSA, arXiv 2404.02948; OLoRA, arXiv 2406.01775.)
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from espalier.errors import AdapterError

if TYPE_CHECKING:
    import torch


def as_plain(
    base: Any, settings: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], where: str
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(adapter_config.json, tensors by PEFT's names) of the plain adapter.

    base: the float32 base with its weights, which is changed and must be thrown away. Raises AdapterError for DoRA,
    whose magnitudes belong to the changed base.
    """
    import torch
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    if settings.get("use_dora"):
        raise AdapterError(
            "DoRA on a start that changes the base cannot become a plain adapter",
            where=where,
            todo="Use it with PEFT alone, which computes that start again.",
        )
    names = LoraConfig.__dataclass_fields__
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = get_peft_model(base, LoraConfig(**{key: value for key, value in settings.items() if key in names}))
    start = get_peft_model_state_dict(first, save_embedding_layers=False)
    made = {}
    for key, tensor in tensors.items():
        if ".lora_A." in key:
            made[key] = torch.cat([tensor.float(), start[key].float()], dim=0)
        elif ".lora_B." in key and key.endswith(".weight"):
            made[key] = torch.cat([tensor.float(), -start[key].float()], dim=1)
        else:
            made[key] = tensor
    # The scale s stays: alpha / r with both doubled, alpha / sqrt(r) with alpha times sqrt(2).
    factor = math.sqrt(2) if settings.get("use_rslora") else 2
    ranks, alphas = settings.get("rank_pattern") or {}, settings.get("alpha_pattern") or {}
    return {
        **settings,
        "init_lora_weights": True,
        "r": 2 * settings["r"],
        "lora_alpha": factor * settings["lora_alpha"],
        "rank_pattern": {name: 2 * rank for name, rank in ranks.items()},
        "alpha_pattern": {name: factor * alpha for name, alpha in alphas.items()},
    }, made
