"""Cross-entropy at supervised positions only: the tree's way, and the plain padded one that it must equal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from espalier.encode.encode import IGNORE_INDEX, Encoded
from espalier.errors import ModelError
from espalier.tree.attention import set_attention, takes_stock_mask, tree_masks
from espalier.tree.collate import PackTensors

# Logits held at once: 16 million of them are 64 MB in float32.
CHUNK_LOGITS = 1 << 24
# Logits that are worked on at once, on a CPU: what its cache holds (3.6 times faster than a whole chunk, LOG.md).
_CACHED_LOGITS = 1 << 20


@dataclass(frozen=True, slots=True)
class LossOutput:
    """loss_sum: float32 scalar with gradient, the weighted sum of token losses. num_supervised: tokens with a label,
    counted in every row that has them. weight_sum: the sum of their weights, the divisor of a weighted mean.
    num_correct: int64 scalar, how many of num_supervised the largest logit names."""

    loss_sum: torch.Tensor
    num_supervised: int
    weight_sum: float
    num_correct: torch.Tensor


# Fields of a config that scale the logits, as a factor or as a divisor.
_SCALE_KEYS = (
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "output_multiplier",
    "logits_mup_width_multiplier",
)


@dataclass(frozen=True, slots=True)
class _LogitRule:
    """What a model does to its head's output: logits = cap * tanh(scale * raw / cap)."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, raw: torch.Tensor) -> torch.Tensor:
        logits = raw if self.scale == 1.0 else raw * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


_logit_rules: WeakKeyDictionary[PreTrainedModel, _LogitRule] = WeakKeyDictionary()


def base_of(model: torch.nn.Module) -> PreTrainedModel:
    """The transformers model inside wrappers such as DistributedDataParallel and PEFT."""
    inner: Any = model
    while not isinstance(inner, PreTrainedModel):
        if hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        elif hasattr(inner, "module"):
            inner = inner.module
        else:
            raise ModelError(f"{type(model).__name__} holds no transformers model")
    return inner


def head_of(base: PreTrainedModel) -> torch.nn.Module:
    """The module that turns hidden states into logits, with the adapter that may be on it."""
    head: Any = cast(Any, base).get_output_embeddings()
    if not isinstance(head, torch.nn.Module):
        raise ModelError(f"{type(base).__name__} has no output head", todo="Load a causal language model.")
    return head


def tree_loss(
    model: torch.nn.Module, tensors: PackTensors, *, attention: str = "reference", chunk_tokens: int | None = None
) -> LossOutput:
    """Loss of one pack: one forward of its unique tokens, the head at the positions that predict, nothing else.

    attention: a name of espalier.tree.attention. chunk_tokens: positions a head call, chosen from the vocabulary
    size if None. The model keeps that attention until the next call, so that recomputation in backward finds it.
    """
    base = base_of(model)
    rule = logit_rule(base)
    hidden = tree_hidden(base, tensors, attention)[0].index_select(0, tensors.logit_positions)  # [M, D]
    head = head_of(base)
    chunk_tokens = chunk_tokens or _chunk_tokens(base)
    parameters = [parameter for parameter in head.parameters() if parameter.requires_grad]
    loss_sum, num_correct = _HeadLoss.apply(  # type: ignore[no-untyped-call]
        hidden, tensors.target_ids, tensors.target_weights, tensors.target_counts, head, rule, chunk_tokens, *parameters
    )
    return LossOutput(loss_sum, tensors.num_supervised, tensors.weight_sum, num_correct)


@dataclass(frozen=True, slots=True)
class TargetScores:
    """Of each target of a pack: its loss, float32 [M], and whether the largest logit names it, bool [M]."""

    loss: torch.Tensor
    correct: torch.Tensor


@torch.no_grad()
def tree_scores(model: torch.nn.Module, tensors: PackTensors, *, attention: str = "reference") -> TargetScores:
    """As tree_loss, target by target and without gradient. Logits of a chunk of positions are held at a time."""
    base = base_of(model)
    rule, head, size = logit_rule(base), head_of(base), _chunk_tokens(base)
    hidden = tree_hidden(base, tensors, attention)[0].index_select(0, tensors.logit_positions)  # [M, D]
    losses, correct = [], []
    for x, targets in zip(hidden.split(size), tensors.target_ids.split(size), strict=True):
        logits = rule(head(x))  # [m, V]
        correct.append(logits.argmax(-1) == targets)
        losses.append(F.cross_entropy(logits.float(), targets, reduction="none"))
    return TargetScores(torch.cat(losses), torch.cat(correct))


