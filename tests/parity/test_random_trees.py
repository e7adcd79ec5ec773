"""Random tries on a tiny Llama: the tree, both attentions, against plain padded rows in float32."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from peft import PeftModel

from espalier.encode.encode import Encoded
from espalier.errors import DataError
from espalier.tree.plan import plan_step
from parity.models import TREE_MODELS, VOCAB, row, tiny_config, tiny_model
from parity.test_tree_parity import LOSS_TOLERANCE, assert_same_gradients, plain, tree

tokens = st.integers(3, VOCAB - 1)


@cache
def model_of(name: str) -> PeftModel:
    return tiny_model(tiny_config(*TREE_MODELS[name]))


@st.composite
def tries(draw: st.DrawFn) -> list[Encoded]:
    """Rows from a tree of depth 1 to 6: leaves at every depth (so some rows begin others), repeats, short answers."""
    depth = draw(st.integers(1, 6))
    prefixes: list[list[int]] = [draw(st.lists(tokens, min_size=1, max_size=9))]
    for _ in range(depth - 1):
        stem = draw(st.sampled_from(prefixes))
        prefixes.append(stem + draw(st.lists(tokens, min_size=1, max_size=5)))
    rows: list[Encoded] = []
    for line in range(1, draw(st.integers(1, 8)) + 1):
        if rows and draw(st.booleans()) and draw(st.booleans()):
            rows.append(draw(st.sampled_from(rows)))
            continue
        prompt = draw(st.sampled_from(prefixes))
        answer = draw(st.lists(tokens, min_size=1, max_size=draw(st.sampled_from([1, 2, 7]))))
        rows.append(row(prompt, answer, line=line, weight=draw(st.sampled_from([None, None, None, 0.25, 3.0]))))
    return rows


@settings(max_examples=150, deadline=None)
@given(
    tries(),
    st.sampled_from(["llama_grouped", "mistral_window"]),
    st.sampled_from(["reference", "merged"]),
    st.integers(0, 20),
    st.integers(1, 6),
)
def test_random_trees_match_plain(rows, name, attention, slack, min_shared) -> None:
    longest = max(len(r.input_ids) for r in rows) - 1
    plan = plan_step(rows, max_tokens=longest + slack, min_shared_tokens=min_shared, min_saving=0.0)
    event(f"packs: {min(len(plan.packs), 4)}")
    event(f"shared: {plan.unique_tokens < sum(len(r.input_ids) - 1 for r in rows)}")
    model = model_of(name)
    expected, expected_gradients = plain(model, rows)
    loss, correct, found = tree(model, plan, attention)
    assert (plan.num_supervised, correct) == (expected.num_supervised, int(expected.num_correct))
    assert loss == pytest.approx(float(expected.loss_sum.detach()), rel=LOSS_TOLERANCE, abs=1e-6)
    assert_same_gradients(found, expected_gradients, smallest=0.1)
    if longest > 1:
        with pytest.raises(DataError, match="do not fit the budget"):
            plan_step(rows, max_tokens=longest - 1)
