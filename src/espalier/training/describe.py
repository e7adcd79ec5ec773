"""What the header says of a trainer: its tree, and the norms that are computed by a forward of ours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from espalier.training.step import StepBatch
    from espalier.training.trainer import LoraTrainer


def describe_norms(trainer: LoraTrainer) -> str:
    """The end of the header's line on layers: how many norms are computed by which forward."""
    if not trainer.fast_norms:
        return ""
    rest = f", {trainer.stock_norms} as they are" if trainer.stock_norms else ""
    return f"; fused norms: {trainer.fast_norms}{rest}"


def describe_tree(trainer: LoraTrainer) -> str:
    """One line: what is shared, how, and what the first step gains."""
    collator: Any = trainer.data_collator
    batch: StepBatch = collator(trainer.first_rows())
    if not trainer.options.tree:
        why = trainer.support.reason or "--tree off"
        return f"off ({why}): padded rows, {batch.unique_tokens:,} positions for {batch.logical_tokens:,} tokens"
    shared = "on" + (f" ({trainer.support.reason})" if trainer.support.reason else "")
    dropout = max((float(getattr(c, "lora_dropout", 0.0)) for c in trainer.model.peft_config.values()), default=0.0)
    if dropout:
        shared += f" (dropout {dropout:g}: rows that share a token share its draw, equal in expectation)"
    if trainer.ranks.world > 1:
        shared += f"; steps are dealt to {trainer.ranks.world} processes by shared beginnings"
    return (
        f"{shared}; first step: {len(batch.rows)} rows of {batch.logical_tokens:,} tokens in {len(batch.packs)} "
        f"pack{'s' if len(batch.packs) > 1 else ''} of {batch.unique_tokens:,} tokens "
        f"({batch.logical_tokens / batch.unique_tokens:.1f} times less); "
        f"attention {trainer.attention}: {trainer.attention_reason}"
    )
