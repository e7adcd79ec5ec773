"""Files to encoded rows: counts, workers, the cache, the held-out split."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from encoding import chat, encoder_for, example, load

from espalier.data.formats import FormatOptions
from espalier.encode.encode import Encoded, Encoder
from espalier.encode.store import EncodedDataset, EncodeResult, encode_files, overlength_report, split_heldout
from espalier.errors import DataError


@pytest.fixture
def encoder(shared: Path) -> Encoder:
    return encoder_for(load(shared / "tok-plain"), "atom", max_length=60)


@pytest.fixture
def data(tmp_path: Path) -> str:
    """40 lines: line 3 has no answer, line 5 is too long, line 7 has a weight; two lines share each prompt."""
    lines = []
    for i in range(1, 41):
        row: dict[str, Any] = {"instruction": f"question {(i + 1) // 2}", "output": f"answer {i}"}
        if i == 3:
            row["output"] = ""
        if i == 5:
            row["output"] = "long " * 40
        if i == 7:
            row["weight"] = 0.5
        lines.append(json.dumps(row))
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def same(a: EncodedDataset, b: EncodedDataset) -> bool:
    if len(a) != len(b):
        return False
    return all(
        x.input_ids.tolist() == y.input_ids.tolist()
        and x.labels.tolist() == y.labels.tolist()
        and (x.weights is None) == (y.weights is None)
        and (x.weights is None or y.weights is None or x.weights.tolist() == y.weights.tolist())
        and (x.file, x.line) == (y.file, y.line)
        for x, y in zip(a, b, strict=True)
    )


def test_every_row_is_kept_or_named(encoder: Encoder, data: str) -> None:
    result = encode_files([data], encoder, num_workers=0)
    assert [bad.line for bad in result.bad] == [3, 5]
    assert [row.line for row in result.dataset] == [i for i in range(1, 41) if i not in (3, 5)]
    counts = result.counts
    assert (counts.num_read, counts.num_kept, counts.num_over) == (40, 38, 1)
    assert result.lengths.tolist() == [len(row.input_ids) for row in result.dataset]
    report = overlength_report(result)
    assert report.worst[0][0] == f"{data}:5"
    assert report.lines()[0] == "1 rows (2.5%) are longer than 60 tokens; the longest:"
    weighted = [row for row in result.dataset if row.weights is not None]
    assert [row.line for row in weighted] == [7]
    assert set(weighted[0].weights[weighted[0].labels >= 0].tolist()) == {0.5}


def test_same_result_for_any_number_of_workers(encoder: Encoder, data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("espalier.encode.store.CHUNK", 7)
    alone = encode_files([data], encoder, num_workers=0)
    seen: list[int] = []
    shared_out = encode_files([data], encoder, num_workers=2, progress=seen.append)
    assert same(alone.dataset, shared_out.dataset)
    assert alone.counts == shared_out.counts
    assert seen == [7, 14, 21, 28, 35, 40]
    assert alone.dataset.prompt_keys.tolist() == shared_out.dataset.prompt_keys.tolist()


def cached(encoder: Encoder, data: str, folder: Path, **options: Any) -> EncodeResult:
    return encode_files([data], encoder, cache_dir=folder, num_workers=0, **options)


def test_cache_gives_the_same_rows(encoder: Encoder, data: str, tmp_path: Path) -> None:
    plain = encode_files([data], encoder, num_workers=0)
    first = cached(encoder, data, tmp_path / "cache")
    second = cached(encoder, data, tmp_path / "cache")
    assert (first.cached, second.cached) == (False, True)
    assert same(plain.dataset, first.dataset)
    assert same(plain.dataset, second.dataset)
    assert plain.counts == first.counts == second.counts
    copy = pickle.loads(pickle.dumps(second.dataset[3:9]))
    assert same(copy, plain.dataset[3:9])
    assert len(pickle.dumps(second.dataset)) < 1000  # by path, not by content


@pytest.mark.parametrize("change", ["data", "template", "options", "limit", "tokenizer"])
def test_cache_is_not_used_for_anything_else(
    encoder: Encoder, data: str, tmp_path: Path, shared: Path, change: str
) -> None:
    cached(encoder, data, tmp_path / "cache")
    options = FormatOptions()
    if change == "data":
        Path(data).write_text(Path(data).read_text(encoding="utf-8").replace("answer 9", "answer X"), encoding="utf-8")
    elif change == "template":
        encoder = encoder_for(load(shared / "tok-plain"), "plain", max_length=60)
    elif change == "options":
        options = FormatOptions(input_joiner=" ")
    elif change == "limit":
        encoder = encoder_for(load(shared / "tok-plain"), "atom", max_length=61)
    else:
        tokenizer = load(shared / "tok-plain")
        tokenizer.add_tokens(["question"])
        encoder = encoder_for(tokenizer, "atom", max_length=60)
    result = encode_files([data], encoder, options, cache_dir=tmp_path / "cache", num_workers=0)
    assert not result.cached


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "manifest", "layout"])
def test_damaged_cache_is_rebuilt(encoder: Encoder, data: str, tmp_path: Path, damage: str) -> None:
    whole = cached(encoder, data, tmp_path / "cache")
    expected_ids = [row.input_ids.tolist() for row in whole.dataset]
    (folder,) = (tmp_path / "cache").iterdir()
    ids = folder / "ids.bin"
    if damage == "flip":
        content = bytearray(ids.read_bytes())
        content[100] ^= 1
        ids.unlink()  # the first result still maps the old file
        ids.write_bytes(content)
    elif damage == "cut":
        content = bytearray(ids.read_bytes()[:-4])
        ids.unlink()
        ids.write_bytes(content)
    elif damage == "remove":
        (folder / "labels.bin").unlink()
    elif damage == "manifest":
        (folder / "manifest.json").write_text("{", encoding="utf-8")
    else:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        (folder / "manifest.json").write_text(json.dumps({**manifest, "layout": 0}), encoding="utf-8")
    again = cached(encoder, data, tmp_path / "cache")
    assert not again.cached
    assert [row.input_ids.tolist() for row in again.dataset] == expected_ids
    assert cached(encoder, data, tmp_path / "cache").cached
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [folder.name]


def test_stopped_encoding_leaves_nothing(encoder: Encoder, data: str, tmp_path: Path) -> None:
    def stop(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached(encoder, data, tmp_path / "cache", progress=stop)
    assert list((tmp_path / "cache").iterdir()) == []


def rows() -> list[Encoded]:
    ids = [np.array([1, 2, 3, i], dtype=np.int32) for i in range(6)]
    labels = [np.array([-100, -100, -100, i], dtype=np.int32) for i in range(6)]
    return [Encoded(i, label, None, "f", n) for n, (i, label) in enumerate(zip(ids, labels, strict=True))]


def test_from_rows() -> None:
    dataset = EncodedDataset.from_rows(rows())
    assert same(dataset, pickle.loads(pickle.dumps(dataset)))
    assert [row.input_ids.tolist() for row in dataset] == [[1, 2, 3, i] for i in range(6)]
    assert dataset[-1].line == 5
    assert [row.line for row in dataset.select([4, 1])[1:]] == [1]
    assert dataset.num_supervised_tokens == 6
    assert len(set(dataset.prompt_keys.tolist())) == 1
    assert len(EncodedDataset.from_rows([])) == 0
    with pytest.raises(IndexError):
        dataset[6]


def test_heldout_split_keeps_prompts_together(encoder: Encoder, data: str) -> None:
    dataset = encode_files([data], encoder, num_workers=0).dataset
    train, heldout = split_heldout(dataset, 0.2, seed=1)
    assert len(train) + len(heldout) == 38
    assert 7 <= len(heldout) <= 9
    assert not set(train.prompt_keys.tolist()) & set(heldout.prompt_keys.tolist())
    again = split_heldout(dataset, 0.2, seed=1)[1]
    assert [row.line for row in again] == [row.line for row in heldout]
    other = split_heldout(dataset, 0.2, seed=2)[1]
    assert [row.line for row in other] != [row.line for row in heldout]
    backwards = split_heldout(dataset.select(range(len(dataset))[::-1]), 0.2, seed=1)[1]
    assert {row.line for row in backwards} == {row.line for row in heldout}


def test_heldout_split_edges() -> None:
    dataset = EncodedDataset.from_rows(rows())
    assert [len(part) for part in split_heldout(dataset, 0.0)] == [6, 0]
    with pytest.raises(DataError, match="all 6 rows have the same prompt"):
        split_heldout(dataset, 0.5)


def test_prompt_keys_are_those_of_the_first_learnt_answer(encoder: Encoder) -> None:
    keys = [
        outcome.key
        for outcome in encoder.encode_batch(
            [
                chat("q", "a"),
                chat("q", "b"),
                chat("q", "b", "r", "c"),
                chat("q", "a", system="s"),
                example([], text="<s>Human: q\n</s><s>Assistant: a</s>"),
                example([], text="<s>Human: q\n</s><s>Assistant: b</s>"),
            ]
        )
    ]
    assert keys[0] == keys[1] == keys[2] != keys[3]
    assert keys[4] == keys[5]
