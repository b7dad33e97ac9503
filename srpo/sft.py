"""The supervised start: episodes as ids that a policy imitates before it sees a reward.

    loss = mean over trained tokens                              mean "tokens", as TRL's SFTTrainer
         = mean over rows of the mean over a row's tokens        mean "rows": an episode of 20 decisions weighs as
                                                                 much as one of 2

A token of a row is an id to imitate, or (`soft`, mean "rows") a distribution over ids: - sum_i p_i log pi(i), over the
whole vocabulary.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from srpo.config import SRPOConfig
from srpo.rollout.special_tokens import settle_special_tokens
from srpo.run.steps import check_steps_made
from srpo.task import Ids, RunArguments
from srpo.teacher.lm_head import capture_hidden, head_of
from srpo.texts import encode_frame, inside, opened_by
from srpo.trainer.precision import train_in_fp32
from srpo.trainer.progress import show_progress

Mean = Literal["tokens", "rows"]


class _Collator(DataCollatorForLanguageModeling):  # type: ignore[misc]
    """Adds `soft` [N, 4]: row, position, id and its probability."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = super().torch_call(examples)
        soft = [(row, *each) for row, example in enumerate(examples) for each in example.get("soft") or ()]
        return {**batch, "soft": torch.tensor(soft, dtype=torch.float64).view(-1, 4)}


class _Lines(DataCollatorForLanguageModeling):  # type: ignore[misc]
    """Rows behind one another, in lines no longer than the longest row, where `position_ids` begin anew with each.

    TRL's `padding_free` makes one line of a batch. Without flash attention its mask is a square of that line: work
    that grows with the square of the batch.
    """

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        width = max(len(example["input_ids"]) for example in examples)
        lines: list[list[dict[str, Any]]] = []
        free: list[int] = []
        for example in sorted(examples, key=lambda example: -len(example["input_ids"])):
            length = len(example["input_ids"])
            fits = [i for i, left in enumerate(free) if left >= length]
            if not fits:
                lines.append([])
                free.append(width)
            line = min(fits, key=free.__getitem__, default=len(free) - 1)
            lines[line].append(example)
            free[line] -= length

        def filled(parts: Callable[[dict[str, Any]], Sequence[int]], rest: Callable[[int], Sequence[int]]) -> Any:
            made = [[one for example in line for one in parts(example)] for line in lines]
            return torch.tensor([[*line, *rest(width - len(line))] for line in made])

        return {
            "input_ids": filled(lambda row: row["input_ids"], lambda left: [self.pad_token_id] * left),
            "labels": filled(lambda row: [-100, *row["labels"][1:]], lambda left: [-100] * left),
            "position_ids": filled(lambda row: range(len(row["input_ids"])), range),
            "tokens": torch.tensor(width * len(lines) - sum(free)),
        }


class _LinesSFT(SFTTrainer):
    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        uncounted = inputs.pop("tokens") - inputs["position_ids"].shape[1]  # TRL takes it for one line
        self._total_train_tokens += int(self.accelerator.reduce(uncounted))
        return super().compute_loss(model, inputs, *args, **kwargs)


class _RowsSFT(SFTTrainer):
    _signature_columns: list[str]  # TRL's

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = [*{*self._signature_columns, "soft"}]

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        soft = inputs.pop("soft")
        base = self.accelerator.unwrap_model(model)
        base = base.get_base_model() if is_peft_model(base) else base
        with capture_hidden(base) as captured:
            output = model(**inputs, use_cache=False, fused_lm_head=True)  # log-probs are 0 on masked positions
        rows, tokens = -output.log_probs.sum(dim=1), output.label_mask.sum(dim=1)
        if len(soft):
            places, which = soft[:, :2].long().unique(dim=0, return_inverse=True)
            row, position = places.T
            with (head := head_of(base)).gather():
                logp = head.logits(captured[0][row, position - 1]).log_softmax(dim=-1)
            cross = -soft[:, 3].to(logp) * logp[which, soft[:, 2].long()]
            rows = rows.to(cross).index_add(0, soft[:, 0].long(), cross)
            tokens = tokens.index_add(0, row, torch.ones_like(row).to(tokens))
        loss = (rows / tokens.clamp(min=1)).mean()
        if num_items_in_batch is not None:  # the Trainer then leaves the accumulation to the loss
            loss = loss / self.current_gradient_accumulation_steps
        return (loss, output) if return_outputs else loss


