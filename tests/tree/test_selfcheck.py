"""The comparison before a run: passes where the tree is exact, fails where it is not, and leaves no trace."""

from __future__ import annotations

import pytest
import torch

from espalier.errors import ModelError
from espalier.tree.selfcheck import rows_to_check, self_check
from parity.models import PADDED_MODELS, TREE_MODELS, row, tiny_config, tiny_model, tree_rows


def test_exact_models_pass() -> None:
    model = tiny_model(tiny_config(*TREE_MODELS["llama_grouped"]), lora_dropout=0.5)
    model.get_base_model().model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 3.0)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    check = self_check(model, tree_rows(), 0, attention="merged")
    assert check.ok
    assert check.shared_tokens > 100
    assert check.loss_tree == pytest.approx(check.loss_plain, rel=1e-6)
    assert check.grad_norm_tree == pytest.approx(check.grad_norm_plain, rel=1e-5)
    assert check.grad_difference < 1e-5
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(p.grad, torch.full_like(p, 3.0)) for p in parameters)
    assert "by the tree" in str(check)


def test_a_model_that_leaks_between_branches_fails() -> None:
    model_type, fields, _ = PADDED_MODELS["lfm2"]
    check = self_check(tiny_model(tiny_config(model_type, fields)), tree_rows(), 0)
    assert not check.ok
    assert check.grad_difference > 0.05


def test_a_model_that_gives_no_numbers_is_named() -> None:
    model = tiny_model(tiny_config(*TREE_MODELS["llama"]))
    with torch.no_grad():
        model.get_base_model().model.norm.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="logits that are not numbers"):
        self_check(model, [row([5, 6], [7]), row([5, 6], [8])], 0)


def test_rows_that_share_most_are_chosen() -> None:
    common = list(range(10, 30))
    rows = [row([5], [6]), row(common, [1, 2]), row([7, 8], [9] * 30), row(common, [3, 4]), row([5], [9])]
    chosen = rows_to_check(rows, 2)
    assert [r.input_ids.tolist() for r in chosen] == [[*common, 1, 2], [*common, 3, 4]]
    assert len(rows_to_check(rows[:1])) == 1
