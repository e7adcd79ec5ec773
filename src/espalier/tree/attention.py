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
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from espalier.errors import ModelError, UsageError
from espalier.tree.collate import TreeLayout
from espalier.tree.products import product_backward
from espalier.tree.support import STOCK_MASK_MODEL_TYPES

ATTENTION_NAMES = ("reference", "merged")
_PREFIX = "espalier_"

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
    if takes_stock_mask(model):
        return
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


def takes_stock_mask(model: PreTrainedModel) -> bool:
    """True for the models outside the AttentionInterface whose own attention takes a ready [1, 1, T, T] mask."""
    return model.config.model_type in STOCK_MASK_MODEL_TYPES


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
        groups = query.shape[1] // key.shape[1]
        if groups > 1 and query.device.type != "cpu":
            # Elsewhere a mask together with grouped heads falls back to the kernel that holds all scores.
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
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


def tree_marker(layout: TreeLayout) -> torch.Tensor:
    """An empty mask [1, 1, 0, 0] that carries the tree.

    Every model hands its mask to every layer, also when a layer is computed again in the backward; some (StableLM,
    Nemotron) hand nothing else through.
    """
    marker = torch.empty((1, 1, 0, 0), dtype=torch.bool, device=layout.device)
    marker.tree_layout = layout  # type: ignore[attr-defined]
    return marker


