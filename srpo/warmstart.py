"""Supervised warm start: teaches a policy the format of its turn before any reward is seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer


def warm_start(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict[str, Any]],
    args: SFTConfig,
    peft_config: Any = None,
) -> PreTrainedModel:
    """Train on the completions of ``rows`` with TRL's ``SFTTrainer`` and return the trained model.

    Args:
        model: trained in place (with ``peft_config``: wrapped in a new adapter, which is what is trained).
        tokenizer: with a chat template and a pad token.
        rows: ``{"prompt": [messages], "completion": [messages]}``; the loss is on the completion only. Or, where the
            loss skips parts (what the world said between two turns), ``{"input_ids": [ids], "labels": [ids]}`` with
            -100 at tokens without loss.
        args: as for ``SFTTrainer``. ``completion_only_loss`` must not be False.
        peft_config: a PEFT configuration, or None.

    Raises:
        ValueError: no rows, a row without its two fields, or labels that do not fit (named by its number, from 0).
    """
    if not rows:
        raise ValueError("the warm start has no rows")
    if args.completion_only_loss is False:
        raise ValueError("the warm start trains on completions only: leave completion_only_loss unset")
    fields = ("input_ids", "labels") if "input_ids" in rows[0] else ("prompt", "completion")
    for i, row in enumerate(rows):
        if not row.get(fields[0]) or not row.get(fields[1]):
            raise ValueError(f"row {i} of the warm start has no {fields[0]} or no {fields[1]}")
        if fields[0] == "input_ids" and len(row["labels"]) != len(row["input_ids"]):
            raise ValueError(f"row {i} of the warm start has {len(row['labels'])} labels, not one per input id")
    dataset = Dataset.from_list([{name: row[name] for name in fields} for row in rows])
    trainer = SFTTrainer(
        model=model, args=args, train_dataset=dataset, processing_class=tokenizer, peft_config=peft_config
    )
    trainer.train()
    config = trainer.model.config.get_text_config()
    if hasattr(config, "output_router_logits"):
        config.output_router_logits = False  # switched on by the trainer, for its auxiliary loss; breaks `generate`
    return trainer.model
