"""A base model's config, tokenizer and weights, each checked, with errors a user can act on.

The names of locate.py (where a model is) and hardware.py (device and precision) are given here too. Nothing here
imports torch or transformers before it is needed.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from espalier.errors import EspalierError, ModelError
from espalier.model.embedded import convert_gguf, convert_gguf_arguments, quiet_transformers, restore_digit_split
from espalier.model.fingerprint import RECORDED, base_fingerprint, fingerprint_of_files
from espalier.model.hardware import choose_device, choose_dtype
from espalier.model.locate import ModelPath, ModelRef, first_line, resolve_model, weight_problems
from espalier.model.quantized import Kind, bitsandbytes_config, keep_trainable

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedModel

__all__ = [
    "ModelPath",
    "check_causal_lm",
    "check_weights",
    "choose_device",
    "choose_dtype",
    "load_config",
    "load_model",
    "load_tokenizer",
    "own_code",
    "resolve_model",
    "sane_generation_config",
]

# Values that only sampling reads; with do_sample false they do nothing but make the file unsavable.
SAMPLING_ONLY = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")


def load_config(ref: ModelRef, trust_remote_code: bool = False) -> Any:
    """The model's config. Raises ModelError where there is none or transformers does not know its kind."""
    from transformers import AutoConfig

    where, extra = _source(ref)
    with _clear_errors(ref, "its config cannot be read"):
        return AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code, **extra)


def load_tokenizer(ref: ModelRef, trust_remote_code: bool = False) -> Any:
    """The tokenizer with its chat template. `ref` may be an adapter's folder too. Raises ModelError."""
    from transformers import AutoTokenizer

    where, extra = _source(ref)
    if not extra and Path(where).is_dir() and not any(map(_of_tokenizer, os.listdir(where))):
        todo = "Copy its tokenizer's files into it: tokenizer.json and tokenizer_config.json."
        raise ModelError("the folder holds no tokenizer", where=_said(ref), todo=todo)
    with _clear_errors(ref, "its tokenizer cannot be loaded"):
        tokenizer: Any = AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code, **extra)
        if "gguf_file" in extra:
            restore_digit_split(tokenizer, Path(where) / extra["gguf_file"])
        return tokenizer


def _of_tokenizer(name: str) -> bool:
    """Whether a tokenizer may be in a file of this name."""
    return name.startswith(("token", "vocab", "merges", "spiece")) or name.endswith((".model", ".tiktoken", ".py"))


def load_model(
    ref: ModelRef,
    *,
    device: str,
    dtype: torch.dtype,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    quantization: Kind | None = None,
) -> PreTrainedModel:
    """The causal language model in eval mode, on `device`, its weights in `dtype`.

    quantization: hold the linear layers packed, each one quantised as it is read (model/quantized.py).

    Raises ModelError for a model that is no causal language model, for a quantised one that cannot be trained, and
    for missing, damaged or incomplete weights: nothing is ever filled with random numbers.
    """
    import transformers

    auto_model: Any = transformers.AutoModelForCausalLM
    where, extra = _source(ref)
    if quantization is not None and "gguf_file" in extra:
        return _quantized_gguf(ref, device=device, dtype=dtype, quantization=quantization)
    config = load_config(ref, trust_remote_code)
    check_causal_lm(config, said=_said(ref))
    check_weights(ref)
    if "gguf_file" in extra:
        extra |= convert_gguf_arguments()
    fingerprint = None
    if quantization is not None:
        extra["quantization_config"] = bitsandbytes_config(quantization, dtype)
        fingerprint = _fingerprint_before(ref, config, dtype, trust_remote_code)
    if device != "cpu":
        extra["device_map"] = {"": device}  # straight to the device: no second copy in the host's memory
    with _clear_errors(ref, "its weights cannot be loaded"), _no_bars_in_logs("gguf_file" in extra):
        model, info = auto_model.from_pretrained(
            where,
            dtype=dtype,
            attn_implementation=attn_implementation or exact_attention(config),
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **extra,
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"{len(missing)} tensors that {type(model).__name__} needs are not in the weights file",
            where=_said(ref),
            details=missing[:5],
            todo="Give a whole model; a headless or partly copied one cannot be trained.",
        )
    loaded: PreTrainedModel = model.eval()
    keep_trainable(loaded)
    if fingerprint is not None:
        setattr(loaded, RECORDED, fingerprint)
    return loaded


