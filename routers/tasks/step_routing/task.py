"""Train a router of agent steps under budgets, from a recipe: profile -> BoSFT -> BoPO -> held-out evaluation.

    accelerate launch scripts/train_bopo.py --config recipes/quickstart/bopo.yaml
    accelerate launch scripts/train_bopo.py --config recipes/quickstart/bopo.yaml --seed 1 --output_dir OUTPUT

Every line of the recipe is a field of `BudgetTask` (scripts/budget_task.py), of `BopoArguments` below, or of
`srpo.SRPOConfig` (TRL's GRPOConfig and more). The output directory holds the policy, `bosft/` (the policy that RL
started from, and its demonstrations), `task/` (profiles, baselines), `episodes.parquet`, tables and `frontier.png`;
with live executors also `spending_0.json`, the books that `max_cost_usd` holds for. A run that was stopped goes on
with the same command: what was played is kept (in training by checkpoints: `--resume_from_checkpoint`).
"BoPO-style": the paper (arXiv 2602.21227) has no public code or formula; see srpo/objectives/advantages.py.
"""

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import set_seed

from rewards.boundary import BoundaryReward, make_boundary_reward
from routers.tasks.step_routing.evaluate import EPISODES, POLICY, evaluate, rules, tables
from routers.tasks.step_routing.executors import make_pool
from routers.tasks.step_routing.profiles import observe, write_profiles
from routers.tasks.step_routing.rows import begun_rows, describe_rows, given_profiles, training_rows
from routers.tasks.step_routing.settings import STEP_ROUTER, StepSettings
from routers.tasks.step_routing.sft_rows import (
    Demonstration,
    Synthesis,
    balance,
    demonstrations,
    read_dataset,
    write_dataset,
)
from routers.tasks.step_routing.spending import Money, StopWithoutMoney, estimate, phases
from routers.tasks.step_routing.world import (
    BudgetTask,
    check_folder,
    check_parts,
    corpus,
    heldout_sets,
    make_environment,
    make_player,
    profiles,
    step_settings,
    train_tasks,
)
from srpo import SRPOConfig, SRPOTrainer
from srpo.policy import check_loads, check_policy, load_policy, warm_start_config, with_adapter
from srpo.ranges import Ranges, above, at_least, check_numbers
from srpo.recipe import load_recipe, resolved_recipe
from srpo.rollout.loop import observation_ids
from srpo.rollout.shared import find_file
from srpo.run.derived import check_made_from, is_made_from, made_from, mark, source, unmark
from srpo.run.folder import RunArguments, claim, finish
from srpo.run.steps import NoSteps, check_rows_of_a_batch
from srpo.scratch_lm import tiny_causal_lm, train_tokenizer
from srpo.sft import imitate
from srpo.types import CORRECT, Observation


