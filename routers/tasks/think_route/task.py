"""Train an agent that thinks, asks models, reads their replies and answers: warm start -> RL -> held-out evaluation.

    accelerate launch scripts/train_think_route.py --config recipes/quickstart/think_route.yaml
    accelerate launch scripts/train_think_route.py --config recipes/quickstart/think_route.yaml --objective grpo
    accelerate launch scripts/train_think_route.py --config RECIPE --pool endpoint --catalogue endpoints.yaml

Every line of the recipe is a field of `TaskArguments` (scripts/think_route_setup.py) or of `srpo.SRPOConfig`. The
output directory holds the policy with its `agent.yaml`, `warm_start/`, `agent_evaluation.json`, the completions of
every step as parquet, and the resolved recipe.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from routers.data.table import ReplyTable, spread
from routers.evaluation.agent_report import AGENT_EVALUATION, AgentEvaluation
from routers.pool.reasoning import split_reasoning
from routers.tasks.think_route.agent_parts import without_control_tokens
from routers.tasks.think_route.evaluate import evaluate_agent
from routers.tasks.think_route.settings import AgentSettings
from routers.tasks.think_route.sft_rows import Demonstration, copy_drills, demonstrations, restricted
from routers.tasks.think_route.world import (
    TaskArguments,
    load_questions,
    load_replies,
    make_pool,
    make_rewards,
    make_settings,
    make_world,
    prompt_of,
    seen_members,
    tiny_corpus,
    with_cost_weight,
)
from srpo import SRPOConfig, SRPOTrainer
from srpo.checks import check_rows
from srpo.policy import check_policy, load_policy, warm_start_config, with_adapter
from srpo.recipe import Recipe, load_recipe, resolved_recipe
from srpo.rollout.loop import observation_ids
from srpo.rollout.thinking import inside, opened_by
from srpo.rollout.untrusted import encode_frame
from srpo.run.derived import check_made_from, is_made_from, made_from, mark, source, unmark
from srpo.run.folder import RunArguments, claim, finish
from srpo.run.steps import check_rows_of_a_batch
from srpo.sft import warm_start

ARGUMENTS = (TaskArguments, RunArguments, SRPOConfig)
"""What a line of a recipe may set."""


def main(argv: Sequence[str] | None = None) -> AgentEvaluation | None:
    """Run a recipe; returns the held-out evaluation on the main process, None on the others."""
    recipe = load_recipe(ARGUMENTS, argv)
    task, how, args = recipe
    state, resume = PartialState(), args.resume_from_checkpoint
    check_policy(task.model_name_or_path)
    resumes, warm_starts = resume is not None, task.warm_start_passes > 0
    start = (Path(resume).parent if resume is not None else Path(args.output_dir)) / "warm_start"
    warmed, evaluated = _made_from(recipe)
    if resumes and warm_starts:
        check_made_from(start, warmed, "the warm start that the checkpoint began from")
    claimed = claim(recipe, args.output_dir, overwrite=how.overwrite, resume=resume)
    table = load_replies(task, claimed.notes)
    train, heldout = load_questions(task, table, claimed.notes)
    check_rows_of_a_batch(len(train), args, "the training questions")
    pool = make_pool(task, table, args.max_cost_usd)
    names = seen_members(task, pool)
    settings = make_settings(task, args, [pool.members[name] for name in names])
    rewards, args.reward_weights = make_rewards(task, settings.members)
    train = [with_cost_weight(row, settings) for row in train]
    args.stop_strings = list(settings.grammar.stops)

    set_seed(args.seed)
    # A resumed run must begin from the very weights that the first run began from: the saved warm start.
    policy = str(start) if resumes and warm_starts else task.model_name_or_path
    model, tokenizer = load_policy(policy, args, task.lora_r, lambda: tiny_corpus(settings, train, table, args))
    world = make_world(task, settings, pool, names, tokenizer)
    clean = without_control_tokens(tokenizer)
    quarantine = claimed.notes / "quarantine.jsonl"
    rows = [{"prompt": prompt_of(row, settings, settings.members, clean), **row} for row in train]
    dataset = check_rows(
        rows,
        tokenizer=tokenizer,
        max_prompt_length=task.max_prompt_length,
        quarantine_path=quarantine,
        max_bad_share=task.max_bad_share,
        chat_template_kwargs=args.chat_template_kwargs,
    )
    check_rows_of_a_batch(len(dataset), args, f"the training data, without what {quarantine} lists,")
    examples = []
    if warm_starts and not resumes:
        examples = warm_start_rows(task, args, settings, table, train, tokenizer)
    # All that can be found wrong before something is trained has been looked for: the folder is this run's now.
    output = claimed.take()
    model = with_adapter(model, tokenizer, policy, args, task.lora_r)

    def evaluate(
        policy: PreTrainedModel, name: str, members: Sequence[str], weight: float | None = None
    ) -> AgentEvaluation:
        recorded = task.pool == "recorded"
        return evaluate_agent(
            policy,
            tokenizer,
            make_world(task, settings, make_pool(task, table), members, tokenizer),  # not on the training's ledger
            settings,
            [with_cost_weight(row, settings, weight) for row in heldout],
            (rewards, args.reward_weights),
            name=name,
            train=[with_cost_weight(row, settings, weight) for row in train] if recorded else (),
            baselines=recorded,  # endpoints would be asked for every question: scripts/evaluate_think_route.py does
        )

    before, scores = None, start / AGENT_EVALUATION
    if warm_starts and not resumes:
        config = warm_start_config(
            args,
            start,
            epochs=1,
            learning_rate=task.warm_start_learning_rate,
            batch_size=task.warm_start_batch_size,
            adam_beta2=0.95,  # some hundred steps are too few for a memory of a thousand
            # Drills are a quarter as long as episodes: rows of a batch stand in one line instead of being padded.
            padding_free=task.warm_start_drills > 0,
        )
        model = warm_start(model, tokenizer, examples, config)
        if state.is_main_process:
            unmark(start)
            _save(model, tokenizer, settings, start)
            mark(start, warmed)
    if warm_starts and state.is_main_process:
        if resumes and is_made_from(scores, evaluated):
            before = AgentEvaluation.read(start)
        else:
            before = evaluate(model, "warm start", names)
            before.write(start)
            mark(scores, evaluated)
    state.wait_for_everyone()

    trainer = SRPOTrainer(
        model,
        rewards,
        args,
        dataset,
        processing_class=tokenizer,
        environment=world,
        recipe=resolved_recipe(recipe),
    )
    trainer.save_beside = settings.save
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()

    after = None
    if state.is_main_process:
        final = trainer.accelerator.unwrap_model(trainer.model)
        after = evaluate(final, args.objective, names)
        after.write(output)
        trainer.heldout_table = after.text(before, markdown=True)
        print(after.text(before))
        for weight in settings.cost_weights:  # one checkpoint, one point of its frontier each
            point = evaluate(final, f"{args.objective}, price sensitivity {weight:g}", names, weight)
            point.write(output / f"cost_weight_{weight:g}")
            print(point.text())
        if task.unseen_members:
            added = evaluate(final, f"{args.objective}, {', '.join(task.unseen_members)} added", list(pool.members))
            added.write(output / "unseen")
            print(added.text())
    trainer.create_model_card(model_name=output.name)
    if args.push_to_hub:
        trainer.push_to_hub()
    finish(output)
    return after


def _made_from(recipe: Recipe) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the warm start is made from, and what its evaluation is, beside that."""
    task, _, args = recipe
    of_task = """lora_r train_limit members unseen_members replies prompt forward_empty cost_weights warm_start_passes
        warm_start_learning_rate warm_start_batch_size warm_start_limit warm_start_drills"""
    of_args = "seed bf16 fp16 chat_template_kwargs max_observation_tokens"
    warmed = made_from(
        model_name_or_path=task.model_name_or_path,
        model=source(task.model_name_or_path),
        table=source(task.table),
        catalogue=source(task.catalogue),
        **{name: getattr(task, name) for name in of_task.split()},
        **{name: getattr(args, name) for name in of_args.split()},
    )
    names = """eval_limit question_seed pool agent_prompt failed_call policy_price_in policy_price_out metric reward
        cost_weight format_weight cost_scale_usd"""
    limits = {name: getattr(args, name) for name in ("max_completion_length", "max_turns", "max_turn_tokens")}
    return warmed, made_from(**warmed, **{name: getattr(task, name) for name in names.split()}, **limits)


