"""An adapter's folder onto a loaded base: everything is checked, and nothing is loaded in part."""

from __future__ import annotations

import contextlib
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from espalier.errors import AdapterError
from espalier.model.adapter_settings import CONFIG as CONFIG  # also from here
from espalier.model.adapter_settings import check_settings, read_json, read_settings
from espalier.model.adapter_tensors import PREFIX, WRAPPERS, read_tensors
from espalier.model.fingerprint import base_fingerprint, fingerprint_difference
from espalier.model.locate import first_line

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

WEIGHTS, LEGACY_WEIGHTS, RECORD, RUN_FILE = (
    "adapter_model.safetensors",
    "adapter_model.bin",
    "espalier.json",
    "run.yaml",
)
NO_FINGERPRINT = "no fingerprint of its base: made by another tool; whether this base is right cannot be checked"


def to_stderr(line: str) -> None:
    """Where notices go unless the caller has a better place."""
    print(line, file=sys.stderr)


def load_adapter(
    model: PreTrainedModel | PeftModel,
    folder: str | Path,
    *,
    is_trainable: bool = False,
    notice: Callable[[str], None] = to_stderr,
    name: str = "default",
) -> PeftModel:
    """`model` with the adapter in `folder` on it, every tensor in place. name: what PEFT knows it by.

    Keys that torch.compile, DataParallel or a second wrap have spoilt are repaired, with a notice; a base with fewer
    embedding rows than the adapter carries is enlarged (the model itself changes). Raises AdapterError where the
    folder is no adapter, tensors are missing, do not fit or are not finite, or the adapter was made on another base.
    A model without weights (on the device "meta") gets the adapter's tensors only; which base it is stays unchecked.
    A PeftModel gets the adapter under a new name beside those it has; call check_base on the bare model before.
    """
    from peft import PeftModel, PeftModelForCausalLM, get_peft_model_state_dict, set_peft_model_state_dict

    path = check_adapter_folder(folder)
    empty, further = model.device.type == "meta", isinstance(model, PeftModel)
    config, tensors = read_settings(path, notice, with_weights=not empty), read_tensors(weights_file(path))
    check_settings(config, tensors, path)
    if not empty and not further:
        check_base(path, model, notice)
    if not further:
        _enlarge_embeddings(model, tensors, path, notice)
    config.inference_mode = not is_trainable
    try:
        with warnings.catch_warnings():
            # PEFT's remarks about transformers' names and tied tables say nothing a user can act on here.
            warnings.simplefilter("ignore")
            if isinstance(model, PeftModel):
                adapted = model
                adapted.add_adapter(name, config)
            else:
                adapted = PeftModelForCausalLM(model, config, adapter_name=name, low_cpu_mem_usage=empty)
    except Exception as error:  # settings of any type end in any exception inside PEFT
        raise AdapterError(
            f"the adapter does not fit this base: {first_line(error)}",
            where=str(path / CONFIG),
            todo="Give the base that it was trained on (--model_path).",
        ) from error
    expected = get_peft_model_state_dict(adapted, adapter_name=name, save_embedding_layers=False)
    tensors = _repair_keys(tensors, expected, path, notice)
    _check_tensors(tensors, expected, adapted, path)
    if empty:
        _fill_empty(adapted, tensors)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a bias beside lora_B it says that its shape is wrong
            result: Any = set_peft_model_state_dict(adapted, tensors, adapter_name=name)
        assert not result.unexpected_keys, result.unexpected_keys
    if all(not tensor.any() for key, tensor in tensors.items() if "lora_B" in key):
        notice(f"{path}: every lora_B is zero: this adapter changes nothing")
    if not is_trainable:  # PEFT 0.21 leaves the matrices of an adapted embedding trainable
        adapted.requires_grad_(False)
    num_trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert (num_trainable > 0) == is_trainable, num_trainable
    adapted.train(is_trainable)
    return adapted


def _fill_empty(adapted: Any, tensors: dict[str, torch.Tensor]) -> None:
    """The adapter's tensors, float32 on the CPU, in place of empty ones: PEFT's loader would move them to the base's
    device, which is "meta"."""
    from peft import get_peft_model_state_dict

    live = adapted.state_dict(keep_vars=True)
    names = {id(tensor): name for name, tensor in live.items()}
    wanted = get_peft_model_state_dict(adapted, state_dict=live, save_embedding_layers=False)
    places = {key: names[id(tensor)] for key, tensor in wanted.items()}
    adapted.load_state_dict(
        {places.get(key, key): tensor.float() for key, tensor in tensors.items()}, strict=False, assign=True
    )


