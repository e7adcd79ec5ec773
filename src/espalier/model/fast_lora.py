"""The arithmetic of a LoRA linear layer as one autograd function, for the modules that PEFT makes.

    y = x W^T + bias + s (x A^T) B^T

PEFT keeps A and B in float32 under a 16-bit base and computes the second term in float32: a float32 copy of every
input, float32 products, and a full-size pass each for scaling, adding and casting back. Here A and B stay float32 for
the optimizer and are cast inside; the products are taken in the base's own dtype, which accumulates in float32, and
the second term is added in place by its product. Kept for backward: x, which the other layers that read it share, and
u = x A^T. The gradients, with g the gradient by y:

    gu = s g B        gx = g W + gu A        gA = gu^T x        gB = s g^T u

A base layer that bitsandbytes holds in 4 or 8 bits is unpacked for the product, and again in backward: for its time
only one layer's W is there in 16 bits.

PEFT owns the modules, their names and their weights. `fast_lora` changes nothing but their class, to a subclass with
another forward; whatever that forward does not cover goes through PEFT's own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear, LoraLayer
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from espalier.model.quantized import is_packed, unpacked

PEFT_PACKED = "peft.tuners.lora.bnb"  # where PEFT's layers over those of bitsandbytes are


@dataclass(frozen=True, slots=True)
class Counts:
    """How many LoRA layers compute by the fast form and how many by PEFT's forward; reasons: why -> how many."""

    fast: int
    peft: int
    reasons: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        why = ", ".join(f"{reason} x{count}" for reason, count in self.reasons.items())
        ending = f" ({why})" if why else ""
        if not self.fast:
            return f"PEFT's forward in {self.peft} layers{ending}"
        return f"own forward in {self.fast} layers" + (f", PEFT's in {self.peft}{ending}" if self.peft else "")


def fast_lora(model: nn.Module) -> Counts:
    """Give the LoRA linear layers of `model` the fast forward, in place; `peft_lora` takes it back.

    Names, state dict, saving, merging and switching adapters off are PEFT's as before. Each layer decides at every
    call, so the counts are those of the model as it is now: an adapter that is merged later goes through PEFT.
    """
    fast, reasons = 0, Counter[str]()
    for module in model.modules():
        if type(module) is Linear:
            cast(Any, module).__class__ = FastLinear
        elif type(module).__module__ == PEFT_PACKED:
            cast(Any, module).__class__ = _fast_packed()[type(module).__name__]
        if isinstance(module, LoraLayer):
            reason = why_peft(module)
            if reason is None:
                fast += 1
            else:
                reasons[reason] += 1
    return Counts(fast, reasons.total(), dict(reasons))


def peft_lora(model: nn.Module) -> Counts:
    """Give all LoRA layers of `model` PEFT's own forward again, in place."""
    count = 0
    for module in model.modules():
        if is_fast(module):
            cast(Any, module).__class__ = type(module).__base__
        count += isinstance(module, LoraLayer)
    return Counts(0, count)


def is_fast(module: nn.Module) -> bool:
    """True for a layer whose class `fast_lora` has set."""
    return type(module).forward is _fast_forward


def why_peft(layer: LoraLayer) -> str | None:
    """Why this layer's next forward is PEFT's own; None where the fast form computes the same."""
    base: Any = layer.base_layer
    if not is_fast(cast(nn.Module, layer)) or not (type(base) in (nn.Linear, Conv1D) or is_packed(base)):
        return type(base).__name__  # embeddings, convolutions, other quantised bases, adapters inside adapters
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or not names:
        return "merged or switched off"
    if len(names) > 1:
        return "several adapters at once"
    (name,) = names
    if name in layer.lora_variant:
        return "DoRA" if layer.use_dora[name] else type(layer.lora_variant[name]).__name__
    if layer.lora_bias[name]:
        return "a bias on lora_B"
    if any(parameter.requires_grad for parameter in base.parameters(recurse=False)):
        return "the base layer is trained too"
    if any(map(_is_wrapped, (base, layer.lora_A[name], layer.lora_B[name]))):
        return "hooks on its parts"  # offloading, sharded weights, a user's probe: they must be called
    return None


