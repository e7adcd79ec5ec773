"""A model's tensors by name, read from its safetensors files one at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from espalier.model.load import ModelPath, check_weights

if TYPE_CHECKING:
    import torch

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
        self._open: dict[str, Any] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        stored = self.stored_name(name)
        tensor: torch.Tensor = self._file(stored).get_tensor(stored)
        return tensor

    def shape(self, name: str) -> list[int]:
        """The shape of the tensor `name`, from the file's header."""
        stored = self.stored_name(name)
        return list(self._file(stored).get_slice(stored).get_shape())

    def _file(self, stored: str) -> Any:
        from safetensors import safe_open

        file = self._place[stored]
        if file not in self._open:
            self._open[file] = safe_open(self.folder / file, framework="pt")
        return self._open[file]

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

    def close(self, file: str) -> None:
        """Give back what was read of one file."""
        self._open.pop(file, None)


class NamedTensors:
    """What `base_fingerprint` needs of a model, with its tensors read one by one: parameters by name, and a config."""

    def __init__(self, model: Any, weights: Mapping[str, torch.Tensor]):
        self.config, self._model, self._weights = model.config, model, weights

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, _ in self._model.named_parameters():
            yield name, self._weights[name]


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