def tree_hidden(base: PreTrainedModel, tensors: PackTensors, attention: str, **kwargs: Any) -> torch.Tensor:
    """Last hidden state [1, T, D] of a pack. kwargs go to the model's body: a cache, which then holds the tree's keys
    and values in the order of the pack."""
    set_attention(base, attention)
    if takes_stock_mask(base):
        mask = tensors.layout.causal_mask
    else:
        # Ones: without a mask transformers takes jumping positions for packed documents and isolates each branch.
        mask = torch.ones_like(tensors.input_ids)
    with tree_masks(tensors.layout):
        return _hidden(base, tensors.input_ids, attention_mask=mask, position_ids=tensors.position_ids, **kwargs)


def _chunk_tokens(base: PreTrainedModel) -> int:
    return max(1, CHUNK_LOGITS // int(base.config.get_text_config().vocab_size))


def _hidden(base: PreTrainedModel, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """Last hidden state [B, T, D], through the model's own body."""
    body = base.base_model
    if body is base:
        raise ModelError(f"{type(base).__name__} has no separate body and head", todo="Load a causal language model.")
    return cast(torch.Tensor, body(input_ids=input_ids, **{"use_cache": False, **kwargs})[0])


class _HeadLoss(torch.autograd.Function):
    """Head and cross-entropy in chunks. The gradients are taken chunk by chunk in the forward, where the logits are at
    hand, so that no [tokens, vocabulary] matrix outlives its chunk and nothing is computed twice."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,  # [M, D]
        targets: torch.Tensor,  # [M]
        weights: torch.Tensor,  # [M]
        counts: torch.Tensor,  # [M]
        head: torch.nn.Module,
        rule: _LogitRule,
        chunk_tokens: int,
        *parameters: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wanted = any(ctx.needs_input_grad)
        grad_hidden = torch.empty_like(hidden) if wanted else None
        grads: list[torch.Tensor] = [torch.zeros_like(parameter) for parameter in parameters] if wanted else []
        loss_sum = torch.zeros((), dtype=torch.float32, device=hidden.device)
        num_correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        for begin in range(0, len(hidden), chunk_tokens):
            part = slice(begin, begin + chunk_tokens)
            with torch.set_grad_enabled(wanted):
                x = hidden[part].detach().requires_grad_(wanted)
                logits = rule(head(x))  # [m, V]
            with torch.no_grad():
                loss, correct, grad_logits = _chunk_loss(logits, targets[part], weights[part], counts[part])
            loss_sum += loss
            num_correct += correct
            if grad_hidden is not None:
                chunk_grads = torch.autograd.grad(logits, (x, *parameters), grad_logits)
                grad_hidden[part] = chunk_grads[0]
                for total, grad in zip(grads, chunk_grads[1:], strict=True):
                    total += grad
        if grad_hidden is not None:
            ctx.save_for_backward(grad_hidden, *grads)
        ctx.mark_non_differentiable(num_correct)
        return loss_sum, num_correct

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor, _grad_correct: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_hidden, *grads = ctx.saved_tensors
        scaled = [grad * grad_loss.to(grad.dtype) for grad in grads]
        return grad_hidden * grad_loss.to(grad_hidden.dtype), None, None, None, None, None, None, *scaled


def _chunk_loss(
    logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, counts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(sum of weighted losses, correct tokens, gradient by the logits [m, V]); float32, the gradient as the logits.

    loss = w (logsumexp(z) - z[target]); d loss / d z = w (softmax(z) - onehot(target)). The gradient takes the logits'
    place: no head's backward reads its own output.
    """
    logits = logits.detach()
    loss = torch.zeros((), dtype=torch.float32, device=logits.device)
    correct = torch.zeros((), dtype=torch.int64, device=logits.device)
    rows = len(logits) if logits.is_cuda else max(1, _CACHED_LOGITS // logits.shape[1])
    for begin in range(0, len(logits), rows):
        part = slice(begin, begin + rows)
        z, target, weight = logits[part], targets[part, None], weights[part]
        top, picked = z.amax(-1), z.gather(1, target).squeeze(1)
        # In 16 bits several logits may be the largest; the first of them is what the model says.
        likely = (picked == top).nonzero().squeeze(1)
        correct += ((z[likely].argmax(-1) == target[likely, 0]) * counts[part][likely]).sum()
        top = top.float()
        exponentials = torch.sub(z, top[:, None]).exp_()  # float32
        total = exponentials.sum(-1)
        loss += ((total.log() + top - picked.float()) * weight).sum()
        exponentials.mul_((weight / total)[:, None]).scatter_add_(1, target, -weight[:, None])
        z.copy_(exponentials)
    return loss, correct, logits


def logit_rule(base: PreTrainedModel) -> _LogitRule:
    """How the model turns its head's output into logits, found by name in its config and *checked* on four tokens
    against the model's own forward. Raises ModelError where none of the known rules explains its logits."""
    if base in _logit_rules:
        return _logit_rules[base]
    config = base.config.get_text_config()
    scales = [1.0]
    for key in (
        "logit_scale",
        "logits_scaling",
        "lm_head_multiplier",
        "output_multiplier",
        "logits_mup_width_multiplier",
    ):
        value = getattr(config, key, None)
        if isinstance(value, int | float) and value:
            # Granite divides by the field that HyperCLOVA X multiplies by.
            scales += [float(value), 1.0 / float(value)]
    if getattr(config, "dim_model_base", None):  # MiniCPM
        scales.append(config.dim_model_base / config.hidden_size)
    caps = [value for value in (getattr(config, "final_logit_softcapping", None), None) if value is None or value > 0]
    training = [module for module in base.modules() if module.training]
    try:
        cast(torch.nn.Module, base).train(False)
        with torch.no_grad():
            ids = torch.arange(4, device=base.device)[None] % config.vocab_size
            expected = base(input_ids=ids, use_cache=False).logits.float()
            raw = head_of(base)(_hidden(base, ids)).float()
    finally:
        for module in training:
            module.training = True
    if not bool(expected.isfinite().all()):
        raise ModelError(
            f"{type(base).__name__} gives logits that are not numbers, before any training",
            todo="Check that its weights are whole, or load it in another dtype.",
        )
    rules = [_LogitRule(scale, cap) for cap in caps for scale in scales]
    errors = [float((rule(raw) - expected).abs().max()) for rule in rules]
    best = min(range(len(rules)), key=errors.__getitem__)
    tolerance = 1e-4 if base.dtype == torch.float32 else 2e-2
    if not errors[best] <= tolerance * max(1.0, float(expected.abs().max())):
        raise ModelError(
            f"{type(base).__name__} changes its logits in a way that is not known here",
            todo="Train it without the tree: --tree off.",
        )
    _logit_rules[base] = rules[best]
    return rules[best]


def plain_loss(model: torch.nn.Module, rows: Sequence[Encoded], pad_id: int) -> LossOutput:
    """The plain twin: whole rows, padded on the right, through the model's stock forward and attention.

    Where the model returns a mixture-of-experts auxiliary loss, it is added in proportion to the supervised tokens,
    so that the mean over a step is transformers' own loss.
    """
    chosen, targets, _, weights, auxiliary = _plain_logits(model, rows, pad_id)
    picked_weights = torch.from_numpy(weights).to(chosen.device)
    loss_sum = (F.cross_entropy(chosen, targets, reduction="none") * picked_weights).sum()
    if isinstance(auxiliary, torch.Tensor):
        loss_sum = loss_sum + auxiliary * base_of(model).config.router_aux_loss_coef * len(targets)
    correct = (chosen.argmax(-1) == targets).sum()
    return LossOutput(loss_sum, len(targets), float(weights.sum(dtype=np.float64)), correct)


@torch.no_grad()
def plain_scores(
    model: torch.nn.Module, rows: Sequence[Encoded], pad_id: int
) -> tuple[TargetScores, npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """The plain twin of tree_scores: (scores of each label of the padded rows, its row [K], its weight [K])."""
    chosen, targets, row_at, weights, _ = _plain_logits(model, rows, pad_id)
    losses = F.cross_entropy(chosen, targets, reduction="none")
    return TargetScores(losses, chosen.argmax(-1) == targets), row_at, weights


def _plain_logits(
    model: torch.nn.Module, rows: Sequence[Encoded], pad_id: int
) -> tuple[torch.Tensor, torch.Tensor, npt.NDArray[np.int64], npt.NDArray[np.float32], Any]:
    """(float32 logits [K, V] that predict the labels, the labels [K], the row of each, its weight, auxiliary loss)."""
    base = base_of(model)
    set_attention(base, None)
    width = max(len(row.input_ids) for row in rows)
    ids = np.full((len(rows), width), pad_id, np.int64)
    labels = np.full((len(rows), width), IGNORE_INDEX, np.int64)
    weights = np.ones((len(rows), width), np.float32)
    mask = np.zeros((len(rows), width), np.int64)
    for index, row in enumerate(rows):
        length = len(row.input_ids)
        ids[index, :length], labels[index, :length], mask[index, :length] = row.input_ids, row.labels, 1
        if row.weights is not None:
            weights[index, :length] = row.weights
    device = base.device
    outputs = model(
        input_ids=torch.from_numpy(ids).to(device), attention_mask=torch.from_numpy(mask).to(device), use_cache=False
    )
    row_at, token_at = np.nonzero(labels != IGNORE_INDEX)
    chosen = outputs.logits[torch.from_numpy(row_at).to(device), torch.from_numpy(token_at - 1).to(device)].float()
    targets = torch.from_numpy(labels[row_at, token_at]).to(device)
    return chosen, targets, row_at, weights[row_at, token_at], getattr(outputs, "aux_loss", None)
