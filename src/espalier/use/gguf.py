"""GGUF files for llama.cpp, Ollama and LM Studio: a whole model, or an adapter alone; nothing is compiled.

The format, tensor names and quantisation are those of the `gguf` package, which llama.cpp's authors publish. What is
ours: per family, how transformers' tensors differ from ggml's. Tensors are computed and written one at a time.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from espalier.errors import AdapterError, ModelError
from espalier.use.gguf_vocab import add_vocabulary
from espalier.use.merged_weights import plain_layers

if TYPE_CHECKING:
    import numpy as np
    import torch

QUANTIZE = ("f32", "f16", "bf16", "q8_0", "q5_0", "q4_0")
BLOCK = 32  # numbers that q8_0, q5_0 and q4_0 scale together; a row must be a multiple of it


@dataclass(frozen=True, slots=True)
class Family:
    """How a model type of transformers is laid out in GGUF.

    arch: ggml's name. interleaved: ggml rotates neighbouring pairs where transformers rotates halves, so the rows of
    q and k are reordered. norm_plus_one: ggml keeps a norm's weight with the 1 that the model's code adds. full_every:
    ggml lets every so many-th layer see all, and the others the sliding window. large_layers: with so many layers
    ggml scales attention by the hidden size a head instead of the head's size.
    """

    arch: str
    interleaved: bool = False
    norm_plus_one: bool = False
    full_every: int = 0
    large_layers: int = 0


@dataclass(frozen=True, slots=True)
class Written:
    """A tensor in a GGUF file. crc: CRC-32 of its bytes. rounding: largest change over the tensor's largest value."""

    crc: int
    rounding: float


FAMILIES = {
    "llama": Family("llama", interleaved=True),
    "mistral": Family("llama", interleaved=True),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "gemma": Family("gemma", norm_plus_one=True),
    "gemma2": Family("gemma2", norm_plus_one=True, full_every=2, large_layers=46),
    "gemma3_text": Family("gemma3", norm_plus_one=True, full_every=6, large_layers=62),
}


