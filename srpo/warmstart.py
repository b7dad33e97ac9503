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
        rows: ``{"prompt": [messages], "completion": [messages]}``; the loss is on the completion only.
        args: as for ``SFTTrainer``. ``completion_only_loss`` must not be False.
        peft_config: a PEFT configuration, or None.

    Raises:
        ValueError: no rows, or a row without prompt or completion (named by its number, from 0).
    """
    if not rows:
        raise ValueError("the warm start has no rows")
    if args.completion_only_loss is False:
        raise ValueError("the warm start trains on completions only: leave completion_only_loss unset")
    for i, row in enumerate(rows):
        if not row.get("prompt") or not row.get("completion"):
            raise ValueError(f"row {i} of the warm start has no prompt or no completion")
    dataset = Dataset.from_list([{"prompt": row["prompt"], "completion": row["completion"]} for row in rows])
    trainer = SFTTrainer(
        model=model, args=args, train_dataset=dataset, processing_class=tokenizer, peft_config=peft_config
    )
    trainer.train()
    return trainer.model
