"""The fast form of a LoRA layer against PEFT's own forward: outputs and every gradient."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from espalier.model.fast_lora import Counts, FastLinear, fast_lora, peft_lora
from espalier.tree.collate import to_tensors
from espalier.tree.loss import plain_loss, tree_loss
from espalier.tree.plan import plan_step
from parity.models import TREE_MODELS, tiny_config, tiny_model, tree_rows

Results = dict[str, torch.Tensor]
TOKENS, IN, OUT = 70, 48, 80


class OneLayer(nn.Module):
    def __init__(self, proj: nn.Module):
        super().__init__()
        self.proj = proj

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x)


def one_layer(*, bias: bool = False, conv1d: bool = False, dtype: torch.dtype = torch.float32, **lora: Any) -> Any:
    """A base layer with an adapter whose B is not zero, in training mode, with PEFT's forward; A and B are float32."""
    torch.manual_seed(0)
    base = Conv1D(OUT, IN) if conv1d else nn.Linear(IN, OUT, bias=bias)
    with torch.no_grad():
        base.weight.normal_(0.0, IN**-0.5)
        if base.bias is not None:
            base.bias.normal_()
    config = LoraConfig(**{"r": 4, "target_modules": ["proj"], "init_lora_weights": False, **lora})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on Conv1D, PEFT says that it sets fan_in_fan_out
        return get_peft_model(OneLayer(base.to(dtype)), config).train()


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """An input and a gradient by the output."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(*shape, IN, generator=generator).to(dtype)
    return x, torch.randn(*shape, OUT, generator=generator).to(dtype)


def compute(model: nn.Module, x: torch.Tensor, grad: torch.Tensor, call: Callable[..., Any] | None = None) -> Results:
    """The output, the gradient by the input and by every trained parameter; the parameters' own are left clear."""
    x = x.detach().clone().requires_grad_()
    torch.manual_seed(5)
    y = call(model, x) if call else model(x)
    y.backward(grad.to(y.dtype))
    assert x.grad is not None
    found = {"y": y.detach(), "x": x.grad}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if parameter.grad is not None:
            assert parameter.grad.dtype == parameter.dtype
            found[name.split(".")[-3] if "lora_" in name else name] = parameter.grad
    model.zero_grad()
    return found


def distances(found: Results, expected: Results) -> dict[str, float]:
    """Norm of the difference relative to the expected one's."""
    assert found.keys() == expected.keys()
    return {
        name: float((found[name].double() - value.double()).norm() / value.double().norm())
        for name, value in expected.items()
    }


def by_both(model: nn.Module, run: Callable[[], Results]) -> tuple[Results, Results]:
    """(PEFT's results, ours), and the model is left with PEFT's forward."""
    expected = run()
    assert fast_lora(model).fast > 0
    found = run()
    peft_lora(model)
    return expected, found


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "lora_alpha": 5},
    "bias": {"bias": True},
    "conv1d": {"conv1d": True},
    "dropout": {"lora_dropout": 0.4},
    "dropout_conv1d": {"lora_dropout": 0.4, "conv1d": True},
    "rank_1": {"r": 1},
}


