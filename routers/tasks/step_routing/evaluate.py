"""Evaluate a checkpoint on held-out tasks beside all baselines, or put several runs into one table with intervals.

    python scripts/evaluate_bopo.py --model outputs/quickstart/bopo --temperature 1 0 --eval_caps inf 2
    python scripts/evaluate_bopo.py outputs/bopo-seed0 outputs/bopo-seed1 outputs/bopo-seed2 --markdown

The first plays a checkpoint (folder or Hub id) as the recipe beside it says; further options are lines of that recipe
(fields of `BudgetTask`, scripts/budget_task.py), such as `--heldout_tasks valid_unseen.jsonl.xz --heldout_count 0`. It
writes `episodes.parquet`, `tables.md` and `frontier.png` to `--output`, which is then one of the runs of the second.
Runs are grouped by the name of their folder without "-seedN"; every run of scripts/train_bopo.py writes
`episodes.parquet`. The scripted executors of the quickstart are SCRIPTED: the planner reads the hidden state.
"""

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import PreTrainedModel

from routers.environments.scripted import SCRIPTED
from routers.evaluation.budget_plot import draw
from routers.evaluation.budget_report import Episodes, render
from routers.tasks.step_routing.environment import TASK
from routers.tasks.step_routing.executors import make_pool
from routers.tasks.step_routing.player import NOTHING, RAISE, STEP_SECONDS, PhaseStopped
from routers.tasks.step_routing.rules_played import episode_row, families, play_rules
from routers.tasks.step_routing.settings import StepSettings
from routers.tasks.step_routing.spending import Money
from routers.tasks.step_routing.world import (
    BudgetTask,
    heldout_sets,
    load_tasks,
    make_environment,
    make_player,
    make_rows,
    profiles,
)
from srpo.ranges import SEED, at_least, ranged
from srpo.recipe import load_recipe
from srpo.rollout.generator import TransformersGenerator
from srpo.rollout.loop import Limits, play
from srpo.rollout.sampling import Sampling
from srpo.rollout.shared import find_file, load_checkpoint
from srpo.rollout.special_tokens import end_ids
from srpo.run.derived import is_made_from, made_from, mark, source, unmark
from srpo.run.results import check_results
from srpo.types import CORRECT, LOST, Row, Trajectory

EPISODES = "episodes.parquet"
POLICY = "policy"
"""How a run calls its policy; with something after it, another way of decoding."""
NOTE = (
    f"Executors called {', '.join(SCRIPTED)} are SCRIPTED, no language models; the planner reads the hidden state. "
    "Costs hold the policy's own tokens. Intervals are 95 %, over tasks and seeds; gains in points, paired by task."
)


def play_policy(
    model: PreTrainedModel,
    tokenizer: Any,
    task: BudgetTask,
    types: Mapping[str, str],
    settings: StepSettings,
    *,
    caps: Sequence[float],
    seed: int,
    temperature: float,
    batch: int = 64,
) -> pd.DataFrame:
    """The policy on every task (id -> type) at every cap, told about it as `settings` say.

    Its own tokens are priced, each token of a context once (it is cached). A lost episode is played again with the
    same seed; lost again, it counts as failed.

    Raises:
        PhaseStopped: the run's money is spent.
    """
    environment = make_environment(task)
    records = []
    model.eval()

    def played(rows: Sequence[Row]) -> list[Trajectory]:
        prompts = [settings.prompt_ids(row["prompt"], tokenizer) for row in rows]
        generator = TransformersGenerator(
            model, tokenizer, Sampling(temperature=temperature), eos_ids=end_ids(model, tokenizer)
        )
        limits = Limits(task.step_limit, 100_000, settings.observation_tokens, STEP_SECONDS)
        seeds = [f"evaluation/{seed}/{row[TASK]}" for row in rows]
        out = environment.out_of_money
        return play(environment, rows, prompts, seeds, generator, tokenizer, limits, out_of_money=out)

    for cap in caps:
        rows = make_rows(task, types, [cap])
        for start in range(0, len(rows), batch):
            some = rows[start : start + batch]
            for row, trajectory in zip(some, _twice(played, some), strict=True):
                if environment.out_of_money():
                    raise PhaseStopped(f"max_cost_usd is reached: ${environment.spent_usd():.4f} are spent. {RAISE}")
                read = len(trajectory.prompt_ids) + sum(len(t.ids) for t in trajectory.turns if t.owner == "world")
                written = sum(len(t.ids) for t in trajectory.turns if t.owner == "policy")
                own = settings.policy_usd(read, written)
                columns = _known(row[TASK], trajectory)
                record = episode_row(row[TASK], types[row[TASK]], columns)
                used = columns["budget_used"]
                records.append({**record, "repetition": seed, "cap": cap, "policy_usd": own, "used": used})
        for name in [name for name in types if name not in {row[TASK] for row in rows}]:  # could not even begin
            record = episode_row(name, types[name], {**NOTHING, CORRECT: 0.0})
            records.append({**record, "repetition": seed, "cap": cap, "used": None})
    return pd.DataFrame(records)


