"""The fused RMSNorm equals the models' own, forward and backward, and leaves alone what it does not cover."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from espalier.model.fast_norm import FastNorm, fast_norms, stock_norms

WIDTH = 48


def norm(kind: type[nn.Module] = LlamaRMSNorm, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    module = kind(WIDTH, 1e-5).requires_grad_(False)
    module.weight.copy_(torch.randn(WIDTH) * 0.3 + 1)
    return module.to(dtype)


def compute(module: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    x = (torch.randn(*shape, WIDTH) * 3 + 0.5).to(dtype).requires_grad_(True)
    grad = torch.randn(*shape, WIDTH).to(dtype)
    y = module(x)
    y.backward(grad)
    assert x.grad is not None
    return y.detach(), x.grad


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Qwen3RMSNorm, Olmo2RMSNorm])
@pytest.mark.parametrize("shape", [(1, 7), (2, 3, 4), (1,)])
def test_fast_norm_matches_stock(kind: type[nn.Module], shape: tuple[int, ...]) -> None:
    module = norm(kind)
    expected = compute(module, shape, torch.float32)
    assert fast_norms(module) == (1, 0)
    found = compute(module, shape, torch.float32)
    for one, other in zip(found, expected, strict=True):
        assert relative(one, other) <= 1e-6
    # In bfloat16, as near to the exact result as the stock norm is.
    narrow = norm(kind, torch.bfloat16)
    stock = compute(narrow, shape, torch.bfloat16)
    exact = compute(norm(kind, torch.bfloat16).double(), shape, torch.float64)
    fast_norms(narrow)
    ours = compute(narrow, shape, torch.bfloat16)
    for one, other, truth in zip(ours, stock, exact, strict=True):
        assert one.dtype == torch.bfloat16
        assert relative(one, truth) <= max(1.3 * relative(other, truth), 4e-3)


def test_other_formulas_keep_their_own_forward() -> None:
    module = norm(GemmaRMSNorm)
    assert fast_norms(module) == (0, 1)
    assert type(module) is GemmaRMSNorm


def test_a_trained_weight_keeps_its_gradient() -> None:
    module = norm().requires_grad_(True)
    assert fast_norms(module) == (0, 1)
    frozen = norm()
    fast_norms(frozen)
    frozen.requires_grad_(True)  # afterwards: the module asks at every call
    compute(frozen, (1, 3), torch.float32)
    assert frozen.weight.grad is not None


def test_stock_norms_takes_it_back() -> None:
    model = nn.Sequential(norm(), nn.Linear(WIDTH, WIDTH), norm(Qwen3RMSNorm))
    state = list(model.state_dict())
    assert fast_norms(model) == (2, 0)
    assert fast_norms(model) == (2, 0)
    assert isinstance(model[0], FastNorm)
    assert isinstance(model[0], LlamaRMSNorm)
    assert type(model[0]).__name__ == "LlamaRMSNorm"
    stock_norms(model)
    assert [type(module) for module in model] == [LlamaRMSNorm, nn.Linear, Qwen3RMSNorm]
    assert list(model.state_dict()) == state


def test_other_dtypes_go_through_the_stock_forward() -> None:
    module = norm()
    expected = module(torch.ones(1, 2, WIDTH, dtype=torch.bfloat16))
    fast_norms(module)
    found = module(torch.ones(1, 2, WIDTH, dtype=torch.bfloat16))
    assert found.dtype == expected.dtype == torch.float32
    assert torch.equal(found, expected)
