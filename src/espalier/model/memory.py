"""How much memory a run takes, from the config and the rows' layout alone: no weight is read.

What depends on the architecture is not a formula of ours: the model's own forward and backward are run on PyTorch's
meta device, which computes shapes and no numbers, while every allocation is counted as it is made and freed. Two layers
stand for all of them. So whatever a layer keeps (fast or PEFT's LoRA arithmetic, either attention, any norm and MLP)
is counted as it is, and a change of the code changes the plan.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from espalier.model.fast_lora import fast_lora
from espalier.model.lora import ALL_LINEAR, add_adapter, empty_model, head_of_model, is_linear, num_embedding_rows
from espalier.tree.attention import set_attention, takes_stock_mask, tree_masks
from espalier.tree.collate import TreeLayout
from espalier.tree.loss import CHUNK_LOGITS
from espalier.tree.plan import Pack

if TYPE_CHECKING:
    from peft import LoraConfig

TRACED_LAYERS = 2
# Bytes of optimizer state a trained number: AdamW holds two float32 numbers.
STATE_BYTES = {"adamw_torch": 8.0, "adafactor": 0.1, "sgd": 0.0, "adagrad": 4.0, "rmsprop": 4.0, "lion": 4.0}
# NF4: half a byte a number, an absmax byte each 64 numbers, and a float32 each 256 of those.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)


@dataclass(frozen=True, slots=True)
class FixedBytes:
    """What a run holds from step to step, in bytes. unpacked: the largest 4- or 8-bit weight as a 16-bit one."""

    base: int
    adapter: int  # float32 weights and their gradients
    optimizer: int
    unpacked: int = 0

    @property
    def total(self) -> int:
        """Held at all times."""
        return self.base + self.adapter + self.optimizer


@dataclass(frozen=True, slots=True)
class PartBytes:
    """What one forward and backward takes beside the fixed bytes.

    kept: by all layers for the backward, with `recomputed` of them computed again; outside: kept by what is around the
    layers; working: the largest that comes and goes on top, in the head's loss or in a layer's backward.
    """

    tokens: int
    kept: int
    outside: int
    logits: int
    layer_work: int
    recomputed: int

    @property
    def working(self) -> int:
        """The head's loss and a layer's backward do not happen at the same time."""
        return max(self.logits, self.layer_work)

    @property
    def total(self) -> int:
        """The peak of this part over the fixed bytes."""
        return self.kept + self.outside + self.working


@dataclass(frozen=True, slots=True)
class _Trace:
    """Bytes of one forward and backward on the meta device. layer: kept by one layer; layer_input: by one that is
    computed again; outside: by the rest; work: on top in the last layer's backward."""

    layer: int
    layer_input: int
    outside: int
    work: int


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all meta tensors that are made while it is open, until they are freed.

    model: its weights are there before; a view of one makes nothing.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}
        held = [*model.parameters(), *model.buffers()]
        self._held = {tensor.untyped_storage()._cdata for tensor in held}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage: Any) -> None:
        key = storage._cdata
        if key not in self._sizes and key not in self._held:
            self._sizes[key] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


class _Kernels(TorchFunctionMode):
    """Kernels that the meta device has not got, or replaces by others that keep more: torch's fused attention, which
    would be plain products that keep all scores, and the experts' products."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():
            if func is F.scaled_dot_product_attention:
                return _Kept.apply(*args[:3], kwargs.get("attn_mask"))  # type: ignore[no-untyped-call]
            if func is getattr(torch, "_grouped_mm", None):  # what F.grouped_mm calls
                return _Grouped.apply(*args[:2])  # type: ignore[no-untyped-call]
        return func(*args, **kwargs)


class _Kept(torch.autograd.Function):
    """Keeps what the fused kernels keep: inputs, output, log-sum-exp, and the mask in the inputs' own dtype."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, mask: Any) -> torch.Tensor:
        output = query.new_empty((*query.shape[:-1], value.shape[-1]))
        lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
        kept = (query, key, value, output, lse) + (() if mask is None else (mask.to(query.dtype),))
        ctx.save_for_backward(*kept)
        return cast(torch.Tensor, output)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value = ctx.saved_tensors[:3]
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


