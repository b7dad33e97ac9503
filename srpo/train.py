"""The run of every task: recipe -> task -> policy -> rows -> supervised start -> RL -> evaluation -> report -> Hub.

    srpo train recipes/quickstart/srpo.yaml --seed 1
    accelerate launch -m srpo.train --config recipes/quickstart/srpo.yaml --seed 1

Every line of a recipe is a field of the task's `Arguments`, of `srpo.task.RunArguments` or of `srpo.SRPOConfig` (TRL's
GRPOConfig and more). Every process of a launch runs this whole story; what only one of them may do says so.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from srpo.checks import check_rows
from srpo.cli import run
from srpo.config import SRPOConfig
from srpo.garbage import set_imports_aside
from srpo.hub.jobs import repository
from srpo.hub.upload import NotPushed
from srpo.own_policy import own_policy, train_own
from srpo.policy import check_loads, check_policy, load_policy, whole_policy, whole_start, with_adapter
from srpo.recipe import load_run, resolved_recipe
from srpo.rollout.special_tokens import settle_special_tokens
from srpo.run.batch import batch_line
from srpo.run.derived import check_made_from, is_made_from, made_from, mark, source, unmark
from srpo.run.files import EVALUATION, VALIDATION
from srpo.run.folder import claim, finish
from srpo.run.processes import Elsewhere
from srpo.run.signals import heeded
from srpo.run.steps import check_rows_of_a_batch
from srpo.run.watch import part, watched
from srpo.run.whole import SAVING, resume_from
from srpo.sft import check_unsharded, sft, sft_config
from srpo.task import START, Evaluation, RunArguments, Share, Task
from srpo.trainer.engines import sealed
from srpo.trainer.progress import check_report_to, phase, quiet, show_progress
from srpo.trainer.trainer import SRPOTrainer

Result = TypeVar("Result")


def main(argv: Sequence[str] | None = None) -> Evaluation:
    """Run a recipe; returns the evaluation of start, trained policy and baselines, on every process.

    Raises:
        ValueError: a mistake in recipe or data, in one sentence; before the output folder is touched where it can be.
        Interrupted: a signal has ended the run (`srpo.run.signals`); exit code 0.
        NotPushed: all is done and written, and the Hub has not taken it; exit code 75.
    """
    with heeded():
        return _run(argv)


def _run(argv: Sequence[str] | None) -> Evaluation:
    quiet()
    task_class, recipe = load_run(argv)
    set_imports_aside()
    check_report_to(recipe[2].report_to)
    PartialState()
    with watched(recipe[2].hang_deadline, recipe[2].ddp_timeout):
        return _told(task_class, recipe)


def _told(task_class: Any, recipe: Any) -> Evaluation:
    (arguments, how, args), state = recipe, PartialState()
    resume = args.resume_from_checkpoint = resume_from(args.resume_from_checkpoint, args.output_dir)
    task: Task = task_class(arguments, how, args)
    chooses = args.eval_strategy != "no"
    if chooses and not hasattr(task, "validate"):
        raise ValueError(
            f'eval_strategy: {how.task} has no items to choose a checkpoint on (`validate`): set eval_strategy: "no"'
        )
    if own := own_policy(task, how.model_name_or_path):
        return train_own(task, own, recipe)

    # Look at everything that can be wrong, before anything is written or paid.
    supervised = how.sft_epochs > 0 and how.start_from is None
    start = (Path(args.output_dir) if resume is None else Path(resume).parent) / START
    check_policy(how.start_from or how.model_name_or_path)
    if supervised and resume is None:
        check_unsharded()
    began_from, scored = _made_from(task, how, args)
    if supervised and resume is not None:
        check_made_from(start, began_from, "the supervised start that the checkpoint began from")
    claimed = claim(recipe, args.output_dir, overwrite=how.overwrite, resume=resume)
    task.load(claimed.notes)
    # A resumed run must begin from the very weights that the first run began from.
    name = str(start) if supervised and resume is not None else how.start_from or how.model_name_or_path
    check_loads(name)
    set_seed(args.seed)
    model, tokenizer = load_policy(name, args, how.lora_r, task.corpus)
    quarantine = claimed.notes / "quarantine.jsonl"
    dataset = check_rows(
        task.rows(tokenizer),
        tokenizer=tokenizer,
        max_prompt_length=how.max_prompt_length,
        quarantine_path=quarantine,
        max_bad_share=how.max_bad_share,
        chat_template_kwargs={**(args.chat_template_kwargs or {}), "tools": getattr(task, "tools", None)},
    )
    check_rows_of_a_batch(len(dataset), args, f"the training data, without what {quarantine} lists,")

    # The folder is this run's now.
    output = claimed.take()
    phase("start", f"{how.task}, {args.objective}: {len(dataset):,} rows, policy {name}, into {output}")
    phase("batch", batch_line(args, state.num_processes))
    rows = dataset.to_list()
    prepared = task.prepare(output, rows)
    dataset = dataset if prepared is rows else Dataset.from_list(prepared)
    if chooses and state.is_main_process:
        (output / VALIDATION).write_text(json.dumps({"items": [*task.validation]}), encoding="utf-8")  # type: ignore[attr-defined]
    model = with_adapter(model, tokenizer, name, args, how.lora_r)
    if supervised and resume is None:
        phase("sft", f"supervised start, {how.sft_epochs:g} epochs")
        model = _supervised_start(task, how, args, model, tokenizer, start)
        if state.is_main_process:
            unmark(start)
            with sealed(str(start), writes=True):
                model.save_pretrained(start)
                tokenizer.save_pretrained(start)
                task.save(start)
            mark(start, began_from)
    scored[START] = source(start) if supervised else None
    before = _evaluated_once(task, lambda: whole_start(model, name, args), tokenizer, start / EVALUATION, scored)

    functions, args.reward_weights = task.rewards()
    trainer = SRPOTrainer(
        model,
        functions,
        args,
        dataset,
        processing_class=tokenizer,
        world=task.world(),
        environment=task.environment(tokenizer),
        correctness=task.correctness,
        recipe=resolved_recipe(recipe),
        save_beside=task.save,
        allowed_tokens=task.allowed_tokens(tokenizer),
        heldout=lambda: {"reward": _validation_reward(task, trainer, output)},
    )
    for callback in task.callbacks():
        trainer.add_callback(callback)
    show_progress(trainer, "train")
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(_internal_call=True)  # without a push, which comes last, with card and picture
    trainer.save_state()
    task.finish(trainer, output)

    phase("evaluate", "the trained policy")
    with whole_policy(trainer, output) as policy:
        after = evaluated(lambda share: task.evaluate(policy, tokenizer, args.objective, share))
    evaluation, trainer.heldout_table = concluded(task, [before, after, evaluated(task.baselines)], output)
    trainer.heldout_results = results_of(evaluation)
    trainer.create_model_card(model_name=output.name)
    pushed = True
    if args.push_to_hub:
        with part("push", patient=True):
            pushed = trainer.push_to_hub()
    finish(output)
    phase("done", f"policy, evaluation and report are in {output}")
    if not pushed:
        raise NotPushed.of(output, repository(args))
    return evaluation


def together(act: Callable[[], Result]) -> list[Result]:
    """What every process's `act` returned, in order of rank, on all of them.

    Raises:
        Exception: what `act` raised here; where it raised on another process only, `Elsewhere`, so that no process
            waits for one that has ended.
    """
    try:
        mine: tuple[Any, BaseException | None] = (act(), None)
    except Exception as error:
        mine = (None, error)
    told = gather_object([(mine[0], None if mine[1] is None else f"{type(mine[1]).__name__}: {mine[1]}")])
    if mine[1] is not None:
        raise mine[1]
    for rank, (_, words) in enumerate(told):
        if words is not None:
            raise Elsewhere(f"process {rank}: {words}")
    return [result for result, _ in told]


def evaluated(play: Callable[[Share], Any]) -> Any:
    """The shares of all processes as one evaluation; None where there is nothing to play."""
    state = PartialState()
    parts = together(lambda: play(Share(state.process_index, state.num_processes)))
    return None if parts[0] is None else type(parts[0]).merged(parts)


def concluded(task: Task, parts: Sequence[Any], output: Path) -> tuple[Evaluation, str | None]:
    """All parts that there are as one evaluation, and what its report says.

    The main process writes and prints them; on the others there is no report.
    """
    found = [part for part in parts if part is not None]
    evaluation: Evaluation = type(found[0]).merged(found)
    if not PartialState().is_main_process:
        return evaluation, None
    evaluation.write(output / EVALUATION)
    told = task.report(evaluation, output)
    print(told, flush=True)
    return evaluation, told


def _validation_reward(task: Any, trainer: SRPOTrainer, output: Path) -> float:
    """What the policy earns on the task's items for choosing, in the middle of its training."""
    folder = output / SAVING / "evaluated"
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        trainer.save_model(str(folder), _internal_call=True)  # without a push
    with whole_policy(trainer, folder) as policy:
        tokenizer = trainer.processing_class
        return float(evaluated(lambda share: task.validate(policy, tokenizer, share)).mean_reward())


