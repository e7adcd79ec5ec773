"""Damaged and hostile input of every kind that is read: only our errors may come of it, in bounded time and memory.

`python tests/reliability/fuzz.py --inputs 100000` prints a count a kind; test_fuzz.py runs a shorter form. An input
is a good file with a few mutations: bytes flipped, cut, doubled, spliced from another file, words of the format put
in, and in JSON files values replaced by others of any kind. A failing input is kept in --keep.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import json
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zstandard

from espalier.errors import EspalierError

CASES = Path(__file__).parent.parent / "cases"
SECONDS_AN_INPUT = 10  # of this process's own time, so that a busy machine makes no failures
EXTRA_BYTES = 3 << 30  # address space above what the loaded libraries have
WORDS = [
    b"{", b"}", b"[", b"]", b'"', b",", b":", b"\\", b"\n", b"\r\n", b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"null",
    b"NaN", b"1e999", b"-1", b"9" * 400, b"[" * 3000, b'{"a":' * 3000, b"\\ud800", b"\xed\xa0\x80", b"'", b";", b"\t",
    b"instruction", b"output", b"messages", b"role", b"content", b"&a [*a]", b"!!python/object:os.system", b"---",
    b"PAR1", b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"|", b"#", b"  ", b"*", b"../../etc/passwd", b"{{", b"{%", b"%}", b"}}",
]  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**40, 0.5, -1e308, float("inf"), float("nan"), "", "x", "x" * 5000,
    "\ud800", "../../../etc/passwd", "/dev/zero", [], {}, [[]], [None], ["q_proj"], {"a": 1}, {"": None}, "LORA",
    "all-linear", "os.system", [0, 1], "(", [[0, 10**9]],
]  # fmt: skip


class TooSlow(BaseException):
    """An input took longer than SECONDS_AN_INPUT."""


# ---- mutations -------------------------------------------------------------------------------------------------------


def mutate_bytes(data: bytes, choice: random.Random, other: bytes) -> bytes:
    """One to eight small changes."""
    changed = bytearray(data)
    for _ in range(choice.randint(1, 8)):
        at, length = choice.randrange(len(changed) + 1), choice.choice([1, 1, 2, 8, 64, 512])
        kind = choice.randrange(7)
        if kind == 0 and changed:
            changed[at % len(changed)] ^= 1 << choice.randrange(8)
        elif kind == 1:
            del changed[at : at + length]
        elif kind == 2:
            changed[at:at] = changed[at : at + length]
        elif kind == 3:
            changed[at:at] = choice.choice(WORDS)
        elif kind == 4:
            start = choice.randrange(len(other) + 1)
            changed[at : at + length] = other[start : start + length]
        elif kind == 5:
            changed[at : at + length] = choice.randbytes(length)
        elif choice.random() < 0.3:
            del changed[at:]
    return bytes(changed)


def mutate_json(value: Any, choice: random.Random) -> Any:
    """Values anywhere in the tree replaced, removed, renamed or nested."""
    value = copy.deepcopy(value)
    for _ in range(choice.randint(1, 4)):
        holders = [node for node in _nodes(value) if isinstance(node, (dict, list)) and node]
        if not holders:
            return choice.choice(VALUES)
        holder = choice.choice(holders)
        key: Any = choice.choice(list(holder)) if isinstance(holder, dict) else choice.randrange(len(holder))
        kind = choice.randrange(4)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[choice.choice(["", "x", "__class__", str(key) + "s"])] = holder.pop(key)
        elif kind == 2:
            holder[key] = [holder[key]]
        else:
            holder[key] = copy.deepcopy(choice.choice(VALUES))
    return value


def _nodes(value: Any) -> list[Any]:
    children = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    return [value, *(node for child in children for node in _nodes(child))]


def mutate_json_bytes(data: bytes, choice: random.Random, other: bytes) -> bytes:
    """Half the time on the tree, else on the bytes."""
    if choice.random() < 0.5:
        return mutate_bytes(data, choice, other)
    return json.dumps(mutate_json(json.loads(data), choice)).encode("utf-8", "surrogatepass")


def mutate_safetensors(data: bytes, choice: random.Random, other: bytes) -> bytes:
    """The header's length, its JSON, or the bytes."""
    (length,) = struct.unpack("<Q", data[:8])
    header, body = data[8 : 8 + length], data[8 + length :]
    kind = choice.randrange(4)
    if kind == 0:
        wrong = choice.choice([0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1, choice.randrange(2**20)])
        return struct.pack("<Q", wrong) + header + body
    if kind == 1:
        return mutate_bytes(data, choice, other)
    header = mutate_json_bytes(header, choice, other)
    return struct.pack("<Q", len(header)) + header + body