def _twice(played: Callable[[Sequence[Row]], list[Trajectory]], rows: Sequence[Row]) -> list[Trajectory]:
    """Trajectories of rows, lost ones at their second attempt."""
    found = played(rows)
    lost = [i for i, trajectory in enumerate(found) if trajectory.stop == "lost"]
    for i, again in zip(lost, played([rows[i] for i in lost]) if lost else [], strict=True):
        found[i] = again
    return found


def _known(name: str, trajectory: Trajectory) -> Mapping[str, Any]:
    """Columns of an episode; a lost one counts as failed."""
    if trajectory.stop != "lost":
        return trajectory.columns
    print(f"WARNING: lost twice, counts as failed: {name}: {trajectory.columns[LOST]}", flush=True)
    known = {key: value for key, value in trajectory.columns.items() if value is not None}
    return {**NOTHING, **known, CORRECT: 0.0}


def evaluate(
    model: PreTrainedModel,
    tokenizer: Any,
    task: BudgetTask,
    settings: StepSettings,
    folder: Path,
    name: str,
    *,
    seed: int,
    temperature: float,
) -> pd.DataFrame:
    """Episodes of a policy on every held-out set, with the classes of their tasks (profiles lie in `folder`)."""
    frames = []
    for label, which in heldout_sets(task).items():
        types = load_tasks(task.environment, which, task.heldout_count)
        how = {"caps": task.eval_caps, "seed": seed, "temperature": temperature}
        frame = play_policy(model, tokenizer, task, types, settings, **how)
        frames.append(_classified(frame, task, label, which, folder).assign(method=name))
    return pd.concat(frames, ignore_index=True)


def rules(task: BudgetTask, folder: Path) -> pd.DataFrame:
    """Episodes of all rules on every held-out set; played once per `task_dir`, and again where others are asked for.

    Classes are those of today's thresholds.
    """
    frames, (methods, repetitions) = [], families(task)
    played_as = {family: list(settings) for family, settings in methods.items()}
    made = made_from(rules=played_as, repetitions=repetitions, **task.profile_settings())
    for label, which in heldout_sets(task).items():
        path, types = folder / f"rules_{label}.parquet", load_tasks(task.environment, which, task.heldout_count)
        known = pd.read_parquet(path) if is_made_from(path, made) else None
        if known is None or not set(types) <= set(known["task"]):
            partial = path.with_suffix(".partial")
            player = make_player(task, (which, task.heldout_count))
            known = play_rules(task, types, player, partial)
            unmark(path)
            known.to_parquet(path)
            mark(path, made)
            partial.unlink()
        frames.append(_classified(known[known["task"].isin(types)], task, label, which, folder))
    return pd.concat(frames, ignore_index=True)


def _classified(frame: pd.DataFrame, task: BudgetTask, label: str, which: str, folder: Path) -> pd.DataFrame:
    found = profiles(task, label, which, task.heldout_count, folder)
    difficulty = {name: task.rule(profile) for name, profile in found.items()}
    return frame.assign(set=label, difficulty=frame["task"].map(difficulty))


def read_runs(folders: Sequence[Path]) -> pd.DataFrame:
    """All episodes of several runs in one frame. A run's policy is named after its folder, without "-seedN".

    Rules and the BoSFT policy of a seed are the same in all runs that share them, and are kept once.
    """
    frames = []
    for folder in folders:
        if not (folder / EPISODES).is_file():
            raise FileNotFoundError(f"{folder} holds no {EPISODES}, which scripts/train_bopo.py writes at its end")
        frame = pd.read_parquet(folder / EPISODES)
        name = re.sub(r"-seed\d+$", "", folder.name)
        frames.append(frame.assign(method=frame["method"].str.replace(f"^{POLICY}(?=$|,)", name, regex=True)))
    return pd.concat(frames).drop_duplicates(["set", "method", "repetition", "task", "cap"], ignore_index=True)


