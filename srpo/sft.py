"""Supervised warm start: what a policy is taught before any reward is seen, by texts or by whole episodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from srpo.rollout.special_tokens import settle_special_tokens
from srpo.rollout.thinking import inside, opened_by
from srpo.rollout.untrusted import encode_frame
from srpo.run.steps import check_steps_made
from srpo.trainer.precision import train_in_fp32


class _EpisodeSFT(SFTTrainer):
    """Every episode weighs the same: the mean over rows of the mean over a row's trained tokens.

    A batch sampled whole counts its tokens, so that an episode of 20 decisions would weigh ten times one of 2.
    """

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        output = model(**inputs, use_cache=False, fused_lm_head=True)  # log-probs are 0 on masked positions
        rows = -output.log_probs.sum(dim=1) / output.label_mask.sum(dim=1).clamp(min=1)
        loss = rows.mean()
        if num_items_in_batch is not None:  # the Trainer then leaves the accumulation to the loss
            loss = loss / self.current_gradient_accumulation_steps
        return (loss, output) if return_outputs else loss


def imitate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict[str, list[int]]],
    args: SFTConfig,
    peft_config: Any = None,
) -> PreTrainedModel:
    """Train on the policy's own tokens of ready-made episodes, and return the trained model.

    Args:
        rows: ``{"input_ids": [...], "labels": [...]}``, labels -100 wherever the token is not the policy's. Every
            row weighs the same, its n trained tokens 1/n each.
        model, tokenizer, args, peft_config: as in ``warm_start``.

    Raises:
        ValueError: no rows, or a row without a trained token (named by its number, from 0).
    """
    if not rows:
        raise ValueError("there are no episodes to imitate")
    for i, row in enumerate(rows):
        if len(row["input_ids"]) != len(row["labels"]) or all(label == -100 for label in row["labels"]):
            raise ValueError(f"row {i}: needs as many labels as input_ids, and at least one that is not -100")
    settle_special_tokens(model, tokenizer)
    dataset = Dataset.from_list([dict(row) for row in rows])
    return _trained(_EpisodeSFT, model, tokenizer, dataset, args, peft_config)


def warm_start(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict[str, Any]],
    args: SFTConfig,
    peft_config: Any = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """Train on the completions of ``rows`` with TRL's ``SFTTrainer`` and return the trained model.

    Args:
        model: trained in place (with ``peft_config``: wrapped in a new adapter, which is what is trained).
        tokenizer: with a chat template; it gets an end and a pad token where it lacks them
        (`srpo.rollout.special_tokens`). rows: ``{"prompt": [messages], "completion": [messages]}``; the loss is on the
        completion only. Or, where the
            loss skips parts (what the world said between two turns), ``{"input_ids": [ids], "labels": [ids]}`` with
            -100 at tokens without loss.
        args: as for ``SFTTrainer``. ``completion_only_loss`` must not be False.
        peft_config: a PEFT configuration, or None.
        chat_template_kwargs: as the policy's prompts are rendered afterwards.

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
    ends = settle_special_tokens(model, tokenizer)
    if fields[0] == "prompt" and not all(_rendered(row, tokenizer, ends, chat_template_kwargs) for row in rows):
        fields, rows = ("input_ids", "labels"), [_encoded(row, tokenizer, chat_template_kwargs) for row in rows]
    dataset = Dataset.from_list([{name: row[name] for name in fields} for row in rows])
    return _trained(SFTTrainer, model, tokenizer, dataset, args, peft_config)


def _trained(
    trainer_class: type[SFTTrainer],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    args: SFTConfig,
    peft_config: Any,
) -> PreTrainedModel:
    trainer = trainer_class(
        model=model, args=args, train_dataset=dataset, processing_class=tokenizer, peft_config=peft_config
    )
    zero3 = args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3
    if zero3 or trainer.accelerator.distributed_type == "FSDP":
        raise ValueError(
            "the warm start runs on unsharded weights, so that it can be saved and played with: make it in a run "
            "with ddp.yaml or zero2.yaml, and give the sharded run what that one saved"
        )
    train_in_fp32(trainer.model, args)
    trainer.train()
    check_steps_made(trainer.state.global_step, "the supervised training")
    config = trainer.model.config.get_text_config()
    if hasattr(config, "output_router_logits"):
        config.output_router_logits = False  # switched on by the trainer, for its auxiliary loss; breaks `generate`
    return trainer.model


def _rendered(row: Mapping[str, Any], tokenizer: Any, ends: Sequence[int], options: Mapping[str, Any] | None) -> bool:
    """Whether TRL's way trains what will be sampled: the chat template goes on from the generation prompt, in full.

    Templates of reasoning models drop the think block of an answer, or open one in the generation prompt only. Others
    close an answer with a token that ends nothing (`<|im_end|>` where the end token is `<|endoftext|>`). TRL knows
    nothing of `chat_template_kwargs` here either.
    """
    if options:
        return False
    prompt = _prompt_ids(row, tokenizer, {})
    messages = [*row["prompt"], *row["completion"]]
    whole = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    text = "".join(inside(opened_by(tokenizer, prompt), row["completion"][-1]["content"]).split())
    shown = "".join(tokenizer.decode(whole[len(prompt) :]).split())
    return whole[: len(prompt)] == prompt and text in shown and not {*ends}.isdisjoint(whole[len(prompt) :])


def _encoded(row: Mapping[str, Any], tokenizer: Any, options: Mapping[str, Any] | None) -> dict[str, list[int]]:
    """A row as ids: the prompt as the policy will see it, its answer as it should write it, and the end token."""
    prompt = _prompt_ids(row, tokenizer, options or {})
    answer = encode_frame(tokenizer, inside(opened_by(tokenizer, prompt), row["completion"][-1]["content"]))
    answer += [tokenizer.eos_token_id]
    return {"input_ids": [*prompt, *answer], "labels": [-100] * len(prompt) + answer}


def _prompt_ids(row: Mapping[str, Any], tokenizer: Any, options: Mapping[str, Any]) -> list[int]:
    ids: list[int] = tokenizer.apply_chat_template(
        row["prompt"], add_generation_prompt=True, tokenize=True, return_dict=False, **options
    )
    return ids
