"""What is served: one base in memory, adapters on it by name, each with the layout that it was trained in."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from espalier.encode.stops import generation_stop_ids
from espalier.encode.template import resolve_template
from espalier.errors import AdapterError, UsageError
from espalier.model.adapter_settings import CONFIG, TAKE_FROM_BASE, read_json
from espalier.model.adapter_tensors import bare_name, parse_name, read_tensors
from espalier.model.load import (
    ModelPath,
    choose_device,
    choose_dtype,
    load_model,
    load_tokenizer,
    sane_generation_config,
)
from espalier.model.load_adapter import check_base, load_adapter, to_stderr, weights_file
from espalier.use.adapter_base import Layout, adapter_layout, find_base


@dataclass(frozen=True, slots=True)
class Served:
    """The models of one server. layouts: name -> layout; adapters: name -> folder, the base is not among them."""

    model: Any
    base: ModelPath
    layouts: Mapping[str, Layout]
    adapters: Mapping[str, Path]

    @contextlib.contextmanager
    def active(self, name: str) -> Iterator[Any]:
        """The model as `name`. For one thread at a time: the adapters share the base's modules."""
        if name in self.adapters:
            self.model.set_adapter(_inside(name, self.adapters), inference_mode=True)
            yield self.model
            return
        try:
            with self.model.disable_adapter():
                yield self.model
        finally:
            self.model.requires_grad_(False)  # PEFT switches it on when it enables the adapters again


def load_served(
    folders: Mapping[str, Path],
    model_path: str | None = None,
    template: str | None = None,
    trust_remote_code: bool = False,
    use_cpu: bool = False,
    notice: Callable[[str], None] = to_stderr,
) -> Served:
    """Load the base once and every adapter onto it. The base is served too, unless an adapter changes it.

    Raises UsageError for adapters of different bases and names that clash, AdapterError for adapters that cannot share
    a base, and what chat raises.
    """
    base = _one_base(folders, model_path)
    base_name = base.name or Path(base.path).stem
    if base_name in folders:
        raise UsageError(
            f"the base is called {base_name!r}, and so is an adapter",
            where="--adapter",
            todo=f"Give the adapter another name: --adapter NAME={folders[base_name]}",
        )
    layouts, said = {}, list[str]()
    for name, folder in folders.items():
        layouts[name], notices = adapter_layout(folder, base, template, trust_remote_code)
        said += [f"{name}: {line}" for line in notices]
    device, device_reason = choose_device(use_cpu)
    dtype, dtype_reason = choose_dtype(device)
    notice(f"base: {base.said}; device: {device} ({device_reason}); {str(dtype).split('.')[-1]} ({dtype_reason})")
    for line in said:
        notice(line)
    model = load_model(base, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    changes = {name: reason for name, folder in folders.items() if (reason := base_change(model, folder))}
    if changes and len(folders) > 1:
        raise AdapterError(
            "adapters that change the base itself cannot share it with others",
            details=[f"{name} ({folders[name]}): {reason}" for name, reason in changes.items()],
            todo="Serve each alone, or merge it: espalier merge.",
        )
    adapted: Any = model
    for folder in list(folders.values())[1:]:
        check_base(folder, model, notice)
    for name, folder in folders.items():
        adapted = load_adapter(adapted, folder, notice=notice, name=_inside(name, folders))
    if changes:
        notice(f"the base is not served under its own name: the adapter changes it ({next(iter(changes.values()))})")
    else:
        layouts[base_name] = _base_layout(base, next(iter(layouts.values())), trust_remote_code, notice)
    return Served(adapted, base, layouts, dict(folders))


def base_change(model: Any, folder: Path) -> str | None:
    """What loading the adapter would change in the bare base `model` itself, in words; None for most adapters."""
    settings = read_json(folder / CONFIG)
    if settings.get("bias", "none") != "none":
        return f"it has trained biases ({settings['bias']})"
    start = settings.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(TAKE_FROM_BASE):
        return f"it was started by {start}, which takes a part out of the base"
    weights = dict(model.named_parameters())
    copied = {str(name) for name in settings.get("modules_to_save") or []}
    for key, tensor in read_tensors(weights_file(folder)).items():
        name = bare_name(key)
        module = name.rpartition(".")[0]
        if parse_name(key) is not None or name not in weights or module.rpartition(".")[2] in copied:
            continue
        held = weights[name]
        if held.shape != tensor.shape or not bool((held.cpu() == tensor.to(held.dtype)).all()):
            return f"it brings its own {name}"
    return None


def _one_base(folders: Mapping[str, Path], model_path: str | None) -> ModelPath:
    bases = {name: find_base(folder, model_path) for name, folder in folders.items()}
    if len({str(base.path) for base in bases.values()}) > 1:
        raise UsageError(
            "the adapters name different bases, and one base is served",
            where="--adapter",
            details=[f"{name}: {base.said}" for name, base in bases.items()],
            todo="Serve them apart, or give the base that fits all with --model_path.",
        )
    return next(iter(bases.values()))


def _base_layout(base: ModelPath, first: Layout, trust_remote_code: bool, notice: Callable[[str], None]) -> Layout:
    """The base's own layout, which is not the adapters' where these were trained in another."""
    tokenizer = load_tokenizer(base, trust_remote_code)
    if not tokenizer.chat_template:
        notice("the base has no chat template of its own: it is asked in the first adapter's layout")
        return first
    template = resolve_template(tokenizer)
    generation, _ = sane_generation_config(base)
    return Layout(tokenizer, template, tuple(generation_stop_ids(tokenizer, template, generation.eos_token_id)))


def _inside(name: str, folders: Mapping[str, Path]) -> str:
    """What PEFT calls an adapter inside: a user's name may hold dots, which are no part of a module's name."""
    return f"served_{list(folders).index(name)}"