def _is_wrapped(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
    )


def _fast_forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The forward of FastLinear and its like.

    x: [..., in]; result [..., out] in the dtype that the base layer alone would give."""
    base: Any = self.base_layer
    kind = x.device.type
    is_narrowed = kind != "meta" and torch.is_autocast_enabled(kind)  # meta: memory.py's plan
    dtype = torch.get_autocast_dtype(kind) if is_narrowed else x.dtype
    packed = is_packed(base)
    # Of a base in another dtype than its input: an error, which PEFT's way would raise too.
    is_mixed = not packed and dtype == x.dtype and base.weight.dtype != dtype
    if args or kwargs or is_mixed or why_peft(self) is not None:
        peft: Any = type(self).__base__
        result: torch.Tensor = peft.forward(self, x, *args, **kwargs)
        return result
    (name,) = (name for name in self.active_adapters if name in self.lora_A)
    dropout = self.lora_dropout[name]
    shape = x.shape
    x = x.to(dtype).reshape(-1, shape[-1])
    dropped = dropout(x) if isinstance(dropout, nn.Dropout) and dropout.training else None
    bias = None if base.bias is None else base.bias.to(dtype)
    weight: Any = partial(unpacked, base, dtype) if packed else base.weight.to(dtype)
    if isinstance(base, Conv1D):
        weight = weight.t()  # [in, out] there
    result = _LoraLinear.apply(  # type: ignore[no-untyped-call]
        x, dropped, weight, bias, self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]
    )
    # Here, not in the function: of a view that a function makes, autograd forbids changes in place.
    return result.view(*shape[:-1], -1)


class FastLinear(Linear):
    """PEFT's LoRA layer on nn.Linear or Conv1D, with a forward of ours. Never built: `fast_lora` sets it as the class
    of layers that PEFT has built."""

    forward = _fast_forward


@cache
def _fast_packed() -> dict[str, type]:
    """Name of PEFT's class for layers of bitsandbytes -> ours: made late, since their import is bitsandbytes'."""
    from peft.tuners.lora import bnb

    classes = [getattr(bnb, name) for name in ("Linear4bit", "Linear8bitLt")]
    return {peft.__name__: type(f"Fast{peft.__name__}", (peft,), {"forward": _fast_forward}) for peft in classes}


class _LoraLinear(torch.autograd.Function):
    """The layer's formula, with the dropped input for the low-rank term where there is dropout."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,  # [T, I]
        dropped: torch.Tensor | None,  # [T, I]: x after dropout; None: x itself
        weight: torch.Tensor | Callable[[], torch.Tensor],  # [O, I], any strides; callable: makes it, in backward too
        bias: torch.Tensor | None,  # [O]
        lora_a: torch.Tensor,  # [r, I]
        lora_b: torch.Tensor,  # [O, r]
        scale: float,
    ) -> torch.Tensor:
        low = x if dropped is None else dropped
        a = lora_a.to(x.dtype)
        b = (lora_b * scale).to(x.dtype)
        u = a @ low.t()  # [r, T]: with few rows, products are faster this way round
        y = F.linear(x, weight() if callable(weight) else weight, bias)  # [T, O]
        y.addmm_(u.t(), b.t())
        ctx.save_for_backward(low, u, None if callable(weight) else weight, a, b)
        ctx.unpack = weight if callable(weight) else None
        ctx.scale, ctx.is_dropped = scale, dropped is not None
        ctx.dtypes = lora_a.dtype, lora_b.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        low, u, weight, a, b = ctx.saved_tensors
        needs_x, needs_dropped, _, _, needs_a, needs_b, _ = ctx.needs_input_grad
        gu = b.t() @ g.t()  # [r, T]
        gx = g @ (weight if ctx.unpack is None else ctx.unpack()) if needs_x else None  # [T, I]
        gdropped = gu.t() @ a if needs_dropped else None
        if gx is not None and not ctx.is_dropped:
            gx.addmm_(gu.t(), a)
        ga = (gu @ low).to(ctx.dtypes[0]) if needs_a else None
        gb = (u @ g).t().to(ctx.dtypes[1]) * ctx.scale if needs_b else None
        return gx, gdropped, None, None, ga, gb, None