def check_adapter_folder(folder: str | Path) -> Path:
    """The folder, where it holds a PEFT adapter's config and weights; touches no model. Raises AdapterError."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise AdapterError(
            "there is no such adapter folder" if not path.exists() else "this is a file, not an adapter's folder",
            where=str(path),
            todo=f"Give the folder that holds {CONFIG}.",
        )
    if not (path / CONFIG).is_file():
        below = sorted(str(found.parent) for found in path.glob(f"*/{CONFIG}"))
        whole = "this folder holds a whole model, not an adapter" if (path / "config.json").is_file() else None
        todo = f"Adapters below it: {', '.join(below[:5])}" if below else "Give the output folder of a training run."
        if any((path / name).is_file() for name in (WEIGHTS, LEGACY_WEIGHTS)):  # as the Atom recipe saves them
            todo = (
                f"It has tensors: `espalier import {path} --output_dir NEW --model_path BASE --lora_alpha A` makes one."
            )
        raise AdapterError(
            whole or f"the folder has no {CONFIG}, so it is no adapter",
            where=str(path),
            todo=todo,
        )
    if not any((path / name).is_file() for name in (WEIGHTS, LEGACY_WEIGHTS)):
        raise AdapterError(
            f"the adapter has no weights: neither {WEIGHTS} nor {LEGACY_WEIGHTS} is there",
            where=str(path),
            todo="It was copied or saved in part. Copy it again, or take an earlier checkpoint.",
        )
    return path


def weights_file(folder: Path) -> Path:
    """The adapter's weights in `folder`: safetensors, else the older .bin file."""
    return folder / (WEIGHTS if (folder / WEIGHTS).is_file() else LEGACY_WEIGHTS)


def read_record(folder: str | Path) -> dict[str, Any]:
    """What our training wrote beside the adapter (espalier.json); empty for an adapter of another tool."""
    file = Path(folder) / RECORD
    fields = read_json(file) if file.is_file() else {}
    if not isinstance(fields.get("base", {}), dict):
        raise _damaged_record(folder)
    return fields


def _damaged_record(folder: str | Path) -> AdapterError:
    return AdapterError("its record of the base is damaged", where=str(Path(folder) / RECORD), todo="Copy it again.")


def recorded_base(folder: str | Path) -> str | None:
    """The base as the adapter's folder gives it, or None."""
    name, _ = recorded_base_and_file(folder)
    return name


def recorded_base_and_file(folder: str | Path) -> tuple[str | None, str]:
    """(the base as the adapter's folder gives it, the file that does), or (None, "").

    The run file beside it holds the path of this machine, if it was trained here; espalier.json and
    adapter_config.json, which travel with the adapter, hold a name that means something elsewhere (case D05).
    """
    run_file = Path(folder) / RUN_FILE
    if run_file.is_file():
        import yaml

        with contextlib.suppress(yaml.YAMLError, OSError, ValueError, AttributeError, RecursionError):
            here = (yaml.safe_load(run_file.read_text(encoding="utf-8")) or {}).get("model_path")
            if isinstance(here, str) and Path(here).exists():
                return here, RUN_FILE
    names = (
        (read_record(folder).get("base", {}).get("name"), RECORD),
        (read_json(Path(folder) / CONFIG).get("base_model_name_or_path"), CONFIG),
    )
    return next(((name, file) for name, file in names if isinstance(name, str) and name), (None, ""))


def check_base(folder: str | Path, model: Any, notice: Callable[[str], None] = to_stderr) -> None:
    """Raise AdapterError where `model` is not the base that the adapter was trained on.

    An adapter without our record cannot be checked; a notice says so. Call it before the model is changed.
    """
    base = read_record(folder).get("base", {})
    if not base.get("fingerprint"):
        notice(f"{folder}: {NO_FINGERPRINT}")
        return
    found = base_fingerprint(model)
    try:
        difference = fingerprint_difference(base["fingerprint"], found)
    except (TypeError, AttributeError, OverflowError) as error:  # values of another kind than we write
        raise _damaged_record(folder) from error
    if difference is not None:
        name = base.get("name")
        raise AdapterError(
            f"the adapter was trained on another base: {difference}",
            where=str(folder),
            todo=f"Give the base that it was trained on{f', {name!r},' if name else ''} as --model_path.",
        )