def family_of(config: Any) -> Family:
    """The family of a model's config. Raises ModelError that names a type not known here."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ModelError(
            f"no GGUF can be written for models of type {config.model_type!r}",
            todo=f"Known types: {', '.join(FAMILIES)}. For others: llama.cpp's own converter, on a merged folder.",
        )
    rope = _rope(config)
    if rope.get("rope_type", "default") not in ("default", "linear", "llama3"):
        raise ModelError(f"no GGUF can be written for rotary scaling of type {rope['rope_type']!r}")
    if family.full_every:
        _check_gemma(config, family)
    return family


def _check_gemma(config: Any, family: Family) -> None:
    """What ggml computes for Gemma 2 and 3 without asking the file must be what the config says."""
    per_head = config.hidden_size // config.num_attention_heads
    scale = per_head if config.num_hidden_layers == family.large_layers else config.head_dim
    if config.query_pre_attn_scalar != scale:
        raise ModelError(
            f"llama.cpp scales this model's attention by {scale}, its config says query_pre_attn_scalar "
            f"{config.query_pre_attn_scalar}",
        )
    full = [kind == "full_attention" for kind in config.layer_types]
    if full != [(i + 1) % family.full_every == 0 for i in range(len(full))]:
        raise ModelError(f"llama.cpp lets every layer {family.full_every} see all, this model's layers are others")


def write_model(
    file: Path, config: Any, tokenizer: Any, names: list[str], weights: Mapping[str, torch.Tensor], quantize: str
) -> dict[str, Written]:
    """A whole model as GGUF. names: its parameters; weights: their tensors, in any float dtype.

    quantize: one of QUANTIZE, for matrices; vectors are f32. A matrix whose rows are no multiple of BLOCK is f16 where
    a block type was asked for. Returns what was written, by GGUF's names. Raises ModelError for families not known, and
    for values that f16 cannot hold.
    """
    import gguf

    family = family_of(config)
    writer = gguf.GGUFWriter(None, family.arch)
    kinds = {name: _kind(weights, name, quantize) for name in names}
    _add_settings(writer, config, family, quantize)
    add_vocabulary(writer, tokenizer, rows=weights[_embedding(names)].shape[0])
    placed = _gguf_names(names, config, family)
    extra = _rope_factors(config)
    for name in names:
        shape = list(weights[name].shape)
        rows = gguf.quant_shape_to_byte_shape(shape, kinds[name])
        size = math.prod(rows) if kinds[name] not in _plain_kinds() else 0
        _add_info(writer, placed[name], shape, kinds[name], size)
    if extra is not None:
        _add_info(writer, "rope_freqs.weight", list(extra.shape), gguf.GGMLQuantizationType.F32, 0)
    _open(writer, file)
    written = {}
    for name in names:
        values = _arranged(weights[name].float(), name, config, family).contiguous().numpy()
        data = gguf.quants.quantize(values, kinds[name])
        if kinds[name] == gguf.GGMLQuantizationType.F16 and not _finite(data):
            raise ModelError(f"{name} holds values beyond f16", todo="Write --quantize bf16 or q8_0.")
        writer.write_tensor_data(data)
        written[placed[name]] = _written(values, data, kinds[name])
    if extra is not None:
        writer.write_tensor_data(extra)
        written["rope_freqs.weight"] = _written(extra, extra, gguf.GGMLQuantizationType.F32)
    writer.close()
    return written


def _written(values: np.ndarray[Any, Any], data: np.ndarray[Any, Any], kind: Any) -> Written:
    import gguf

    error = abs(gguf.quants.dequantize(data, kind) - values).max() / max(float(abs(values).max()), 1e-30)
    return Written(zlib.crc32(data.tobytes()), float(error))


def read_back(file: Path, written: Mapping[str, Written]) -> float:
    """Compare a GGUF file's tensors with what was written, bit for bit. Returns the largest rounding of any.

    Raises ModelError where a tensor is missing, besides, or not what was written.
    """
    import gguf

    found = {tensor.name: zlib.crc32(tensor.data.tobytes()) for tensor in gguf.GGUFReader(file).tensors}
    wrong = [
        name for name in written.keys() | found.keys() if name not in written or found.get(name) != written[name].crc
    ]
    if wrong:
        raise ModelError(f"{len(wrong)} tensors of the file are not what was written", details=sorted(wrong)[:5])
    return max(entry.rounding for entry in written.values())


def write_adapter(file: Path, config: Any, adapted: Any) -> dict[str, Written]:
    """The adapter alone as a GGUF LoRA, float32, for `llama-server --lora`.

    adapted: the PEFT model on an empty base. llama.cpp scales by alpha / rank alone, so whatever else PEFT scales by is
    multiplied into lora_b. Raises AdapterError for what such a file cannot hold.
    """
    import gguf

    family = family_of(config)
    layers = dict(_linear_layers(adapted))
    placed = _gguf_names([f"{name}.weight" for name in layers], config, family)
    alpha = float(adapted.peft_config["default"].lora_alpha)
    writer = gguf.GGUFWriter(None, family.arch)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    tensors = {}
    for name, (a, b, scaling) in layers.items():
        b = b * (scaling * a.shape[0] / alpha)
        tensors[f"{placed[f'{name}.weight']}.lora_a"] = a.contiguous().numpy()
        tensors[f"{placed[f'{name}.weight']}.lora_b"] = _arranged(b, f"{name}.weight", config, family).numpy()
    for key, values in tensors.items():
        _add_info(writer, key, list(values.shape), gguf.GGMLQuantizationType.F32, 0)
    _open(writer, file)
    for values in tensors.values():
        writer.write_tensor_data(values)
    writer.close()
    return {key: _written(values, values, gguf.GGMLQuantizationType.F32) for key, values in tensors.items()}


def _linear_layers(adapted: Any) -> Iterator[tuple[str, tuple[torch.Tensor, torch.Tensor, float]]]:
    modules = dict(adapted.get_base_model().named_modules())
    for name, found in plain_layers(adapted):
        if found is None:
            raise AdapterError(
                f"a GGUF LoRA cannot hold what the adapter does to {name} ({type(modules[name]).__name__})",
                todo="Merge first: --format gguf.",
            )
        yield name, found


def _arranged(tensor: torch.Tensor, name: str, config: Any, family: Family) -> torch.Tensor:
    """A tensor of transformers as ggml wants it. lora_b is arranged as the weight that it belongs to."""
    if family.norm_plus_one and name.endswith("norm.weight"):
        return tensor + 1
    parts = name.split(".")
    if family.interleaved and len(parts) > 1 and parts[-2] in ("q_proj", "k_proj"):
        heads = config.num_attention_heads if parts[-2] == "q_proj" else config.num_key_value_heads
        rest = tensor.shape[1:]
        return tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *rest).transpose(1, 2).reshape(tensor.shape)
    return tensor


def _add_settings(writer: Any, config: Any, family: Family, quantize: str) -> None:
    import gguf

    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_type("model")
    writer.add_context_length(_context_length(config, family))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    rope = _rope(config)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if family.arch == "llama":
        writer.add_rope_dimension_count(head_dim)
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if family.full_every:
        writer.add_sliding_window(config.sliding_window)
    if family.arch == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if family.arch == "gemma3":
        writer.add_rope_freq_base_swa(float(config.rope_parameters["sliding_attention"]["rope_theta"]))
    writer.add_file_type(gguf.LlamaFileType[{"f32": "ALL_F32"}.get(quantize, f"MOSTLY_{quantize.upper()}")])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _context_length(config: Any, family: Family) -> int:
    """In positions: the sliding window where the config has one and ggml's code for the family knows none."""
    window = getattr(config, "sliding_window", None)
    slides = config.model_type == "mistral" or "sliding_attention" in (getattr(config, "layer_types", None) or ())
    limit = int(config.max_position_embeddings)
    return limit if family.full_every or not slides or window is None else min(limit, int(window))


