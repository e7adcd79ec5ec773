"""The head and its loss in chunks, and the twin."""

from __future__ import annotations

import pytest
import torch

from espalier.errors import ModelError
from espalier.tree import loss as tree_loss_module
from espalier.tree.collate import to_tensors
from espalier.tree.loss import base_of, logit_rule, plain_loss, tree_loss
from espalier.tree.plan import Pack, plan_step
from parity.models import TREE_MODELS, row, tiny_config, tiny_model, tree_rows
from parity.test_tree_parity import assert_same_gradients, gradients, plain


def one_pack(rows) -> Pack:
    (pack,) = plan_step(rows, max_tokens=999, min_shared_tokens=1).packs
    return pack


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_chunked_head_matches_plain_with_an_adapter_on_it(chunk: int) -> None:
    model = tiny_model(tiny_config(*TREE_MODELS["llama_grouped"]), head=True)
    rows = tree_rows()
    expected, expected_gradients = plain(model, rows)
    assert any("lm_head" in name for name in expected_gradients)
    output = tree_loss(model, to_tensors(one_pack(rows)), chunk_tokens=chunk)
    (output.loss_sum / output.num_supervised).backward()
    assert float(output.loss_sum.detach()) == pytest.approx(float(expected.loss_sum.detach()), rel=1e-6)
    assert_same_gradients(gradients(model), expected_gradients)


def test_rules_of_the_logits() -> None:
    found = {}
    for name in ("llama", "gemma2", "granite", "cohere"):
        base = base_of(tiny_model(tiny_config(*TREE_MODELS[name])))
        found[name] = logit_rule(base)
        assert base.training
    assert [(rule.scale, rule.cap) for rule in found.values()] == [(1.0, None), (1.0, 30.0), (0.25, None), (0.25, None)]


def test_logits_that_no_rule_explains_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_of(tiny_model(tiny_config(*TREE_MODELS["granite"])))
    base.config.logits_scaling = 4.0
    stock = type(base).forward

    def odd(self, *args, **kwargs):
        output = stock(self, *args, **kwargs)
        output.logits = output.logits**3 + 1
        return output

    monkeypatch.setattr(type(base), "forward", odd)
    with pytest.raises(ModelError, match="changes its logits in a way that is not known"):
        logit_rule(base)


def test_no_full_logits_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    stock = tree_loss_module._chunk_loss

    def watch(logits, *rest):
        sizes.append(tuple(logits.shape))
        return stock(logits, *rest)

    monkeypatch.setattr(tree_loss_module, "_chunk_loss", watch)
    pack = one_pack([row([5, 6, 7], [8] * 9)])
    tree_loss(tiny_model(tiny_config(*TREE_MODELS["llama"])), to_tensors(pack), chunk_tokens=4)
    assert sizes == [(4, 97), (4, 97), (1, 97)]


def test_evaluation_needs_no_gradient() -> None:
    model = tiny_model(tiny_config(*TREE_MODELS["llama"])).eval()
    rows = tree_rows()
    with torch.no_grad():
        output = tree_loss(model, to_tensors(one_pack(rows)), attention="merged")
        expected = plain_loss(model, rows, 0)
    assert not output.loss_sum.requires_grad
    assert output.loss_sum.item() == pytest.approx(expected.loss_sum.item(), rel=1e-6)
    assert output.num_correct.item() == expected.num_correct.item()


def test_plain_loss_adds_the_router_loss_as_transformers_does() -> None:
    config = tiny_config("mixtral", {"output_router_logits": True, "router_aux_loss_coef": 0.5, "num_local_experts": 4})
    model = tiny_model(config)
    rows = [row([5, 6, 7], [8, 9, 10]), row([5, 6, 7], [11, 12, 13])]
    output = plain_loss(model, rows, 0)
    ids = torch.tensor([[5, 6, 7, 8, 9, 10], [5, 6, 7, 11, 12, 13]])
    labels = ids.clone()
    labels[:, :3] = -100
    stock = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
    assert float(output.loss_sum.detach()) / output.num_supervised == pytest.approx(float(stock.detach()), rel=1e-6)


def test_autocast_matches_plain() -> None:
    """float32 weights under bf16 autocast: the tree's functions see mixed dtypes."""
    model = tiny_model(tiny_config(*TREE_MODELS["llama_grouped"]))
    rows = tree_rows()
    with torch.autocast("cpu", torch.bfloat16):
        output = tree_loss(model, to_tensors(one_pack(rows)), attention="merged")
        expected = plain_loss(model, rows, 0)
    assert output.loss_sum.dtype == torch.float32
    assert float(output.loss_sum.detach()) == pytest.approx(float(expected.loss_sum.detach()), rel=2e-2)
    output.loss_sum.backward()
    found = gradients(model)
    expected.loss_sum.backward()
    total = sum(float((found[name] - grad).square().sum()) for name, grad in gradients(model).items()) ** 0.5
    assert total / sum(float(grad.square().sum()) for grad in found.values()) ** 0.5 < 0.1