@pytest.mark.parametrize("shape", [(TOKENS,), (2, TOKENS // 2), (1, 1, 7)])
@pytest.mark.parametrize("kind", KINDS)
def test_fast_lora_matches_peft(kind: str, shape: tuple[int, ...]) -> None:
    model = one_layer(**KINDS[kind])
    x, grad = inputs(*shape)
    expected, found = by_both(model, lambda: compute(model, x, grad))
    assert found.keys() == {"y", "x", "lora_A", "lora_B"}
    assert max(distances(found, expected).values()) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_fast_lora_matches_peft_in_16_bits(kind: str, dtype: torch.dtype) -> None:
    """Both against float64 of the same 16-bit weights and inputs. What passes on to other layers is at most 1.5 times
    as far as PEFT's; the gradients of A and B, which PEFT takes in float32, are within the rounding of the dtype."""
    model = one_layer(dtype=dtype, **KINDS[kind])
    assert model.base_model.model.proj.lora_A.default.weight.dtype == torch.float32
    x, grad = inputs(TOKENS, dtype=dtype)
    peft, fast = by_both(model, lambda: compute(model, x, grad))
    reference = compute(copy.deepcopy(model).double(), x.double(), grad.double())
    far_peft, far_fast = distances(peft, reference), distances(fast, reference)
    for name in ("y", "x"):
        assert fast[name].dtype == dtype
        assert far_fast[name] <= 1.5 * far_peft[name], name
    for name in ("lora_A", "lora_B"):
        assert far_fast[name] <= torch.finfo(dtype).eps, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fast_lora_matches_peft_under_autocast(dtype: torch.dtype) -> None:
    model = one_layer(bias=True)
    x, grad = inputs(TOKENS)

    def run() -> Results:
        with torch.autocast("cpu", dtype):
            return compute(model, x, grad)

    peft, fast = by_both(model, run)
    assert (fast["y"].dtype, fast["x"].dtype) == (peft["y"].dtype, peft["x"].dtype) == (dtype, torch.float32)
    reference = compute(copy.deepcopy(model).double(), x.double(), grad.double())
    far_peft, far_fast = distances(peft, reference), distances(fast, reference)
    assert all(far_fast[name] <= 1.5 * far_peft[name] for name in far_peft), (far_fast, far_peft)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_fast_lora_matches_peft_with_recomputation(dropout: float) -> None:
    model = one_layer(lora_dropout=dropout)
    x, grad = inputs(TOKENS)
    recomputed = lambda m, x: checkpoint(m, x, use_reentrant=False)  # noqa: E731
    expected = compute(model, x, grad)
    fast_lora(model)
    assert max(distances(compute(model, x, grad, recomputed), expected).values()) <= 1e-6


# The front end itself makes an instance of every autograd function, which PyTorch warns of.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0")
def test_fast_lora_matches_peft_compiled() -> None:
    """Traced whole, forward and backward, by the compiler's front end; its back end needs a C++ compiler."""
    model = one_layer(bias=True)
    x, grad = inputs(TOKENS)
    expected = compute(model, x, grad)
    fast_lora(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = compute(model, x, grad, lambda _, x: compiled(x))
    assert max(distances(found, expected).values()) <= 1e-6


def test_evaluation_and_no_grad() -> None:
    model = one_layer(lora_dropout=0.4).eval()
    x, _ = inputs(TOKENS)
    with torch.no_grad():
        expected = model(x)
        fast_lora(model)
        found = model(x)
    assert not found.requires_grad
    assert torch.allclose(found, expected, atol=1e-6)


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    model = one_layer()
    fast_lora(model)
    model.base_model.model.proj.lora_A.default.weight.requires_grad_(False)
    x, grad = inputs(TOKENS)  # the first layer's input has no gradient
    model(x).backward(grad)
    with_gradient = [name.split(".")[-3] for name, p in model.named_parameters() if p.grad is not None]
    assert with_gradient == ["lora_B"]


def test_keeps_only_the_input_and_the_low_rank_product() -> None:
    saved: list[torch.Size] = []
    model = one_layer(dtype=torch.bfloat16)
    fast_lora(model)
    x, _ = inputs(TOKENS, dtype=torch.bfloat16)

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(x)
    assert [tuple(shape) for shape in saved] == [(TOKENS, IN), (4, TOKENS), (OUT, IN), (4, IN), (OUT, 4)]


def test_two_runs_are_equal_to_the_bit() -> None:
    model = one_layer(lora_dropout=0.4, dtype=torch.bfloat16)
    fast_lora(model)
    x, grad = inputs(TOKENS, dtype=torch.bfloat16)
    first, second = compute(model, x, grad), compute(model, x, grad)
    assert all(torch.equal(first[name], second[name]) for name in first)


def spoil(model: Any, how: str) -> None:
    layer = model.base_model.model.proj
    if how in ("several", "other"):
        model.add_adapter("second", LoraConfig(r=2, target_modules=["proj"], init_lora_weights=False))
        model.base_model.set_adapter(["default", "second"] if how == "several" else ["second"])
    elif how == "merged":
        model.merge_adapter()
    elif how == "hook":
        layer.base_layer.register_forward_hook(lambda module, args, output: output * 2)
    elif how == "trained":
        layer.base_layer.bias.requires_grad_(True)


BY_PEFT: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "DoRA"),
    "bias_of_b": ({"lora_bias": True}, "a bias on lora_B"),
    "several": ({}, "several adapters at once"),
    "merged": ({}, "merged or switched off"),
    "hook": ({}, "hooks on its parts"),
    "trained": ({}, "the base layer is trained too"),
}


@pytest.mark.parametrize("kind", BY_PEFT)
def test_what_the_fast_form_does_not_cover_goes_through_peft(kind: str) -> None:
    lora, reason = BY_PEFT[kind]
    model = one_layer(bias=True, **lora)
    spoil(model, kind)
    x, grad = inputs(TOKENS)
    if kind == "merged":
        expected = model(x)
        assert fast_lora(model) == Counts(0, 1, {reason: 1})
        assert torch.equal(model(x), expected)
        return
    expected = compute(model, x, grad)
    assert fast_lora(model) == Counts(0, 1, {reason: 1})
    found = compute(model, x, grad)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_the_layer_decides_at_every_call() -> None:
    """Merging, switching off and switching adapters after `fast_lora`."""
    model = one_layer()
    base, adapted = model.base_model.model.proj.base_layer, model(inputs(TOKENS)[0])
    x, _ = inputs(TOKENS)
    fast_lora(model)
    with model.disable_adapter():
        assert torch.equal(model(x), base(x))
    model.merge_adapter()
    assert torch.equal(model(x), base(x))
    assert torch.allclose(model(x), adapted, atol=1e-5)
    model.unmerge_adapter()
    assert torch.allclose(model(x), adapted, atol=1e-5)
    spoil(model, "other")
    second = model(x)
    peft_lora(model)
    assert torch.allclose(second, model(x), atol=1e-5)
    assert not torch.allclose(second, adapted, atol=1e-2)


def test_rows_of_several_adapters_in_one_batch() -> None:
    model = one_layer()
    spoil(model, "other")
    model.eval()
    x, _ = inputs(3, 5)
    names = ["default", "second", "__base__"]
    expected = model(x, adapter_names=names)
    fast_lora(model)
    assert torch.equal(model(x, adapter_names=names), expected)


def test_other_modules_keep_their_class() -> None:
    """Embeddings, convolutions and linear layers of other types, which quantized bases are."""

    class Other(nn.Linear):
        pass

    base = nn.ModuleDict({"embed": nn.Embedding(9, 8), "conv": nn.Conv1d(8, 8, 1), "other": Other(8, 8)})
    base["linear"] = nn.Linear(8, 8)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["embed", "conv", "other", "linear"]))
    before = {name: type(module) for name, module in model.named_modules()}
    counts = fast_lora(model)
    assert counts == Counts(1, 3, {"Embedding": 1, "Conv1d": 1, "Other": 1})
    assert str(counts) == "own forward in 1 layers, PEFT's in 3 (Embedding x1, Conv1d x1, Other x1)"
    assert type(base.linear) is FastLinear
    assert str(peft_lora(model)) == "PEFT's forward in 4 layers"
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_names_weights_and_copies_are_as_before(tmp_path: Any) -> None:
    model = one_layer()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fast_lora(model)
    assert list(model.state_dict()) == list(before)
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(one_layer().unload(), str(tmp_path))
    assert type(again.base_model.model.proj) is Linear
    for name, value in again.state_dict().items():
        assert torch.equal(value, before[name]), name
    x, _ = inputs(TOKENS)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))
    twin.base_model.model.proj.lora_B.default.weight.data.zero_()
    assert not torch.equal(twin(x), model(x))
    merged = model.merge_and_unload()
    assert type(merged.proj) is nn.Linear


