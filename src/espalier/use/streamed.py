"""A model's logits with one module's weights in memory at a time: for comparisons of models of any size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn


def streamed_logits(
    model: Any, weights: Mapping[str, torch.Tensor], rows: Sequence[Sequence[int]], keep: int
) -> list[torch.Tensor]:
    """The last `keep` logits of each row, float32 [min(keep, T), V], computed in float32.

    model: an empty model (parameters on the device "meta"), also one with an adapter, whose own tensors are real.
    weights: the base's parameters by their names in the bare model. rows: token ids.
    """
    import torch

    found = []
    with torch.no_grad(), _weights_on_demand(model, weights):
        for ids in rows:
            logits = model(input_ids=torch.tensor([list(ids)]), use_cache=False, logits_to_keep=keep).logits
            found.append(logits[0].float())
    return found


@contextmanager
def _weights_on_demand(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Every module gets its weights before its forward and gives them back after it."""
    handles = []
    for name, module in _holders(model):
        fill, clear = _hooks(name, module, weights)
        handles += [module.register_forward_pre_hook(fill), module.register_forward_hook(clear)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _holders(model: Any) -> Iterator[tuple[str, Any]]:
    """Modules whose parameters are filled together: an adapter's layer with the layer it wraps, else each by itself."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    wrapped: tuple[str, ...] = ()
    for name, module in bare.named_modules():
        if name.startswith(wrapped or "\0"):
            continue
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            wrapped = (*wrapped, f"{name}.")
            yield name, module
        elif any(True for _ in module.parameters(recurse=False)):
            yield name, module


def _hooks(
    name: str, module: nn.Module, weights: Mapping[str, torch.Tensor]
) -> tuple[Callable[..., None], Callable[..., None]]:
    import torch
    from torch import nn

    empty = [
        (holder, key, tensor, _base_name(f"{name}.{path}.{key}" if path else f"{name}.{key}"))
        for path, holder in module.named_modules()
        for key, tensor in holder.named_parameters(recurse=False)
        if tensor.is_meta
    ]

    def fill(*_: Any) -> None:
        for holder, key, _tensor, base_name in empty:
            holder.register_parameter(key, nn.Parameter(weights[base_name].to(torch.float32), requires_grad=False))

    def clear(*_: Any) -> None:
        for holder, key, tensor, _name in empty:
            holder.register_parameter(key, tensor)

    return fill, clear


def _base_name(name: str) -> str:
    for inner in (".token_adapter", ".base_layer", ".original_module"):
        name = name.replace(f"{inner}.", ".")
    return name
