"""The base's fingerprint: the same for every dtype and wrap, another for other weights."""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch

from espalier.model.fingerprint import base_fingerprint, fingerprint_difference
from espalier.model.load import load_model
from espalier.model.load_adapter import load_adapter


def test_same_for_every_dtype(shared: Path) -> None:
    for name in ("tiny-llama", "tiny-llama-bf16"):
        prints = [
            base_fingerprint(load_model(shared / name, device="cpu", dtype=dtype))
            for dtype in (torch.float32, torch.bfloat16)
        ]
        assert prints[0] == prints[1] == base_fingerprint(shared / name)


def test_float16_rounds_otherwise_and_is_still_the_same_base(tiny_llama_dir: Path) -> None:
    half = base_fingerprint(load_model(tiny_llama_dir, device="cpu", dtype=torch.float16))
    full = base_fingerprint(tiny_llama_dir)
    assert half["weights"] != full["weights"]
    assert fingerprint_difference(full, half) is None
    assert fingerprint_difference(half, full) is None


def test_other_weights_of_the_same_shape(shared: Path) -> None:
    one, other = base_fingerprint(shared / "tiny-llama"), base_fingerprint(shared / "tiny-llama-other")
    assert one["architecture"] == other["architecture"]
    difference = fingerprint_difference(one, other)
    assert difference is not None
    assert difference.startswith("same shape, other weights")


def test_other_shape_is_named(shared: Path) -> None:
    one, other = base_fingerprint(shared / "tiny-llama"), base_fingerprint(shared / "tiny-phi3")
    assert fingerprint_difference(one, other) == "model_type is phi3, it was llama"


def test_adapter_around_the_base_changes_nothing(tiny_llama_dir: Path, adapter_good_dir: Path) -> None:
    model = load_model(tiny_llama_dir, device="cpu", dtype=torch.float32)
    before = base_fingerprint(model)
    assert base_fingerprint(load_adapter(model, adapter_good_dir)) == before
    assert json.loads(json.dumps(before)) == before


def test_one_changed_tensor_is_seen(tiny_llama_dir: Path) -> None:
    model = load_model(tiny_llama_dir, device="cpu", dtype=torch.float32)
    before = base_fingerprint(model)
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight").mul_(1.1)
    assert fingerprint_difference(before, base_fingerprint(model)) is not None


def test_quick_on_the_embedded_model(smollm2_dir: Path) -> None:
    model = load_model(smollm2_dir, device="cpu", dtype=torch.bfloat16)
    start = time.process_time()
    found = base_fingerprint(model)
    assert time.process_time() - start < 2  # about 0.1 s on an idle machine
    assert found["num_parameters"] == 134_515_008
    assert len(found["sample"]) <= 256
