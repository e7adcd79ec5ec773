"""4- and 8-bit bases: what is loaded, the fast form against PEFT's forward, the tree against plain rows."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from espalier.config import RunConfig
from espalier.errors import UsageError
from espalier.model.fast_lora import Counts, fast_lora, peft_lora
from espalier.model.fingerprint import RECORDED, base_fingerprint
from espalier.model.load import load_model
from espalier.model.lora import add_adapter, describe_adapter, lora_config
from espalier.model.quantized import INSTALL, check_quantization, is_packed, keep_trainable, num_weights, unpacked
from espalier.tree.collate import to_tensors
from espalier.tree.loss import plain_loss, tree_loss
from espalier.tree.plan import plan_step
from model.test_fast_lora import IN, OUT, TOKENS, OneLayer, by_both, compute, distances, inputs, model_results
from parity.models import tree_rows

bnb = pytest.importorskip("bitsandbytes")
KINDS = ("nf4", "int8")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def packed_layer(kind: str, dtype: torch.dtype, device: str = "cpu", bias: bool = True, **lora: Any) -> Any:
    """A packed base layer with an adapter whose B is not zero, in training mode, with PEFT's forward."""
    torch.manual_seed(0)
    full = nn.Linear(IN, OUT, bias=bias).to(dtype)
    if kind == "nf4":
        base = bnb.nn.Linear4bit(IN, OUT, bias, compute_dtype=dtype, compress_statistics=True, quant_type="nf4")
    else:
        base = bnb.nn.Linear8bitLt(IN, OUT, bias, has_fp16_weights=False, threshold=6.0)
    base.weight = type(base.weight)(full.weight.data, requires_grad=False, **_how(kind))
    if bias:
        base.bias = nn.Parameter(full.bias.data, requires_grad=False)
    model: Any = OneLayer(base.to(device))
    keep_trainable(model)
    setattr(model, "is_loaded_in_4bit" if kind == "nf4" else "is_loaded_in_8bit", True)
    config = LoraConfig(**{"r": 4, "target_modules": ["proj"], "init_lora_weights": False, **lora})
    return get_peft_model(model, config).train()


def _how(kind: str) -> dict[str, Any]:
    return {"quant_type": "nf4", "compress_statistics": True} if kind == "nf4" else {"has_fp16_weights": False}