def _merged_mask(
    *,
    mask_function: Callable[..., Any],
    use_vmap: bool = False,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> torch.Tensor | None:
    """A tree_marker where the layer sees its whole past (no mask is needed), else the dense mask of its rule."""
    layout = _active.get()
    if layout is None:
        return sdpa_mask(
            mask_function=mask_function,
            use_vmap=use_vmap,
            local_size=local_size,
            allow_is_causal_skip=allow_is_causal_skip,
            **kwargs,
        )
    sees_all = local_size is None or local_size > layout.max_position
    if sees_all and allow_is_causal_skip and not use_vmap:
        return tree_marker(layout)
    return _tree_rule(layout, mask_function, use_vmap)


def merged_attention(
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
    """Attention without a mask: one call of torch's flash kernel a segment. Shapes as in reference_attention.

    What the kernel cannot do (dropout, soft-capping, sinks, a value width of its own, a window that cuts the tree) goes
    to reference_attention, layer by layer.
    """
    if attention_mask is not None and attention_mask.numel() == 0:
        layout: TreeLayout | None = getattr(attention_mask, "tree_layout", None)
        if layout is None:
            raise ModelError(
                f"{type(module).__name__} receives a copy of the model's mask, which has lost the tree",
                todo="Choose --attention reference.",
            )
        plain_kernel = dropout == 0.0 and softcap is None and s_aux is None and query.shape[-1] == value.shape[-1]
        if plain_kernel:
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            # Under autocast, rotary embedding may leave queries and keys wider than values: narrow them as torch does.
            query, key = query.to(value.dtype), key.to(value.dtype)
            return _Merged.apply(query, key, value, layout, scale), None  # type: ignore[no-untyped-call]
        attention_mask = layout.causal_mask
    return reference_attention(
        module, query, key, value, attention_mask, dropout, scaling, softcap=softcap, s_aux=s_aux, **kwargs
    )


class _Merged(torch.autograd.Function):
    """Exact attention over a tree from causal calls alone.

    A segment's descendants follow it in the pack, so one causal call with queries [segment and all its descendants] and
    keys [segment] serves the segment's own triangle and every descendant's view of it: the kernel aligns the
    triangle at the top left, and all later queries see all keys. A token's output is the average of its parts,
    weighted by exp(log-sum-exp). The backward hands the kernel the *merged* output and log-sum-exp for every part:
    with p = exp(s - lse) and delta = rowsum(grad * output), both of the whole row, the parts' gradients add up to
    the whole (the identity that FlashAttention's blocks rest on, arXiv 2205.14135). In bfloat16 products.py does the
    same without the kernel.
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: TreeLayout, scale: float
    ) -> torch.Tensor:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        _, heads, tokens, width = query.shape
        nested = any(parent >= 0 for parent in layout.parent)
        # Parts are weighted and added in float32 at least; without a tree there is nothing to add.
        wide = torch.promote_types(query.dtype, torch.float32)
        output = query.new_empty((1, tokens, heads, width), dtype=wide if nested else query.dtype)
        merged = output.transpose(1, 2)  # [1, H, T, D]
        lse = query.new_empty((1, heads, tokens), dtype=wide)
        for begin, end, last, parent in layout.segments():
            own = slice(begin, last)
            part, part_lse = kernel(
                query[:, :, own], key[:, :, begin:end], value[:, :, begin:end], 0.0, True, scale=scale
            )
            if parent < 0:
                merged[:, :, own], lse[:, :, own] = part, part_lse
                continue
            before = lse[:, :, own]
            after = torch.logaddexp(before, part_lse)
            merged[:, :, own].mul_((before - after).exp_().unsqueeze(-1))
            merged[:, :, own].addcmul_(part, (part_lse - after).exp_().unsqueeze(-1))
            lse[:, :, own] = after
        output = output.to(query.dtype)
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.layout, ctx.scale = layout, scale
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        query, key, value, output, lse = ctx.saved_tensors
        grad_output, output = grad_output.transpose(1, 2), output.transpose(1, 2)
        if query.dtype == torch.bfloat16:
            found = product_backward(ctx.layout.products, grad_output, query, key, value, output, lse, ctx.scale)
            return *found, None, None
        grads = [torch.empty_like(tensor) for tensor in (query, key, value)]
        for begin, end, last, parent in ctx.layout.segments():
            own, keys = slice(begin, last), slice(begin, end)
            part = kernel(
                grad_output[:, :, own],
                query[:, :, own],
                key[:, :, keys],
                value[:, :, keys],
                output[:, :, own],
                lse[:, :, own],
                0.0,
                True,
                scale=ctx.scale,
            )
            if parent < 0:
                grads[0][:, :, own] = part[0]
            else:
                grads[0][:, :, own] += part[0]
            grads[1][:, :, keys], grads[2][:, :, keys] = part[1], part[2]
        return *grads, None, None


AttentionInterface.register(_PREFIX + "merged", merged_attention)
AttentionMaskInterface.register(_PREFIX + "merged", _merged_mask)


def choose_attention(config: PretrainedConfig, device: torch.device | str, requested: str = "auto") -> tuple[str, str]:
    """(name, reason) of the attention to train with: `requested`, or for `auto` the fastest that was measured here.

    Raises UsageError where the request is unknown or cannot run on the device.
    """
    text = config.get_text_config()
    where = torch.device(device).type
    if requested in {"varlen", "flex"}:
        raise UsageError(
            f"--attention {requested} is not in this version: it has not been tested on a GPU",
            todo="Choose auto, reference or merged.",
        )
    if requested not in {"auto", *ATTENTION_NAMES}:
        raise UsageError(f"unknown attention {requested!r}", todo=f"Choose one of: auto, {', '.join(ATTENTION_NAMES)}.")
    if where != "cpu":
        if requested == "merged":
            raise UsageError(f"--attention merged runs on the CPU, not on {where}", todo="Choose auto or reference.")
        obstacle = f"a dense mask: no other way has been tested on {where} yet"
    elif text.model_type in STOCK_MASK_MODEL_TYPES:
        obstacle = f"{text.model_type} takes a ready mask only"
    elif getattr(text, "attn_logit_softcapping", None) or text.model_type == "gpt_oss":
        obstacle = "soft-capping or attention sinks are in no stock kernel"
    else:
        obstacle = ""
    if requested == "merged" and obstacle:
        return "reference", f"merged was asked for, but {obstacle}"
    if requested != "auto":
        return requested, "as asked for"
    if obstacle:
        return "reference", obstacle
    return "merged", "fastest on CPU at every size measured: 1.3 to 6 times a dense mask"
