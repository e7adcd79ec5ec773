"""The two attentions and the choice between them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from espalier.errors import ModelError, UsageError
from espalier.tree import attention as tree_attention
from espalier.tree.attention import choose_attention, merged_attention, reference_attention, set_attention, tree_marker
from espalier.tree.collate import TreeLayout, to_tensors
from espalier.tree.loss import base_of, tree_loss
from espalier.tree.plan import plan_step
from parity.models import TREE_MODELS, row, tiny_config, tiny_model, tree_rows


def layout_of(rows, **options) -> TreeLayout:
    (pack,) = plan_step(rows, max_tokens=10000, min_shared_tokens=1, **options).packs
    return to_tensors(pack).layout


def test_layout_of_a_small_tree() -> None:
    layout = layout_of([row([1, 2], [3, 9]), row([1, 2], [4, 9]), row([7], [8])])
    assert list(layout.segments()) == [(0, 2, 4, -1), (2, 3, 3, 0), (3, 4, 4, 0), (4, 5, 5, -1)]
    assert layout.ancestry.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [0, 0, 0, 0, 1],
    ]


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)],
)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
def test_merged_matches_reference(dtype, tolerance, heads) -> None:
    """Output and all three gradients against the dense mask in float64; long segments too, and three levels."""
    torch.manual_seed(0)
    system, branch = list(range(3, 60)), list(range(60, 300))
    rows = [row(system + branch, [number] * 9) for number in (1, 2)]
    rows += [row(system, [number] * length) for number, length in ((3, 300), (4, 5), (5, 1))]
    layout = layout_of(rows)
    assert len(layout.start) == 6
    wide = [
        torch.randn(1, layout.num_tokens, count, 16, dtype=torch.float64).transpose(1, 2)
        for count in (heads[0], heads[1], heads[1])
    ]
    upstream = torch.randn(1, layout.num_tokens, heads[0], 16, dtype=torch.float64)
    narrow = [tensor.to(dtype).requires_grad_() for tensor in wide]
    exact = [tensor.detach().double().requires_grad_() for tensor in narrow]
    module = torch.nn.Identity()
    expected, _ = reference_attention(module, *exact, layout.causal_mask)
    expected.backward(upstream.to(dtype).double())
    found, _ = merged_attention(module, *narrow, tree_marker(layout))
    assert found.dtype == dtype
    found.backward(upstream.to(dtype))
    pairs = [(found, expected), *((a.grad, b.grad) for a, b in zip(narrow, exact, strict=True))]
    for mine, other in pairs:
        assert float((mine.detach().double() - other.detach()).norm() / other.detach().norm()) < tolerance


def test_a_mask_that_lost_the_tree_is_an_error() -> None:
    layout = layout_of([row([1, 2], [3])])
    query = torch.zeros(1, 2, 2, 4)
    with pytest.raises(ModelError, match="which has lost the tree"):
        merged_attention(torch.nn.Identity(), query, query, query, tree_marker(layout).clone())


def test_merged_is_used_where_no_window_cuts_the_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 3's two layers: the sliding one takes the dense mask as soon as a path is longer than its window."""
    calls: list[torch.Size] = []
    stock = tree_attention._Merged.apply

    def spy(query, *rest):
        calls.append(query.shape)
        return stock(query, *rest)

    monkeypatch.setattr(tree_attention._Merged, "apply", spy)
    model = tiny_model(tiny_config(*TREE_MODELS["gemma3"]))
    for prompt, expected in ((8, 2), (30, 1)):
        calls.clear()
        rows = [row(list(range(3, 3 + prompt)), [number, number]) for number in (50, 51, 52)]
        (pack,) = plan_step(rows, max_tokens=999, min_shared_tokens=1).packs
        tree_loss(model, to_tensors(pack), attention="merged")
        assert len(calls) == expected


def test_without_a_tree_both_names_are_the_stock_attention() -> None:
    """Generation and plain rows go on while the model is set to one of ours."""
    for name in ("llama_grouped", "gemma2", "mistral_window"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny_config(*TREE_MODELS[name])).eval()
        ids = torch.arange(3, 43)[None]
        with torch.no_grad():
            expected = model(input_ids=ids).logits
            for ours in ("reference", "merged"):
                set_attention(model, ours)
                assert model.config._attn_implementation == f"espalier_{ours}"
                torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-6)
                stock = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
                assert stock.shape == (1, 44)
        set_attention(model, None)
        assert not model.config._attn_implementation.startswith("espalier")


def test_recomputation_in_backward_finds_the_tree() -> None:
    model = tiny_model(tiny_config(*TREE_MODELS["llama_grouped"]))
    (pack,) = plan_step(tree_rows(), max_tokens=999, min_shared_tokens=1).packs
    found = []
    for recompute in (False, True):
        if recompute:
            base = base_of(model)
            name = "activation_checkpointing_enable"  # since transformers 5.24; before, as below
            getattr(base, name if hasattr(base, name) else "gradient_checkpointing_enable")()
            base_of(model).enable_input_require_grads()
        tree_loss(model, to_tensors(pack), attention="merged").loss_sum.backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_choice() -> None:
    llama, gemma2 = tiny_config(*TREE_MODELS["llama"]), tiny_config(*TREE_MODELS["gemma2"])
    assert choose_attention(llama, "cpu")[0] == "merged"
    assert choose_attention(llama, "cpu", "reference") == ("reference", "as asked for")
    name, reason = choose_attention(llama, "cuda")
    assert (name, reason) == ("reference", "a dense mask: no other way has been tested on cuda yet")
    assert choose_attention(gemma2, "cpu")[0] == "reference"
    name, reason = choose_attention(gemma2, "cpu", "merged")
    assert (name, reason.startswith("merged was asked for, but soft-capping")) == ("reference", True)
    with pytest.raises(UsageError, match="runs on the CPU, not on cuda"):
        choose_attention(llama, "cuda", "merged")
    with pytest.raises(UsageError, match="not in this version"):
        choose_attention(llama, "cpu", "flex")
    with pytest.raises(UsageError, match="unknown attention 'fast'"):
        choose_attention(llama, "cpu", "fast")


def test_the_name_of_our_attention_is_not_saved(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(tiny_config(*TREE_MODELS["llama"]))
    set_attention(model, "merged")
    model.save_pretrained(tmp_path)
    assert "espalier" not in (tmp_path / "config.json").read_text(encoding="utf-8")