def warm_start_rows(
    task: TaskArguments,
    args: SRPOConfig,
    settings: AgentSettings,
    table: ReplyTable,
    train: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
) -> list[dict[str, list[int]]]:
    """Episodes as ids, as the rollout would have made them, with labels on the policy's tokens only."""
    rng = np.random.default_rng(args.seed)
    queries = [train[i] for i in spread(len(train), task.warm_start_limit)]
    names = [member.name for member in settings.members]
    shown, clean = restricted(table, names), without_control_tokens(tokenizer)
    episodes = demonstrations(
        queries * task.warm_start_passes,
        shown,
        lambda query: prompt_of(query, settings, settings.members, clean),
        settings.grammar,
        rng,
    )
    recorded = [shown.lookup(query["query_id"], name).reply for query in queries for name in names]
    replies = [split_reasoning(reply)[0] for reply in recorded]
    words = [tokenizer.decode([i]) for i in range(len(tokenizer)) if i not in tokenizer.added_tokens_decoder]
    whole = [word for word in words if "\ufffd" not in word]  # a token may be a part of a character
    drills = copy_drills(replies, whole, settings.grammar, rng, task.warm_start_drills)
    return [encode_demonstration(one, tokenizer, settings) for one in (*episodes, *drills)]


def encode_demonstration(
    demonstration: Demonstration, tokenizer: PreTrainedTokenizerBase, settings: AgentSettings
) -> dict[str, list[int]]:
    """`input_ids`, and `labels`: -100 on prompt and observations. A turn ends with its closing tag, not with EOS."""
    ids: list[int] = []
    if demonstration.prompt:
        ids += tokenizer.apply_chat_template(
            demonstration.prompt,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
            **settings.chat_template_kwargs,
        )
    labels = [-100] * len(ids)
    opened = opened_by(tokenizer, ids)
    for turn in demonstration.turns:
        if isinstance(turn, str):
            part = encode_frame(tokenizer, inside(opened, turn))
            opened = ""
            labels += part
        else:
            part = list(observation_ids(turn, tokenizer, settings.observation_tokens))
            labels += [-100] * len(part)
        ids += part
    return {"input_ids": ids, "labels": labels}


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: AgentSettings, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings.save(folder)
