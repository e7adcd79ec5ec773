"""Generation: shared prefill against transformers' own generate, streaming in whole characters, stops and limits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from espalier.errors import DataError
from espalier.model.load import load_model, load_tokenizer
from espalier.tree import prefill as prefill_module
from espalier.tree.attention import set_attention
from espalier.use import generate as module
from espalier.use.generate import Generated, Sampling, StreamDecoder, decode, generate, stream

SHARED = [0, *range(30, 60)]
PROMPTS = [[*SHARED, *own] for own in ([70], [71, 90, 91], [72, 100, 7, 8, 9], [73, 5], [71, 90, 92, 93])]


@pytest.fixture(scope="module")
def tiny(tiny_llama_dir: Path) -> Any:
    return load_model(tiny_llama_dir, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer(tiny_llama_dir: Path) -> Any:
    return load_tokenizer(tiny_llama_dir)


def drain(pieces: Any) -> tuple[list[str], Generated]:
    got = []
    while True:
        try:
            got.append(next(pieces))
        except StopIteration as end:
            return got, end.value


def count_prefills(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(prompts, tokens that were computed for them) of each tree."""
    counts: list[tuple[int, int]] = []
    real = prefill_module._pack

    def counted(prompts: Any) -> Any:
        pack, last = real(prompts)
        counts.append((len(prompts), pack.num_tokens))
        return pack, last

    monkeypatch.setattr(prefill_module, "_pack", counted)
    return counts


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_shared_prefill_matches_generate(
    tiny: Any, tokenizer: Any, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = count_prefills(monkeypatch)
    settings: dict[str, Any] = {"max_new_tokens": 12, "stop_ids": [1, 2], "batch_size": batch_size}
    fast = generate(tiny, tokenizer, PROMPTS, **settings)
    own = {1: [32, 34, 35, 36, 33], 2: [31 + 1 + 3, 31 + 4 + 5, 33], 16: [31 + 1 + 3 + 4 + 5 + 2]}[batch_size]
    assert [tokens for _, tokens in counts] == own
    plain = generate(tiny, tokenizer, PROMPTS, share_prefix=False, **settings)
    assert len(counts) == len(own)
    assert fast == plain
    # And with each prompt alone through transformers, with nothing of ours around it.
    for prompt, answer in zip(PROMPTS, fast, strict=True):
        out = tiny.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=[1, 2],
            pad_token_id=2,
        )[0, len(prompt) :].tolist()
        assert answer.ids == tuple(token for token in out if token not in (1, 2))