# ---- what is read ----------------------------------------------------------------------------------------------------

Target = tuple[list[tuple[str, bytes]], Callable[[bytes, random.Random, bytes], bytes], Callable[[Path], Any]]


def data_files() -> Target:
    """Every kind of data file, through the reader that training and `check` use."""
    from espalier.data.formats import read_examples

    cases = [(p.name, p.read_bytes()) for p in sorted(CASES.glob("A*/*")) if p.suffix in SUFFIXES]
    lines = "".join(json.dumps({"instruction": f"say {n}", "output": f"{n} ü"}) + "\n" for n in range(6)).encode()
    chat = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 3
    seeds = [(name, data) for name, data in cases if 0 < len(data) < 1 << 16]
    seeds += [("a.jsonl", lines), ("b.json", json.dumps(chat).encode()), ("c.csv", b"prompt,completion\na,b\nc,d\n")]
    seeds += [("a.jsonl.gz", gzip.compress(lines)), ("a.jsonl.zst", zstandard.compress(lines))]

    def read(file: Path) -> None:
        read_examples([str(file)], on_bad_row="skip", notice=lambda text: None)

    return seeds, mutate_bytes, read


SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".tsv", ".txt", ".gz", ".zst")


def run_files() -> Target:
    """`--config`."""
    from espalier.config import RunConfig
    from espalier.runfile import build_config

    full = RunConfig(dataset_path=["a.jsonl"], output_dir="out", columns={"prompt": "q"}, max_steps=3, eval_steps=2)
    seeds = [("run.yaml", full.to_yaml().encode()), ("run.yaml", b"lora_rank: 8\nmax_steps: 3\n")]
    return seeds, mutate_bytes, lambda file: build_config({}, str(file))


def adapter_weights() -> Target:
    """The header and body of adapter_model.safetensors, as chat, merge and --continue_training read it."""
    from espalier.model.adapter_tensors import read_tensors

    seeds = [(p.name, p.read_bytes()) for p in sorted(CASES.rglob("adapter_model.safetensors"))]
    return [s for s in seeds if len(s[1]) < 1 << 17], mutate_safetensors, read_tensors


