"""The backward of tree attention as plain batched products, for bfloat16 on the CPU.

With p = exp(scale q k' - lse) and delta = rowsum(g * o), both of the whole row (log-sum-exp and output are the merged
ones), every part of the tree gives

    ds = p (g v' - delta),   dq = scale ds k,   dk = scale ds' q,   dv = p' g                 (arXiv 2205.14135)

and the parts add up. torch's own kernel for this is several times slower than its products where queries or keys are
few, and twice as slow on long ones (LOG.md, 2026-11-25).

-lse and -delta are two more columns of q and g, against columns of ones in k and v: the product itself subtracts them,
before it is rounded. So what is rounded to 16 bits is log p, not the score: the error of p is 2^-9 |log p|, which is
small where p is large, and no float32 copy of the scores is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch

BLOCK = 256  # longest triangle: a longer segment is a chain of such, so that little is computed for nothing
ROWS = 1024  # queries of a product, so that its scores stay in the cache
_NOTHING = -3e4  # log p of a place that is no token, before scaling


@dataclass(frozen=True)
class ProductPlan:
    """What is multiplied, for one layout: the same for every layer.

    triangles: int64 [n, L] each, places of the tokens of n segments of up to L tokens, filled up with `num_tokens`.
    rectangles: (first query, end of the queries, first key, end of the keys): all queries see all keys.
    """

    triangles: tuple[torch.Tensor, ...]
    rectangles: tuple[tuple[int, int, int, int], ...]
    num_tokens: int

    @cached_property
    def hidden(self) -> dict[int, torch.Tensor]:
        """bool [L, L] for each width: True where the key comes after the query."""
        widths = {places.shape[1] for places in self.triangles}
        return {width: torch.ones(width, width, dtype=torch.bool).triu_(1) for width in widths}


def product_plan(segments: Sequence[tuple[int, int, int]], num_tokens: int) -> ProductPlan:
    """segments: (start, end, end of its subtree), as TreeLayout has them."""
    chain: list[tuple[int, int, int]] = []
    for begin, end, last in segments:
        pieces = max(1, -(-(end - begin) // BLOCK))
        cuts = [begin + (end - begin) * piece // pieces for piece in range(pieces + 1)]
        chain += [(one, other, last) for one, other in pairwise(cuts)]
    rectangles = [
        (rows, min(rows + ROWS, last), begin, end) for begin, end, last in chain for rows in range(end, last, ROWS)
    ]
    chain.sort(key=lambda piece: piece[1] - piece[0], reverse=True)
    triangles: list[torch.Tensor] = []
    while chain:
        width = chain[0][1] - chain[0][0]
        # Segments of like length go together; at most a third of a row is filled up.
        like = [piece for piece in chain if (piece[1] - piece[0]) * 3 >= width * 2]
        chain = chain[len(like) :]
        places = torch.full((len(like), width), num_tokens)
        for row, (begin, end, _) in enumerate(like):
            places[row, : end - begin] = torch.arange(begin, end)
        triangles.append(places)
    return ProductPlan(tuple(triangles), tuple(rectangles), num_tokens)


def product_backward(
    plan: ProductPlan,
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value. grad, query, output [1, H, T, D]; key, value [1, G, T, D]; lse [1, H, T]."""
    groups, tokens, width = key.shape[1:]
    wide = torch.promote_types(query.dtype, torch.float32)
    delta = (grad.to(wide) * output.to(wide)).sum(-1)
    rows = _rows(query, lse / -scale, groups, _NOTHING)  # [G, T + 1, R, D + 2]
    grads = _rows(grad, -delta, groups, 0.0)
    keys, values = _columns(key), _columns(value)  # [G, T + 1, D + 2]
    dq = query.new_zeros((groups, tokens + 1, rows.shape[2], width), dtype=wide)
    dk = key.new_zeros((groups, tokens + 1, width), dtype=wide)
    dv = torch.zeros_like(dk)
    for places in plan.triangles:
        flat = places.flatten()
        picked = [tensor[:, flat].unflatten(1, places.shape).flatten(0, 1) for tensor in (rows, grads, keys, values)]
        parts = _part(*picked, scale=scale, hidden=plan.hidden[places.shape[1]])
        for total, part in zip((dq, dk, dv), parts, strict=True):
            total[:, flat] = part.view(groups, len(flat), *total.shape[2:]).to(wide)
    for first, last, begin, end in plan.rectangles:
        own, seen = slice(first, last), slice(begin, end)
        parts = _part(rows[:, own], grads[:, own], keys[:, seen], values[:, seen], scale=scale)
        dq[:, own] += parts[0].view(groups, last - first, *dq.shape[2:])
        dk[:, seen] += parts[1]
        dv[:, seen] += parts[2]
    dq, dk, dv = dq[:, :tokens], dk[:, :tokens], dv[:, :tokens]
    whole = dq.mul_(scale).permute(0, 2, 1, 3).reshape(query.shape)
    return whole.to(query.dtype), dk.mul_(scale)[None].to(key.dtype), dv[None].to(value.dtype)


def _part(
    rows: torch.Tensor,  # [N, M, R, D + 2]
    grads: torch.Tensor,  # [N, M, R, D + 2]
    keys: torch.Tensor,  # [N, K, D + 2]
    values: torch.Tensor,  # [N, K, D + 2]
    *,
    scale: float,
    hidden: torch.Tensor | None = None,  # [M, K]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq / scale [N, M R, D], dk / scale [N, K, D], dv [N, K, D]) of one block of scores."""
    heads = rows.shape[2]
    rows, grads = rows.flatten(1, 2), grads.flatten(1, 2)
    p = rows @ keys.transpose(1, 2)  # [N, M R, K]: log p / scale
    if hidden is not None:
        p.unflatten(1, (-1, heads)).masked_fill_(hidden[:, None], _NOTHING / scale)
    p.mul_(scale).exp_()
    ds = grads @ values.transpose(1, 2)
    ds.mul_(p)
    width = keys.shape[2] - 2
    return (
        ds @ keys[..., :width],
        ds.transpose(1, 2) @ rows[..., :width],
        p.transpose(1, 2) @ grads[..., :width],
    )


def _rows(tensor: torch.Tensor, column: torch.Tensor, groups: int, nothing: float) -> torch.Tensor:
    """[1, H, T, D] and [1, H, T] -> [G, T + 1, H / G, D + 2]: the column in two parts, rounded and the rest.

    The last place stands for no token: zeros, and `nothing` in the column.
    """
    _, heads, tokens, width = tensor.shape
    rows = tensor.new_zeros((groups, tokens + 1, heads // groups, width + 2))
    rows[:, :tokens, :, :width] = tensor[0].unflatten(0, (groups, -1)).transpose(1, 2)
    rounded = column.to(tensor.dtype)
    rest = (column - rounded.to(column.dtype)).to(tensor.dtype)
    for place, part in ((width, rounded), (width + 1, rest)):
        rows[:, :tokens, :, place] = part[0].unflatten(0, (groups, -1)).transpose(1, 2)
    rows[:, tokens, :, width] = nothing
    return rows


def _columns(tensor: torch.Tensor) -> torch.Tensor:
    """[1, G, T, D] -> [G, T + 1, D + 2]: two columns of ones, and zeros in the last place."""
    _, groups, tokens, width = tensor.shape
    columns = tensor.new_zeros((groups, tokens + 1, width + 2))
    columns[:, :tokens, :width] = tensor[0]
    columns[:, :, width:] = 1.0
    return columns
