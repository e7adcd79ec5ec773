"""The adapter: which modules get one, and its injection by PEFT.

Names that match nothing are refused here, before any weight is read: PEFT takes a list of names as alternatives and
says nothing of those that match no module (case C03).
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from espalier.errors import UsageError
from espalier.model.quantized import num_weights

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

    from espalier.config import RunConfig

ALL_LINEAR = "all-linear"


@dataclass(frozen=True, slots=True)
class AdapterReport:
    """What was adapted. modules: name -> how many modules of that name; counts are numbers of parameters."""

    modules: dict[str, int]
    num_trainable: int
    num_base: int

    def __str__(self) -> str:
        names = ", ".join(f"{name} x{count}" for name, count in self.modules.items())
        share = 100 * self.num_trainable / max(1, self.num_base)
        return f"{names}; {self.num_trainable:,} trainable numbers, {share:.2f} % of the base's {self.num_base:,}"


def empty_model(config: PretrainedConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of `config` without memory for weights: its module names and shapes, at once."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return model


def num_embedding_rows(model: PreTrainedModel) -> int:
    """How many token ids the model's embedding table has rows for."""
    table: Any = model.get_input_embeddings()
    return int(table.weight.shape[0])


def linear_names(model: nn.Module) -> Counter[str]:
    """Last name of each linear layer -> how many there are, without the output head."""
    head = head_of_model(model)
    return Counter(
        name.rsplit(".", 1)[-1] for name, module in model.named_modules() if is_linear(module) and module is not head
    )


def head_of_model(model: nn.Module) -> Any:
    """The output head, which gets no adapter; None where there is none."""
    return getattr(model, "get_output_embeddings", lambda: None)()


def is_linear(module: nn.Module) -> bool:
    """True for the layers that all-linear means."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (nn.Linear, Conv1D))


def check_targets(
    model: nn.Module, names: Sequence[str], layers: Sequence[int] = (), modules_to_save: Sequence[str] = ()
) -> None:
    """Raise UsageError that lists every name which matches no module, and every layer that does not exist."""
    problems = []
    existing = linear_names(model)
    all_names = [name for name, _ in model.named_modules()]
    unknown = [name for name in modules_to_save if not any(f".{full}".endswith(f".{name}") for full in all_names)]
    if unknown:
        last = sorted({name.rsplit(".", 1)[-1] for name in all_names if name and not name.rsplit(".", 1)[-1].isdigit()})
        near = [difflib.get_close_matches(name, last, n=1) for name in unknown]
        raise UsageError(
            "nothing would be trained in full under these names",
            where="--modules_to_save",
            details=[
                f"{name!r} matches nothing" + (f": did you mean {close[0]}?" if close else "")
                for name, close in zip(unknown, near, strict=True)
            ],
            todo=f"This model has {' '.join(last)}.",
        )
    for name in names:
        if name == ALL_LINEAR:
            continue
        if not any(full == name or full.endswith(f".{name}") for full in all_names):
            close = difflib.get_close_matches(name, existing, n=1, cutoff=0.6)
            problems.append(f"{name!r} matches nothing" + (f": did you mean {close[0]}?" if close else ""))
    num_layers = _num_layers(all_names)
    problems += [
        f"layer {layer} does not exist: layers are 0-{num_layers - 1}" for layer in layers if layer >= num_layers
    ]
    if problems:
        raise UsageError(
            "the adapter would not be where it was asked for",
            where="--target_modules" if not problems[0].startswith("layer") else "--layers_to_transform",
            details=problems,
            todo=f"This model has {' '.join(existing)} (layers 0-{num_layers - 1}); "
            f"`--target_modules {ALL_LINEAR}` takes them all.",
        )


def _num_layers(names: Sequence[str]) -> int:
    """Number of decoder layers: the highest index in `...layers.<i>.` or `...h.<i>.` plus one."""
    found = [int(match.group(1)) for name in names if (match := re.search(r"\.(\d+)(?:\.|$)", name))]
    return max(found, default=-1) + 1


def lora_config(
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    target_modules: Sequence[str] = (ALL_LINEAR,),
    layers_to_transform: Sequence[int] = (),
    use_rslora: bool = False,
    use_dora: bool = False,
    init_lora_weights: str = "true",
    modules_to_save: Sequence[str] = (),
) -> LoraConfig:
    """PEFT's configuration. `target_modules` are names of modules, or the one word all-linear."""
    from peft import LoraConfig, TaskType

    targets: Any = ALL_LINEAR if ALL_LINEAR in target_modules else list(target_modules)
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=rank,
        lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        target_modules=targets,
        layers_to_transform=list(layers_to_transform) or None,
        use_rslora=use_rslora,
        use_dora=use_dora,
        init_lora_weights={"true": True, "false": False}.get(init_lora_weights.lower(), init_lora_weights),  # type: ignore[arg-type]
        modules_to_save=list(modules_to_save) or None,
    )


def run_lora_config(config: RunConfig) -> LoraConfig:
    """PEFT's configuration of a run."""
    return lora_config(
        rank=config.lora_rank,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        target_modules=config.target_modules,
        layers_to_transform=config.layers_to_transform,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        init_lora_weights=config.init_lora_weights,
        modules_to_save=config.modules_to_save,
    )


def add_adapter(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """The model with a fresh adapter, whose weights are float32 whatever the base's precision (case C06)."""
    from peft import get_peft_model

    return get_peft_model(model, config, autocast_adapter_dtype=True)


def describe_adapter(model: PeftModel) -> AdapterReport:
    """Count what an injected model trains. Raises UsageError where nothing is trainable (case C12)."""
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    modules = Counter(name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, BaseTunerLayer))
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    total = sum(num_weights(p) for p in model.parameters())
    num_trainable = sum(num_weights(p) for _, p in trainable)
    if not num_trainable:
        raise UsageError("nothing is trainable in this adapter", todo="Load it with is_trainable=True.")
    wrong = [name for name, p in trainable if p.dtype != torch.float32]
    assert not wrong, f"trainable weights that are not float32: {wrong[:3]}"
    return AdapterReport(dict(modules), num_trainable, total - num_trainable)
