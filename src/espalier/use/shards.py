"""A model's tensors by name, read from its safetensors files one at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from espalier.model.load import ModelPath, check_weights

if TYPE_CHECKING:
    import torch

# torch's dtypes as safetensors spells them
CODES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class Shards(Mapping[str, "torch.Tensor"]):
    """The tensors of a model's folder under the names of its parameters.

    A name that the files lack is looked up under the tensor that it is tied to, and without or with the prefix of
    the bare model (`model.`), as transformers does when it loads. Raises ModelError for damaged files, and KeyError
    for a name that is nowhere.
    """

    def __init__(self, folder: Path, tied: Mapping[str, str] | None = None):
        check_weights(folder)
        self.folder, self.tied = folder, dict(tied or {})
        self.files = _files(folder)  # file name -> the names in it, in the file's order
        self._place = {name: file for file, names in self.files.items() for name in names}

    def __getitem__(self, name: str) -> torch.Tensor:
        """A copy: a view would keep the pages of its file in memory."""
        from safetensors import safe_open

        stored = self.stored_name(name)
        with safe_open(self.folder / self._place[stored], framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(stored).clone()
        return tensor

    def view(self, name: str) -> torch.Tensor:
        """The tensor on the disk, for reading a few of its values."""
        from safetensors import safe_open

        stored = self.stored_name(name)
        with safe_open(self.folder / self._place[stored], framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(stored)
        return tensor

    def shape(self, name: str) -> list[int]:
        """The shape of the tensor `name`, from the file's header."""
        return list(self.view(name).shape)

    def stored_name(self, name: str) -> str:
        """The name in the files of the parameter `name`. Raises KeyError."""
        for wanted in (name, self.tied.get(name, name)):
            for spelt in (wanted, wanted.removeprefix("model."), f"model.{wanted}"):
                if spelt in self._place:
                    return spelt
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._place)

    def __len__(self) -> int:
        return len(self._place)


class NamedTensors:
    """What `base_fingerprint` needs of a model, with its tensors left on the disk: parameters by name, and a config."""

    def __init__(self, model: Any, shards: Shards):
        self.config, self._model, self._shards = model.config, model, shards

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, _ in self._model.named_parameters():
            yield name, self._shards.view(name)


def write_safetensors(file: Path, forms: Mapping[str, torch.Tensor], tensor_of: Callable[[str], torch.Tensor]) -> None:
    """A safetensors file, one tensor in memory at a time: the library's own writer wants them all, and copies them.

    forms: name -> an empty tensor of its shape and dtype, in the order of the file. The format (safetensors' README):
    the header's length as 8 bytes, little-endian; the header as JSON, padded with blanks to 8 bytes; the values.
    """
    import torch

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, form in forms.items():
        begin, end = end, end + form.numel() * form.element_size()
        code = CODES[str(form.dtype).removeprefix("torch.")]
        header[name] = {"dtype": code, "shape": list(form.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name, form in forms.items():
            tensor = tensor_of(name).contiguous()
            assert (tensor.shape, tensor.dtype) == (form.shape, form.dtype), name
            tensor.reshape(-1).view(torch.uint8).numpy().tofile(out)
        out.flush()
        os.fsync(out.fileno())


def safetensors_folder(ref: ModelPath, scratch: Path) -> tuple[Path, str | None]:
    """(a folder with the model's safetensors, what had to be done for it).

    A hub model that is not here yet is downloaded into the hub's cache; a GGUF file is unpacked, and weights of the
    older .bin kind are read (weights only), into `scratch`.
    """
    from espalier.model.embedded import convert_gguf

    if ref.kind == "gguf":
        convert_gguf(Path(ref.path), scratch)
        return scratch, f"the quantised weights of {ref.name} were unpacked to bfloat16, as training reads them"
    folder = Path(ref.path)
    if ref.kind == "hub" and not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(
            snapshot_download(str(ref.path), allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model"])
        )
    if not (folder / INDEX).is_file() and not (folder / SINGLE).is_file() and any(folder.glob("pytorch_model*.bin*")):
        from transformers import AutoModelForCausalLM

        loaded: Any = AutoModelForCausalLM.from_pretrained(str(folder), dtype="auto", weights_only=True)
        loaded.save_pretrained(scratch)
        return scratch, "the weights were in the older .bin form and are written as safetensors"
    return folder, None


def _files(folder: Path) -> dict[str, list[str]]:
    from safetensors import safe_open

    index = folder / INDEX
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        names = [SINGLE]
    found = {}
    for name in names:
        with safe_open(folder / name, framework="numpy") as file:
            found[name] = list(file.keys())
    return found