def _quantized_gguf(ref: ModelRef, *, device: str, dtype: torch.dtype, quantization: Kind) -> PreTrainedModel:
    """A .gguf file's model, unpacked into a folder that is gone afterwards and quantised anew from there.

    transformers does not unpack and quantise in one pass, and has no backward through GGUF's own packed layers.
    """
    where, extra = _source(ref)
    with tempfile.TemporaryDirectory(prefix="espalier-") as scratch, _clear_errors(ref, "it cannot be unpacked"):
        convert_gguf(Path(where) / extra["gguf_file"], Path(scratch))
        return load_model(scratch, device=device, dtype=dtype, quantization=quantization)


def _fingerprint_before(ref: ModelRef, config: Any, dtype: torch.dtype, trust_remote_code: bool) -> dict[str, Any]:
    """The fingerprint of a base that will be quantised: from its files, or, where these name their tensors otherwise
    than the model does, from the whole model, loaded for it."""
    from huggingface_hub import snapshot_download

    from espalier.model.lora import empty_model

    where, _ = _source(ref)
    with _clear_errors(ref, "its weights cannot be read"):
        local = Path(where).is_dir()
        folder = Path(where if local else snapshot_download(where, allow_patterns=["*.safetensors", "*.json"]))
        found = fingerprint_of_files(folder, empty_model(config, trust_remote_code=trust_remote_code))
    return found or base_fingerprint(load_model(ref, device="cpu", dtype=dtype, trust_remote_code=trust_remote_code))


def exact_attention(config: Any) -> str | None:
    """The stock attention that computes what the config says; None: the model's own choice does.

    transformers before 5.24 takes sdpa for models that cap their scores (Gemma 2), and leaves the cap out unsaid.
    """
    return "eager" if getattr(config.get_text_config(), "attn_logit_softcapping", None) else None


def check_causal_lm(config: Any, said: str = "the model") -> None:
    """Raise ModelError unless `config` is a causal language model that can be trained here."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    known = CAUSAL.get(config.model_type)
    named = config.architectures
    architectures = [str(name) for name in named] if isinstance(named, (list, tuple)) else []
    if "AutoModelForCausalLM" not in (getattr(config, "auto_map", None) or {}):
        decoder = getattr(config, "is_decoder", True) and not getattr(config, "is_encoder_decoder", False)
        causal = [name for name in architectures if name == known or name.endswith(("ForCausalLM", "LMHeadModel"))]
        if not (causal if architectures else known and decoder):
            kind = architectures[0] if architectures else f"of type {config.model_type}"
            raise ModelError(
                f"the model is {kind}, which is no causal language model",
                where=said,
                todo="Give one whose config.json names an architecture ...ForCausalLM (Llama, Qwen, Gemma, Phi, ...).",
            )
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        _check_quantization(quantization, said)


def _check_quantization(quantization: Any, said: str) -> None:
    """Only bitsandbytes weights have a backward pass that LoRA here is tried with; the rest is refused by name."""
    from importlib.util import find_spec

    fields = quantization if isinstance(quantization, dict) else quantization.to_dict()
    method = str(getattr(fields.get("quant_method"), "value", fields.get("quant_method", "unknown")))
    if method != "bitsandbytes":
        raise ModelError(
            f"the weights are quantised ({method}) and cannot be trained with LoRA here",
            where=said,
            todo="Give the original model. Trainable kinds: not quantised, GGUF (unpacked), bitsandbytes 4 or 8 bit.",
        )
    if find_spec("bitsandbytes") is None:
        raise ModelError(
            "the weights are quantised by bitsandbytes, which is not installed",
            where=said,
            todo="pip install bitsandbytes, or give the original model.",
        )


def check_weights(ref: ModelRef) -> None:
    """Raise ModelError where a local folder's weights are missing, incomplete or damaged; reads headers only."""
    where, extra = _source(ref)
    if "gguf_file" in extra or not Path(where).is_dir():
        return
    problems = weight_problems(Path(where))
    if not problems:
        return
    repair = "Copy or download the model again."
    if isinstance(ref, ModelPath) and ref.kind == "embedded":
        repair = "Delete this folder; it is made again at the next start."
    raise ModelError("the model's weights are not whole", where=where, details=problems[:10], todo=repair)