def plain_twin(model: Any, dtype: torch.dtype) -> Any:
    """The same with nn.Linear that holds the unpacked weight, all in `dtype`."""
    layer = model.base_model.model.proj
    base = layer.base_layer
    full = nn.Linear(IN, OUT, bias=base.bias is not None, device=base.weight.device, dtype=dtype)
    full.weight.data = unpacked(base, torch.float32).to(dtype)
    if base.bias is not None:
        full.bias.data = base.bias.data.to(dtype)
    config = copy.deepcopy(model.peft_config["default"])
    twin = get_peft_model(OneLayer(full), config)
    twin.base_model.model.proj.lora_A.load_state_dict(layer.lora_A.state_dict())
    twin.base_model.model.proj.lora_B.load_state_dict(layer.lora_B.state_dict())
    return twin.to(dtype).train()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lora", [{}, {"use_rslora": True}, {"lora_dropout": 0.4}, {"bias": False}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_fast_lora_matches_peft_on_packed_layers(kind: str, lora: dict[str, Any], device: str) -> None:
    settings = dict(lora)
    model = packed_layer(kind, torch.float32, device, bias=settings.pop("bias", True), **settings)
    x, grad = (t.to(device) for t in inputs(2, TOKENS // 2))
    expected, found = by_both(model, lambda: compute(model, x, grad))
    assert found.keys() == {"y", "x", "lora_A", "lora_B"}
    assert max(distances(found, expected).values()) <= 1e-6
    if not settings.get("lora_dropout"):
        plain = compute(plain_twin(model, torch.float32), x, grad)
        assert max(distances(found, {name: plain[name] for name in found}).values()) <= 1e-6


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_fast_lora_matches_peft_on_packed_layers_in_bf16(kind: str, device: str) -> None:
    """Both against float64 with the weights that are unpacked: no further off than 1.5 times PEFT's forward."""
    model = packed_layer(kind, torch.bfloat16, device)
    x, grad = (t.to(device) for t in inputs(TOKENS, dtype=torch.bfloat16))
    peft, fast = by_both(model, lambda: compute(model, x, grad))
    exact = compute(plain_twin(model, torch.float64), x.double(), grad.double())
    reference = {name: exact[name] for name in peft}
    far_peft, far_fast = distances(peft, reference), distances(fast, reference)
    for name in ("y", "x"):
        assert fast[name].dtype == torch.bfloat16
        assert far_fast[name] <= 1.5 * far_peft[name], name
    for name in ("lora_A", "lora_B"):
        assert far_fast[name] <= torch.finfo(torch.bfloat16).eps, name


@pytest.mark.parametrize("kind", KINDS)
def test_fast_lora_matches_peft_on_packed_layers_under_autocast(kind: str) -> None:
    model = packed_layer(kind, torch.float32)
    x, grad = inputs(TOKENS)
    fast_lora(model)
    with torch.autocast("cpu", torch.bfloat16):
        found = compute(model, x, grad)
    assert (found["y"].dtype, found["x"].dtype) == (torch.bfloat16, torch.float32)
    exact = compute(plain_twin(model, torch.float64), x.double(), grad.double())
    assert max(distances(found, {name: exact[name] for name in found}).values()) <= 2e-2


@pytest.mark.parametrize("kind", KINDS)
def test_fast_lora_matches_peft_on_packed_layers_with_recomputation(kind: str) -> None:
    model = packed_layer(kind, torch.float32, lora_dropout=0.4)
    x, grad = inputs(TOKENS)
    expected = compute(model, x, grad)
    fast_lora(model)
    found = compute(model, x, grad, lambda m, x: checkpoint(m, x, use_reentrant=False))
    assert max(distances(found, expected).values()) <= 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_no_unpacked_weight_is_kept(kind: str) -> None:
    saved: list[tuple[int, ...]] = []
    model = packed_layer(kind, torch.bfloat16)
    fast_lora(model)
    x, _ = inputs(TOKENS, dtype=torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        model(x)
    assert saved == [(TOKENS, IN), (4, TOKENS), (4, IN), (OUT, 4)]


@pytest.mark.parametrize("forward", [fast_lora, peft_lora])
@pytest.mark.parametrize("kind", KINDS)
def test_an_evaluation_changes_no_later_gradient(kind: str, forward: Any) -> None:
    """bitsandbytes repacks 4-bit weights in evaluation mode on some CPUs, and gradients end there."""
    model = packed_layer(kind, torch.bfloat16)
    forward(model)
    x, grad = inputs(TOKENS, dtype=torch.bfloat16)
    before = compute(model, x, grad)
    model.eval()
    with torch.no_grad():
        model(x)
        with model.disable_adapter():
            model(x)
    model.train()
    after = compute(model, x, grad)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert float(after["x"].float().norm()) > 0


def test_8_bit_results_of_a_token_do_not_depend_on_the_others() -> None:
    model = packed_layer("int8", torch.float32)
    x, _ = inputs(TOKENS)
    other = x.clone()
    other[1:] *= 100.0
    assert torch.allclose(model(x)[0], model(other)[0], atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_dora_on_packed_layers_is_peft_s(kind: str) -> None:
    model = packed_layer(kind, torch.float32, use_dora=True)
    assert fast_lora(model) == Counts(0, 1, {"DoRA": 1})
    x, grad = inputs(TOKENS)
    assert "lora_magnitude_vector" in {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad}
    assert compute(model, x, grad)["lora_B"].norm() > 0


@pytest.fixture(params=KINDS)
def packed_model(request: pytest.FixtureRequest, tiny_llama_dir: Path) -> Any:
    return load_model(tiny_llama_dir, device="cpu", dtype=torch.float32, quantization=request.param)


def test_a_packed_base_is_the_same_base(packed_model: Any, tiny_llama_dir: Path) -> None:
    full = load_model(tiny_llama_dir, device="cpu", dtype=torch.float32)
    linear = [name for name, module in packed_model.named_modules() if is_packed(module)]
    assert len(linear) == 14
    assert type(packed_model.lm_head) is nn.Linear
    assert packed_model.model.embed_tokens.weight.dtype == packed_model.lm_head.weight.dtype == torch.float32
    assert getattr(packed_model, RECORDED) == base_fingerprint(packed_model) == base_fingerprint(full)
    for name in linear:
        unpacked_weight = unpacked(packed_model.get_submodule(name), torch.float32)
        weight = full.get_submodule(name).weight.detach()
        assert unpacked_weight.shape == weight.shape
        assert (
            0 < float((unpacked_weight - weight).norm() / weight.norm()) < 0.15
        )  # 0.4 with the scales of other blocks
    adapted = add_adapter(packed_model, lora_config(rank=4, alpha=8))
    assert base_fingerprint(adapted) == base_fingerprint(full)
    assert describe_adapter(adapted).num_base == sum(p.numel() for p in full.parameters())
    assert sum(map(num_weights, full.parameters())) == sum(p.numel() for p in full.parameters())


def test_tree_matches_plain_rows_on_a_packed_base(packed_model: Any) -> None:
    model: Any = add_adapter(packed_model, lora_config(rank=4, alpha=8, init_lora_weights="false"))
    assert fast_lora(model).peft == 0
    (pack,) = plan_step(tree_rows(), max_tokens=999, min_shared_tokens=2).packs
    tree = model_results(model, lambda: tree_loss(model, to_tensors(pack)))
    for forward in (fast_lora, peft_lora):
        forward(model)
        plain = model_results(model, lambda: plain_loss(model, tree_rows(), 0))
        assert len(plain) == 29
        floor = 1e-3 * max(float(value.norm()) for value in plain.values())
        for key, value in plain.items():
            assert float((tree[key] - value).norm()) <= 1e-5 * max(float(value.norm()), floor), key


def test_files_that_name_their_tensors_otherwise(tiny_llama_dir: Path, tmp_path: Path) -> None:
    """The fingerprint comes from the loaded model then."""
    full = load_model(tiny_llama_dir, device="cpu", dtype=torch.float32)
    (tmp_path / "config.json").write_bytes((tiny_llama_dir / "config.json").read_bytes())
    torch.save(full.state_dict(), tmp_path / "pytorch_model.bin")
    packed = load_model(tmp_path, device="cpu", dtype=torch.float32, quantization="nf4")
    assert base_fingerprint(packed) == base_fingerprint(full)


def test_what_does_not_go_with_it_is_refused_at_once() -> None:
    config = RunConfig(
        load_in_4bit=True, load_in_8bit=True, fp32=True, modules_to_save=["lm_head"], init_lora_weights="pissa_niter_4"
    )
    with pytest.raises(UsageError) as caught:
        check_quantization(config, object())
    assert [line.split(":")[0] for line in caught.value.details] == [
        "--load_in_4bit and --load_in_8bit",
        "--fp32",
        "--modules_to_save",
        "--init_lora_weights pissa_niter_4",
    ]
    assert check_quantization(RunConfig(fp32=True, modules_to_save=["lm_head"]), object()) is None
    assert check_quantization(RunConfig(load_in_8bit=True), object()) == "int8"


def test_a_stored_quantisation_is_not_done_again() -> None:
    class Stored:
        quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}  # noqa: RUF012

    assert check_quantization(RunConfig(), Stored()) is None
    with pytest.raises(UsageError, match="stored quantised already"):
        check_quantization(RunConfig(load_in_4bit=True), Stored())


def test_missing_bitsandbytes_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(UsageError, match="bitsandbytes is not installed") as caught:
        check_quantization(RunConfig(load_in_4bit=True), object())
    assert caught.value.todo == INSTALL