@dataclass
class BopoArguments:
    """Policy, demonstrations and reward."""

    RANGES: ClassVar[Ranges] = {
        "lora_r": at_least(0),
        "bosft_sweep": at_least(1),
        "bosft_keep": at_least(1),
        "bosft_epochs": at_least(0),
        "bosft_learning_rate": above(0),
        "bosft_batch_size": at_least(1),
        "cost_weight": at_least(0),
        "hard_bonus": at_least(0),
        "eval_temperature": at_least(0),
        "policy_price_in": at_least(0),
        "policy_price_out": at_least(0),
    }

    model_name_or_path: str = field(
        default="tiny", metadata={"help": "Hub id or path; `tiny`: a Qwen3 of 0.3M parameters made from nothing."}
    )
    lora_r: int = field(default=0, metadata={"help": "Rank of a LoRA adapter on all linear layers; 0: all weights."})
    profiles: str | None = field(
        default=None,
        metadata={
            "help": "OUTPUT/profiles.parquet of an earlier run on the same tasks, to start from instead of profiling: "
            "what its policy solved is no longer Intractable."
        },
    )
    bosft_policy: str | None = field(
        default=None, metadata={"help": "OUTPUT/bosft of an earlier run of the same seed, to start from."}
    )
    bosft_sweep: int = field(default=10, metadata={"help": "Rollouts of the P(large) sweep on every Hard row."})
    bosft_keep: int = field(default=1, metadata={"help": "Cheapest successes kept of every Hard row."})
    bosft_strata: str = field(default="class", metadata={"help": "Balanced by class, by p_large, or none."})
    bosft_epochs: float = field(default=2.0, metadata={"help": "Of supervised fine-tuning; 0: no BoSFT."})
    bosft_learning_rate: float = field(default=1e-3, metadata={"help": "Of supervised fine-tuning."})
    bosft_batch_size: int = field(default=16, metadata={"help": "Episodes per step and device."})
    cost_weight: float = field(default=0.3, metadata={"help": "lambda: price of the normalised cost."})
    hard_bonus: float = field(default=1.0, metadata={"help": "beta: what a success on a Hard task earns beside 1."})
    cost_norm: str = field(default="boundary", metadata={"help": "boundary, large, max or budget (in USD)."})
    gate_cost_on_success: bool = field(default=False, metadata={"help": "Charge cost on successes only."})
    eval_temperature: float = field(default=1.0, metadata={"help": "Of the held-out evaluation; 0: greedy."})
    policy_price_in: float = field(default=0.0, metadata={"help": "USD per million tokens that the policy reads."})
    policy_price_out: float = field(default=0.0, metadata={"help": "USD per million tokens that the policy writes."})

    def __post_init__(self) -> None:
        check_numbers(self)
        self.reward()
        self.synthesis()

    def reward(self) -> BoundaryReward:
        return BoundaryReward(self.cost_weight, self.hard_bonus, self.cost_norm, self.gate_cost_on_success)

    def synthesis(self) -> Synthesis:
        return Synthesis(self.bosft_sweep, self.bosft_keep, self.bosft_strata)  # type: ignore[arg-type]


ARGUMENTS = (BudgetTask, BopoArguments, RunArguments, SRPOConfig)
"""What a line of a recipe may set."""


