"""RMSNorm on the CPU from torch's fused kernels, for the norm modules of transformers' models.

    y = x r w,   r = (mean(x^2) + eps)^(-1/2)
    dx = r (g w - x r mean(g w x r))

transformers writes the norm as six passes, which autograd turns into about fourteen more and several float32 copies.
torch has a fused forward (`_fused_rms_norm`), but on the CPU no fused backward. That of LayerNorm is one: called with a
mean of 0 it gives r (g w - mean(g w) - x r mean(g w x r)), so r mean(g w) has to be added back, which is one product
of g with w and one pass. Kept for backward: x and r.

As with the LoRA layers, nothing changes but the class of the modules, to a subclass with another forward. transformers'
own way to exchange a layer's forward (`kernelize`) takes kernels that are fetched from a hub.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.autograd.function import once_differentiable

_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}  # of a stock norm that is this one
_subclasses: dict[type[nn.Module], type[nn.Module]] = {}


def fast_norms(model: nn.Module) -> tuple[int, int]:
    """(norms that have the fast forward now, norms that keep their own), in place; `stock_norms` takes it back.

    A module is taken whose name says RMSNorm, whose weight is frozen, and whose own forward gives the formula's
    result: Gemma's, which adds one to the weight, keeps its own.
    """
    fast = kept = 0
    for module in model.modules():
        if "RMSNorm" not in type(module).__name__:
            continue
        if isinstance(module, FastNorm) or _is_plain(module):
            if not isinstance(module, FastNorm):
                cast(Any, module).__class__ = _subclass(type(module))
            fast += 1
        else:
            kept += 1
    return fast, kept


def stock_norms(model: nn.Module) -> None:
    """Give all norms their own forward again, in place."""
    for module in model.modules():
        if isinstance(module, FastNorm):
            cast(Any, module).__class__ = type(module).__mro__[2]


class FastNorm(nn.Module):
    """Mixed into the stock class. Never built."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        weight: Any = self.weight
        is_covered = (
            not args and not kwargs and x.device.type == "cpu" and x.dtype == weight.dtype and not weight.requires_grad
        )
        if not is_covered:
            stock: torch.Tensor = super().forward(x, *args, **kwargs)
            return stock
        result: torch.Tensor = _RmsNorm.apply(x, weight, _eps(self))  # type: ignore[no-untyped-call]
        return result


def _subclass(stock: type[nn.Module]) -> type[nn.Module]:
    if stock not in _subclasses:
        _subclasses[stock] = type(stock.__name__, (FastNorm, stock), {})
    return _subclasses[stock]


def _eps(module: nn.Module) -> float | None:
    return next((float(getattr(module, name)) for name in ("variance_epsilon", "eps") if hasattr(module, name)), None)


def _is_plain(module: nn.Module) -> bool:
    """Whether the module computes the formula at the top, by trying it."""
    weight: Any = getattr(module, "weight", None)
    if not hasattr(torch.ops.aten, "_fused_rms_norm") or _eps(module) is None or not isinstance(weight, nn.Parameter):
        return False
    if weight.requires_grad or weight.dim() != 1 or weight.device.type != "cpu" or weight.dtype not in _TOLERANCE:
        return False
    x = torch.linspace(-2.0, 3.0, 2 * len(weight)).view(1, 2, -1).to(weight.dtype)
    with torch.no_grad():
        stock = module(x)
        ours = _RmsNorm.apply(x, weight, _eps(module))  # type: ignore[no-untyped-call]
    if stock.dtype != ours.dtype or stock.shape != ours.shape:
        return False
    error = (stock.float() - ours.float()).norm()
    return bool(error <= _TOLERANCE[weight.dtype] * stock.float().norm().clamp(min=1e-30))


class _RmsNorm(torch.autograd.Function):
    """The formula. x: [..., D]; weight: [D], in x's dtype."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        y, r = torch.ops.aten._fused_rms_norm(x, [x.shape[-1]], weight, eps)
        ctx.save_for_backward(x, r, weight)
        result: torch.Tensor = y
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        x, r, weight = ctx.saved_tensors  # r: float32 [..., 1]
        if not ctx.needs_input_grad[0]:
            return None, None, None
        width = x.shape[-1]
        # LayerNorm's kernel keeps its statistics in float32 where its weight is float32.
        wide = weight.float()
        dx, _, _ = torch.ops.aten.native_layer_norm_backward(
            grad.contiguous(), x, [width], torch.zeros_like(r), r, wide, None, [True, False, False]
        )
        taken = (grad @ weight).unsqueeze(-1) * (r / width)
        return dx.add_(taken.to(dx.dtype)), None, None