def model_weights() -> Target:
    """The headers of a base's weights and their index."""
    from espalier.model.load import check_weights

    index = {"metadata": {"total_size": 1}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    seeds = [("model.safetensors.index.json", json.dumps(index).encode())]
    seeds += [("model.safetensors", p.read_bytes()) for p in sorted(CASES.glob("_shared/tiny-*/model.safetensors"))]

    def mutate(data: bytes, choice: random.Random, other: bytes) -> bytes:
        return (mutate_json_bytes if data[:1] == b"{" else mutate_safetensors)(data, choice, other)

    return seeds, mutate, lambda file: check_weights(file.parent)


def adapter_folders() -> Target:
    """adapter_config.json beside sound weights, loaded onto the tiny model."""
    import torch

    from espalier.model.load import load_model
    from espalier.model.load_adapter import load_adapter

    good = CASES / "_shared" / "adapter-good"
    weights = (good / "adapter_model.safetensors").read_bytes()
    base = load_model(CASES / "_shared" / "tiny-llama", device="cpu", dtype=torch.float32)

    def load(file: Path) -> None:
        (file.parent / "adapter_model.safetensors").write_bytes(weights)
        load_adapter(copy.deepcopy(base), file.parent, notice=lambda text: None)

    return [("adapter_config.json", (good / "adapter_config.json").read_bytes())], mutate_json_bytes, load


def records() -> Target:
    """espalier.json beside an adapter."""
    import torch

    from espalier.model.fingerprint import base_fingerprint
    from espalier.model.load import load_model
    from espalier.model.load_adapter import check_base, recorded_base

    base = load_model(CASES / "_shared" / "tiny-llama", device="cpu", dtype=torch.float32)
    record = {"base": {"name": "tiny-llama", "fingerprint": base_fingerprint(base)}}

    def load(file: Path) -> None:
        (file.parent / "adapter_config.json").write_text("{}")
        recorded_base(file.parent)
        check_base(file.parent, base, notice=lambda text: None)

    return [("espalier.json", json.dumps(record).encode())], mutate_json_bytes, load


def checkpoints() -> Target:
    """A checkpoint's manifest and random states."""
    from espalier.training.checkpoint_files import (
        damage,
        load_random,
        plain_random,
        random_state,
        run_of,
        save_random,
        write_manifest,
    )

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_random([plain_random(random_state())], folder)
        write_manifest(folder, "run")
        seeds = [(p.name, p.read_bytes()) for p in sorted(folder.iterdir())]
        whole = dict(seeds)

    def mutate(data: bytes, choice: random.Random, other: bytes) -> bytes:
        return (mutate_json_bytes if data[:1] == b"{" else mutate_safetensors)(data, choice, other)

    def load(file: Path) -> None:
        for name, data in whole.items():
            if name != file.name:
                (file.parent / name).write_bytes(data)
        damage(file.parent)
        run_of(file.parent)
        load_random(file.parent)

    return seeds, mutate, load


def tokenizers() -> Target:
    """tokenizer.json, tokenizer_config.json, config.json and the template of a base."""
    from espalier.encode.template import resolve_template
    from espalier.model.load import check_causal_lm, load_config, load_tokenizer

    good = CASES / "_shared" / "tiny-llama"
    names = ("config.json", "tokenizer_config.json", "tokenizer.json")
    whole = {p.name: p.read_bytes() for p in good.iterdir() if p.suffix in (".json", ".jinja")}

    def load(file: Path) -> None:
        for name, data in whole.items():
            if name != file.name:
                (file.parent / name).write_bytes(data)
        check_causal_lm(load_config(file.parent))
        template = resolve_template(load_tokenizer(file.parent))
        template.render([{"role": "user", "content": "a"}], generation_prompt=True)

    return [(name, whole[name]) for name in names if name in whole], mutate_json_bytes, load


TARGETS: dict[str, tuple[Callable[[], Target], float]] = {  # kind -> (target, share of the inputs)
    "data files": (data_files, 0.35),
    "run files": (run_files, 0.15),
    "adapter weights": (adapter_weights, 0.20),
    "model weights": (model_weights, 0.10),
    "checkpoints": (checkpoints, 0.10),
    "records": (records, 0.05),
    "adapter folders": (adapter_folders, 0.04),
    "tokenizers": (tokenizers, 0.01),
}


# ---- the loop --------------------------------------------------------------------------------------------------------


def fuzz_kind(kind: str, inputs: int, seed: int, keep: Path | None) -> tuple[Counter[str], list[str]]:
    """(what came of the inputs: accepted or the class of our error; failures as tracebacks)."""
    make, _ = TARGETS[kind]
    seeds, mutate, read = make()
    assert seeds, kind
    choice = random.Random(f"{kind} {seed}")
    outcomes: Counter[str] = Counter()
    failures: list[str] = []
    folder = Path(tempfile.mkdtemp())
    for number in range(inputs):
        name, good = choice.choice(seeds)
        data = mutate(good, choice, choice.choice(seeds)[1])
        for left in folder.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        (folder / name).write_bytes(data)
        outcome = outcome_of(read, folder / name)
        outcomes[outcome.split("\n")[0]] += 1
        if "\n" in outcome:
            failures.append(f"{kind}, input {number}, {name}: {outcome}")
            if keep is not None:
                keep.mkdir(parents=True, exist_ok=True)
                (keep / f"{kind.replace(' ', '-')}-{number}-{name}").write_bytes(data)
    shutil.rmtree(folder)
    return outcomes, failures


def outcome_of(read: Callable[[Path], Any], file: Path) -> str:
    """'accepted', the class of our error, or a class with its traceback in further lines."""
    signal.setitimer(signal.ITIMER_PROF, SECONDS_AN_INPUT)
    try:
        read(file)
    except EspalierError as error:
        return type(error).__name__
    except BaseException as error:  # pyo3's panics are no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"{type(error).__name__}\n{traceback.format_exc(limit=-4)}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return "accepted"


def raise_too_slow(signum: int, frame: Any) -> None:
    raise TooSlow(f"longer than {SECONDS_AN_INPUT} s")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=list(TARGETS))
    parser.add_argument("--keep", type=Path, help="folder for failing inputs")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    import peft  # noqa: F401 (loaded before the limit is set)
    import transformers

    transformers.logging.set_verbosity_error()
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + EXTRA_BYTES, now + EXTRA_BYTES))
    signal.signal(signal.SIGPROF, raise_too_slow)
    total, failed = 0, 0
    for kind, (_, share) in TARGETS.items():
        if options.kind not in (None, kind):
            continue
        count = options.inputs if options.kind else max(1, round(options.inputs * share))
        started = time.monotonic()
        outcomes, failures = fuzz_kind(kind, count, options.seed, options.keep)
        total, failed = total + count, failed + len(failures)
        print(f"{kind}: {count} inputs in {time.monotonic() - started:.0f} s: {dict(outcomes)}", flush=True)
        for name, number in Counter(text.split("\n")[0].split(": ")[-1] for text in failures).items():
            print(f"  {number} x {name}")
        for text in failures[:20]:
            print("  " + text.replace("\n", "\n    "), flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{total} inputs, {failed} failures, peak memory {peak:.0f} MB")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
