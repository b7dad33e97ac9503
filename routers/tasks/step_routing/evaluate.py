"""A policy and the rules it has to beat on held-out tasks, as `routers.evaluation.episodes.Episodes`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from transformers import PreTrainedModel

from rewards.boundary import BoundaryReward
from routers.environments.scripted import SCRIPTED
from routers.evaluation.episodes import CACHES, THEN, Episodes, Kind
from routers.evaluation.frontier import pareto_hull
from routers.evaluation.statistics import Paired
from routers.tasks.step_routing.advantages import EPISODES, Advantages, estimate, steps_of
from routers.tasks.step_routing.arguments import VALIDATION
from routers.tasks.step_routing.environment import TASK, StepRoutingEnvironment
from routers.tasks.step_routing.player import (
    NOTHING,
    RAISE,
    STEP_SECONDS,
    Driven,
    Job,
    PhaseStopped,
    failed,
    play_jobs,
)
from routers.tasks.step_routing.profiles import BoundaryProfile
from routers.tasks.step_routing.rules import LARGE, SMALL, Rules, estimates_advantages, random_mix, rules_of
from routers.tasks.step_routing.settings import StepSettings
from routers.tasks.step_routing.world import StepWorld, boundary_of
from srpo.rollout.generator import TransformersGenerator
from srpo.rollout.loop import Limits, play
from srpo.rollout.sampling_rules import Sampling
from srpo.rollout.special_tokens import end_ids
from srpo.rollout.turns import ALL_TOKENS
from srpo.task import Share
from srpo.types import CORRECT, COST, LOST, Row, Trajectory

NOTE = (
    f"Executors called {', '.join(SCRIPTED)} are SCRIPTED, no language models; the planner reads the hidden state. "
    "An episode that was lost twice counts as failed. The reward's cost is the executors', as in training."
)
_BATCH = 64
ADVANTAGES = "advantages.json"
Profiles = Mapping[str, Mapping[str, BoundaryProfile]]
"""Held-out set -> task -> profile."""


class Record:
    """Turns played episodes into rows of `Episodes`."""

    def __init__(self, world: StepWorld, profiles: Profiles) -> None:
        self._world, self._profiles = world, profiles
        self._rows: list[dict[str, Any]] = []

    def add(
        self, router: str, kind: Kind, which: str, name: str, columns: Mapping[str, Any], stop: str, **more: Any
    ) -> None:
        """One episode of a router on the task `name` of the set `which`; `more`: further columns."""
        task, profile = self._world.arguments, self._profiles[which][name]
        known = profile.columns(task.difficulty())
        cap, own = more.get("cap", math.inf), more.get("policy_usd", 0.0)
        rule, budget = task.reward(), None
        if rule.cost_norm == "budget":
            budget = cap if math.isfinite(cap) else None
            rule = rule if budget is not None else BoundaryReward(rule.cost_weight, rule.hard_bonus, "max")
        score, cost = float(columns[CORRECT]), float(columns[COST])
        self._rows.append(
            {
                "router": router,
                "kind": kind,
                "set": which,
                "item": name,
                "family": profile.task_type,
                "difficulty": known["difficulty"],
                "score": score,
                "usd": cost + own,
                "reward": rule(score, cost, boundary_of(known), budget),
                "calls": float(columns["calls"]),
                "large_calls": float(columns["large_calls"]),
                "member": THEN.join(columns["members"]),
                "stop": "failed" if stop == "lost" else stop,  # it counts, as a failure
                "violated": float(columns["budget_violated"]),
                "used": math.nan if columns["budget_used"] is None else float(columns["budget_used"]),
                **{key: float(value) for key, value in columns.items() if key.startswith(CACHES)},
                **more,
            }
        )

    def episodes(self) -> Episodes:
        task = self._world.arguments
        header: dict[str, Any] = {
            "task": "step_routing",
            "split": "heldout",
            "item": "task",
            "score": "success",
            "note": NOTE,
        }
        header["rule"] = {
            name: getattr(task, name) for name in ("cost_weight", "hard_bonus", "cost_norm", "gate_cost_on_success")
        }
        frame = pd.DataFrame(self._rows, columns=None if self._rows else ["router", "kind", *_EMPTY])
        return Episodes(frame, header)


_EMPTY = ("item", "score", "usd", "reward")


def play_policy(
    model: PreTrainedModel,
    tokenizer: Any,
    world: StepWorld,
    settings: StepSettings,
    profiles: Profiles,
    *,
    name: str,
    kind: Kind,
    share: Share,
    seed: int,
    temperature: float,
) -> Episodes:
    """The policy on its share of every set of `profiles` at every cap, told about it as `settings` say.

    Its own tokens are priced, each token of a context once (it is cached). A lost episode is played again with the
    same seed; lost again, it counts as failed.

    Args:
        model, tokenizer: the policy.
        world: environments, executors and money.
        profiles: of all tasks of the sets to be played.
        name, kind: of the policy, in the table.
        temperature: of its choices; 0: greedy.
        seed: of its dice.

    Raises:
        PhaseStopped: the run's money is spent.
    """
    environment, record = world.environment(), Record(world, profiles)
    sampling, ends = Sampling(temperature=temperature), end_ids(model, tokenizer)
    generator = TransformersGenerator(model, tokenizer, sampling, eos_ids=ends, keep_tokens=ALL_TOKENS)
    limits = Limits(world.arguments.step_limit, 100_000, settings.observation_tokens, STEP_SECONDS)
    was_training = model.training
    model.eval()

    def played(rows: Sequence[Row]) -> list[Trajectory]:
        prompts = [settings.prompt_ids(row["prompt"], tokenizer) for row in rows]
        seeds = [f"evaluation/{seed}/{row[TASK]}" for row in rows]
        out = environment.out_of_money
        return play(environment, rows, prompts, seeds, generator, tokenizer, limits, out_of_money=out)

    for which, known in profiles.items():
        names = list(share.of(list(known)))
        for cap in world.arguments.heldout_caps:
            how = {"seed": seed, "cap": cap}
            rows = world.rows(names, [cap])
            for start in range(0, len(rows), _BATCH):
                some = rows[start : start + _BATCH]
                began = time.monotonic()
                for row, one in zip(some, _twice(played, some), strict=True):
                    _check_money(environment)
                    seconds = (time.monotonic() - began) / len(some)
                    read = len(one.prompt_ids) + sum(len(t.ids) for t in one.turns if t.owner == "world")
                    own = settings.policy_usd(read, sum(len(t.ids) for t in one.turns if t.owner == "policy"))
                    columns = _known(row[TASK], one)
                    record.add(name, kind, which, row[TASK], columns, one.stop, policy_usd=own, seconds=seconds, **how)
            for left_out in [n for n in names if n not in {row[TASK] for row in rows}]:  # could not even begin
                record.add(name, kind, which, left_out, {**NOTHING, CORRECT: 0.0}, "lost", **how)
    model.train(was_training)
    return record.episodes()


def _check_money(environment: StepRoutingEnvironment) -> None:
    if environment.out_of_money():
        raise PhaseStopped(f"max_cost_usd is reached: ${environment.spent_usd():.4f} are spent. {RAISE}")


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
    return failed(trajectory)


def choose_rules(world: StepWorld, folder: Path) -> Mapping[str, float] | None:
    """Settings of rules (and the members) that may meet the held-out tasks, with their mean reward on the validation
    tasks, each played once: of every family those on its frontier there, and the best. None: there are no validation
    tasks, all may.

    What is played lies in `folder`, as in `play_rules`.
    """
    part, types = world.arguments.validation_tasks, world.validation()
    if part is None:
        return None
    profiles = world.profiles(VALIDATION, part, types, world.heldout_limit, folder)
    record, (rules, _) = Record(world, {VALIDATION: profiles}), _rules(world, folder)
    _play_rules(record, world, rules, 1, VALIDATION, part, list(types), folder / "rules_validation.jsonl")
    paired = Paired(record.episodes(), resamples=1)
    kept = {*paired.of_kind("member"), *(rule.router for rule in paired.rules)}
    for names in paired.frontiers.values():
        usd, score = (np.array([paired.mean(name, what) for name in names]) for what in ("usd", "score"))
        kept |= {names[i] for i in pareto_hull(usd, score)}
    return {name: round(paired.mean(name, "reward"), 6) for name in rules if name in kept}


def play_rules(
    world: StepWorld, profiles: Profiles, share: Share, folder: Path, chosen: Mapping[str, float] | None = None
) -> Episodes:
    """Every rule on its share of every held-out set, without a cap. What was played before lies in `folder`, a line
    per episode, and is not played again.

    Args:
        chosen: what `choose_rules` says; only these are played.
    """
    record, (rules, repetitions) = Record(world, profiles), _rules(world, folder)
    some = rules if chosen is None else {name: rules[name] for name in chosen}
    for which, types in world.heldout().items():
        part, path = world.arguments.heldout_sets()[which], folder / f"rules_{which}_{share.rank}of{share.world}.jsonl"
        _play_rules(record, world, some, repetitions, which, part, share.of(list(types)), path)
    found = record.episodes()
    told = {} if chosen is None else {"train_reward": dict(chosen), "chosen_on": "validation tasks"}
    return Episodes(found.frame, {**found.header, **told})


def _rules(world: StepWorld, folder: Path) -> tuple[Rules, int]:
    known = folder / ADVANTAGES
    if estimates_advantages(world.arguments) and not known.exists():
        print(f"WARNING: the rule arbitrage is left out: {folder} was not made by a training, and has no {ADVANTAGES}")
    return rules_of(world.arguments, Advantages.load(known) if known.exists() else None)


def _play_rules(
    record: Record,
    world: StepWorld,
    rules: Rules,
    repetitions: int,
    which: str,
    part: str,
    names: Sequence[str],
    path: Path,
) -> None:
    """Every rule on these tasks of the set `which`."""
    keys = [(rule, k, name) for rule in rules for k in range(repetitions) for name in names]
    jobs = [
        Job(f"{rule}/{k}/{name}", {TASK: name}, f"evaluation/{k}/{name}", rules[rule][1]) for rule, k, name in keys
    ]
    played = play_jobs(jobs, path, world.player((part, world.heldout_limit)), _columns)
    for (rule, k, name), columns in zip(keys, played, strict=True):
        kind: Kind = "member" if rule in (SMALL, LARGE) else "rule"
        record.add(rule, kind, which, name, columns, columns["stop"], seed=k, curve=rules[rule][0])


def estimate_advantages(world: StepWorld, tasks: Mapping[str, BoundaryProfile], folder: Path) -> None:
    """Play random episodes on the training tasks, and keep what `arbitrage` goes by in `folder`; once."""
    path, cheapest = folder / ADVANTAGES, world.arguments.executors[0]
    if path.exists() or not estimates_advantages(world.arguments):
        return
    seeds = [(name, f"advantages/{k}/{name}") for name in tasks for k in range(EPISODES)]
    jobs = [Job(seed, {TASK: name}, seed, random_mix(0.5)) for name, seed in seeds]
    player = world.player((world.arguments.train_tasks, world.train_limit))
    partial = folder / "advantages.partial"

    def kept(driven: Driven) -> tuple[Any, float, float]:
        return steps_of(driven.decisions, cheapest), float(driven.columns[CORRECT]), float(driven.columns[COST])

    played = play_jobs(jobs, partial, player, kept)
    estimate(played, sum(profile.cost_large for profile in tasks.values()) / len(tasks)).save(path)
    partial.unlink()


def _columns(driven: Driven) -> dict[str, Any]:
    names = (CORRECT, COST, "calls", "large_calls", "members", "budget_used", "budget_violated")
    caches = {name: value for name, value in driven.columns.items() if name.startswith(CACHES)}
    return {**{name: driven.columns[name] for name in names}, **caches, "stop": driven.stop}
