"""Checkpoints: complete or invisible, read back, resumed exactly. safetensors and JSON only.

    checkpoint-<step>/
      adapter_model.safetensors, adapter_config.json   a PEFT folder, usable as it is
      optimizer.safetensors, optimizer.json            tensors by "<parameter>.<key>", everything else as JSON
      scheduler.json, scaler.json, random.safetensors, random.json
      trainer_state.json                               HF's TrainerState: step, epoch, log so far
      progress.json                                    the log line in the making
      manifest.json                                    size and sha256 of every file; written last

A checkpoint is written into a hidden folder beside, flushed to disk and renamed. One without a manifest that fits is
never picked, and is named.
"""

from __future__ import annotations

import hashlib
import json
import os
import random as python_random
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers.trainer_callback import ExportableState, TrainerState

from espalier.errors import CheckpointError, RunFolderError

if TYPE_CHECKING:
    from torch import nn

    from espalier.training.trainer import LoraTrainer

MANIFEST = "manifest.json"
STATE = "trainer_state.json"


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
        state["cuda"] = torch.cuda.get_rng_state_all()
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
        torch.cuda.set_rng_state_all(list(state["cuda"]))


class CheckpointKeeper:
    """Writes, counts, checks and reads the checkpoints of one run folder.

    keep: how many to keep besides the best (None: all). companions: small files of the run folder that every
    checkpoint gets a copy of (tokenizer, template, run file), so that it can be used by itself.
    """

    def __init__(self, folder: Path, *, keep: int | None = None):
        self.folder, self.keep = folder, keep
        self.companions: tuple[str, ...] = ()

    def path(self, step: int) -> Path:
        """Where the checkpoint of `step` lies."""
        return self.folder / f"checkpoint-{step}"

    def all(self) -> list[Path]:
        """Folders that look like checkpoints of this run, oldest first; a manifest must be there."""
        found = [p for p in self.folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
        return sorted((p for p in found if (p / MANIFEST).is_file()), key=lambda p: int(p.name.split("-")[1]))

    def newest(self) -> Path | None:
        """The newest complete checkpoint by its manifest, without reading it whole."""
        return next(reversed(self.all()), None)

    # ---- writing -------------------------------------------------------------------------------------------------

    def save(self, trainer: LoraTrainer, random: Mapping[str, Any] | None = None) -> Path:
        """Write the checkpoint of the trainer's step. random: the state to go on with, if not the present one.

        Raises OSError when the disk does not take it; nothing is left behind then, and older ones are untouched.
        """
        step = trainer.state.global_step
        target, partial = self.path(step), self.folder / f".checkpoint-{step}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            self.save_adapter(trainer.model, partial)
            for name in self.companions:
                if (self.folder / name).is_file():
                    shutil.copy2(self.folder / name, partial / name)
            _save_optimizer(trainer.optimizer, partial)
            _write_json(partial / "scheduler.json", _plain(_scheduler(trainer).state_dict()))
            if trainer.accelerator.scaler is not None:
                _write_json(partial / "scaler.json", _plain(trainer.accelerator.scaler.state_dict()))
            _save_random(random if random is not None else random_state(), partial)
            _write_json(partial / "progress.json", trainer.progress())
            _export_callbacks(trainer)
            trainer.state.save_to_json(str(partial / STATE))
            _write_manifest(partial)
            if target.exists():
                shutil.rmtree(target)
            os.rename(partial, target)
            _flush_folder(self.folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        self._forget(trainer.state)
        return target

    def save_adapter(self, model: nn.Module, folder: Path, tokenizer: Any = None) -> None:
        """The adapter in PEFT's form, checked after writing; the tokenizer beside it."""
        from espalier.training.readback import read_back

        folder.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(str(folder), save_embedding_layers=False)  # type: ignore[operator]
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty form of a model card
        os.chmod(folder / "adapter_model.safetensors", 0o666 & ~_umask())  # safetensors leaves it to the owner alone
        read_back(model, folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(folder))

    def _forget(self, state: TrainerState) -> None:
        """Delete what --save_total_limit no longer keeps: never the newest, never the best, nothing of other runs."""
        if self.keep is None:
            return
        others = [p for p in self.all() if str(p) != str(state.best_model_checkpoint)]
        for old in others[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)

    # ---- reading -------------------------------------------------------------------------------------------------

    def find(self, wanted: str, say: Any = None) -> Path:
        """The checkpoint that --resume_from_checkpoint means: a folder, or 'last' for the newest whole one.

        Damaged ones are named through `say` and passed over. Raises CheckpointError where none is left.
        """
        if wanted.lower() not in ("last", "true"):
            folder = Path(wanted)
            problem = damage(folder)
            if problem:
                raise CheckpointError(
                    f"this is no whole checkpoint: {problem}",
                    where=str(folder),
                    todo="`--resume_from_checkpoint last` takes the newest whole one of the run.",
                )
            return folder
        for folder in reversed(self.all()):
            problem = damage(folder)
            if not problem:
                return folder
            if say is not None:
                say(f"{folder} is passed over: {problem}")
        raise CheckpointError(
            "there is no whole checkpoint to resume from",
            where=str(self.folder),
            todo="Start the run anew, without --resume_from_checkpoint.",
        )

    def load_adapter(self, model: nn.Module, checkpoint: Path) -> None:
        """Copy the checkpoint's adapter into the live one, tensor by tensor. Raises CheckpointError if they differ."""
        from peft import set_peft_model_state_dict
        from peft.utils import get_peft_model_state_dict

        stored = load_file(str(checkpoint / "adapter_model.safetensors"))
        live = get_peft_model_state_dict(model, save_embedding_layers=False)
        wrong = [k for k in {*stored, *live} if k not in stored or k not in live or stored[k].shape != live[k].shape]
        if wrong:
            raise CheckpointError(
                f"{len(wrong)} tensors of this adapter do not fit the model, {sorted(wrong)[0]} among them",
                where=str(checkpoint),
                todo="Resume with the rank and the target modules that the run was started with.",
            )
        set_peft_model_state_dict(model, stored)

    def load_optimizer(self, trainer: LoraTrainer, checkpoint: Path) -> None:
        """Optimizer and schedule as they were."""
        _load_optimizer(trainer.optimizer, checkpoint)
        _scheduler(trainer).load_state_dict(_read_json(checkpoint / "scheduler.json"))

    def load_scaler(self, trainer: LoraTrainer, checkpoint: Path) -> None:
        """The gradient scaler, where float16 has one."""
        if trainer.accelerator.scaler is not None and (checkpoint / "scaler.json").is_file():
            trainer.accelerator.scaler.load_state_dict(_read_json(checkpoint / "scaler.json"))

    def load_random(self, trainer: LoraTrainer, checkpoint: Path) -> None:
        """Random states and the log line in the making; the Trainer asks for this right before the first step."""
        set_random_state(_load_random(checkpoint))
        trainer.set_progress(_read_json(checkpoint / "progress.json"))


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None: its manifest and every file's size and hash are compared."""
    if not checkpoint.is_dir():
        return "there is no such folder"
    try:
        manifest = _read_json(checkpoint / MANIFEST)
        files = manifest["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST} is missing or damaged"
    for name, entry in files.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry["bytes"] or _sha256(file) != entry["sha256"]:
            return f"{name} is not what was written"
    return None


def step_of(checkpoint: Path) -> int:
    """The optimizer step after which a checkpoint was saved."""
    return int(_read_json(checkpoint / STATE)["global_step"])


def check_writable(folder: Path) -> None:
    """Raises RunFolderError where files cannot be created in `folder`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write-probe"
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise RunFolderError(
            f"this folder cannot be written to: {error.strerror or error}",
            where=str(folder),
            todo="Choose another --output_dir, or mend its permissions.",
        ) from error


# ---- parts of a checkpoint -------------------------------------------------------------------------------------------


def _save_optimizer(optimizer: Any, folder: Path) -> None:
    state = optimizer.state_dict()
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for index, values in state["state"].items():
        for key, value in values.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{key}"] = value.detach().cpu().contiguous()
            else:
                scalars.setdefault(str(index), {})[key] = value
    save_file(tensors, str(folder / "optimizer.safetensors"))
    _write_json(folder / "optimizer.json", {"param_groups": _plain(state["param_groups"]), "scalars": scalars})


def _load_optimizer(optimizer: Any, folder: Path) -> None:
    plain = _read_json(folder / "optimizer.json")
    state: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in plain["scalars"].items()}
    for name, tensor in load_file(str(folder / "optimizer.safetensors")).items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    groups = plain["param_groups"]
    for group, live in zip(groups, optimizer.state_dict()["param_groups"], strict=True):
        group.update({key: tuple(group[key]) for key, value in live.items() if isinstance(value, tuple)})
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _save_random(state: Mapping[str, Any], folder: Path) -> None:
    tensors = {"torch": state["torch"], "numpy.key": torch.from_numpy(state["numpy"]["key"].astype(np.int64))}
    tensors |= {f"cuda.{i}": s for i, s in enumerate(state.get("cuda", []))}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(folder / "random.safetensors"))
    numpy_rest = {name: value for name, value in state["numpy"].items() if name != "key"}
    _write_json(folder / "random.json", {"python": state["python"], "numpy": _plain(numpy_rest)})


def _load_random(folder: Path) -> dict[str, Any]:
    try:
        tensors = load_file(str(folder / "random.safetensors"))
        plain = _read_json(folder / "random.json")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"its random states cannot be read: {error}", where=str(folder)) from error
    state = {"python": plain["python"], "numpy": {**plain["numpy"], "key": tensors["numpy.key"].numpy()}}
    state["torch"] = tensors["torch"]
    cuda = [tensors[name] for name in sorted(tensors, key=lambda n: (len(n), n)) if name.startswith("cuda.")]
    return state | ({"cuda": cuda} if cuda else {})


def _scheduler(trainer: LoraTrainer) -> Any:
    assert trainer.lr_scheduler is not None, "there is a schedule once training has begun"
    return trainer.lr_scheduler


def _export_callbacks(trainer: LoraTrainer) -> None:
    """Put the callbacks' states (early stopping's counter) into the TrainerState, as HF's own saving does."""
    states: dict[str, Any] = {}
    for callback in [*trainer.callback_handler.callbacks, trainer.control]:
        if isinstance(callback, ExportableState):
            states.setdefault(type(callback).__name__, []).append(callback.state())
    trainer.state.stateful_callbacks = cast(Any, {k: v if len(v) > 1 else v[0] for k, v in states.items()})


def _write_manifest(folder: Path) -> None:
    """Flush every file to disk, then write and flush the manifest, then the folder."""
    files = {}
    for file in sorted(_files(folder)):
        with open(file, "rb+") as handle:
            os.fsync(handle.fileno())
        files[str(file.relative_to(folder))] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
    _write_json(folder / MANIFEST, {"format": 1, "files": files})
    with open(folder / MANIFEST, "rb+") as handle:
        os.fsync(handle.fileno())
    _flush_folder(folder)


def _files(folder: Path) -> Iterator[Path]:
    return (p for p in folder.rglob("*") if p.is_file())


def _umask() -> int:
    """The process's file mode mask; it can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _flush_folder(folder: Path) -> None:
    if os.name == "posix":  # Windows cannot open a folder
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """Numbers, texts, lists and mappings only; a tensor of one number as that number."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (torch.Tensor, np.generic)):
        return value.item()
    return value


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")


def _read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))
