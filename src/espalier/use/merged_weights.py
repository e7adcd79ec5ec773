"""The tensors of base + adapter, summed in float32 when they are asked for, one module at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from espalier.errors import AdapterError, ModelError
from espalier.model.load_adapter import load_adapter, to_stderr
from espalier.use.shards import Shards

if TYPE_CHECKING:
    import torch
    from torch import nn

ADAPTER = "default"


def empty_base(config: Any, trust_remote_code: bool = False) -> Any:
    """The model of `config` in float32 without memory for weights; its buffers (rotary tables) are real."""
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    auto_model: Any = AutoModelForCausalLM
    with init_empty_weights(include_buffers=False):
        model: Any = auto_model.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    model.tie_weights()
    return model.eval()


class MergedWeights(Mapping[str, "torch.Tensor"]):
    """Base + adapter under the names of the base's parameters.

    base: the base's tensors. adapted: the PEFT model on an empty base (see `adapted_model`). A tensor that the adapter
    changes comes as float32 [as the base's], computed by PEFT's own merge of that one module, so that rank-stabilised
    scaling, DoRA and patterns of rank and alpha are as in training; any other comes as the base stores it.
    """

    def __init__(self, base: Shards, adapted: Any):
        self.base, self._bare = base, adapted.get_base_model()
        self.layers = dict(_layers(self._bare))  # base parameter -> the module that changes it
        self.tables = dict(tables(self._bare))  # base parameter -> the tensor that takes its place
        missing = [name for name in (*self.layers, *self.tables) if not self._in_base(name)]
        if missing:
            raise ModelError(
                f"{len(missing)} tensors that the adapter changes are not in the base's files under these names",
                where=str(base.folder),
                details=missing[:5],
                todo="The files name them otherwise than transformers does: save the base once with save_pretrained.",
            )
        self._check_rows()
        self.untied = self._untied()

    @property
    def changed(self) -> list[str]:
        """Names of the base's parameters that the adapter changes."""
        return list(self.layers | self.tables)

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding table, after what the adapter adds."""
        return int(self._bare.get_input_embeddings().weight.shape[0])

    def __getitem__(self, name: str) -> torch.Tensor:
        # Both where an adapter on an embedding carries the table itself, as PEFT saves it.
        below = self.tables[name].float() if name in self.tables else self.base[name]
        return _merge(self.layers[name], below) if name in self.layers else below

    def __iter__(self) -> Iterator[str]:
        """The names in the base's files, and the tables that are no longer tied."""
        yield from self.base
        yield from self.untied

    def __len__(self) -> int:
        return len(self.base) + len(self.untied)

    def _check_rows(self) -> None:
        """Where the adapter brings more token rows, it must bring them for the table and the head."""
        for name, tensor in self._bare.named_parameters():
            if tensor.is_meta and tensor.dim() == 2 and self._in_base(name) and name not in self.tables:
                have = self.base.shape(name)
                if have[1:] == list(tensor.shape[1:]) and have[0] != tensor.shape[0]:
                    raise AdapterError(
                        f"the adapter brings {tensor.shape[0]} token rows, but none for {name}, which has {have[0]}",
                        todo="Take an adapter that was saved with both embedding tables.",
                    )

    def _in_base(self, name: str) -> bool:
        try:
            self.base.stored_name(name)
        except KeyError:
            return False
        return True

    def _untied(self) -> tuple[str, ...]:
        """Names that were tied to another tensor and now differ from it: both must be written (case D06)."""
        import torch

        found = []
        for name, source in self.base.tied.items():
            touched = {name, source} & {*self.layers, *self.tables}
            stored_once = self._in_base(source) and self.base.stored_name(name) == self.base.stored_name(source)
            if touched and stored_once and not torch.equal(self[name].float(), self[source].float()):
                found.append(name)
        return tuple(found)


def adapted_model(
    config: Any, folder: Path, *, trust_remote_code: bool = False, notice: Callable[[str], None] = to_stderr
) -> Any:
    """The adapter's tensors on an empty base. Raises AdapterError as `load_adapter` does."""
    import copy

    return load_adapter(empty_base(copy.deepcopy(config), trust_remote_code), folder, notice=notice)


def _layers(bare: nn.Module) -> Iterator[tuple[str, Any]]:
    """(base parameter, tuner layer) of every weight that a LoRA layer or trained token rows change."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in bare.named_modules():
        if isinstance(module, BaseTunerLayer):
            path = name.removesuffix(".token_adapter")
            yield f"{path}.weight", module
            if any(getattr(module, "lora_bias", {}).values()):
                raise AdapterError(
                    f"{path} has a trained bias of its own (lora_bias)", todo="Such an adapter cannot be merged here."
                )


def tables(bare: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(base parameter, tensor) of whole tensors that the adapter carries: modules_to_save, enlarged embeddings."""
    from peft.utils.other import ModulesToSaveWrapper

    inside = set()
    for name, module in bare.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            for key, tensor in module.modules_to_save[ADAPTER].named_parameters():
                yield f"{name}.{key}", tensor.detach()
            inside.add(f"{name}.")
    for name, tensor in bare.named_parameters():
        ours = any(part.startswith(("lora_", "trainable_tokens_")) for part in name.split("."))
        if not tensor.is_meta and not ours and not name.startswith(tuple(inside)):
            yield name.replace(".base_layer.", "."), tensor.detach()


def _merge(module: Any, weight: torch.Tensor) -> torch.Tensor:
    """float32 weight + the module's adapter, by PEFT's merge; the module is left as it was."""
    import torch
    from torch import nn

    base = module.get_base_layer()
    before = base.weight
    base.weight = nn.Parameter(weight.to(torch.float32, copy=True), requires_grad=False)
    try:
        with torch.no_grad():
            module.merge(adapter_names=[ADAPTER])
        merged: torch.Tensor = base.weight.detach()
        return merged
    finally:
        base.weight = before
        module.merged_adapters.clear()


def plain_layers(adapted: Any) -> Iterator[tuple[str, tuple[torch.Tensor, torch.Tensor, float] | None]]:
    """(module, (A [r, in], B [out, r], scaling)) of every adapted linear layer; None for what is no plain LoRA."""
    from peft.tuners.lora import Linear
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    for name, module in adapted.get_base_model().named_modules():
        if isinstance(module, Linear) and not module.lora_variant and not any(module.lora_bias.values()):
            a, b = (module.get_parameter(f"lora_{letter}.{ADAPTER}.weight") for letter in "AB")
            yield name, (a.detach().float(), b.detach().float(), module.scaling[ADAPTER])
        elif isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            yield name, None