class _Grouped(torch.autograd.Function):
    """x [S, in], sorted by expert, times the weights [E, in, out] of its rows' experts: [S, out]."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return x.new_empty(x.shape[0], weight.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        wanted = zip(ctx.saved_tensors, ctx.needs_input_grad, strict=True)
        return tuple(torch.empty_like(tensor) if needs else None for tensor, needs in wanted)


@contextmanager
def _without_autocast() -> Iterator[None]:
    """PEFT switches autocast off around the weights of experts, and PyTorch has no autocast for the meta device."""
    before: Any = torch.autocast
    cast(Any, torch).autocast = lambda *_, **__: nullcontext()
    try:
        yield
    finally:
        cast(Any, torch).autocast = before


class MemoryModel:
    """The memory of a base with an adapter, for any pack and any number of recomputed layers.

    config: of the base. dtype: of its weights. bits: 16 (or 32, by dtype), 8 or 4. attention: the name to train with,
    None for the stock forward over padded rows. optim: transformers' name of the optimizer. spare: what the allocator
    takes for kept tensors beyond their bytes, as a share of them.
    """

    spare = 0.0

    def __init__(
        self,
        config: Any,
        settings: LoraConfig,
        *,
        dtype: torch.dtype,
        attention: str | None,
        optim: str = "adamw_torch_fused",
        bits: int = 16,
        lora_forward: str = "fast",
        trust_remote_code: bool = False,
    ):
        self.config, self.attention, self.dtype = config, attention, dtype
        whole = empty_model(config, trust_remote_code=trust_remote_code)
        self.num_layers = int(config.get_text_config().num_hidden_layers)
        if not _are_alike(decoder_layers(whole)):
            raise NotImplementedError("its layers are not all of one kind")
        head: Any = head_of_model(whole)
        self.num_linear = sum(m.weight.numel() for m in whole.modules() if is_linear(m) and m is not head)  # type: ignore[operator,misc]
        self.vocabulary = num_embedding_rows(whole)
        self.hidden_size = int(config.get_text_config().hidden_size)
        few = shortened(config, TRACED_LAYERS)
        # A head's loss is counted by itself, so an adapter on chosen layers is traced as one on all of them.
        everywhere = replace_layers(settings)
        model: Any = empty_model(few, trust_remote_code=trust_remote_code)
        model.to(dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT says the same once more when the real model gets its adapter
            self.model: Any = add_adapter(model, everywhere)
        if lora_forward == "fast":
            fast_lora(self.model)
        self.model.train()
        on_experts = expert_numbers(self.model) * self.num_layers // TRACED_LAYERS
        self.is_moe = any(parameter.dim() == 3 for layer in decoder_layers(whole) for parameter in layer.parameters())

        def fixed(bits: int) -> FixedBytes:
            return fixed_bytes(whole, settings, dtype=dtype, optim=optim, bits=bits, on_experts=on_experts)

        self._fixed, self.fixed = fixed, fixed(bits)
        self._traces: dict[Any, _Trace] = {}

    def with_bits(self, bits: int) -> MemoryModel:
        """The same run over a base of `bits` bits."""
        other = copy.copy(self)
        other.fixed = self._fixed(bits)
        return other

    def part(self, pack: Pack, recompute: int = 0) -> PartBytes:
        """The bytes of one pack, with the first `recompute` layers computed again in the backward."""
        key = (pack.num_tokens, len(pack.segment_start), pack.num_pairs)
        if key not in self._traces:
            layout = TreeLayout(pack, torch.device("meta"))
            self._traces[key] = self._trace(layout)
        rows = len(pack.logit_positions)
        size = self.dtype.itemsize
        chunk = min(rows, max(1, CHUNK_LOGITS // self.vocabulary))
        logits = chunk * self.vocabulary * size + (2 * rows + 2 * chunk) * self.hidden_size * size
        return self._assemble(self._traces[key], pack.num_tokens, logits, recompute)

    def padded(self, rows: int, width: int, supervised: int, recompute: int = 0) -> PartBytes:
        """The bytes of one padded micro-batch through the stock forward, which makes all logits at once."""
        tokens, size = rows * width, self.dtype.itemsize
        if (rows, width) not in self._traces:
            trace = self._trace(TreeLayout(_separate_rows(rows, width), torch.device("meta")))
            mask = rows * width * width
            self._traces[rows, width] = replace(
                trace, layer=trace.layer + mask * size, outside=trace.outside + mask, work=trace.work + mask * size
            )
        logits = 2 * tokens * self.vocabulary * size + 3 * 4 * supervised * self.vocabulary
        return self._assemble(self._traces[rows, width], tokens, logits, recompute)

    def _assemble(self, trace: _Trace, tokens: int, logits: int, recompute: int) -> PartBytes:
        again = min(recompute, self.num_layers)
        kept = int((1 + self.spare) * ((self.num_layers - again) * trace.layer + again * trace.layer_input))
        work = trace.work + self.fixed.unpacked
        if again == self.num_layers:  # else the first layers' turn comes when most of the rest is freed
            work += trace.layer - trace.layer_input
        return PartBytes(tokens, kept, trace.outside, logits, work, again)

    def _trace(self, layout: TreeLayout) -> _Trace:
        base: Any = self.model.get_base_model()
        set_attention(base, self.attention or "merged")
        marks: list[int] = []
        counter = LiveBytes(self.model)
        layers = decoder_layers(base)
        hooks = [layer.register_forward_pre_hook(lambda *_: marks.append(counter.live)) for layer in layers]
        ids = torch.zeros((1, layout.num_tokens), dtype=torch.long, device="meta")
        try:
            with counter, _Kernels(), _without_autocast(), tree_masks(layout):
                mask = layout.causal_mask if takes_stock_mask(base) else torch.ones_like(ids)
                hidden = base.base_model(input_ids=ids, use_cache=False, attention_mask=mask, position_ids=ids)[0]
                end = counter.peak = counter.live
                hidden.backward(torch.empty_like(hidden))
                peak = counter.peak
        finally:
            for hook in hooks:
                hook.remove()
            self.model.zero_grad(set_to_none=True)
        layer = marks[1] - marks[0]
        layer_input = layout.num_tokens * self.hidden_size * self.dtype.itemsize
        return _Trace(layer, layer_input, end - TRACED_LAYERS * layer, peak - end)


def _separate_rows(rows: int, width: int) -> Any:
    """What TreeLayout reads of a pack, for rows that share nothing."""
    return SimpleNamespace(
        segment_start=np.arange(rows) * width,
        segment_length=np.full(rows, width),
        segment_parent=np.full(rows, -1),
        num_tokens=rows * width,
        num_pairs=rows * width * (width + 1) // 2,
        position_ids=np.tile(np.arange(width), rows),
    )


def decoder_layers(base: Any) -> list[torch.nn.Module]:
    """The decoder layers of a transformers model; empty where they are not in one list."""
    length = int(base.config.get_text_config().num_hidden_layers)
    for module in base.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == length:
            return list(module)
    return []


def shortened(config: Any, num_layers: int) -> Any:
    """The same config with its first layers alone."""
    few = copy.deepcopy(config)
    text = few.get_text_config()
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == text.num_hidden_layers:
            setattr(text, name, value[:num_layers])
    text.num_hidden_layers = num_layers
    return few


def _are_alike(layers: Sequence[torch.nn.Module]) -> bool:
    """Whether two layers may stand for all: every one has the same parameters."""
    shapes = [{name: p.shape for name, p in layer.named_parameters()} for layer in layers]
    return all(these == shapes[0] for these in shapes)


def expert_numbers(model: torch.nn.Module) -> int:
    """Trained numbers that PEFT puts on the experts of a mixture, which are no linear layers."""
    from peft.tuners.lora.layer import ParamWrapper

    wrappers = [module for module in model.modules() if isinstance(module, ParamWrapper)]
    return sum(p.numel() for one in wrappers for half in (one.lora_A, one.lora_B) for p in half.parameters())


def replace_layers(settings: LoraConfig) -> LoraConfig:
    """The settings with an adapter on every layer."""
    return replace(settings, layers_to_transform=None, init_lora_weights=True, modules_to_save=None)


def fixed_bytes(
    whole: torch.nn.Module,
    settings: LoraConfig,
    *,
    dtype: torch.dtype,
    optim: str,
    bits: int = 16,
    on_experts: int = 0,
) -> FixedBytes:
    """Base, adapter and optimizer, from the shapes of the whole model on the meta device.

    on_experts: trained numbers beside those on linear layers.
    """
    size = dtype.itemsize
    head: Any = head_of_model(whole)
    linears = {name: module for name, module in whole.named_modules() if is_linear(module) and module is not head}
    packed = {id(module.weight): module.weight.numel() for module in linears.values()} if bits < 16 else {}
    base = 0.0
    for parameter in whole.parameters():
        base += parameter.numel() * (size if id(parameter) not in packed else NF4_BYTES if bits == 4 else 1.0)
    base += sum(buffer.numel() * buffer.element_size() for buffer in whole.buffers())
    trained = on_experts + sum(
        settings.r * sum(module.weight.shape)
        for name, module in linears.items()
        if _is_target(name, settings.target_modules, settings.layers_to_transform)
    )
    for name, module in whole.named_modules():
        if name.rsplit(".", 1)[-1] in (settings.modules_to_save or ()):
            trained += sum(parameter.numel() for parameter in module.parameters())
    return FixedBytes(
        base=int(base),
        adapter=trained * 8,
        optimizer=int(trained * state_bytes(optim)),
        unpacked=size * max(packed.values(), default=0),
    )


def state_bytes(optim: str) -> float:
    """Bytes of state a trained number under transformers' optimizer `optim`; unknown ones count as AdamW."""
    if "8bit" in optim:
        return 2.0
    for name, value in STATE_BYTES.items():
        if optim.startswith(name):
            return value
    return STATE_BYTES["adamw_torch"]


def _is_target(name: str, targets: Any, layers: Sequence[int] | int | None) -> bool:
    wanted = [targets] if isinstance(targets, str) else list(targets or ())
    if ALL_LINEAR not in wanted and not any(name == one or name.endswith(f".{one}") for one in wanted):
        return False
    if not layers:
        return True
    chosen = {layers} if isinstance(layers, int) else set(layers)
    return any(piece.isdigit() and int(piece) in chosen for piece in name.split("."))
