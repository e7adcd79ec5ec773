"""bitsandbytes' linear layers with products by their unpacked weight. Importing this imports bitsandbytes.

Its own forwards do not fit an adapter's training (0.50, on the CPU): the 4-bit one repacks its weight in evaluation
mode, where the CPU has AVX512_BF16, for a kernel without backward, and whatever is trained afterwards gets no gradient
through that layer; it also mistakes the scales where rows are no multiple of a block. The 8-bit one rounds its input
to 8 bits too, but for the columns in which any token of the same call is large: what a token gets depends on the
others beside it, and a tree of rows would not equal plain rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from torch import nn
from torch.autograd.function import once_differentiable

from espalier.model.quantized import unpacked


def _forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    """x: [..., in]; result [..., out] in x's dtype, or in that of autocast."""
    kind = x.device.type
    x = x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x
    result: torch.Tensor = _Unpacked.apply(x, self)  # type: ignore[no-untyped-call]
    return result if self.bias is None else result + self.bias.to(result.dtype)


class WeightOnly4bit(Linear4bit):
    """Never built, like the next: `keep_trainable` sets it as the class of layers that transformers has built."""

    forward = _forward


class WeightOnly8bit(Linear8bitLt):
    """Only the weight is held in 8 bits, the input is taken as it is."""

    forward = _forward


def set_forward(layer: nn.Module) -> None:
    """Give a layer of bitsandbytes the forward above."""
    kind: Any = layer
    kind.__class__ = WeightOnly4bit if isinstance(layer, Linear4bit) else WeightOnly8bit


class _Unpacked(torch.autograd.Function):
    """x W^T, with W made anew in backward instead of kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: nn.Module) -> torch.Tensor:
        ctx.layer = layer
        return F.linear(x, unpacked(layer, x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor, None]:
        return g @ unpacked(ctx.layer, g.dtype), None