def _enlarge_embeddings(
    model: Any, tensors: dict[str, torch.Tensor], path: Path, notice: Callable[[str], None]
) -> None:
    """Give the base as many embedding rows as the adapter's own tables have; never fewer than it has."""
    tables = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    names = [name for name, module in model.named_modules() if id(module) in tables]
    carried = {tensors[key].shape[0] for name in names if (key := f"{PREFIX}{name}.weight") in tensors}
    have = model.get_input_embeddings().weight.shape[0]
    if not carried or carried == {have}:
        return
    rows = max(carried)
    if len(carried) > 1 or rows < have:
        raise AdapterError(
            f"the adapter carries embedding tables of {sorted(carried)} rows, the base has {have}",
            where=str(path),
            todo="Give the base that it was trained on (--model_path).",
        )
    # The new rows come from the adapter, so how they are filled until then does not matter.
    model.resize_token_embeddings(rows, mean_resizing=False)
    notice(f"{path}: the adapter carries {rows} embedding rows, the base has {have}: enlarged to {rows}")


def _repair_keys(
    tensors: dict[str, torch.Tensor],
    expected: dict[str, torch.Tensor],
    path: Path,
    notice: Callable[[str], None],
) -> dict[str, torch.Tensor]:
    """Bring keys that a wrapper has spoilt back to PEFT's form: _orig_mod. (torch.compile), module. (DataParallel),
    FSDP's, the prefix twice (a second wrap), and the adapter's name inside."""
    repaired: dict[str, torch.Tensor] = {}
    spoilt: set[str] = set()
    for key, tensor in tensors.items():
        good = key
        if key not in expected:
            parts = [part for part in key.split(".") if part not in WRAPPERS]
            good = re.sub(rf"^(?:{re.escape(PREFIX)})+", PREFIX, ".".join(parts))
            good = good.replace(".default.weight", ".weight")
        if good != key:
            spoilt |= {part for part in (*WRAPPERS, "default") if part in key.split(".")}
            spoilt |= {PREFIX.rstrip(".") + " twice"} if key.count(PREFIX) > 1 else set()
        repaired[good] = tensor
    if spoilt:
        notice(f"{path}: keys of the adapter's tensors repaired (they held {', '.join(sorted(spoilt))})")
    return repaired


def _check_tensors(
    tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], adapted: Any, path: Path
) -> None:
    """Raise AdapterError unless exactly the expected tensors are there, of the right shape and finite.

    Whole tables of the base (embeddings, head) may come besides: PEFT saves them after a resize.
    """
    missing = [key for key in expected if key not in tensors]
    if missing:
        raise AdapterError(
            f"the adapter holds {len(expected) - len(missing)} of {len(expected)} tensors that its settings ask for",
            where=str(path),
            details=[f"missing: {key}" for key in missing[:5]],
            todo="It was saved empty or in part, or for another base. Take an earlier checkpoint or the right base.",
        )
    base = dict(adapted.named_parameters())
    strange = [key for key in tensors if key not in expected and key not in base]
    if strange:
        raise AdapterError(
            f"{len(strange)} of the adapter's {len(tensors)} tensors fit nothing in this base",
            where=str(path),
            details=strange[:5],
            todo="Give the base that it was trained on (--model_path).",
        )
    wrong = [
        f"{key}: adapter {list(tensor.shape)}, base needs {list(needed)}"
        for key, tensor in tensors.items()
        if tensor.shape != (needed := (expected[key] if key in expected else base[key]).shape)
    ]
    if wrong:
        raise AdapterError(
            f"{len(wrong)} of the adapter's {len(tensors)} tensors have another shape than this base needs",
            where=str(path),
            details=wrong[:5],
            todo="Give the base that it was trained on (--model_path).",
        )
    bad = [key for key, tensor in tensors.items() if not tensor.isfinite().all()]
    if bad:
        raise AdapterError(
            f"{len(bad)} of the adapter's {len(tensors)} tensors hold values that are not finite",
            where=str(path),
            details=bad[:5],
            todo="Take an earlier checkpoint.",
        )
