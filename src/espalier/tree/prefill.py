"""Many prompts into one key-value cache: what they share is computed once, however they branch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from espalier.encode.encode import IGNORE_INDEX, Encoded
from espalier.tree.attention import set_attention
from espalier.tree.collate import to_tensors
from espalier.tree.loss import base_of, head_of, logit_rule, tree_hidden
from espalier.tree.plan import Pack, plan_step


@torch.no_grad()
def prefill(
    model: Any, prompts: Sequence[Sequence[int]], attention: str, cache: Any, cache_argument: str
) -> torch.Tensor:
    """Next-token logits float32 [B, V] of the prompts; `cache` (empty) holds their keys and values: [B, G, L, D] a
    layer, prompts on the right of the longest one's width L. cache_argument: what the model's forward calls it.

    One forward of the prompts' tree with a batch of one; its keys and values are then gathered along each path. For
    models of `tree_support` whose cache is a plain list of keys and values.
    """
    pack, last = _pack(prompts)
    base = base_of(model)
    rule = logit_rule(base)
    hidden = tree_hidden(base, to_tensors(pack, base.device), attention, **{cache_argument: cache}, use_cache=True)[0]
    set_attention(base, None)
    index = torch.from_numpy(_paths(pack, last, max(map(len, prompts)))).to(base.device)  # [B, L]
    for layer in cache.layers:
        layer.keys = layer.keys[0][:, index].transpose(0, 1).contiguous()
        layer.values = layer.values[0][:, index].transpose(0, 1).contiguous()
    logits: torch.Tensor = rule(head_of(base)(hidden[index[:, -1]])).float()
    return logits


def _pack(prompts: Sequence[Sequence[int]]) -> tuple[Pack, npt.NDArray[np.int64]]:
    """(the prompts as one pack, the place of each one's last token): rows whose one label follows the prompt."""
    rows = []
    for ids in prompts:
        labels = np.full(len(ids) + 1, IGNORE_INDEX, np.int32)
        labels[-1] = 0
        rows.append(Encoded(np.array([*ids, 0], np.int32), labels))
    (pack,) = plan_step(rows, max_tokens=sum(map(len, prompts)) + 1).packs
    last = np.empty(len(prompts), np.int64)
    last[pack.labels.row] = pack.logit_positions[pack.labels.target]
    return pack, last


def _paths(pack: Pack, last: npt.NDArray[np.int64], width: int) -> npt.NDArray[np.int64]:
    """int64 [B, width]: the places of each prompt's tokens in the pack, on the right; 0 on the left of them."""
    paths = np.zeros((len(last), width), np.int64)
    segment_of = np.repeat(np.arange(len(pack.segment_start)), pack.segment_length)
    for row, token in enumerate(last):
        end, segment, place = width, int(segment_of[token]), int(token)
        while segment >= 0:
            start = int(pack.segment_start[segment])
            paths[row, end - (place - start + 1) : end] = np.arange(start, place + 1)
            end -= place - start + 1
            segment = int(pack.segment_parent[segment])
            if segment >= 0:
                place = int(pack.segment_start[segment] + pack.segment_length[segment]) - 1
    return paths
