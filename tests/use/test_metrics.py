"""Losses by row against a plain loop; answers against wanted answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from espalier.encode.encode import Encoded
from espalier.model.load import load_model, load_tokenizer
from espalier.model.load_adapter import load_adapter
from espalier.use import metrics as module
from espalier.use.metrics import question_of, score_answer, score_rows


@pytest.fixture(scope="module")
def model(tiny_llama_dir: Path, adapter_good_dir: Path) -> Any:
    base = load_model(tiny_llama_dir, device="cpu", dtype=torch.float32)
    return load_adapter(base, adapter_good_dir, notice=lambda text: None)


def rows() -> list[Encoded]:
    """30 rows of three beginnings: repeats, several answers in one row, weights, unequal lengths."""
    random = np.random.default_rng(0)
    heads = [[0, *range(10 * k, 10 * k + 25)] for k in (3, 4, 5)]
    made = []
    for i in range(30):
        own = random.integers(3, 300, 4 + i % 7).tolist()
        ids = [*heads[i % 3], *own]
        if i == 29:
            ids = made[0].input_ids.tolist()
        labels = np.full(len(ids), -100, np.int32)
        labels[-3:] = ids[-3:]
        if i % 4 == 0:
            labels[10:12] = ids[10:12]
        weights = np.linspace(0.5, 2, len(ids)).astype(np.float32) if i % 5 == 0 else None
        made.append(Encoded(np.array(ids, np.int32), labels, weights, "a.jsonl", i + 1))
    return made


def by_plain_loop(model: Any) -> list[tuple[float, float, int, int]]:
    found = []
    for row in rows():
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row.input_ids.tolist()])).logits[0]
        loss = weight = 0.0
        count = correct = 0
        for t in range(1, len(row.input_ids)):
            if row.labels[t] == -100:
                continue
            factor = 1.0 if row.weights is None else float(row.weights[t])
            loss += factor * float(F.cross_entropy(logits[t - 1], torch.tensor(int(row.labels[t]))))
            weight += factor
            count += 1
            correct += int(logits[t - 1].argmax()) == row.labels[t]
        found.append((loss, weight, count, correct))
    return found


@pytest.mark.parametrize("tree", [True, False])
@pytest.mark.parametrize("window", [8192, 7])
def test_tree_scores_match_plain(model: Any, tree: bool, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WINDOW_ROWS", window)
    scores = score_rows(model, rows(), tree=tree, attention="merged")
    loss, weight, count, correct = (np.array(values) for values in zip(*by_plain_loop(model), strict=True))
    assert scores.loss == pytest.approx(loss, rel=1e-5)
    assert scores.weight == pytest.approx(weight)
    assert scores.supervised.tolist() == count.tolist()
    assert scores.correct.tolist() == correct.tolist()
    logical = sum(len(row.input_ids) for row in rows())
    assert (scores.computed_tokens < 0.8 * logical) == tree


def test_the_adapter_changes_the_loss_and_disabled_it_does_not(model: Any, tiny_llama_dir: Path) -> None:
    bare = load_model(tiny_llama_dir, device="cpu", dtype=torch.float32)
    base = score_rows(bare, rows(), tree=True, attention="merged")
    with model.disable_adapter():
        assert score_rows(model, rows(), tree=True, attention="merged").loss.tolist() == base.loss.tolist()
    assert abs(score_rows(model, rows(), tree=True, attention="merged").loss - base.loss).max() > 1e-3


def test_question_is_the_last_answer(tiny_llama_dir: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama_dir)
    words = tokenizer("a pear, an apple", add_special_tokens=False).input_ids
    ids = [0, 20, *words, 1, 21, 22, *words[:2], 1]
    labels = np.full(len(ids), -100, np.int32)
    labels[2 : 3 + len(words)] = ids[2 : 3 + len(words)]
    labels[-3:] = ids[-3:]
    question = question_of(Encoded(np.array(ids, np.int32), labels), tokenizer, [1])
    assert question.prompt == tuple(ids[:-3])
    assert (question.wanted, question.num_tokens) == (tokenizer.decode(words[:2]), 3)


WANTED = json.dumps({"name": "梨", "size": {"g": 120, "ripe": True}, "tags": ["a", "b"], "note": None, "extra": {}})


@pytest.mark.parametrize(
    ("answer", "wanted", "exact", "valid", "right"),
    [
        (" queue: billing\n", "queue: billing", True, None, []),
        ("queue: Billing", "queue: billing", False, None, []),
        ("5", "5", True, None, []),
        (WANTED, WANTED, True, True, ["name", "size.g", "size.ripe", "tags[0]", "tags[1]", "note", "extra"]),
        ('{"name": "梨", "size": {"g": 120.0, "ripe": 1}, "tags": ["b"]}', WANTED, False, True, ["name", "size.g"]),
        ('{"name": "梨"', WANTED, False, False, []),
        ('{"name": NaN}', WANTED, False, False, []),
        ("```json\n{}\n```", WANTED, False, False, []),
        ("7", WANTED, False, True, []),
        ("[1, {\"a\": 2}]", "[1, {\"a\": 3}]", False, True, ["[0]"]),
        ("[" * 3000, "{}", False, False, []),
        ("", "[]", False, False, []),
        ("null", "{\"a\": null}", False, True, []),
    ],
)  # fmt: skip
def test_answers(answer: str, wanted: str, exact: bool, valid: bool | None, right: list[str]) -> None:
    score = score_answer(answer, wanted)
    assert (score.exact, score.valid) == (exact, valid)
    assert [path for path, equal in score.fields.items() if equal] == right
    if wanted == WANTED:
        assert list(score.fields) == ["name", "size.g", "size.ripe", "tags[0]", "tags[1]", "note", "extra"]
