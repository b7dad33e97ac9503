"""Evaluate a router on held-out tasks, or put several runs into one table with intervals and a picture.

    python scripts/evaluate_bopo.py outputs/bopo-seed0 outputs/bopo-seed1 outputs/bopo-seed2 --markdown

Runs are grouped by the name of their folder without "-seedN"; every run of scripts/train_bopo.py writes
`episodes.parquet`. The scripted executors of the quickstart are SCRIPTED: the planner reads the hidden state.
"""

import argparse
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from budget_task import BudgetTask, heldout_sets, load_tasks, make_environment, make_rows, profiles
from transformers import PreTrainedModel

from routers.budget_episode import TASK, Choose, drive
from routers.budget_plot import draw
from routers.budget_report import Episodes, render
from routers.budget_rules import always_large, always_small, cascade, first_large, random_mix
from srpo.generate import TransformersGenerator
from srpo.rollout import Limits, play
from srpo.sampling import Sampling
from srpo.types import CORRECT, COST, LOST

EPISODES = "episodes.parquet"
REPETITIONS = 3
NOTE = (
    "Explorer and planner are SCRIPTED executors, no language models; the planner reads the hidden state of the game. "
    "Costs hold the policy's own tokens. Intervals are 95 %, over tasks and seeds; gains in points, paired by task."
)
SHARES = (0.02, 0.04, 0.06, 0.08, 0.1, 0.13, 0.16, 0.2, 0.25, 0.3, 0.4, 0.6)
FAMILIES: dict[str, Mapping[str, Choose]] = {
    "random mixing": {"0": always_small, **{f"{p:g}": random_mix(p) for p in SHARES}, "1": always_large},
    "first-large": {"0": always_small, **{str(k): first_large(k) for k in range(1, 7)}, "all": always_large},
    "cascade": {"never": always_small, **{str(k): cascade(k) for k in range(2, 20, 2)}, "at once": always_large},
}


def play_rules(task: BudgetTask, types: Mapping[str, str]) -> pd.DataFrame:
    """Every setting of every family on every task (id -> type): one row per episode."""
    environment = make_environment(task)
    rows = []
    for family, settings in FAMILIES.items():
        for setting, choose in settings.items():
            for repetition in range(REPETITIONS):
                for name, kind in types.items():
                    columns = drive(environment, {TASK: name}, f"evaluation/{repetition}/{name}", choose).columns
                    record = _record(name, kind, columns)
                    rows.append({"method": f"{family} {setting}", "repetition": repetition, **record})
    return pd.DataFrame(rows)


def play_policy(
    model: PreTrainedModel,
    tokenizer: Any,
    task: BudgetTask,
    types: Mapping[str, str],
    *,
    caps: Sequence[float],
    seed: int,
    temperature: float,
    price: tuple[float, float],
    batch: int = 64,
) -> pd.DataFrame:
    """The policy on every task (id -> type) at every cap.

    Its own tokens are priced, each token of a context once (it is cached).

    Raises:
        RuntimeError: an episode was lost.
    """
    environment = make_environment(task)
    records = []
    model.eval()
    for cap in caps:
        rows = make_rows(task, types, [cap])
        for start in range(0, len(rows), batch):
            some = rows[start : start + batch]
            prompts = [
                tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
                for row in some
            ]
            generator = TransformersGenerator(
                model, tokenizer, Sampling(temperature=temperature), eos_ids=[tokenizer.eos_token_id]
            )
            limits = Limits(task.step_limit, 100_000, 1024, step_seconds=120.0)
            seeds = [f"evaluation/{seed}/{row[TASK]}" for row in some]
            for row, trajectory in zip(
                some, play(environment, some, prompts, seeds, generator, tokenizer, limits), strict=True
            ):
                if trajectory.stop == "lost":
                    raise RuntimeError(f"{row[TASK]} was lost: {trajectory.columns[LOST]}")
                read = len(trajectory.prompt_ids) + sum(len(t.ids) for t in trajectory.turns if t.owner == "world")
                written = sum(len(t.ids) for t in trajectory.turns if t.owner == "policy")
                own = (read * price[0] + written * price[1]) / 1e6
                record = _record(row[TASK], types[row[TASK]], trajectory.columns)
                records.append({**record, "repetition": seed, "cap": cap, "policy_usd": own})
    return pd.DataFrame(records)


def _record(name: str, kind: str, columns: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "task": name,
        "task_type": kind,
        "success": float(columns[CORRECT]),
        "executor_usd": float(columns[COST]),
        "large_calls": int(columns["large_calls"]),
        "steps": int(columns["calls"]),
        "violated": bool(columns["budget_violated"]),
        "cap": math.inf,
        "policy_usd": 0.0,
    }


def evaluate(
    model: PreTrainedModel, tokenizer: Any, task: BudgetTask, folder: Path, name: str, seed: int, **how: Any
) -> pd.DataFrame:
    """Episodes of a policy on every held-out set, with the classes of their tasks; `how` as for `play_policy`."""
    frames = []
    for label, which in heldout_sets(task).items():
        types = load_tasks(task.environment, which, task.heldout_count)
        frame = play_policy(model, tokenizer, task, types, caps=task.eval_caps, seed=seed, **how)
        frames.append(_classified(frame, task, label, which, folder).assign(method=name))
    return pd.concat(frames, ignore_index=True)


def rules(task: BudgetTask, folder: Path) -> pd.DataFrame:
    """Episodes of all rules on every held-out set; played once per `task_dir`."""
    frames = []
    for label, which in heldout_sets(task).items():
        path = folder / f"rules_{label}.parquet"
        if not path.exists():
            played = play_rules(task, load_tasks(task.environment, which, task.heldout_count))
            _classified(played, task, label, which, folder).to_parquet(path)
        frames.append(pd.read_parquet(path))
    return pd.concat(frames, ignore_index=True)


def _classified(frame: pd.DataFrame, task: BudgetTask, label: str, which: str, folder: Path) -> pd.DataFrame:
    found = profiles(task, label, which, task.heldout_count, folder)
    difficulty = {name: task.rule(profile) for name, profile in found.items()}
    return frame.assign(set=label, difficulty=frame["task"].map(difficulty))


def read_runs(folders: Sequence[Path], names: Sequence[str] | None = None) -> pd.DataFrame:
    """All episodes of several runs in one frame. A run's policy is named after its folder, without "-seedN".

    Rules and the BoSFT policy of a seed are the same in all runs that share them, and are kept once.
    """
    frames = []
    for folder in folders:
        frame = pd.read_parquet(folder / EPISODES)
        name = re.sub(r"-seed\d+$", "", folder.name)
        frames.append(frame.assign(method=frame["method"].replace("policy", name)))
    return pd.concat(frames).drop_duplicates(["set", "method", "repetition", "task", "cap"], ignore_index=True)


def main(argv: Sequence[str] | None = None) -> str:
    """Print the tables of finished runs."""
    parser = argparse.ArgumentParser(description="Put runs of train_bopo.py into one table.")
    parser.add_argument("runs", nargs="+", type=Path, help="output folders of scripts/train_bopo.py")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--picture", type=Path, help="where to draw the frontiers (PNG)")
    options = parser.parse_args(argv)
    frame = read_runs(options.runs)
    sets = {str(name): Episodes(part) for name, part in frame.groupby("set")}
    text = "\n".join(render(episodes, name, options.markdown) for name, episodes in sets.items())
    if options.picture:
        draw(sets, options.picture)
    text += "\n" + NOTE
    print(text)
    return text


if __name__ == "__main__":
    main()
