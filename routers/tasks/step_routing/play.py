"""Let a trained step router play some tasks, and see who acted, out of whom, and what it cost.

    srpo play outputs/quickstart/bopo --count 2 --cap 1
    srpo play user/step-router --cap 0.05 --unit usd --json --catalogue members.yaml

Benchmark, tasks and executors are those of the recipe beside the checkpoint; further options are lines of it. The
scripted executors of the quickstart are SCRIPTED.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from routers.tasks.step_routing.arguments import StepRoutingArguments
from srpo.cli import Parser
from srpo.ranges import at_least, ranged
from srpo.recipe import load_recipe

if TYPE_CHECKING:
    from routers.tasks.step_routing.router import PlayedEpisode


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; 0 where no budget was passed and no episode lost."""
    parser = Parser("srpo play", None, __doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id of a step router")
    parser.add_argument("--config", help="recipe of the tasks; default: recipe.yaml beside the model or above it")
    parser.add_argument("--part", help="part of the benchmark; default: the first of the recipe's heldout_tasks")
    parser.add_argument("--count", type=ranged(at_least(1), whole=True), default=3, help="of its tasks")
    parser.add_argument("--cap", type=ranged(at_least(0)), help="hard limit of an episode; default: none")
    parser.add_argument("--unit", choices=["usd", "large_calls"], help="of the cap; default: as trained")
    parser.add_argument(
        "--temperature", type=ranged(at_least(0)), help="of the policy; 0: greedy; default: as trained"
    )
    parser.add_argument("--seed", default="0", help="names the dice")
    parser.add_argument("--json", action="store_true", help="print one JSON object per episode")
    options, lines = parser.parse_known_args(argv)
    recipe = options.config or _recipe_of(options.model)
    [task] = load_recipe(StepRoutingArguments, ["--config", str(recipe), *lines], partial=True)

    from routers.tasks.step_routing.router import StepRouter
    from routers.tasks.step_routing.world import StepWorld

    made = StepWorld(task)
    names = list(made.tasks(options.part or task.heldout_tasks[0], options.count))
    worlds, executors = [made.make(name) for name in names], made.executors()
    with StepRouter.from_pretrained(options.model, temperature=options.temperature) as router:
        waiting = [
            router.submit(world, executors, options.cap, unit=options.unit, seed=f"{options.seed}/{name}")
            for name, world in zip(names, worlds, strict=True)
        ]
        played = [future.result() for future in waiting]
    for name, world, episode in zip(names, worlds, played, strict=True):
        print(json.dumps(record(name, episode)) if options.json else told(name, world.task, episode))
    return int(any(episode.violated or episode.stop == "lost" for episode in played))


def _recipe_of(model: str) -> Path:
    """The recipe beside a checkpoint, or of the run that it is of.

    Raises:
        ValueError: there is none.
    """
    from srpo.rollout.shared import find_file

    above = Path(model).parent / "recipe.yaml"
    found = find_file(model, "recipe.yaml") or (above if Path(model).is_dir() and above.is_file() else None)
    if found is None:
        raise ValueError(f"{model} has no recipe.yaml, which srpo train writes: name a recipe with --config")
    return found


def record(name: str, episode: PlayedEpisode) -> dict[str, Any]:
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