def sane_generation_config(source: PreTrainedModel | ModelRef) -> tuple[GenerationConfig, list[str]]:
    """(a generation config that can be saved, notices about what was repaired) of a model, folder or name.

    Values that only sampling reads are dropped where do_sample is false: they had no effect, and transformers refuses
    to save them, which would be found out hours later. The model's own config is not changed.
    """
    from transformers import GenerationConfig

    if isinstance(source, (ModelPath, str, Path)):
        where, _ = _source(source)
        with quiet_transformers():
            try:
                config = GenerationConfig.from_pretrained(where)
            except OSError:  # the model has none: what its config says
                return GenerationConfig.from_model_config(load_config(source)), []
            except ValueError as error:
                notice = f"generation config: taken from config.json, generation_config.json is invalid: {error}"
                return GenerationConfig.from_model_config(load_config(source)), [notice]
    else:
        config = copy.deepcopy(source.generation_config)
    assert config is not None
    if _can_be_saved(config) is None:
        return config, []
    dropped = []
    if not config.do_sample:
        for name in SAMPLING_ONLY:
            if getattr(config, name, None) is not None:
                dropped.append(f"{name}={getattr(config, name)}")
                setattr(config, name, None)
    problem = _can_be_saved(config)
    if problem is None:
        return config, [f"generation config: dropped {', '.join(dropped)} (without effect: do_sample is false)"]
    kept = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    bare: Any = GenerationConfig
    return bare(**kept), [f"generation config: kept only the token ids, the rest is invalid: {problem}"]


def _can_be_saved(config: GenerationConfig) -> str | None:
    """None where transformers would save `config`, else its complaint on one line."""
    try:
        with quiet_transformers():
            config.validate(strict=True)
    except ValueError as error:
        return " ".join(str(error).split())
    return None


def _source(ref: ModelRef) -> tuple[str, dict[str, Any]]:
    """What from_pretrained takes for `ref`: (folder or hub name, keyword arguments)."""
    path = ref.path if isinstance(ref, ModelPath) else ref
    if str(path).lower().endswith(".gguf") or (isinstance(ref, ModelPath) and ref.kind == "gguf"):
        return str(Path(path).parent), {"gguf_file": Path(path).name}
    return str(path), {}


def _said(ref: ModelRef) -> str:
    return str(ref.path if isinstance(ref, ModelPath) else ref)


@contextlib.contextmanager
def _no_bars_in_logs(gguf: bool) -> Iterator[None]:
    """A bar is for eyes: without a terminal it would fill a log. The GGUF reader's own heeds no switch."""
    with contextlib.ExitStack() as stack:
        if not sys.stderr.isatty():
            stack.enter_context(quiet_transformers())
            if gguf:
                stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        yield


@contextlib.contextmanager
def _clear_errors(ref: ModelRef, what: str) -> Iterator[None]:
    """Turn what the libraries raise for a user's model into one ModelError that keeps their first line."""
    try:
        yield
    except EspalierError:
        raise
    except Exception as error:  # damaged files end in any exception inside the libraries, bare ones of Rust included
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"{what}: the model brings its own code, which is not run unless you say so",
                where=_said(ref),
                details=own_code(ref),
                todo="Read it. If you trust its author, add --trust_remote_code.",
            ) from error
        todo = "Check that the model is whole and that this version of transformers knows it."
        raise ModelError(f"{what}: {first_line(error)}", where=_said(ref), todo=todo) from error


def own_code(ref: ModelRef) -> list[str]:
    """What --trust_remote_code would run, one line a class: 'AutoConfig runs code.py (Config), 812 bytes'.

    From the `auto_map` of config.json and tokenizer_config.json, in the folder or in the Hugging Face cache.
    """
    from huggingface_hub import try_to_load_from_cache

    where, _ = _source(ref)
    lines = []
    for name in ("config.json", "tokenizer_config.json"):
        file = Path(where) / name if Path(where).is_dir() else try_to_load_from_cache(where, name)
        try:
            auto_map = json.loads(Path(str(file)).read_text(encoding="utf-8"))["auto_map"]
            targets = [(kind, target) for kind, value in auto_map.items() for target in _texts(value)]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
        for kind, target in targets:
            origin, _, path = target.rpartition("--")
            module, _, cls = path.rpartition(".")
            code = Path(where) / f"{module}.py"
            size = f", {code.stat().st_size:,} bytes" if not origin and code.is_file() else ""
            lines.append(f"{kind} runs {module}.py ({cls}){f' of {origin}' if origin else ''}{size}")
    return list(dict.fromkeys(lines))


def _texts(value: Any) -> list[str]:
    return [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, str)]
