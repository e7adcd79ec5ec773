"""Text from a model: greedy or sampled, batched, with what prompts share computed once; and streamed.

The prompts of a batch go through the model as one tree (tree/prefill.py); then all rows decode together, and a row
that has ended leaves the batch. `share_prefix=False` is the plain twin: transformers' own generate on padded prompts.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from espalier.errors import DataError

if TYPE_CHECKING:
    import torch

# Most bytes of keys and values that a batch holds: with many rows at once each weight is read once for all of them.
CACHE_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Generated:
    """One answer. ids: the new tokens without the stop token. stopped: False where max_new_tokens cut it off."""

    ids: tuple[int, ...]
    text: str
    stopped: bool


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. temperature 0: the likeliest (greedy). top_p: nucleus sampling; 1 is off."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


class StreamDecoder:
    """Token ids to text, one id at a time, in whole characters only.

    A character may span several tokens, and a tokenizer may write a token otherwise at the start of a text than
    inside; so each new token is decoded together with the piece before it, and text is held back while its end is
    an unfinished character.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._context = 0  # ids from here are decoded
        self._said = 0  # ids up to here have been given out

    def push(self, token_id: int) -> str:
        """The text that this token completes; may be empty."""
        self._ids.append(token_id)
        text = self._new_text()
        return "" if text.endswith("\ufffd") else self._give(text)

    def flush(self) -> str:
        """What is still held back: an unfinished character comes out as U+FFFD."""
        return self._give(self._new_text())

    def _new_text(self) -> str:
        before = decode(self._tokenizer, self._ids[self._context : self._said])
        return decode(self._tokenizer, self._ids[self._context :])[len(before) :]

    def _give(self, text: str) -> str:
        if text:
            self._context, self._said = self._said, len(self._ids)
        return text


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """Plain text of `ids`: special tokens left out, blanks as they are."""
    text: str = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    batch_size: int = 64,
    sampling: Sampling | None = None,
    share_prefix: bool = True,
) -> list[Generated]:
    """An answer for each prompt (token ids, not empty), in their order.

    An answer ends before the first of `stop_ids`, after max_new_tokens, or where the model's positions end. Prompts
    that begin alike go into one batch, batch_size at most and as many as CACHE_BYTES hold. The model is put into eval
    mode for the time, and no gradient is kept. Raises DataError for prompts that leave no room in the model.
    """
    sampling = sampling or Sampling()
    _check_room(model, prompts)
    limits = [min(max_new_tokens, model_length(model) - len(ids)) for ids in prompts]
    with _inference(model, sampling.seed):
        if share_prefix and keeps_plain_cache(model) and shares_prefixes(model):
            rows = _by_tree(model, prompts, limits, sampling, stop_ids, batch_size)
        else:
            rows = _by_transformers(model, prompts, limits, sampling, stop_ids, batch_size)
    return [_answer(tokenizer, rows[i], stop_ids) for i in range(len(prompts))]


def shares_prefixes(model: Any) -> bool:
    """True where a tree of prompts gives what each prompt alone gives."""
    from espalier.tree.support import tree_support

    return tree_support(model.config).mode == "tree"


def _by_tree(
    model: Any,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    sampling: Sampling,
    stop_ids: Collection[int],
    batch_size: int,
) -> dict[int, list[int]]:
    """prompt -> new tokens, prompts that begin alike in one batch."""
    from transformers import DynamicCache

    from espalier.tree.attention import choose_attention
    from espalier.tree.prefill import prefill

    attention, _ = choose_attention(model.config, model.device)
    answers: dict[int, list[int]] = {}
    for chosen in _batches(model, prompts, limits, batch_size):
        batch = [list(prompts[i]) for i in chosen]
        cache = DynamicCache(config=model.config)
        logits = prefill(model, batch, attention, cache, _cache_argument(model))
        lengths, own_limits = list(map(len, batch)), [limits[i] for i in chosen]
        steps = _decode_steps(model, logits, cache, lengths, own_limits, sampling, stop_ids)
        answers |= {i: [] for i in chosen}
        for pairs in steps:
            for row, token in pairs:
                answers[chosen[row]].append(token)
    return answers