def main(argv: list[str] | None = None) -> str | None:
    """Run a recipe; returns the tables on the main process, None on the others."""
    recipe = load_recipe(ARGUMENTS, argv)
    task, bopo, folders, args = recipe
    state, resume = PartialState(), args.resume_from_checkpoint
    settings = step_settings(task, args, (bopo.policy_price_in, bopo.policy_price_out))
    check_policy(bopo.model_name_or_path)
    if bopo.bosft_policy is not None:
        check_policy(bopo.bosft_policy)
        check_told_alike(settings, bopo.bosft_policy)
    check_rows(task, args)
    own = Path(resume).parent if resume is not None else Path(args.output_dir)
    start = Path(bopo.bosft_policy or own / "bosft")
    if resume is not None and bopo.bosft_policy is None:
        check_made_from(start, bosft_made_from(task, bopo, args, settings, start), "what the run began from")
    claimed = claim(recipe, args.output_dir, overwrite=folders.overwrite, resume=resume)
    given = None if bopo.profiles is None else given_profiles(task, Path(bopo.profiles))
    check_parts(task)
    begun = begun_rows(task, bopo.reward(), claimed.notes / "quarantine.jsonl")
    pool = make_pool(task)
    check_loads(bopo.bosft_policy or bopo.model_name_or_path)
    # All that can be found wrong before something is played has been looked for: the folder is this run's now.
    output = claimed.take()
    folder = Path(task.task_dir or output / "task")
    money = Money(pool, args.max_cost_usd, output / f"spending_{state.process_index}.json")
    if task.live and state.is_main_process:
        runs = task.profile_runs + bopo.bosft_sweep - 1 if bopo.bosft_epochs > 0 and bopo.bosft_policy is None else 0
        print(estimate(task, phases(task, args, runs, state.num_processes), args.max_cost_usd), flush=True)
    with state.main_process_first(), money.phase("profiling"):  # the others read what the first has written
        profiled = given or profiles(task, "train", task.train_tasks, task.train_count, folder)
    rows = training_rows(task, bopo.reward(), profiled, begun)
    if state.is_main_process:
        print(describe_rows(bopo.reward(), rows))

    set_seed(args.seed)
    if bopo.bosft_policy is None and resume is None:
        with state.main_process_first(), money.phase("demonstrations"):
            chosen = bosft_demonstrations(task, bopo, rows, args.seed, start / "demonstrations")
        make_start(task, bopo, args, settings, rows, chosen, start)
        state.wait_for_everyone()
    # Read from disk, also by the process that wrote it: TRL makes the reference policy of the KL from that path.
    model, tokenizer = load_policy(str(start), args, 0, lambda: corpus(task, rows))
    how = {"seed": args.seed, "temperature": bopo.eval_temperature}
    told = made_from(policy=source(start), settings=asdict(settings), **task.evaluation_settings(), **how)
    # Episodes of another run's BoSFT policy are taken from there only if they are those that this recipe asks for.
    scores = next((path for path in (start / EPISODES,) if is_made_from(path, told)), output / "bosft" / EPISODES)
    if state.is_main_process and not is_made_from(scores, told):
        with money.phase("profiling of held-out tasks"):
            for name, which in heldout_sets(task).items():
                profiles(task, name, which, task.heldout_count, folder)
        with money.phase("evaluation of BoSFT"):
            played = evaluate(model, tokenizer, task, settings, folder, "BoSFT", **how)
        scores.parent.mkdir(exist_ok=True)
        unmark(scores)
        played.to_parquet(scores)
        mark(scores, told)
    money.check("What was played is kept.")

    environment = make_environment(task)
    trainer = SRPOTrainer(
        model,
        make_boundary_reward(bopo.reward()),
        args,
        Dataset.from_list([{**row, "prompt": settings.cleaned(row["prompt"], tokenizer)} for row in rows]),
        processing_class=tokenizer,
        environment=environment,
        correctness=succeeded,
        recipe=resolved_recipe(recipe),
    )
    trainer.save_beside = settings.save
    trainer.add_callback(StopWithoutMoney(environment))
    money.share()
    with money.phase("training"):
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    money.take_back()
    outcomes = gather_object([environment.outcomes()])
    if not state.is_main_process:
        return None  # what follows is one process's work

    write_profiles(observe(profiled.values(), outcomes), output / "profiles.parquet", task.profile_settings())
    money.check(
        f"The policy of step {trainer.state.global_step} is saved: --resume_from_checkpoint with its checkpoint in "
        f"{output} goes on, scripts/evaluate_bopo.py --model {output} evaluates it."
    )
    trained = trainer.accelerator.unwrap_model(trainer.model)
    with money.phase("evaluation of the policy"):
        after = evaluate(trained, tokenizer, task, settings, folder, POLICY, **how)
    with money.phase("rules"):
        ruled = rules(task, folder)
    before = pd.read_parquet(scores)
    episodes = pd.concat([ruled, before, after], ignore_index=True)
    episodes.to_parquet(output / EPISODES)
    text = tables(episodes, True, output / "frontier.png")
    (output / "tables.md").write_text(text)
    trainer.heldout_table = text
    trainer.create_model_card(model_name=output.name)
    if args.push_to_hub:
        trainer.push_to_hub()
    finish(output)
    print(text, output / "frontier.png", sep="\n")
    return text


def check_rows(task: BudgetTask, args: SRPOConfig) -> None:
    """ValueError where one batch of rollouts takes more rows than there are: the trainer would not train at all."""
    tasks, caps = len(train_tasks(task)), len(task.train_caps)
    check_rows_of_a_batch(tasks * caps, args, f"train_tasks ({tasks} tasks at {caps} train_caps)")


def check_told_alike(settings: StepSettings, policy: str) -> None:
    """ValueError where `bosft_policy` was trained to be told something else than this recipe tells it."""
    found = find_file(policy, STEP_ROUTER)
    then = None if found is None else StepSettings.load(found.parent)
    for name in ("environment", "executors", "labels", "observation", "observation_tokens", "unit"):
        if then is not None and getattr(then, name) != getattr(settings, name):
            raise ValueError(
                f"bosft_policy {policy} was trained with {name}={getattr(then, name)!r}, the recipe says "
                f"{getattr(settings, name)!r}: set that, or give another bosft_policy"
            )


def bosft_made_from(
    task: BudgetTask, bopo: BopoArguments, args: SRPOConfig, settings: StepSettings, folder: Path
) -> dict[str, Any]:
    """What the policy that RL starts from is made from; its demonstrations lie in `folder` already."""
    names = "model_name_or_path lora_r bosft_epochs bosft_learning_rate bosft_batch_size"
    return made_from(
        **{name: getattr(bopo, name) for name in names.split()},
        **{name: getattr(args, name) for name in ("seed", "bf16", "fp16")},
        model=source(bopo.model_name_or_path),
        demonstrations=source(folder / "demonstrations" / "train.parquet") if bopo.bosft_epochs > 0 else None,
        told=asdict(settings),
        **{f"train: {key}": value for key, value in {**task.profile_settings(), **task.row_settings()}.items()},
        **{f"demonstrations: {key}": value for key, value in asdict(bopo.synthesis()).items()},
    )


