"""What ties an adapter to its base: a small record of the base's shape and of a fixed sample of its weights.

A path or a name cannot tell two bases of the same shape apart; the record can. It is taken from the loaded model, in
whatever dtype that is, before anything is resized, merged or trained.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

VERSION = 1
RECORDED = "espalier_fingerprint"  # attribute of a base that is held in another form than its files have
VALUES_A_TENSOR = 16
MAX_SAMPLE = 256
# Fields of a config that say how the network is built, under the names that most architectures share.
ARCHITECTURE = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "tie_word_embeddings",
)


def base_fingerprint(source: Any) -> dict[str, Any]:
    """The fingerprint of a base as a JSON-serialisable dict; the same for float32 and bfloat16 loads.

    source: a loaded model, also one with an adapter around it (the adapter's tensors are left out), or a model's
    folder, which is loaded for it. `weights` is the SHA-256 over names, shapes and VALUES_A_TENSOR values of every
    tensor, each rounded to bfloat16; `sample` holds one value of up to MAX_SAMPLE tensors, for a comparison with
    tolerance where a load in float16 has rounded otherwise. A base that load_model has quantised has the fingerprint
    of the weights that it was made from.
    """
    if isinstance(source, (str, Path)):
        source = _load(source)
    recorded: dict[str, Any] | None = getattr(source, RECORDED, None)
    return recorded or _fingerprint(source.config, _base_tensors(source))


def fingerprint_of_files(folder: Path, skeleton: Any) -> dict[str, Any] | None:
    """The same from the safetensors files of a folder, reading the sampled values only.

    skeleton: the model without weights, for its tensors' names and shapes. None where a tensor is not in the files
    under the name and shape that it has in the model: then only loading tells.
    """
    from safetensors import safe_open

    files = sorted(folder.glob("*.safetensors"))
    handles = [safe_open(file, framework="pt") for file in files]
    where = {name: handle for handle in handles for name in handle.keys()}  # noqa: SIM118
    wanted = {name: tuple(parameter.shape) for name, parameter in skeleton.named_parameters()}
    if any(name not in where or tuple(where[name].get_slice(name).get_shape()) != s for name, s in wanted.items()):
        return None
    return _fingerprint(skeleton.config, [(name, where[name].get_tensor(name)) for name in wanted])


def _fingerprint(config: Any, tensors: list[tuple[str, torch.Tensor]]) -> dict[str, Any]:
    tensors = sorted(tensors, key=lambda pair: pair[0])
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
    values = _sampled(tensors)  # [num_tensors, VALUES_A_TENSOR]
    # The float32 of a bfloat16 value is exact, and NumPy has no bfloat16.
    digest.update(values.float().numpy().astype("<f4").tobytes())
    step = max(1, -(-len(tensors) // MAX_SAMPLE))
    return {
        "version": VERSION,
        "architecture": {name: getattr(config, name, None) for name in ARCHITECTURE},
        "num_parameters": sum(tensor.numel() for _, tensor in tensors),
        "weights": digest.hexdigest(),
        "sample": [float(value) for value in values[::step, VALUES_A_TENSOR // 2]],
    }


def fingerprint_difference(recorded: dict[str, Any], found: dict[str, Any]) -> str | None:
    """None where both are the same base, else what differs, in words."""
    if recorded.get("weights") == found["weights"]:
        return None
    for name, value in found["architecture"].items():
        before = recorded.get("architecture", {}).get(name, value)
        if before != value:
            return f"{name} is {value}, it was {before}"
    ours, theirs = found["sample"], recorded.get("sample", [])
    if len(ours) != len(theirs):
        return f"the number of tensors differs ({found['num_parameters']:,} parameters)"
    # One unit in bfloat16's last place is 2^-8 of the value; float16 cuts values below 6e-8 to nothing.
    different = sum(abs(a - b) > 2**-7 * max(abs(a), abs(b)) + 1e-7 for a, b in zip(ours, theirs, strict=True))
    if different == 0:
        return None
    return f"same shape, other weights ({different} of {len(ours)} sampled values differ)"


def _load(folder: str | Path) -> Any:
    import torch

    from espalier.model.load import load_model

    return load_model(folder, device="cpu", dtype=torch.bfloat16)


def _base_tensors(model: Any) -> list[tuple[str, torch.Tensor]]:
    """(name, tensor) of the base's own parameters; names as in the bare model, the adapter's tensors left out."""
    found = []
    for name, tensor in model.named_parameters():
        bare = name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".original_module.", ".")
        if not any(part.startswith("lora_") or part == "modules_to_save" for part in bare.split(".")):
            found.append((bare, tensor.detach()))
    return found


def _sampled(tensors: list[tuple[str, torch.Tensor]]) -> torch.Tensor:
    """bfloat16 [num_tensors, VALUES_A_TENSOR] on the CPU: values at evenly spaced places of each flattened tensor."""
    import torch

    rows = []
    for _, tensor in tensors:
        flat = tensor.reshape(-1)
        places = torch.arange(VALUES_A_TENSOR, device=flat.device) * (flat.numel() - 1) // (VALUES_A_TENSOR - 1)
        rows.append(flat[places].to(torch.bfloat16))
    return torch.stack(rows).cpu()