def check_unsharded() -> None:
    """ValueError, before anything is loaded, where the engine keeps weights in parts (ZeRO-3 by its own words)."""
    if {os.environ.get("ACCELERATE_USE_DEEPSPEED"), os.environ.get("ACCELERATE_USE_FSDP")} & {"true", "1"}:
        raise ValueError(
            "the supervised start runs on unsharded weights: make it with ddp.yaml and max_steps: 1, then give its "
            "OUTPUT/start as start_from to the sharded run"
        )


def sft_config(run: RunArguments, args: SRPOConfig, folder: Path, options: Mapping[str, Any]) -> SFTConfig:
    """The supervised start of a recipe; seed, device and precision are those of the training that follows.

    `options` are further fields of `SFTConfig`, of the task.
    """
    settings = {
        "output_dir": str(folder),
        "num_train_epochs": run.sft_epochs,
        "learning_rate": run.sft_learning_rate,
        "per_device_train_batch_size": run.sft_batch_size,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 10,
        "max_length": None,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 20,
        **{name: getattr(args, name) for name in ("seed", "use_cpu", "bf16", "fp16", "activation_checkpointing")},
    }
    return SFTConfig(**settings | dict(options))


def sft(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Ids],
    args: SFTConfig,
    *,
    mean: Mean = "tokens",
    peft_config: Any = None,
) -> PreTrainedModel:
    """Train on the policy's own tokens of ready-made episodes with TRL's ``SFTTrainer``; returns the trained model.

    Args:
        model: trained in place (with ``peft_config``: wrapped in a new adapter, which is what is trained).
        tokenizer: gets an end and a pad token where it lacks them (`srpo.rollout.special_tokens`).
        rows: ``input_ids``, and ``labels`` of the same length: -100 wherever the token is not the policy's, or one of
            ``soft``: (position, id, probability) of each id that may stand there, in rows of mean "rows".
        mean: how rows weigh, see above.

    Raises:
        ValueError: no rows, a row without a trained token (named by its number, from 0), or sharded weights.
    """
    if not rows:
        raise ValueError("the supervised start has no rows to imitate")
    for i, row in enumerate(rows):
        if len(row["input_ids"]) != len(row["labels"]) or all(label == -100 for label in row["labels"]):
            raise ValueError(f"row {i}: needs as many labels as input_ids, and at least one that is not -100")
    settle_special_tokens(model, tokenizer)
    made: type[SFTTrainer] = _RowsSFT if mean == "rows" else SFTTrainer
    collator = _Collator(tokenizer.pad_token_id) if mean == "rows" else None
    if args.padding_free and "flash" not in str(model.config._attn_implementation):
        args = copy.copy(args)
        args.padding_free = False
        if not model._is_stateful:  # a state would go on from one row into the next
            made, collator = _LinesSFT, _Lines(tokenizer.pad_token_id)
    trainer = made(
        model=model,
        args=args,
        train_dataset=Dataset.from_list([dict(row) for row in rows]),
        processing_class=tokenizer,
        peft_config=peft_config,
        data_collator=collator,
    )
    zero3 = args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3
    if zero3 or trainer.accelerator.distributed_type == "FSDP":
        raise ValueError(
            "the supervised start runs on unsharded weights, so that it can be saved and played with: make it in a "
            "run with ddp.yaml or zero2.yaml, and give the sharded run what that one saved"
        )
    train_in_fp32(trainer.model, args)
    show_progress(trainer, "sft")
    trainer.train()
    check_steps_made(trainer.state.global_step, "the supervised start")
    config = trainer.model.config.get_text_config()
    if hasattr(config, "output_router_logits"):
        config.output_router_logits = False  # switched on by the trainer, for its auxiliary loss; breaks `generate`
    return trainer.model


def encode_turn(
    row: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    ends: Sequence[int],
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Ids:
    """A prompt and one answer as ids: the prompt as the policy will see it, the answer as it should write it.

    The chat template writes the prompt only. Templates of reasoning models drop the think block of an answer or open
    one in the generation prompt; others close an answer with a token that ends nothing (`<|im_end|>` where the end
    token is `<|endoftext|>`).

    Args:
        row: ``prompt`` and ``completion``, chat messages each.
        ends: ids that end a turn, as `srpo.rollout.special_tokens.settle_special_tokens` returns them.
        chat_template_kwargs: as the policy's prompts are rendered afterwards.
    """
    prompt: list[int] = tokenizer.apply_chat_template(
        row["prompt"], add_generation_prompt=True, tokenize=True, return_dict=False, **(chat_template_kwargs or {})
    )
    answer = encode_frame(tokenizer, inside(opened_by(tokenizer, prompt), row["completion"][-1]["content"]))
    answer += [ends[0]]
    return {"input_ids": [*prompt, *answer], "labels": [-100] * len(prompt) + answer}