def results_of(evaluation: Any) -> Sequence[Mapping[str, Any]]:
    """For the card's metadata, where the evaluation has such."""
    results = getattr(evaluation, "results", None)
    return results() if results else ()


def _evaluated_once(task: Task, load: Callable[[], Any], tokenizer: Any, path: Path, values: dict[str, Any]) -> Any:
    """The evaluation of the policy that RL starts from; a run that goes on reads what was paid for before.

    `load` gives the policy with whole weights. It is called only if something is played, and what it loaded is free
    again before the training begins.
    """
    PartialState().wait_for_everyone()
    if all(together(lambda: is_made_from(path, values))):
        return task.episodes.read(path)
    phase("evaluate", "the policy that RL starts from")
    model = load()
    found = evaluated(lambda share: task.evaluate(model, tokenizer, START, share))
    if PartialState().is_main_process:
        path.parent.mkdir(parents=True, exist_ok=True)
        unmark(path)
        found.write(path)
        mark(path, values)
    PartialState().wait_for_everyone()
    return found


def _supervised_start(
    task: Task, how: RunArguments, args: SRPOConfig, model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> PreTrainedModel:
    options = dict(task.sft_options)
    mean = options.pop("mean", "tokens")
    rows = task.sft_rows(tokenizer, settle_special_tokens(model, tokenizer))
    return sft(model, tokenizer, rows, sft_config(how, args, folder, options), mean=mean)


_OF_THE_RUN = "model_name_or_path start_from lora_r train_limit max_bad_share sft_epochs sft_learning_rate"
_OF_THE_RUN += " sft_batch_size sft_limit"
_OF_THE_CONFIG = "seed bf16 fp16 chat_template_kwargs reprompt_template solution_template feedback_template"
_OF_AN_EVALUATION = "heldout_limit policy_price_in policy_price_out"
_LIMITS = "max_completion_length max_turns max_turn_tokens max_observation_tokens"


def _made_from(task: Task, how: RunArguments, args: SRPOConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the supervised start is made from, and what an evaluation of it depends on."""
    of_start, of_evaluation = task.made_from()
    began = made_from(
        policy=source(how.start_from or how.model_name_or_path),
        **{name: getattr(how, name) for name in _OF_THE_RUN.split()},
        **{name: getattr(args, name) for name in _OF_THE_CONFIG.split()},
        **({} if args.eval_strategy == "no" else {"eval_strategy": "a fifth of the rows is set aside"}),
        **of_start,
    )
    evaluated = {name: getattr(how, name) for name in _OF_AN_EVALUATION.split()}
    evaluated |= {name: getattr(args, name) for name in _LIMITS.split()}
    return began, made_from(**{**began, **evaluated, **of_evaluation})


if __name__ == "__main__":
    run(main)