def make_start(
    task: BudgetTask,
    bopo: BopoArguments,
    args: SRPOConfig,
    settings: StepSettings,
    rows: Sequence[dict[str, Any]],
    chosen: Sequence[Demonstration],
    folder: Path,
) -> None:
    """The policy that RL starts from, in `folder`: the named one after BoSFT on these demonstrations."""
    if bopo.model_name_or_path == "tiny":  # few words and two actions need little
        made = corpus(task, rows)
        tokenizer = train_tokenizer(made.texts, vocab_size=600, whole=made.whole)
        model = tiny_causal_lm(tokenizer, hidden=96, layers=2, heads=4, intermediate=192, seed=args.seed)
    else:
        model, tokenizer = load_policy(bopo.model_name_or_path, args, bopo.lora_r, lambda: corpus(task, rows))
        model = with_adapter(model, tokenizer, bopo.model_name_or_path, args, bopo.lora_r)
    if chosen:
        examples = [tokens(demonstration, settings, tokenizer) for demonstration in chosen]
        config = warm_start_config(
            args,
            folder,
            epochs=bopo.bosft_epochs,
            learning_rate=bopo.bosft_learning_rate,
            batch_size=bopo.bosft_batch_size,
        )
        model = imitate(model, tokenizer, examples, config)
    if PartialState().is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        unmark(folder)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        settings.save(folder)
        mark(folder, bosft_made_from(task, bopo, args, settings, folder))


def bosft_demonstrations(
    task: BudgetTask, bopo: BopoArguments, rows: Sequence[dict[str, Any]], seed: int, folder: Path
) -> list[Demonstration]:
    """Balanced demonstrations on the training rows, at their caps; made once, in `folder`.

    Raises:
        ValueError: the folder was made with other settings.
        NoSteps: there is none, so that the row "BoSFT" of the table would be an untrained policy's.
    """
    if bopo.bosft_epochs <= 0:
        return []
    how = bopo.synthesis()
    made_with = {
        **task.profile_settings(),
        **task.row_settings(),
        **asdict(how),
        "seed": seed,
        "profiles": bopo.profiles,
        # What the rows read of the profiles, so that others of the same name make other demonstrations.
        "rows": hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode()).hexdigest(),
    }
    check_folder(made_with, folder)
    if not (folder / "train.parquet").exists():

        def seeds(row: Mapping[str, Any]) -> list[str]:
            return [f"bosft/{seed}/{k}/{row['query_id']}" for k in range(task.profile_runs)]

        play, partial = make_player(task, (task.train_tasks, task.train_count)), folder / "runs.partial"
        found = demonstrations(rows, how, seeds, play, partial)
        write_dataset(balance(found, how, random.Random(seed)), folder, task.executors)
        partial.unlink(missing_ok=True)
    if not (chosen := read_dataset(folder)):
        raise NoSteps(
            f"BoSFT has nothing to imitate: no boundary run and none of {how.sweep} sweeps solved one of {len(rows)} "
            "training rows; raise bosft_sweep or profile_runs, or set bosft_epochs: 0"
        )
    return chosen


def tokens(demonstration: Demonstration, settings: StepSettings, tokenizer: Any) -> dict[str, list[int]]:
    """A demonstration as the rollout would have made it, with labels on the decisions only."""
    ids = settings.prompt_ids(demonstration.prompt, tokenizer)
    labels = [-100] * len(ids)
    for step in demonstration.decisions:
        decision = tokenizer(settings.names[step["executor"]], add_special_tokens=False)["input_ids"]
        observation = Observation(step["body"], step["before"], step["after"])
        said = observation_ids(observation, tokenizer, settings.observation_tokens)
        ids += [*decision, *said]
        labels += [*decision, *[-100] * len(said)]
    return {"input_ids": ids, "labels": labels}


def succeeded(rewards: Any, columns: Any) -> Any:
    """Correct means that the task was fulfilled; the reward also holds the cost."""
    return rewards.new_tensor([score is not None and score >= 1 for score in columns[CORRECT]]).bool()
