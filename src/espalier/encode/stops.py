"""Which tokens end a turn, and whether the tokenizer's ids fit the model's table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from espalier.encode.template import ChatTemplate
from espalier.errors import ModelError, TemplateError

_PROBES = (
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
)


def turn_end_ids(tokenizer: Any, template: ChatTemplate) -> list[int]:
    """Ids that end a trained turn under this template (mostly one); empty where the template refuses every probe."""
    for probe in _PROBES:
        try:
            text = template.render(probe)
        except TemplateError:
            continue
        end = template.turn_end(text)
        if end is not None:
            last = list(template.special_pattern.finditer(text, 0, end))[-1].group()
            return [int(tokenizer.convert_tokens_to_ids(last))]
    return []


def generation_stop_ids(
    tokenizer: Any, template: ChatTemplate, generation_config_eos: int | Sequence[int] | None = None
) -> list[int]:
    """Ids at which chat must stop: the trained turn ends, the tokenizer's eos, the generation config's; ascending."""
    stops = set(turn_end_ids(tokenizer, template))
    if tokenizer.eos_token_id is not None:
        stops.add(int(tokenizer.eos_token_id))
    if isinstance(generation_config_eos, int):
        stops.add(generation_config_eos)
    elif generation_config_eos is not None:
        stops.update(int(i) for i in generation_config_eos)
    return sorted(stops)


def check_vocabulary(tokenizer: Any, num_embedding_rows: int, *, max_used_id: int | None = None) -> None:
    """Raises ModelError where the tokenizer has ids beyond the model's embedding table.

    A table with more rows than the tokenizer has ids (padded vocabularies) is fine. With max_used_id, the largest id
    that the data uses, ids that no row uses are fine too.
    """
    num_ids = max(tokenizer.get_vocab().values()) + 1
    if num_ids <= num_embedding_rows or (max_used_id is not None and max_used_id < num_embedding_rows):
        return
    by_id = {i: token for token, i in tokenizer.get_vocab().items() if i >= num_embedding_rows}
    shown = ", ".join(f"{by_id[i]!r} = {i}" for i in sorted(by_id)[:5])
    raise ModelError(
        f"tokenizer has {num_ids} ids, model has {num_embedding_rows} rows; without a row: {shown}",
        todo="Use the tokenizer that came with the model, or resize the model's embeddings before training.",
    )