def tables(frame: pd.DataFrame, markdown: bool, picture: Path | None) -> str:
    """The tables of every set of tasks, and the picture."""
    sets = {str(name): Episodes(part) for name, part in frame.groupby("set")}
    if picture:
        draw(sets, picture)
    return "\n".join([*(render(part, f"## {name}", markdown) for name, part in sets.items()), NOTE, ""])


def recorded_task(model: str, config: str | None, overrides: Sequence[str]) -> BudgetTask:
    """The task of a checkpoint, from the recipe beside it (or another one) and lines given on the command line.

    Raises:
        ValueError: there is no recipe, or it cannot be used.
    """
    found = config or find_file(model, "recipe.yaml")
    if found is None:
        raise ValueError(
            f"{model} has no recipe.yaml, which scripts/train_bopo.py writes: name a recipe with --config"
        )
    [task] = load_recipe(BudgetTask, ["--config", str(found), *overrides], partial=True)
    return task


def evaluate_checkpoint(argv: Sequence[str]) -> str:
    """Play a checkpoint on the held-out tasks of the recipe beside it; returns the tables that it wrote."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id, as scripts/train_bopo.py writes them")
    parser.add_argument("--config", help="recipe of the tasks; default: recipe.yaml beside the model")
    parser.add_argument(
        "--temperature", nargs="+", type=ranged(at_least(0)), help="0: greedy; a row for each; default: as trained"
    )
    parser.add_argument(
        "--seeds", nargs="+", type=ranged(SEED, whole=True), default=[0], help="of the policy's dice; repetitions"
    )
    parser.add_argument("--task_dir", type=Path, help="profiles and baselines; default: the run's, else OUTPUT/task")
    parser.add_argument("--output", type=Path, help="default: outputs/evaluation/NAME_OF_THE_MODEL")
    parser.add_argument(
        "--max_cost_usd",
        type=ranged(at_least(0)),
        help="stop before live executors have cost more, restarts included",
    )
    options, overrides = parser.parse_known_args(argv)
    task = recorded_task(options.model, options.config, overrides)
    (model, tokenizer), folder = load_checkpoint(options.model), options.model
    settings = StepSettings.load(folder)
    output = options.output or Path("outputs/evaluation", Path(options.model).name)
    decoding = {"temperature": options.temperature or [settings.temperature], "seeds": options.seeds}
    made = made_from(
        model=options.model,
        model_content=source(folder),
        settings=asdict(settings),
        **task.evaluation_settings(),
        **decoding,
    )
    check_results(output, EPISODES, made)
    output.mkdir(parents=True, exist_ok=True)
    places = [Path(place) for place in (task.task_dir, folder / "task") if place is not None]
    known = options.task_dir or next((place for place in places if place.exists()), output / "task")
    money = Money(make_pool(task), options.max_cost_usd, output / "spending_0.json")
    with money.phase("rules"):
        frames = [rules(task, known)]
    for temperature in decoding["temperature"]:
        name = POLICY + {0.0: ", greedy", settings.temperature: ""}.get(temperature, f", temperature {temperature:g}")
        for seed in options.seeds:
            how = {"seed": seed, "temperature": temperature}
            with money.phase(f"{name}, seed {seed}"):
                frames.append(evaluate(model, tokenizer, task, settings, known, name, **how))
    episodes = pd.concat(frames, ignore_index=True)
    unmark(output / EPISODES)
    episodes.to_parquet(output / EPISODES)
    text = tables(episodes, True, output / "frontier.png")
    (output / "tables.md").write_text(text)
    mark(output / EPISODES, made)
    print(text, output, sep="\n")
    return text


def compare(argv: Sequence[str]) -> str:
    """Put finished runs into one table; returns it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="output folders of scripts/train_bopo.py, or of --model")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--picture", type=Path, help="where to draw the frontiers (PNG)")
    options = parser.parse_args(argv)
    text = tables(read_runs(options.runs), options.markdown, options.picture)
    print(text)
    return text


def main(argv: Sequence[str] | None = None) -> str:
    """Command line; the tables."""
    words = list(sys.argv[1:] if argv is None else argv)
    asked = any(word.split("=")[0] == "--model" for word in words)
    return evaluate_checkpoint(words) if asked else compare(words)
