"""A few rows of a run computed both ways, before the run trusts the tree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch

from espalier.encode.encode import Encoded
from espalier.model.fast_lora import fast_lora, is_fast, peft_lora
from espalier.model.fast_norm import FastNorm, fast_norms, stock_norms
from espalier.tree.collate import to_tensors
from espalier.tree.loss import LossOutput, base_of, plain_loss, tree_loss
from espalier.tree.plan import common_prefix, plan_step

# (relative difference of the mean loss, of the gradient as a vector) that rounding alone explains; a wrong mask gives
# 0.1 to 1 in both. In bf16, SmolLM2-135M's gradient on three rows is 0.07 from the float32 one, for plain rows and for
# the tree alike; the same plain rows one by one or padded together differ by 0.056, tree and plain by 0.084.
_TOLERANCES = {torch.float32: (1e-5, 1e-3), torch.float64: (1e-9, 1e-6)}
_TOLERANCE_16_BITS = (4e-2, 2e-1)

Part = Callable[[], LossOutput]
# The forwards of some parts -> (the sum of their losses, its gradient by each trained parameter).
Gradients = Callable[[Sequence[Part]], tuple[float, list[torch.Tensor]]]


@dataclass(frozen=True, slots=True)
class SelfCheck:
    """Mean loss and gradient norm of the same rows by the tree and by plain padded rows.

    grad_difference: norm of the difference of both gradients, relative to the plain one. tolerance: what the dtype
    allows, (loss, gradient). shared_tokens: how many tokens the tree saved; 0 means that nothing was tested.
    """

    loss_tree: float
    loss_plain: float
    grad_norm_tree: float
    grad_norm_plain: float
    grad_difference: float
    tolerance: tuple[float, float]
    shared_tokens: int
    ok: bool

    def __str__(self) -> str:
        return (
            f"loss {self.loss_tree:.6g} by the tree, {self.loss_plain:.6g} by plain rows; gradient norm "
            f"{self.grad_norm_tree:.6g} and {self.grad_norm_plain:.6g}, difference {self.grad_difference:.1e} "
            f"(allowed: loss {self.tolerance[0]:g}, gradient {self.tolerance[1]:g})"
        )


def rows_to_check(rows: Sequence[Encoded], count: int = 3) -> list[Encoded]:
    """The `count` neighbours in token order that share most for their length: few tokens that test the tree well."""
    ordered = sorted(rows, key=lambda row: row.input_ids.astype(">i4").tobytes())
    shared = [common_prefix(a.input_ids, b.input_ids) for a, b in pairwise(ordered)]

    def score(begin: int) -> tuple[float, int]:
        length = sum(len(row.input_ids) for row in ordered[begin : begin + count])
        return sum(shared[begin : begin + count - 1]) / length, -length

    best = max(range(max(1, len(ordered) - count + 1)), key=score)
    return ordered[best : best + count]


def self_check(
    model: torch.nn.Module,
    rows: Sequence[Encoded],
    pad_id: int,
    *,
    attention: str = "reference",
    gradients: Gradients | None = None,
) -> SelfCheck:
    """Loss and gradient of `rows` by the tree and by the plain twins: padded rows, stock forwards; no dropout.

    Give it few rows: the plain twin pads them and holds full logits. gradients: how they are had, where torch alone
    does not. The model's gradients, its training mode and the random state are left as they were. Every shared token
    is shared here, so that the tree is really tested.
    """
    length = max(len(row.input_ids) for row in rows)
    plan = plan_step(rows, max_tokens=length * len(rows), min_shared_tokens=1, min_saving=0.0)
    gradients = gradients or partial(_gradients, [p for p in model.parameters() if p.requires_grad])
    training = [module for module in model.modules() if module.training]
    device = base_of(model).device
    was_fast = any(is_fast(module) for module in model.modules())
    had_fast_norms = any(isinstance(module, FastNorm) for module in model.modules())
    try:
        model.eval()
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            packs = [to_tensors(pack, device) for pack in plan.packs]
            loss_tree, grads_tree = gradients([partial(tree_loss, model, pack, attention=attention) for pack in packs])
            peft_lora(model)
            stock_norms(model)
            loss_plain, grads_plain = gradients([partial(plain_loss, model, rows, pad_id)])
    finally:
        if was_fast:
            fast_lora(model)
        if had_fast_norms:
            fast_norms(model)
        for module in training:
            module.training = True
    difference = _norm([a - b for a, b in zip(grads_tree, grads_plain, strict=True)])
    norm_tree, norm_plain = _norm(grads_tree), _norm(grads_plain)
    count = plan.num_supervised
    loss_tree, loss_plain = loss_tree / count, loss_plain / count
    relative = difference / norm_plain if norm_plain else difference
    tolerance = _TOLERANCES.get(base_of(model).dtype, _TOLERANCE_16_BITS)
    return SelfCheck(
        loss_tree=loss_tree,
        loss_plain=loss_plain,
        grad_norm_tree=norm_tree / count,
        grad_norm_plain=norm_plain / count,
        grad_difference=relative,
        tolerance=tolerance,
        shared_tokens=sum(len(row.input_ids) for row in rows) - plan.unique_tokens,
        # Written so that a NaN on either side is a failure.
        ok=abs(loss_tree - loss_plain) <= tolerance[0] * max(1.0, abs(loss_plain)) and relative <= tolerance[1],
    )


def _gradients(parameters: Sequence[torch.nn.Parameter], parts: Sequence[Part]) -> tuple[float, list[torch.Tensor]]:
    """Without a trace in the parameters."""
    loss, grads = 0.0, [torch.zeros_like(parameter) for parameter in parameters]
    for part in parts:
        loss_sum = part().loss_sum
        found = torch.autograd.grad(loss_sum, parameters, allow_unused=True)
        grads = [total if grad is None else total + grad for total, grad in zip(grads, found, strict=True)]
        loss += float(loss_sum.detach())
    return loss, grads


def _norm(tensors: Sequence[torch.Tensor]) -> float:
    return float(torch.stack([tensor.float().norm() for tensor in tensors]).norm()) if tensors else 0.0