def _rope(config: Any) -> dict[str, Any]:
    """Of the layers that see all, where the config tells kinds of layers apart."""
    rope = getattr(config, "rope_parameters", None) or {"rope_theta": getattr(config, "rope_theta", 10000.0)}
    return dict(rope.get("full_attention", rope))


def _rope_factors(config: Any) -> np.ndarray[Any, Any] | None:
    """float32 [head_dim / 2]: by what Llama 3 divides each rotary frequency; None for plain rotary positions."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = _rope(config)
    if rope.get("rope_type") != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    width = 2 * len(scaled)
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    factors: np.ndarray[Any, Any] = (plain / scaled).float().numpy()
    return factors


def _gguf_names(names: list[str], config: Any, family: Family) -> dict[str, str]:
    import gguf

    arch = {text: key for key, text in gguf.MODEL_ARCH_NAMES.items()}[family.arch]
    table = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    placed = {name: table.get_name(name, try_suffixes=(".weight", ".bias")) for name in names}
    unknown = [name for name, found in placed.items() if found is None]
    if unknown:
        raise ModelError(f"{len(unknown)} tensors have no name in GGUF's {family.arch}", details=unknown[:5])
    return {name: str(found) for name, found in placed.items()}


def _embedding(names: list[str]) -> str:
    return next(name for name in names if name.endswith("embed_tokens.weight"))


def _kind(weights: Mapping[str, torch.Tensor], name: str, quantize: str) -> Any:
    import gguf

    shape = weights[name].shape
    if len(shape) < 2:
        return gguf.GGMLQuantizationType.F32
    if quantize.startswith("q") and shape[-1] % BLOCK:
        return gguf.GGMLQuantizationType.F16
    return gguf.GGMLQuantizationType[quantize.upper()]


def _plain_kinds() -> tuple[Any, ...]:
    import gguf

    return (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)


def _add_info(writer: Any, name: str, shape: list[int], kind: Any, size: int) -> None:
    """Announce a tensor; `size` in bytes for packed kinds, whose shape the writer takes in numbers."""
    import gguf
    import numpy as np

    plain = {gguf.GGMLQuantizationType.F32: np.float32, gguf.GGMLQuantizationType.F16: np.float16}
    if kind in plain:
        width = np.dtype(plain[kind])
        writer.add_tensor_info(name, shape, width, math.prod(shape) * width.itemsize)
    else:
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=kind)


def _open(writer: Any, file: Path) -> None:
    """Everything before the tensors."""
    writer.write_header_to_file(path=file)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def _finite(values: np.ndarray[Any, Any]) -> bool:
    import numpy as np

    return bool(np.isfinite(values).all())
