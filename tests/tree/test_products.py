"""The backward by plain products equals torch's kernel and autograd, over trees of all shapes."""

from __future__ import annotations

import pytest
import torch

from espalier.tree import products
from espalier.tree.attention import _Merged, merged_attention, reference_attention, tree_marker
from espalier.tree.collate import to_tensors
from espalier.tree.plan import plan_step
from espalier.tree.products import product_backward, product_plan


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def layout_of(rows: list[list[int]]):
    import numpy as np

    from espalier.encode.encode import Encoded

    encoded = []
    for row in rows:
        ids = np.array(row, np.int32)
        labels = ids.copy()
        labels[0] = -100
        encoded.append(Encoded(ids, labels))
    (pack,) = plan_step(encoded, max_tokens=10_000, min_shared_tokens=1).packs
    return to_tensors(pack).layout


def tree_of(kind: str):
    shared = list(range(10, 50))
    branch = [*shared, *range(60, 75)]
    return {
        "flat": lambda: layout_of([[1, *range(5, 40)]]),
        "leaves": lambda: layout_of([[*shared, 100 + i, *range(200, 203 + 4 * i)] for i in range(6)]),
        "nested": lambda: layout_of(
            [[*branch, 100 + i, *range(200, 205 + 3 * i)] for i in range(4)]
            + [[*shared, 120 + i, *range(300, 304 + 9 * i)] for i in range(3)]
            + [[7, 8, 9, *range(400, 420)]]
        ),
    }[kind]()


def gradients(attention, layout, tensors, grad):
    leaves = [tensor.clone().requires_grad_(True) for tensor in tensors]
    output = attention(*leaves)
    return output, torch.autograd.grad(output, leaves, grad, retain_graph=True)


@pytest.mark.parametrize("kind", ["flat", "leaves", "nested"])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("small", [False, True])
def test_products_match_kernel(kind: str, heads: int, groups: int, small: bool, monkeypatch) -> None:
    if small:  # many blocks and many chunks of queries
        monkeypatch.setattr(products, "BLOCK", 7)
        monkeypatch.setattr(products, "ROWS", 5)
    layout = tree_of(kind)
    torch.manual_seed(0)
    tokens, width, scale = layout.num_tokens, 16, 0.3
    query = torch.randn(1, heads, tokens, width, dtype=torch.float64) * 2
    key, value = (torch.randn(1, groups, tokens, width, dtype=torch.float64) for _ in range(2))
    grad = torch.randn(1, tokens, heads, width, dtype=torch.float64)
    output, expected = gradients(
        lambda q, k, v: _Merged.apply(q, k, v, layout, scale), layout, (query, key, value), grad
    )
    saved = output.grad_fn.saved_tensors
    plan = product_plan([segment[:3] for segment in layout.segments()], tokens)
    covered = torch.cat([places.flatten() for places in plan.triangles])
    assert sorted(covered[covered < tokens].tolist()) == list(range(tokens))
    if small:
        assert len(plan.rectangles) > len(layout.start)
    found = product_backward(plan, grad.transpose(1, 2), *saved[:3], saved[3].transpose(1, 2), saved[4], scale)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", ["flat", "leaves", "nested"])
@pytest.mark.parametrize("spread", [1.0, 6.0])  # 6: scores of about +-40, a few places take all the weight
def test_products_match_reference_in_16_bits(kind: str, spread: float) -> None:
    layout = tree_of(kind)
    torch.manual_seed(1)
    tokens = layout.num_tokens
    query = (torch.randn(1, 6, tokens, 32) * spread).bfloat16()
    key, value = (torch.randn(1, 2, tokens, 32).bfloat16() for _ in range(2))
    grad = torch.randn(1, tokens, 6, 32).bfloat16()
    module = torch.nn.Identity()
    tensors = (query, key, value)
    _, exact = gradients(
        lambda q, k, v: reference_attention(module, q, k, v, layout.causal_mask)[0],
        layout,
        [tensor.double() for tensor in tensors],
        grad.double(),
    )
    _, kernel = gradients(
        lambda q, k, v: reference_attention(module, q, k, v, layout.causal_mask)[0], layout, tensors, grad
    )
    _, found = gradients(
        lambda q, k, v: merged_attention(module, q, k, v, tree_marker(layout))[0], layout, tensors, grad
    )
    for one, stock, other in zip(found, kernel, exact, strict=True):
        assert one.dtype == torch.bfloat16
        assert relative(one, other) <= max(0.012, 2 * relative(stock, other))


def test_a_place_that_is_no_token_takes_part_in_nothing() -> None:
    """Two leaves of unlike length share a batch: what fills the shorter one up leaves no trace, whatever the scores."""
    layout = layout_of([[*range(10, 30), 100, *range(200, 212)], [*range(10, 30), 101, *range(200, 216)]])
    plan = product_plan([segment[:3] for segment in layout.segments()], layout.num_tokens)
    assert any(int((places == layout.num_tokens).sum()) for places in plan.triangles)
    tokens = layout.num_tokens
    shape = (1, 2, tokens, 8)
    query, key, value = torch.full(shape, 30.0), torch.full(shape, -30.0), torch.ones(shape)
    grad = torch.ones(1, tokens, 2, 8)
    module = torch.nn.Identity()
    _, found = gradients(
        lambda q, k, v: merged_attention(module, q, k, v, tree_marker(layout))[0],
        layout,
        [tensor.bfloat16() for tensor in (query, key, value)],
        grad.bfloat16(),
    )
    assert all(bool(tensor.isfinite().all()) for tensor in found)
    # All scores are equal, so every key gets an equal share of each query that sees it, and no score has a gradient.
    assert float(found[0].abs().max()) == float(found[1].abs().max()) == 0.0
    ancestry = layout.ancestry.double()
    expected = (ancestry / ancestry.sum(1, keepdim=True)).sum(0)
    torch.testing.assert_close(found[2][0, 0, :, 0].double(), expected, rtol=1e-2, atol=1e-3)
