"""Rows for the scripts of this folder, as training has them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from espalier.encode.encode import Encoded, Encoder
from espalier.encode.length import length_limit
from espalier.encode.store import encode_files
from espalier.encode.template import resolve_template
from espalier.model.load import load_config, load_tokenizer, resolve_model


def encoded_rows(data: Path, model: str) -> Sequence[Encoded]:
    """The rows of a file by the model's own tokenizer, template and limit."""
    ref = resolve_model(model)
    tokenizer = load_tokenizer(ref)
    limit, _ = length_limit(None, tokenizer, load_config(ref))
    encoder = Encoder(tokenizer, resolve_template(tokenizer, None), max_length=limit)
    return encode_files([str(data)], encoder).dataset
