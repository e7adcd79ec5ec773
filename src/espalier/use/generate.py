"""Text from a model: greedy or sampled, batched, with the prompts' shared beginning computed once; and streamed.

The shared beginning of all prompts goes through the model once with a batch of one; its key-value cache is repeated
for every batch of leftovers. `share_prefix=False` is the plain twin: transformers' own generate on padded prompts.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from espalier.errors import DataError

if TYPE_CHECKING:
    import torch

# Below this many shared tokens a second forward costs more than it saves.
MIN_SHARED_TOKENS = 16


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
    batch_size: int = 16,
    sampling: Sampling | None = None,
    share_prefix: bool = True,
) -> list[Generated]:
    """An answer for each prompt (token ids, not empty), in their order.

    An answer ends before the first of `stop_ids`, after max_new_tokens, or where the model's positions end. Prompts
    of like length go into one batch. The model is put into eval mode for the time, and no gradient is kept. Raises
    DataError for prompts that leave no room in the model.
    """
    sampling = sampling or Sampling()
    _check_room(model, prompts)
    answers: dict[int, Generated] = {}
    with _inference(model, sampling.seed):
        shared = _shared_length(prompts) if share_prefix and len(prompts) > 1 and keeps_plain_cache(model) else 0
        prefix = _prefill(model, list(prompts[0][:shared])) if shared >= MIN_SHARED_TOKENS else None
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for first in range(0, len(order), batch_size):
            chosen = order[first : first + batch_size]
            batch = [list(prompts[i]) for i in chosen]
            room = min(max_new_tokens, model_length(model) - max(map(len, batch)))
            if prefix is not None:
                suffixes = [ids[shared:] for ids in batch]
                steps = _decode_steps(model, suffixes, sampling, stop_ids, room, copy.deepcopy(prefix))
                rows = [list(row) for row in zip(*steps, strict=True)]
            else:
                rows = _plain(model, batch, sampling, stop_ids, room)
            for i, ids in zip(chosen, rows, strict=True):
                answers[i] = _answer(tokenizer, ids, stop_ids)
    return [answers[i] for i in range(len(prompts))]


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
        for tokens in _decode_steps(model, [list(prompt)], sampling, stop_ids, room):
            ids.append(tokens[0])
            if tokens[0] not in stop_ids and (piece := decoder.push(tokens[0])):
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


def _shared_length(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that all prompts begin with; each prompt keeps at least one of its own."""
    # The first and the last in sorted order share what all share.
    low, high = min(prompts, key=list), max(prompts, key=list)
    limit = min(map(len, prompts)) - 1
    return next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b or i == limit), limit)


def _prefill(model: Any, ids: list[int]) -> Any:
    """The key-value cache of `ids`, batch of one."""
    import torch
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    with_cache = {_cache_argument(model): cache, "use_cache": True}
    model(input_ids=torch.tensor([ids], device=model.device), logits_to_keep=1, **with_cache)
    return cache


def _cache_argument(model: Any) -> str:
    """What the model's forward calls its cache: `cache` from transformers 5.24 on, `past_key_values` before."""
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "cache" if "cache" in inspect.signature(bare.forward).parameters else "past_key_values"


def _decode_steps(
    model: Any,
    suffixes: list[list[int]],
    sampling: Sampling,
    stop_ids: Collection[int],
    num_steps: int,
    cache: Any = None,
) -> Iterator[list[int]]:
    """Yield one token a row and step until every row has stopped (a stopped row repeats its stop token).

    cache: that of the beginning all rows share, batch of one, or None. Suffixes are padded on the left, between the
    shared beginning and themselves; the mask hides the padding and the positions skip it.
    """
    import torch
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config) if cache is None else cache
    shared, width, rows = cache.get_seq_length(), max(map(len, suffixes)), len(suffixes)
    cache.batch_repeat_interleave(rows)
    with_cache = {_cache_argument(model): cache, "use_cache": True}
    device = model.device
    input_ids = torch.tensor([[0] * (width - len(ids)) + ids for ids in suffixes], device=device)  # [B, W]
    real = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in suffixes], device=device)  # [B, W]
    mask = torch.cat([real.new_ones(rows, shared), real], dim=1)  # [B, P + W]
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, shared:]  # [B, W]
    stops = torch.tensor(sorted(stop_ids), device=device, dtype=torch.long)
    stopped = torch.zeros(rows, dtype=torch.bool, device=device)
    tokens = input_ids[:, -1]
    for _ in range(num_steps):
        logits = model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=positions,
            logits_to_keep=1,
            **with_cache,
        ).logits[:, -1]  # [B, V]
        tokens = torch.where(stopped, tokens, _choose(logits.float(), sampling))
        stopped = stopped | torch.isin(tokens, stops)
        yield tokens.tolist()
        if bool(stopped.all()):
            return
        input_ids, positions = tokens[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(rows, 1)], dim=1)


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

    was_training = model.training
    model.eval()
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            yield
    finally:
        model.train(was_training)