def _batches(
    model: Any, prompts: Sequence[Sequence[int]], limits: Sequence[int], batch_size: int
) -> Iterator[list[int]]:
    """Numbers of prompts, neighbours in the order of their ids, as many at once as may be."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token_bytes = 2 * config.num_hidden_layers * heads * width * model.dtype.itemsize
    batch: list[int] = []
    longest = 0
    for i in sorted(range(len(prompts)), key=lambda i: list(prompts[i])):
        wanted = max(longest, len(prompts[i]) + limits[i])
        if batch and (len(batch) == batch_size or (len(batch) + 1) * wanted * token_bytes > CACHE_BYTES):
            yield batch
            batch, wanted = [], len(prompts[i]) + limits[i]
        batch.append(i)
        longest = wanted
    if batch:
        yield batch


def _by_transformers(
    model: Any,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    sampling: Sampling,
    stop_ids: Collection[int],
    batch_size: int,
) -> dict[int, list[int]]:
    """prompt -> new tokens, prompts of like length in one batch."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: dict[int, list[int]] = {}
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        rows = _plain(model, [list(prompts[i]) for i in chosen], sampling, stop_ids, max(limits[i] for i in chosen))
        answers |= {i: ids[: limits[i]] for i, ids in zip(chosen, rows, strict=True)}
    return answers


def stream(
    model: Any,
    tokenizer: Any,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    sampling: Sampling | None = None,
    ended: Callable[[], bool] = lambda: False,
) -> Generator[str, None, Generated]:
    """Yield the answer's text in pieces of whole characters; the generator's return value is the whole answer.

    As `generate` with one prompt. ended: asked after every token; where it says True the answer ends there, as if cut
    off. A model without a plain key-value cache (recurrent layers) gives one piece.
    """
    sampling = sampling or Sampling()
    _check_room(model, [prompt])
    room = min(max_new_tokens, model_length(model) - len(prompt))
    if not keeps_plain_cache(model):
        with _inference(model, sampling.seed):
            rows = _plain(model, [list(prompt)], sampling, stop_ids, room, ended)
        answer = _answer(tokenizer, rows[0], stop_ids)
        yield answer.text
        return answer
    decoder, ids = StreamDecoder(tokenizer), list[int]()
    with _inference(model, sampling.seed):
        logits, cache = _prefill(model, list(prompt))
        for ((_, token),) in _decode_steps(model, logits, cache, [len(prompt)], [room], sampling, stop_ids):
            ids.append(token)
            if token not in stop_ids and (piece := decoder.push(token)):
                yield piece
            if ended():
                break
    if rest := decoder.flush():
        yield rest
    return _answer(tokenizer, ids, stop_ids)


def keeps_plain_cache(model: Any) -> bool:
    """True where every layer's cache is a plain list of keys and values: no recurrent state, no sliding window.

    With a window, the padding between a shared beginning and a leftover would count as distance.
    """
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return all(kind == "full_attention" for kind in kinds)
    recurrent = any(getattr(config, name, None) for name in ("state_size", "ssm_cfg", "attn_layer_indices"))
    return not recurrent and getattr(config, "sliding_window", None) is None


def _answer(tokenizer: Any, ids: list[int], stop_ids: Collection[int]) -> Generated:
    """`ids` up to the first stop token; what a batch has added to a stopped row is left out with it."""
    end = next((i for i, token in enumerate(ids) if token in stop_ids), None)
    kept = ids[:end]
    return Generated(tuple(kept), decode(tokenizer, kept), stopped=end is not None)


def _prefill(model: Any, ids: list[int]) -> tuple[torch.Tensor, Any]:
    """(next-token logits float32 [1, V], key-value cache) of one prompt."""
    import torch
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    input_ids = torch.tensor([ids], device=model.device)
    with_cache = {_cache_argument(model): cache, "use_cache": True}
    return model(input_ids=input_ids, logits_to_keep=1, **with_cache).logits[:, -1].float(), cache


def _cache_argument(model: Any) -> str:
    """What the model's forward calls its cache: `cache` from transformers 5.24 on, `past_key_values` before."""
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "cache" if "cache" in inspect.signature(bare.forward).parameters else "past_key_values"