def model_results(model: PeftModel, run: Callable[[], Any]) -> Results:
    output = run()
    (output.loss_sum / output.num_supervised).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {"loss": output.loss_sum.detach(), **found}


@pytest.mark.parametrize("name", ["llama_grouped", "gpt2", "phi3", "qwen2"])
def test_fast_lora_matches_peft_over_a_model(name: str) -> None:
    """Through the tree's loss, with an adapter on the head too where it is a linear layer."""
    model = tiny_model(tiny_config(*TREE_MODELS[name]), head=name != "gpt2")
    (pack,) = plan_step(tree_rows(), max_tokens=999, min_shared_tokens=2).packs
    tensors = to_tensors(pack)
    expected, found = by_both(model, lambda: model_results(model, lambda: tree_loss(model, tensors)))
    assert len(found) > 8
    floor = 1e-3 * max(float(value.norm()) for value in expected.values())
    for key, value in expected.items():
        assert float((found[key] - value).norm()) <= 1e-5 * max(float(value.norm()), floor), key
    expected, found = by_both(model, lambda: model_results(model, lambda: plain_loss(model, tree_rows(), 0)))
    assert float(found["loss"]) == pytest.approx(float(expected["loss"]), rel=1e-6)


@pytest.mark.parametrize("name", ["llama_grouped", "gpt2", "phi3", "qwen2"])
def test_fast_lora_matches_peft_over_a_model_in_bf16(name: str) -> None:
    """Against float32: the whole gradient is no further off than 1.5 times PEFT's."""
    model = tiny_model(tiny_config(*TREE_MODELS[name]))
    (pack,) = plan_step(tree_rows(), max_tokens=999, min_shared_tokens=2).packs
    tensors = to_tensors(pack)
    for parameter in model.parameters():  # what bf16 holds, in float32
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16().float()
    reference = model_results(model, lambda: tree_loss(model, tensors))
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    peft, fast = by_both(model, lambda: model_results(model, lambda: tree_loss(model, tensors)))

    def distance(found: Results) -> float:
        names = [key for key in reference if key != "loss"]
        squares = sum(float((found[key] - reference[key]).square().sum()) for key in names)
        return (squares / sum(float(reference[key].square().sum()) for key in names)) ** 0.5

    assert 0 < distance(fast) <= 1.5 * distance(peft) < 0.2
