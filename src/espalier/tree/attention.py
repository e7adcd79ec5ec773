"""Attention over a tree, registered with transformers under `espalier_reference` and `espalier_merged`.

Both enter through AttentionInterface and AttentionMaskInterface; no model code is changed. transformers asks the mask
function once for each kind of layer and hands over that kind's own rule (causal, sliding window, chunks) as a
function of (query index, key index). We evaluate the rule on *positions* and keep the pairs that lie on one path of
the tree: exact for any rule that depends on positions alone. Without a tree (generation, plain rows) both names
behave as transformers' sdpa.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from espalier.errors import ModelError, UsageError
from espalier.tree.collate import TreeLayout

ATTENTION_NAMES = ("reference", "merged")
_PREFIX = "espalier_"
TREE_KEYWORD = "espalier_tree"  # the forward keyword that carries the TreeLayout down to the attention function

_active: ContextVar[TreeLayout | None] = ContextVar("espalier_active_tree", default=None)
_stock_names: WeakKeyDictionary[PreTrainedModel, str] = WeakKeyDictionary()


@contextmanager
def tree_masks(layout: TreeLayout) -> Iterator[None]:
    """While it is open, transformers' mask functions build masks of this tree."""
    token = _active.set(layout)
    try:
        yield
    finally:
        _active.reset(token)


def set_attention(model: PreTrainedModel, name: str | None) -> None:
    """Let the model compute with `reference` or `merged`; None: with what it was loaded with.

    It stays so until the next call, because recomputation in the backward runs the attention again.
    """
    current = str(model.config._attn_implementation)
    if not current.startswith(_PREFIX):
        _stock_names[model] = current
    wanted = _stock_names[model] if name is None else _PREFIX + name
    if name is not None and name not in ATTENTION_NAMES:
        raise UsageError(f"unknown attention {name!r}", todo=f"Choose one of: {', '.join(ATTENTION_NAMES)}.")
    if current != wanted:
        model.set_attn_implementation(wanted)
        if model.config._attn_implementation != wanted:
            raise ModelError(
                f"{type(model).__name__} does not take its attention from transformers' AttentionInterface",
                todo="Train it without the tree: --tree off.",
            )


def _tree_rule(layout: TreeLayout, mask_function: Callable[..., Any], use_vmap: bool) -> torch.Tensor:
    """bool [1, 1, T, T]: the layer's own rule, on positions, along the paths of the tree."""
    if use_vmap:
        raise ModelError(
            "this model lays a mask of its own over the causal one, which is not known to depend on positions alone",
            todo="Train it without the tree: --tree off.",
        )
    zero = layout.positions.new_zeros(())
    allowed: torch.Tensor = mask_function(zero, zero, layout.positions[:, None], layout.positions[None, :])
    return (layout.ancestry & allowed)[None, None]


def _reference_mask(*, mask_function: Callable[..., Any], use_vmap: bool = False, **kwargs: Any) -> torch.Tensor | None:
    layout = _active.get()
    if layout is None:
        return sdpa_mask(mask_function=mask_function, use_vmap=use_vmap, **kwargs)
    return _tree_rule(layout, mask_function, use_vmap)


def reference_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention under a dense mask. query [B, H, T, D], key and value [B, G, T, D] -> [B, T, H, D].

    `softcap` (Gemma 2) and `s_aux`, attention sinks (GPT-OSS), are in no stock kernel: they take the plain products.
    """
    if softcap is not None or s_aux is not None:
        output = _explicit(query, key, value, attention_mask, dropout, scaling, softcap, s_aux)
    else:
        output = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=attention_mask,
            dropout_p=dropout,
            scale=scaling,
            is_causal=attention_mask is None and query.shape[2] > 1 and getattr(module, "is_causal", True),
            enable_gqa=key.shape[1] != query.shape[1],
        )
    return output.transpose(1, 2).contiguous(), None


def _explicit(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """[B, H, T, D], softmax in float32. A sink is one more logit a head that takes weight and gives no value."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = (query @ key.transpose(2, 3)) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is None and query.shape[2] > 1:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    scores = scores.float()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        column = sinks.float().reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = scores.softmax(-1)[..., : key.shape[2]].to(query.dtype)
    return F.dropout(weights, dropout) @ value


AttentionInterface.register(_PREFIX + "reference", reference_attention)
AttentionMaskInterface.register(_PREFIX + "reference", _reference_mask)
