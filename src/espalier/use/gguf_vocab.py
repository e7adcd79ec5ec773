"""A fast tokenizer as GGUF's vocabulary: tokens, types, merges, special tokens, chat template."""

from __future__ import annotations

import json
from typing import Any

from espalier.encode.stops import check_vocabulary, turn_end_ids
from espalier.encode.template import ChatTemplate, starts_with_bos
from espalier.errors import ModelError
from espalier.use.layout import server_adds_bos

# The splits before byte-level BPE that llama.cpp knows by a name. Digits apart, then GPT-2's pattern, is `smollm`.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPACE = "\u2581"
SPLITS = {LLAMA3_SPLIT: "llama-bpe", LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}"): "qwen2"}


def add_vocabulary(writer: Any, tokenizer: Any, rows: int) -> None:
    """Write the tokenizer's part of a GGUF file; rows: those of the embedding table, the rest is filled with names.

    Raises ModelError for a tokenizer with more ids than rows, and for one whose splitting llama.cpp has no name for: it
    would read other tokens.
    """
    check_vocabulary(tokenizer, rows)
    form = json.loads(tokenizer.backend_tokenizer.to_str())
    if form["model"]["type"] != "BPE":
        raise ModelError(f"no GGUF can be written for a tokenizer of kind {form['model']['type']}")
    if form["model"].get("byte_fallback"):
        _add_sentencepiece(writer, form, tokenizer, rows)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(split_name(form.get("pre_tokenizer")))
        tokens, types = _tokens(form, rows)
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in form["model"]["merges"]])
    _add_special(writer, tokenizer)


def split_name(pre_tokenizer: dict[str, Any] | None) -> str:
    """llama.cpp's name of a byte-level tokenizer's split. Raises ModelError for one that it does not know."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer] if pre_tokenizer else [])
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and steps[1].get("use_regex", True):
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        name = SPLITS.get(steps[0]["pattern"].get("Regex", ""))
        if name is not None:
            return name
    raise ModelError(
        f"llama.cpp has no name for this tokenizer's split ({' + '.join(kinds) or 'none'})",
        todo="It would read other tokens than were trained. Use llama.cpp's own converter on the merged folder.",
    )


def _tokens(form: dict[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """(texts, types), one an embedding row; rows that no token has are named [PAD<id>] and marked unused."""
    import gguf

    kind = gguf.TokenType
    texts = [f"[PAD{i}]" for i in range(rows)]
    types = [int(kind.UNUSED)] * rows
    for text, i in form["model"]["vocab"].items():
        texts[i], types[i] = text, int(kind.NORMAL)
    for token in form["added_tokens"]:
        texts[token["id"]] = token["content"]
        types[token["id"]] = int(kind.CONTROL if token["special"] else kind.USER_DEFINED)
    return texts, types


def _add_sentencepiece(writer: Any, form: dict[str, Any], tokenizer: Any, rows: int) -> None:
    """BPE with byte fallback (Llama 2, Gemma). llama.cpp merges by score: minus the rank of the merge that makes it."""
    import gguf

    _check_sentencepiece(form)
    tokens, types = _tokens(form, rows)
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(form["model"]["merges"]):
        ranks.setdefault("".join(pair) if not isinstance(pair, str) else pair.replace(" ", ""), rank)
    for i, text in enumerate(tokens):
        if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            types[i] = int(gguf.TokenType.BYTE)
        elif text == form["model"].get("unk_token"):
            types[i] = int(gguf.TokenType.UNKNOWN)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(ranks.get(text, len(ranks))) for text in tokens])
    writer.add_token_types(types)
    writer.add_add_space_prefix(_space_prefix(tokenizer))


def _check_sentencepiece(form: dict[str, Any]) -> None:
    """Raise ModelError where llama.cpp would join other tokens than BPE does.

    llama.cpp joins any two neighbours that make a token, BPE those of its list of pairs. Both agree where the list
    holds every pair that makes a token, and the pairs of one token stand together; so it is in tokenizers that were
    converted from sentencepiece.
    """
    unlike = [step["type"] for step in _steps(form.get("normalizer"), "normalizers") if not _plain_step(step)]
    unlike += [step["type"] for step in _steps(form.get("pre_tokenizer"), "pretokenizers") if not _plain_step(step)]
    if unlike:
        raise ModelError(
            f"llama.cpp does not do what this tokenizer does to a text first: {', '.join(unlike)}",
            todo="It would read other tokens than were trained.",
        )
    vocabulary = form["model"]["vocab"]
    pairs = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in form["model"]["merges"]]
    known = set(pairs)
    skipped = {token["content"] for token in form["added_tokens"]}
    skipped |= {text for text in vocabulary if text.startswith("<0x") and text.endswith(">")}
    wrong = [
        f"{text[:cut]!r} + {text[cut:]!r}"
        for text in vocabulary
        if text not in skipped
        for cut in range(1, len(text))
        if text[:cut] in vocabulary and text[cut:] in vocabulary and (text[:cut], text[cut:]) not in known
    ]
    made = [left + right for left, right in pairs]
    seen: set[str] = set()
    for before, text in zip(["", *made], made, strict=False):
        if text in seen and text != before:
            wrong.append(f"{text!r}, whose pairs have ranks of their own")
        seen.add(text)
    if wrong:
        raise ModelError(
            f"llama.cpp would join tokens otherwise than this tokenizer does, in {len(wrong)} cases",
            details=wrong[:5],
            todo="It would read other tokens than were trained.",
        )


def _steps(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    return [] if part is None else part.get(key, [part])


def _plain_step(step: dict[str, Any]) -> bool:
    """Marks blanks by \u2581, and no more."""
    return (
        step == {"type": "Prepend", "prepend": SPACE}
        or (step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"] == SPACE)
        or (step["type"] == "Metaspace" and step["replacement"] == SPACE and not step.get("split", True))
        or (step["type"] == "Split" and step["pattern"] == {"String": " "})  # none are left by then
    )


def _space_prefix(tokenizer: Any) -> bool:
    """Whether texts, also those after a special token, get a blank in front. Raises ModelError where they differ."""

    def blank(before: str) -> bool:
        ids = tokenizer(f"{before}a", add_special_tokens=False)["input_ids"]
        return bool(tokenizer.convert_ids_to_tokens(ids)[1 if before else 0].startswith(SPACE))

    first, later = blank(""), blank(tokenizer.bos_token or tokenizer.eos_token or "")
    if first != later and not _starts_special(tokenizer):
        raise ModelError(
            "this tokenizer puts a blank before the first text only; llama.cpp puts one before all or none",
            todo="It would read other tokens than were trained.",
        )
    return later


def _starts_special(tokenizer: Any) -> bool:
    """The chat template begins with a special token, so that no text is the first."""
    template = ChatTemplate(tokenizer, "tokenizer's own", "")
    return bool(template.special_pattern.match(template.try_render([{"role": "user", "content": "a"}])))


def _add_special(writer: Any, tokenizer: Any) -> None:
    for name in ("bos", "eos", "pad", "unk"):
        token_id = getattr(tokenizer, f"{name}_token_id")
        if token_id is not None:
            getattr(writer, f"add_{name}_token_id")(token_id)
    template = ChatTemplate(tokenizer, "tokenizer's own", "")
    ends = turn_end_ids(tokenizer, template) if tokenizer.chat_template else []
    if ends and ends[0] != tokenizer.eos_token_id:
        writer.add_eot_token_id(ends[0])
    writer.add_add_bos_token(server_adds_bos(template) if tokenizer.chat_template else starts_with_bos(tokenizer))
    writer.add_add_eos_token(False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
