"""Let a trained step router play some tasks, and see who acted, out of whom, and what it cost.

    python scripts/play_bopo.py --model outputs/quickstart/bopo --count 2 --cap 1
    python scripts/play_bopo.py --model user/step-router --cap 0.05 --unit usd --json --catalogue members.yaml

Environment, tasks and executors are those of the recipe beside the checkpoint; further options are lines of it (fields
of `BudgetTask`, scripts/budget_task.py). The scripted executors of the quickstart are SCRIPTED.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence

from routers.environments.registry import benchmark
from routers.tasks.step_routing.evaluate import recorded_task
from routers.tasks.step_routing.executors import make_executors
from routers.tasks.step_routing.router import StepRouter
from routers.tasks.step_routing.step_parts import PlayedEpisode
from routers.tasks.step_routing.world import load_tasks
from srpo.ranges import at_least, ranged


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; 0 where no budget was passed and no episode lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id, as scripts/train_bopo.py writes them")
    parser.add_argument("--config", help="recipe of the tasks; default: recipe.yaml beside the model")
    parser.add_argument("--part", help="part of the environment; default: the first of the recipe's heldout_tasks")
    parser.add_argument("--count", type=ranged(at_least(0), whole=True), default=3, help="of its tasks; 0: all")
    parser.add_argument("--cap", type=ranged(at_least(0)), help="hard limit of an episode; default: none")
    parser.add_argument("--unit", help="of the cap: usd or large_calls; default: as trained")
    parser.add_argument(
        "--temperature", type=ranged(at_least(0)), help="of the policy; 0: greedy; default: as trained"
    )
    parser.add_argument("--seed", default="0", help="names the dice")
    parser.add_argument("--json", action="store_true", help="print one JSON object per episode")
    options, overrides = parser.parse_known_args(argv)
    task = recorded_task(options.model, options.config, overrides)
    names = list(load_tasks(task.environment, options.part or task.heldout_tasks[0], options.count))
    worlds = [benchmark(task.environment).make(name, task.step_limit) for name in names]
    executors = make_executors(task)
    with StepRouter.from_pretrained(options.model, temperature=options.temperature) as router:
        waiting = [
            router.submit(world, executors, options.cap, unit=options.unit, seed=f"{options.seed}/{name}")
            for name, world in zip(names, worlds, strict=True)
        ]
        played = [future.result() for future in waiting]
    for name, world, episode in zip(names, worlds, played, strict=True):
        print(json.dumps(record(name, episode)) if options.json else told(name, world.task, episode))
    return int(any(episode.violated or episode.stop == "lost" for episode in played))


def record(name: str, episode: PlayedEpisode) -> dict[str, object]:
    """An episode as JSON; an infinite budget is null."""
    document = {"task": name, **dataclasses.asdict(episode), "cost_usd": episode.cost_usd}
    del document["ids"]
    for step in document["steps"]:
        step["left"] = None if step["left"] == float("inf") else step["left"]
    return document


def told(name: str, task: str, episode: PlayedEpisode) -> str:
    """An episode as text."""
    lines = [f"{name}: {task}"]
    for step in episode.steps:
        left = "" if step.left == float("inf") else f", budget left {step.left:.4g}"
        lines.append(f"  {step.executor} ({step.probability:.2f} of {', '.join(step.allowed)}{left}): {step.action}")
        lines.append(f"    {step.error or step.observation}")
    lines.append(
        f"  {episode.stop}: score {episode.score:g}, ${episode.executor_usd:.6f} for executors, "
        f"${episode.policy_usd:.6f} for the policy" + (f" ({episode.error})" if episode.error else "")
    )
    return "\n".join(lines)