def test_shared_prefill_matches_generate_on_the_embedded_model(
    smollm2_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(smollm2_dir, device="cpu", dtype=torch.float32)
    tok = load_tokenizer(smollm2_dir)
    questions = ["Name a colour.", "What is 2 + 2? Answer with the number only.", "Hi", "Where is Paris?"]
    prompts = [
        tok.apply_chat_template([{"role": "user", "content": q}], add_generation_prompt=True, return_dict=False)
        for q in questions
    ]
    counts = count_prefills(monkeypatch)
    settings: dict[str, Any] = {"max_new_tokens": 12, "stop_ids": [2], "batch_size": 4}
    fast = generate(model, tok, prompts, **settings)
    # The system text's 24 tokens once; the second level shares too little to be a branch of its own.
    assert counts == [(4, 24 + sum(len(prompt) - 24 for prompt in prompts))]
    assert fast == generate(model, tok, prompts, share_prefix=False, **settings)
    assert all(answer.text for answer in fast)
    pieces, answer = drain(stream(model, tok, prompts[1], max_new_tokens=12, stop_ids=[2]))
    assert answer == fast[1]
    assert "".join(pieces) == answer.text


def test_stop_token_ends_the_answer(tiny: Any, tokenizer: Any) -> None:
    free = generate(tiny, tokenizer, PROMPTS, max_new_tokens=6, stop_ids=[])
    assert all(len(answer.ids) == 6 and not answer.stopped for answer in free)
    third = free[2].ids[3]
    first = free[2].ids.index(third)
    answer = generate(tiny, tokenizer, PROMPTS, max_new_tokens=6, stop_ids=[third])[2]
    assert (answer.ids, answer.stopped) == (free[2].ids[:first], True)
    pieces, streamed = drain(stream(tiny, tokenizer, PROMPTS[2], max_new_tokens=6, stop_ids=[third]))
    assert streamed == answer
    assert "".join(pieces) == answer.text


def test_sampling_is_seeded_and_leaves_the_run_s_random_state_alone(tiny: Any, tokenizer: Any) -> None:
    torch.manual_seed(7)
    state = torch.get_rng_state()
    settings: dict[str, Any] = {"max_new_tokens": 8, "stop_ids": []}
    one = generate(tiny, tokenizer, PROMPTS, sampling=Sampling(temperature=5.0, seed=1), **settings)
    again = generate(tiny, tokenizer, PROMPTS, sampling=Sampling(temperature=5.0, seed=1), **settings)
    other = generate(tiny, tokenizer, PROMPTS, sampling=Sampling(temperature=5.0, seed=2), **settings)
    assert one == again
    assert one != other
    assert torch.equal(torch.get_rng_state(), state)


def test_top_p_keeps_the_smallest_set() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().repeat(4000, 1)
    torch.manual_seed(0)
    chosen = module._choose(logits, Sampling(temperature=1.0, top_p=0.7))
    assert sorted(set(chosen.tolist())) == [0, 1]
    assert (chosen == 0).float().mean().item() == pytest.approx(0.625, abs=0.03)
    assert set(module._choose(logits, Sampling(temperature=1.0, top_p=0.01)).tolist()) == {0}


def test_training_mode_comes_back(tiny: Any, tokenizer: Any) -> None:
    tiny.train()
    generate(tiny, tokenizer, PROMPTS[:1], max_new_tokens=1, stop_ids=[])
    assert tiny.training
    tiny.eval()


def test_prompt_without_room(tiny: Any, tokenizer: Any) -> None:
    with pytest.raises(DataError, match="the model holds 128 tokens") as caught:
        generate(tiny, tokenizer, [[5], [5] * 128], max_new_tokens=1, stop_ids=[])
    assert caught.value.details == ("prompt 2 has 128 tokens",)


def test_answer_ends_where_the_positions_end(tiny: Any, tokenizer: Any) -> None:
    answer = generate(tiny, tokenizer, [[5] * 125], max_new_tokens=50, stop_ids=[])[0]
    assert (len(answer.ids), answer.stopped) == (3, False)


def test_sliding_window_takes_the_plain_way(shared: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    phi3 = load_model(shared / "tiny-phi3", device="cpu", dtype=torch.float32)
    phi3.config.sliding_window = 8
    counts = count_prefills(monkeypatch)
    assert not module.keeps_plain_cache(phi3)
    answers = generate(phi3, tokenizer, PROMPTS, max_new_tokens=3, stop_ids=[])
    assert counts == []
    assert [len(answer.ids) for answer in answers] == [3] * len(PROMPTS)
    pieces, answer = drain(stream(phi3, tokenizer, PROMPTS[0], max_new_tokens=3, stop_ids=[]))
    assert pieces == [answer.text]


def test_many_prefixes_match_plain(tiny: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three beginnings that branch twice, prompts of one token, and one prompt that begins another."""
    heads = [[0, *range(10 * k, 10 * k + 25)] for k in (3, 4, 5)]
    prompts = [[*heads[i % 3], *range(100 + i % 2, 120 + i % 2), 200 + i, *[7] * (i % 4)] for i in range(14)]
    prompts += [heads[0], [5], [5], [*heads[0], 7]]
    counts = count_prefills(monkeypatch)
    fast = generate(tiny, tokenizer, prompts, max_new_tokens=10, stop_ids=[1, 2])
    assert counts[0][1] < sum(map(len, prompts)) / 2
    assert fast == generate(tiny, tokenizer, prompts, max_new_tokens=10, stop_ids=[1, 2], share_prefix=False)
    assert len({answer.ids for answer in fast}) > 5


def test_batches_are_bounded_by_the_cache(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows leave the batch as they end; a batch holds as many rows as fit into CACHE_BYTES, one at least."""
    config = tiny.config
    token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    prompts, limits = [[9] * 10, [3] * 6, [3] * 8, [9] * 50], [10] * 4
    monkeypatch.setattr(module, "CACHE_BYTES", 40 * token_bytes)
    assert list(module._batches(tiny, prompts, limits, 64)) == [[1, 2], [0], [3]]
    assert list(module._batches(tiny, prompts, limits, 1)) == [[1], [2], [0], [3]]


def test_ended_rows_leave_the_batch(tiny: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    free = generate(tiny, tokenizer, PROMPTS, max_new_tokens=8, stop_ids=[])
    stop = free[2].ids[3]
    ends = [answer.ids.index(stop) + 1 if stop in answer.ids else 8 for answer in free]
    sizes: list[int] = []
    real = module._choose
    monkeypatch.setattr(
        module, "_choose", lambda logits, sampling: (sizes.append(len(logits)), real(logits, sampling))[1]
    )
    generate(tiny, tokenizer, PROMPTS, max_new_tokens=8, stop_ids=[stop])
    assert sizes == [sum(end >= step for end in ends) for step in range(1, max(ends) + 1)]
    assert sizes[-1] < len(PROMPTS)


def test_a_loss_before_does_not_change_answers(tiny: Any, tokenizer: Any) -> None:
    before = generate(tiny, tokenizer, PROMPTS, max_new_tokens=4, stop_ids=[])
    set_attention(tiny, "merged")
    assert generate(tiny, tokenizer, PROMPTS, max_new_tokens=4, stop_ids=[]) == before
    _, answer = drain(stream(tiny, tokenizer, PROMPTS[0], max_new_tokens=4, stop_ids=[]))
    assert answer == before[0]


def test_stream_decoder_gives_whole_characters(smollm2_dir: Path, cases: Path) -> None:
    tok = load_tokenizer(smollm2_dir)
    case = json.loads((cases / "D09_stream_halves" / "ids.json").read_text(encoding="utf-8"))
    decoder = StreamDecoder(tok)
    assert [decoder.push(token) for token in case["token_ids"]] == ["", "你", "", "好", "", "", "🤗"]
    assert decoder.flush() == ""
    assert decode(tok, case["token_ids"]) == case["text"]
    decoder = StreamDecoder(tok)
    assert [decoder.push(token) for token in case["second"]["token_ids"]] == ["", "你", ""]
    assert decoder.flush() == "\ufffd"


def test_stream_that_ends_inside_a_character(smollm2_dir: Path) -> None:
    tok = load_tokenizer(smollm2_dir)
    ids = tok("hi 🤗").input_ids[:-1]
    decoder = StreamDecoder(tok)
    text = "".join(decoder.push(token) for token in ids)
    assert text == "hi"
    assert text + decoder.flush() == decode(tok, ids)
    assert decoder.flush() == ""


@pytest.mark.parametrize("name", ["tok-meta", "tok-plain", "tok-bos"])
def test_stream_decoder_equals_decode_of_all(shared: Path, name: str) -> None:
    tok = load_tokenizer(shared / name)
    for text in ("a pear, an apple and  two plums", " lead", "x"):
        ids = tok(text, add_special_tokens=False).input_ids
        decoder = StreamDecoder(tok)
        assert "".join(decoder.push(token) for token in ids) + decoder.flush() == decode(tok, ids)
