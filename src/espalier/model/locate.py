"""Where a base model is: an embedded name, a local folder, a .gguf file, or a hub name.

Imports neither torch nor transformers, so that a wrong name costs no waiting.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Literal

from espalier.errors import ModelError
from espalier.model.embedded import EMBEDDED, prepare_embedded, suggest_embedded

# A hub name: one or two parts of letters, digits, '-', '_' and '.' (huggingface_hub's own rule).
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
NETWORK_TIMEOUT_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class ModelPath:
    """A model that was found.

    path: a folder, a .gguf file, or (kind "hub", not yet on this machine) the hub's name.
    said: one phrase for the header. name: what to write down for others, never a path of this machine.
    """

    path: Path | str
    kind: Literal["embedded", "folder", "gguf", "hub"]
    said: str
    name: str = ""


ModelRef = ModelPath | str | Path


def resolve_model(name: str | os.PathLike[str]) -> ModelPath:
    """Find the model that --model_path means: an embedded name, a local folder, a .gguf file, or a hub name.

    An embedded model is made ready here (see embedded.py). A hub name is looked up in the local cache first, then on
    the network with a short timeout. A name that looks like a path never goes to the network. Raises ModelError.
    """
    text = os.fspath(name).strip()
    if text in EMBEDDED:
        folder, source = prepare_embedded(text)
        return ModelPath(folder, "embedded", f"{EMBEDDED[text].title} from {source}", text)
    path = Path(text).expanduser()
    if text and path.is_dir():
        return _local_folder(text, path)
    if path.is_file():
        return _gguf_file(text, path)
    if is_path_like(text):
        raise _no_such_path(text, path)
    return _hub_model(text)


def is_path_like(name: str) -> bool:
    """True for names that can only mean a file or folder: never sent over the network."""
    file = name.lower().endswith((".gguf", ".safetensors", ".bin", ".json"))
    return HUB_NAME.fullmatch(name) is None or file or ("/" in name and Path(name).parent.is_dir())


def _local_folder(text: str, path: Path) -> ModelPath:
    if (path / "config.json").is_file():
        return ModelPath(path, "folder", f"folder {text}", path.resolve().name)
    if (path / "adapter_config.json").is_file():
        raise ModelError(
            "this folder holds an adapter, not a base model",
            where=text,
            todo="Give the base as --model_path; an adapter to go on from is --checkpoint, one to talk to --adapter.",
        )
    gguf_files = sorted(file.name for file in path.glob("*.gguf"))
    if gguf_files:
        raise ModelError(
            f"the folder has no config.json, but GGUF files: {', '.join(gguf_files[:5])}",
            where=text,
            todo=f"Name the file itself: --model_path {text.rstrip('/')}/{gguf_files[0]}",
        )
    raise ModelError(
        "the folder has no config.json, so it is no model of the Hugging Face kind",
        where=text,
        todo="Give the folder that holds config.json, the weights and the tokenizer.",
    )


def _gguf_file(text: str, path: Path) -> ModelPath:
    with open(path, "rb") as file:
        magic = file.read(4)
    if magic == b"GGUF":
        return ModelPath(path, "gguf", f"GGUF file {text}", path.name)
    if path.suffix.lower() == ".gguf":
        raise ModelError("not a GGUF file (it does not begin with 'GGUF')", where=text, todo="Download it again.")
    raise ModelError(
        "this is a single file, but no GGUF file", where=text, todo="Give the folder that holds it, or a .gguf file."
    )


def _no_such_path(text: str, path: Path) -> ModelError:
    named = f"Give a folder, a .gguf file, a hub name or {' or '.join(map(repr, EMBEDDED))}."
    siblings = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings, n=3)
    return ModelError(
        f"there is no model at {text!r}",
        where="--model_path",
        todo=f"Near names there: {', '.join(near)}" if near else named,
    )


def _hub_model(name: str) -> ModelPath:
    """A model by its hub name: from the local cache where it is whole, else known to the hub (nothing is fetched)."""
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError

    near = suggest_embedded(name)
    if near and "/" not in name:
        raise ModelError(f"there is no model {name!r}", where="--model_path", todo=f"Did you mean {near!r}?")
    cached = try_to_load_from_cache(name, "config.json")
    if isinstance(cached, str) and not weight_problems(Path(cached).parent):
        return ModelPath(Path(cached).parent, "hub", f"hub model {name} from the Hugging Face cache", name)
    try:
        HfApi().model_info(name, timeout=NETWORK_TIMEOUT_SECONDS)
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"the hub knows no model {name!r} (or it is private)",
            where="--model_path",
            todo="Check the spelling; for a private model, log in with `hf auth login`.",
        ) from error
    except Exception as error:  # the HTTP library behind huggingface_hub changes, and with it the class
        offline = isinstance(error, OfflineModeIsEnabled)
        why = "HF_HUB_OFFLINE is set" if offline else f"the hub cannot be reached ({first_line(error)})"
        raise ModelError(
            f"no model {name!r} on this machine, and {why}",
            where="--model_path",
            details=[
                f"embedded names: {', '.join(EMBEDDED)}",
                f"no folder or file ./{name}",
                f"not (wholly) in the Hugging Face cache {constants.HF_HUB_CACHE}",
            ],
            todo="Check the spelling, go online once, or give a local folder or .gguf file.",
        ) from error
    return ModelPath(name, "hub", f"hub model {name}", name)


def weight_problems(folder: Path) -> list[str]:
    """What is wrong with the weights in a folder, one line a file; empty where all is well."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = sorted({PurePath(name) for name in weight_map.values()})
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            return [f"{index.name}: not a valid index"]
        outside = [str(name) for name in files if name.is_absolute() or ".." in name.parts]
        if outside:
            return [f"{index.name}: names {outside[0]!r}, which is not in the folder"]
    elif (folder / "model.safetensors").is_file():
        files = [PurePath("model.safetensors")]
    elif (folder / "pytorch_model.bin").is_file() or (folder / "pytorch_model.bin.index.json").is_file():
        return []  # read by torch.load with weights_only, whose own message is clear
    else:
        return ["no model.safetensors, model.safetensors.index.json or pytorch_model.bin"]
    return [f"{name}: {problem}" for name in files if (problem := _safetensors_problem(folder / name))]


def _safetensors_problem(file: Path) -> str | None:
    from safetensors import SafetensorError, safe_open

    if not os.path.isfile(file):  # a name that no file system takes is missing too
        return "missing"
    with open(file, "rb") as opened:
        if opened.read(23) == b"version https://git-lfs":
            return "a Git LFS pointer, not the weights: run `git lfs pull`"
    try:
        with safe_open(file, framework="numpy"):
            return None
    except SafetensorError as error:
        return f"damaged or cut off ({file.stat().st_size:,} bytes; {first_line(error)})"


def first_line(error: BaseException) -> str:
    """The first line of an error's text, cut to 200 characters; its class where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