def _decode_steps(
    model: Any,
    logits: torch.Tensor,
    cache: Any,
    lengths: Sequence[int],
    limits: Sequence[int],
    sampling: Sampling,
    stop_ids: Collection[int],
) -> Iterator[list[tuple[int, int]]]:
    """Yield (row, its next token) of all rows that still go on, the stop token included.

    logits: float32 [B, V] of the first token. cache: of prompts of `lengths` tokens, on the right of the longest one's
    width. The mask hides what stands left of them, and the positions skip it. A row ends with a stop token or after
    `limits` tokens, and leaves the batch and the cache.
    """
    import torch

    device, width = model.device, max(lengths)
    prompt_lengths = torch.tensor(lengths, device=device)
    mask = (torch.arange(width, device=device) >= width - prompt_lengths[:, None]).long()  # [B, L]
    positions = prompt_lengths[:, None]  # [B, 1]
    rows = list(range(len(lengths)))
    with_cache = {_cache_argument(model): cache, "use_cache": True}
    for step in range(1, max(limits) + 1):
        tokens = _choose(logits, sampling)
        pairs = list(zip(rows, tokens.tolist(), strict=True))
        yield pairs
        kept = [at for at, (row, token) in enumerate(pairs) if token not in stop_ids and step < limits[row]]
        if not kept:
            return
        if len(kept) < len(rows):
            rows = [rows[at] for at in kept]
            select = torch.tensor(kept, device=device)
            cache.batch_select_indices(select)
            tokens, mask, positions = tokens[select], mask[select], positions[select]
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        output = model(
            input_ids=tokens[:, None], attention_mask=mask, position_ids=positions, logits_to_keep=1, **with_cache
        )
        logits, positions = output.logits[:, -1].float(), positions + 1  # [B, V]


def _choose(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Next token of each row, [B]; logits float32 [B, V]."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    probs = (logits / sampling.temperature).softmax(dim=-1)
    if sampling.top_p < 1:
        # Keep the smallest set of tokens whose probabilities reach top_p; the likeliest is always kept.
        sorted_probs, places = probs.sort(dim=-1, descending=True)
        outside = sorted_probs.cumsum(dim=-1) - sorted_probs >= sampling.top_p
        probs = probs.scatter(-1, places, sorted_probs.masked_fill(outside, 0.0))
    return probs.multinomial(1)[:, 0]


def _plain(
    model: Any,
    prompts: list[list[int]],
    sampling: Sampling,
    stop_ids: Collection[int],
    num_steps: int,
    ended: Callable[[], bool] = lambda: False,
) -> list[list[int]]:
    """The same through transformers' own generate, every prompt whole and padded on the left."""
    import torch
    from transformers import GenerationConfig, StoppingCriteriaList

    width = max(map(len, prompts))
    pad = min(stop_ids, default=0)
    input_ids = [[pad] * (width - len(ids)) + ids for ids in prompts]
    mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]
    settings: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        settings = {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": 0,
        }
    config_class: Any = GenerationConfig
    out = model.generate(
        input_ids=torch.tensor(input_ids, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        generation_config=config_class(
            max_new_tokens=num_steps, eos_token_id=sorted(stop_ids) or None, pad_token_id=pad, **settings
        ),
        stopping_criteria=StoppingCriteriaList(
            [lambda ids, scores: torch.full(ids.shape[:1], ended(), device=ids.device)]
        ),
    )
    rows: list[list[int]] = out[:, width:].tolist()
    return rows


def _check_room(model: Any, prompts: Sequence[Sequence[int]]) -> None:
    positions = model_length(model)
    long = [(i, len(ids)) for i, ids in enumerate(prompts, start=1) if len(ids) >= positions]
    if long:
        raise DataError(
            f"the model holds {positions:,} tokens, which leaves no room for an answer",
            details=[f"prompt {i} has {length:,} tokens" for i, length in long[:5]],
            todo="Shorten the prompts.",
        )


def model_length(model: Any) -> int:
    """Tokens that fit into the model; without such a limit in its config, as good as any number."""
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31)


@contextlib.contextmanager
def _inference(model: Any, seed: int) -> Iterator[None]:
    """Eval mode, no gradient, and a random state of our own: a training run's is left untouched."""
    import torch

    from espalier.tree.attention import set_attention
    from espalier.tree.loss import base_of

    was_training = model.training
    model.eval()
    set_attention(base_of(model), None)  # a loss may have left the tree's
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            yield
    finally:
        model.train(was_training)
