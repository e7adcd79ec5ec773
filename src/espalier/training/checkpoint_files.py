"""The files of a checkpoint: written and flushed, listed with their hashes, read back. safetensors and JSON only."""

from __future__ import annotations

import hashlib
import json
import os
import random as python_random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from espalier.errors import CheckpointError

MANIFEST = "manifest.json"
STATE = "trainer_state.json"
PROGRESS = "progress.json"


# ---- random generators -----------------------------------------------------------------------------------------------


def random_state() -> dict[str, Any]:
    """The state of every random generator that training draws from: Python's, numpy's, torch's, each device's."""
    numpy_state: Any = np.random.get_state(legacy=False)
    state: dict[str, Any] = {
        "python": python_random.getstate(),
        "numpy": {"key": numpy_state["state"]["key"], "pos": numpy_state["state"]["pos"]}
        | {name: numpy_state[name] for name in ("has_gauss", "gauss")},
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        # One rank of several has one device, and must not reach for those of the others.
        several = "LOCAL_RANK" in os.environ
        state["cuda"] = [torch.cuda.get_rng_state()] if several else torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Set what `random_state` gave."""
    version, internal, gauss = state["python"]
    python_random.setstate((version, tuple(internal), gauss))
    numpy_state = state["numpy"]
    np.random.set_state(
        {
            "bit_generator": "MT19937",
            "state": {"key": np.asarray(numpy_state["key"], np.uint32), "pos": numpy_state["pos"]},
            "has_gauss": numpy_state["has_gauss"],
            "gauss": numpy_state["gauss"],
        }
    )
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        if "LOCAL_RANK" in os.environ:
            torch.cuda.set_rng_state(state["cuda"][0])
        else:
            torch.cuda.set_rng_state_all(list(state["cuda"]))


def plain_random(state: Mapping[str, Any]) -> dict[str, Any]:
    """What `random_state` gave, as JSON holds it: a rank tells rank 0, which writes."""
    return {
        "python": state["python"],
        "numpy": {**state["numpy"], "key": np.asarray(state["numpy"]["key"]).tolist()},
        "torch": state["torch"].tolist(),
        "cuda": [device.tolist() for device in state.get("cuda", [])],
    }


def save_random(states: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """random.safetensors and random.json from what `plain_random` gave; those of further ranks as random-<rank>.*."""
    for rank, state in enumerate(states):
        stem = random_stem(rank)
        tensors = {"torch": torch.tensor(state["torch"], dtype=torch.uint8)}
        tensors["numpy.key"] = torch.tensor(state["numpy"]["key"], dtype=torch.int64)
        tensors |= {f"cuda.{i}": torch.tensor(s, dtype=torch.uint8) for i, s in enumerate(state["cuda"])}
        save_file(tensors, str(folder / f"{stem}.safetensors"))
        numpy_rest = {name: value for name, value in state["numpy"].items() if name != "key"}
        write_json(folder / f"{stem}.json", {"python": state["python"], "numpy": plain(numpy_rest)})


def random_stem(rank: int) -> str:
    """Name of a rank's random state in a checkpoint, without its ending."""
    return f"random-{rank}" if rank else "random"


def load_random(folder: Path, rank: int = 0) -> dict[str, Any]:
    """What `save_random` wrote. Raises CheckpointError: random states are never left out without a word (case C15)."""
    stem = random_stem(rank)
    try:
        tensors = load_file(str(folder / f"{stem}.safetensors"))
        values = read_json(folder / f"{stem}.json")
        state = {"python": values["python"], "numpy": {**values["numpy"], "key": tensors["numpy.key"].numpy()}}
        state["torch"] = tensors["torch"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"its random states cannot be read: {error}", where=str(folder)) from error
    cuda = [tensors[name] for name in sorted(tensors, key=lambda n: (len(n), n)) if name.startswith("cuda.")]
    return state | ({"cuda": cuda} if cuda else {})


# ---- optimizer -------------------------------------------------------------------------------------------------------


def save_optimizer(state: Mapping[str, Any], folder: Path) -> None:
    """optimizer.safetensors with tensors by "<parameter>.<key>", everything else in optimizer.json.

    state: the optimizer's state_dict().
    """
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for index, values in state["state"].items():
        # Optimizers of bitsandbytes hide their packed tensors one level deeper, and take them from this one.
        hidden = [value for value in values.values() if isinstance(value, dict)]
        flat = {key: value for part in (values, *hidden) for key, value in part.items() if not isinstance(value, dict)}
        for key, value in flat.items():
            if isinstance(value, torch.Tensor):
                tensor = value.detach().cpu().contiguous()
                # Their code tables are one tensor for all parameters, which safetensors refuses.
                tensors[f"{index}.{key}"] = tensor.clone() if hidden else tensor
            else:
                scalars.setdefault(str(index), {})[key] = value
    save_file(tensors, str(folder / "optimizer.safetensors"))
    write_json(folder / "optimizer.json", {"param_groups": plain(state["param_groups"]), "scalars": scalars})


def load_optimizer(folder: Path, groups_now: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The state_dict() that `save_optimizer` wrote. groups_now: the optimizer's, which know what JSON does not."""
    values = read_json(folder / "optimizer.json")
    state: dict[int, dict[str, Any]] = {int(index): dict(scalars) for index, scalars in values["scalars"].items()}
    for name, tensor in load_file(str(folder / "optimizer.safetensors")).items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    groups = values["param_groups"]
    for group, live in zip(groups, groups_now, strict=True):
        group.update({key: tuple(group[key]) for key, value in live.items() if isinstance(value, tuple)})
    return {"state": state, "param_groups": groups}


# ---- manifest --------------------------------------------------------------------------------------------------------


def write_manifest(folder: Path, run: str) -> None:
    """Flush every file to disk, then write and flush the manifest, then the folder. run: the id of the run."""
    files = {}
    for file in sorted(_files(folder)):
        if file.name != MANIFEST:
            flush(file)
            files[file.relative_to(folder).as_posix()] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    write_json(folder / MANIFEST, {"format": 1, "run": run, "files": files})
    flush(folder / MANIFEST)
    flush(folder)


def run_of(checkpoint: Path) -> str | None:
    """The id of the run that wrote a checkpoint; None where its manifest does not say."""
    try:
        manifest = read_json(checkpoint / MANIFEST)
    except (OSError, ValueError, RecursionError):
        return None
    run = manifest.get("run") if isinstance(manifest, dict) else None
    return run if isinstance(run, str) else None


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None: its manifest and every file's size and hash are compared."""
    if not checkpoint.is_dir():
        return "there is no such folder"
    try:
        manifest = read_json(checkpoint / MANIFEST)
        files = {str(name): (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{MANIFEST} is missing or damaged"
    for name, (size, digest) in files.items():
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            return f"{MANIFEST} names {name!r}, which is not in the folder"
        file = checkpoint / name
        try:
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != size or sha256(file) != digest:
                return f"{name} is not what was written"
        except (OSError, ValueError):
            return f"{name!r} cannot be read"
    return None


# ---- files -----------------------------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """Numbers, texts, lists and mappings only; a tensor of one number as that number."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (torch.Tensor, np.generic)):
        return value.item()
    return value


def write_json(file: Path, value: Any) -> None:
    """`value` as indented JSON."""
    file.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def replace_text(file: Path, text: str) -> None:
    """Write a small file whole or not at all: beside, flushed, renamed."""
    beside = file.with_name(f".{file.name}.partial")
    beside.write_text(text, encoding="utf-8")
    flush(beside)
    os.replace(beside, file)


def read_json(file: Path) -> Any:
    """The value of a JSON file. Raises OSError or ValueError."""
    return json.loads(file.read_text(encoding="utf-8"))


def flush(path: Path) -> None:
    """Make the system write a file, or a folder's list of names, to the disk."""
    if path.is_dir() and os.name != "posix":  # Windows cannot open a folder
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(file: Path) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with open(file, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    return (p for p in folder.rglob("*") if p.is_file())
