"""`espalier merge --format gguf` and `gguf-lora`: files for llama.cpp, written beside, read back, renamed."""

from __future__ import annotations

from pathlib import Path

from espalier.model.load_adapter import read_record
from espalier.use.gguf import family_of, read_back, write_adapter, write_model
from espalier.use.merged_record import write_record
from espalier.use.merged_weights import empty_base
from espalier.use.modelfile import FILE, modelfile
from espalier.use.new_folder import new_folder
from espalier.use.source import Adapters, Source, open_source, stop_ids

MODEL_FILE, ADAPTER_FILE, TEMPLATE_FILE = "model-{}.gguf", "adapter.gguf", "chat_template.jinja"


def export_gguf(
    adapter: Adapters,
    output_dir: str | Path,
    model_path: str | None = None,
    quantize: str | None = "f16",
    trust_remote_code: bool = False,
    dequantize: bool = False,
) -> list[str]:
    """Write base + adapter (or, with quantize None, the adapter alone) as a GGUF file into a new folder.

    Returns the report. Every tensor is read back and compared before the folder appears. Raises RunFolderError,
    AdapterError and ModelError as `merge` does, and for models and tokenizers that GGUF has no place for.
    """
    output = Path(output_dir)
    with new_folder(output) as (scratch, ready):
        source = open_source(adapter, model_path, scratch, trust_remote_code, dequantize)
        family_of(source.config)
        lines = _adapter(source, ready, output) if quantize is None else _model(source, ready, output, quantize)
        about = {"format": "gguf-lora" if quantize is None else "gguf", "quantize": quantize or "f32"}
        write_record(ready, read_record(source.adapter), stop_ids(source), about)
    return [*lines[:1], *source.notes, *lines[1:]]


def _model(source: Source, ready: Path, output: Path, quantize: str) -> list[str]:
    name = MODEL_FILE.format(quantize)
    parameters = [key for key, _ in empty_base(source.config, source.trust_remote_code).named_parameters()]
    parameters += [key for key in source.weights.untied if key not in parameters]
    written = write_model(ready / name, source.config, source.tokenizer, parameters, source.weights, quantize)
    worst = read_back(ready / name, written)
    size = (ready / name).stat().st_size
    return [
        f"merged into {output / name} ({quantize}, {size / 1e6:.0f} MB, {len(written)} tensors)",
        f"every tensor was read back; rounding changed a value by {100 * worst:.2g} % of its tensor's largest, at most",
        f"serve it: llama-server -m {output / name} --jinja",
        _modelfile(source, ready, output, f"./{name}", None),
    ]


def _adapter(source: Source, ready: Path, output: Path) -> list[str]:
    written = write_adapter(ready / ADAPTER_FILE, source.config, source.adapted)
    read_back(ready / ADAPTER_FILE, written)
    base = str(Path(source.base.path).resolve()) if source.base.kind == "gguf" else "./BASE.gguf"
    # The base's GGUF brings its own template, which need not be the trained one.
    (ready / TEMPLATE_FILE).write_text(source.tokenizer.chat_template, encoding="utf-8")
    return [
        f"written to {output / ADAPTER_FILE} ({len(written)} tensors, float32), every one read back and equal",
        f"serve it with a GGUF of its base: llama-server -m BASE.gguf --lora {output / ADAPTER_FILE} --jinja "
        f"--chat-template-file {output / TEMPLATE_FILE}",
        _modelfile(source, ready, output, base, f"./{ADAPTER_FILE}"),
    ]


def _modelfile(source: Source, ready: Path, output: Path, from_: str, adapter: str | None) -> str:
    stops = [str(source.tokenizer.convert_ids_to_tokens(i)) for i in stop_ids(source)]
    text, said = modelfile(from_, adapter, source.template, stops)
    (ready / FILE).write_text(text, encoding="utf-8")
    put = "" if from_ != "./BASE.gguf" else f"put the base's GGUF into the FROM line of {output / FILE}, then "
    return f"Ollama: {put}ollama create NAME -f {output / FILE}; {said}"
