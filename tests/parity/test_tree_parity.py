"""The tree against plain padded rows in float32: same loss, same gradient of every adapter weight."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from espalier.encode.encode import Encoded
from espalier.tree.attention import choose_attention
from espalier.tree.collate import to_tensors
from espalier.tree.loss import LossOutput, plain_loss, tree_loss
from espalier.tree.plan import StepPlan, plan_step
from espalier.tree.support import TESTED_MODEL_TYPES, tree_support
from parity.models import PADDED_MODELS, TREE_MODELS, tiny_config, tiny_model, tree_rows

LOSS_TOLERANCE = 1e-6
GRADIENT_TOLERANCE = 1e-5
Gradients = dict[str, torch.Tensor]


def gradients(model: torch.nn.Module) -> Gradients:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def plain(model: torch.nn.Module, rows: Sequence[Encoded]) -> tuple[LossOutput, Gradients]:
    output = plain_loss(model, rows, 0)
    (output.loss_sum / output.num_supervised).backward()
    return output, gradients(model)


def tree(model: torch.nn.Module, plan: StepPlan, attention: str) -> tuple[float, int, Gradients]:
    loss, correct = 0.0, 0
    for pack in plan.packs:
        output = tree_loss(model, to_tensors(pack), attention=attention, chunk_tokens=5)
        (output.loss_sum / plan.num_supervised).backward()
        loss, correct = loss + float(output.loss_sum.detach()), correct + int(output.num_correct)
    return loss, correct, gradients(model)


def assert_same_gradients(found: Gradients, expected: Gradients, *, smallest: float = 1e-3) -> None:
    """Relative to each gradient's own norm, or to `smallest` times the largest norm of all, which is what rounding
    leaves of a gradient that should be zero (an expert that saw no token, attention over one token)."""
    assert found.keys() == expected.keys()
    floor = max(1e-4, smallest * max(float(grad.norm()) for grad in expected.values()))
    for name, grad in expected.items():
        difference = float((found[name] - grad).norm()) / max(float(grad.norm()), floor)
        assert difference <= GRADIENT_TOLERANCE, f"{name}: {difference:.2e}"


# Soft-capping and sinks are in no stock kernel; Falcon's attention is its own and takes a ready mask only.
REFERENCE_ONLY = {"gemma2", "gpt_oss", "falcon"}


@pytest.mark.parametrize("attention", ["reference", "auto"])
@pytest.mark.parametrize("name", TREE_MODELS)
def test_tree_matches_plain(name: str, attention: str) -> None:
    config = tiny_config(*TREE_MODELS[name])
    if attention == "auto":
        attention, _ = choose_attention(config, "cpu")
        assert attention == ("reference" if name in REFERENCE_ONLY else "merged")
    assert tree_support(config).mode == "tree"
    assert tree_support(config).reason == ""
    model = tiny_model(config)
    rows = tree_rows()
    plan = plan_step(rows, max_tokens=1000, min_shared_tokens=2)
    # Something was really shared.
    assert (plan.reason, len(plan.packs), plan.num_rows) == ("", 1, 9)
    assert plan.unique_tokens < 0.5 * plan.logical_tokens
    expected, expected_gradients = plain(model, rows)
    loss, correct, found = tree(model, plan, attention)
    assert plan.num_supervised == expected.num_supervised
    assert plan.weight_sum == expected.weight_sum
    assert loss == pytest.approx(float(expected.loss_sum.detach()), rel=LOSS_TOLERANCE)
    assert correct == int(expected.num_correct)
    assert_same_gradients(found, expected_gradients)


def test_every_tested_type_is_tested() -> None:
    assert {model_type for model_type, _ in TREE_MODELS.values()} == TESTED_MODEL_TYPES
    assert len(TREE_MODELS) >= 20


@pytest.mark.parametrize("name", PADDED_MODELS)
def test_inexact_models_are_named_and_padded(name: str) -> None:
    model_type, fields, words = PADDED_MODELS[name]
    support = tree_support(tiny_config(model_type, fields))
    assert support.mode == "padded"
    assert support.reason.startswith(f"{model_type}: ")
    assert words in support.reason


@pytest.mark.parametrize("name", ["llama_grouped", "gemma3", "gpt2"])
def test_merged_matches_reference(name: str) -> None:
    """Both ways of attention on the same packs, with several packs and a window that cuts some of them."""
    model = tiny_model(tiny_config(*TREE_MODELS[name]))
    plan = plan_step(tree_rows(), max_tokens=45, min_shared_tokens=2)
    assert len(plan.packs) > 1
    loss, _, expected = tree(model, plan, "reference")
    merged_loss, _, found = tree(model, plan, "merged")
    assert merged_loss == pytest.approx(loss, rel=LOSS_TOLERANCE)
    assert_same_gradients(found, expected)
