"""A base whose layers lie in pieces on several processes: PyTorch's FSDP2, layer by layer.

Each layer's weights are gathered when it runs, and dropped again. The adapter stays whole on every process, so that
its gradients, its optimizer and its files are those of data-parallel training; so do the embeddings, the head and the
norms. accelerate's own wrapping shards the model from its outermost module, and expects each call to go through that
module; the tree calls the body and the head apart from each other, which is why `fully_shard` is called here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from espalier.errors import ModelError, UsageError

if TYPE_CHECKING:
    import torch
    from torch import nn

SETTINGS = {
    "reshard_after_forward": "drop a layer's weights after its forward, and gather them again for its backward",
    "cpu_offload": "keep this process's pieces in the machine's memory while they are not needed",
}


def shard_base(model: nn.Module, device: str, settings: dict[str, Any]) -> str:
    """Shard the decoder layers of `model` (with its adapter) over all processes. Returns a sentence for the header.

    settings: see SETTINGS. Raises ModelError where no layers are found, or they are quantized.
    """
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    from espalier.tree.loss import base_of

    base = base_of(model)
    body = base.base_model
    layers = decoder_layers(base)
    sharded = [p for layer in layers for p in layer.parameters() if not p.requires_grad]
    kept = set(model.parameters()) - set(sharded)
    if any(not p.is_floating_point() or type(p).__name__ == "Params4bit" for p in sharded):
        raise ModelError(
            "a quantized base cannot be sharded here", todo="Leave out --fsdp, or the options that quantize."
        )
    mesh = init_device_mesh(device.split(":")[0], (torch.distributed.get_world_size(),))
    options: dict[str, Any] = {
        "mesh": mesh,
        "ignored_params": kept,
        "reshard_after_forward": settings.get("reshard_after_forward", True),
        "offload_policy": CPUOffloadPolicy() if settings.get("cpu_offload") else OffloadPolicy(),
    }
    total = sum(p.numel() * p.element_size() for p in sharded)
    for layer in layers:
        fully_shard(layer, **options)
    fully_shard(body, **options)  # holds nothing of its own: it lets the layers' gathers run ahead of each other
    move_rest(model, set(sharded), device)
    world = mesh.size()
    where = ", kept in the machine's memory" if settings.get("cpu_offload") else ""
    return (
        f"{len(layers)} layers of {total / 1e6:,.1f} MB in {world} pieces (FSDP2){where}; embeddings, head and adapter "
        "whole on every process"
    )


def decoder_layers(base: Any) -> list[nn.Module]:
    """The layers that the base model's class says are to be kept together. Raises ModelError where it names none."""
    names = set(getattr(base, "_no_split_modules", None) or ())
    layers = [module for module in base.base_model.modules() if type(module).__name__ in names]
    if not layers:
        raise ModelError(
            f"{type(base).__name__} names no layers to shard", todo="Leave out --fsdp, or ZeRO stage 3 of --deepspeed."
        )
    return layers


def move_rest(model: nn.Module, sharded: set[nn.Parameter], device: str) -> None:
    """Bring to `device`, in place, what is not sharded: the other parameters, and all buffers."""
    for parameter in model.parameters():
        if parameter not in sharded:
            parameter.data = parameter.data.to(device)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


def is_piece(tensor: torch.Tensor) -> bool:
    """True for a parameter of which each process holds a piece."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def is_sharded(model: nn.Module) -> bool:
    """True where `shard_base` was there."""
    return any(is_piece(parameter) for parameter in model.parameters())


def check_settings(settings: Any) -> None:
    """Raises UsageError for a setting of --fsdp_config that is not in SETTINGS, or is no yes or no."""
    if not isinstance(settings, dict):
        settings = {str(settings): None}
    wrong = [f"{k}: unknown" for k in settings if k not in SETTINGS]
    wrong += [f"{k}: {v!r} is not true or false" for k, v in settings.items() if k in SETTINGS and type(v) is not bool]
    if wrong:
        raise UsageError(
            "settings that are not understood",
            where="--fsdp_config",
            details=wrong,
            todo=f"There are: {'; '.join(f'{name} ({text})' for name, text in SETTINGS.items())}.",
        )
