"""What a recipe of step routing names: tasks of a benchmark, executors, the environment, rows, profiles."""

from __future__ import annotations

import functools
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewards.boundary import Boundary, BoundaryReward, cheap_failure_pays
from routers.data.catalogue import Member, load_catalogue
from routers.data.folds import parted
from routers.environments.messages.agent import agent_of
from routers.environments.messages.members import LiveMember, ScriptedMember
from routers.environments.priced import PricedExecutor
from routers.environments.protocol import Executor
from routers.environments.react import ReActExecutor
from routers.environments.registry import benchmark
from routers.environments.scripted import SCRIPTED
from routers.pool import Pool, ReplyCache, live_pool
from routers.tasks.step_routing.arguments import VALIDATION, StepRoutingArguments
from routers.tasks.step_routing.environment import CAP, TASK, StepRoutingEnvironment
from routers.tasks.step_routing.player import PAUSE, Player, twice
from routers.tasks.step_routing.profiles import BoundaryProfile, profile_tasks, read_profiles, read_settings
from routers.tasks.step_routing.prompts import OBSERVATIONS
from routers.tasks.step_routing.settings import StepSettings
from srpo.quarantine import Quarantine
from srpo.rollout.worker_loop import Failure
from srpo.run.derived import source

if TYPE_CHECKING:
    from srpo.config import SRPOConfig
    from srpo.task import RunArguments

BUDGET = "budget"
"""Column: the episode's budget in USD, for cost_norm budget; None where calls are counted."""
REFERENCES = "references"
"""Column: of `srpo.objectives.advantages`, which this module does not import: it needs torch."""
_PARTS = "parts.json"


@dataclass(frozen=True)
class StepWorld:
    """Tasks, executors and episodes of a recipe. It can be pickled, for processes that play.

    Args:
        arguments: of the recipe.
        train_limit, heldout_limit: tasks of the training part, and of each held-out part; None: all.
        chooses: whether the best checkpoint of a training is chosen (`eval_strategy`).
    """

    arguments: StepRoutingArguments
    train_limit: int | None = None
    heldout_limit: int | None = None
    chooses: bool = False

    def train_tasks(self) -> Mapping[str, str]:
        """Training tasks that are trained on: id -> type."""
        return self._parted()[0]

    def choosing(self) -> Mapping[str, str]:
        """Tasks on which the best checkpoint is chosen: those of `validation_tasks`, else a fifth of the training
        tasks, which are not trained on; none: it is not."""
        if not self.chooses:
            return {}
        return self.validation() if self.arguments.validation_tasks else self._parted()[1]

    def choosing_profiles(self, folder: Path) -> Mapping[str, BoundaryProfile]:
        """Profiles of those, as `profiles`."""
        task, part = self.arguments, self.arguments.validation_tasks
        if part is None:
            return self.profiles("train", task.train_tasks, self.choosing(), self.train_limit, folder)
        return self.profiles(VALIDATION, part, self.choosing(), self.heldout_limit, folder)

    def _parted(self) -> tuple[Mapping[str, str], Mapping[str, str]]:
        every = self.tasks(self.arguments.train_tasks, self.train_limit)
        names = list(every)
        parts = parted(names, self.chooses and self.arguments.validation_tasks is None)
        learned, aside = ({names[i]: every[names[i]] for i in part} for part in parts)
        return learned, aside

    def heldout(self) -> dict[str, Mapping[str, str]]:
        """Name of every held-out set -> its tasks."""
        sets = self.arguments.heldout_sets()
        return {name: self.tasks(which, self.heldout_limit) for name, which in sets.items()}

    def validation(self) -> Mapping[str, str]:
        """Tasks on which rules choose their settings; none: they do not."""
        part = self.arguments.validation_tasks
        return {} if part is None else self.tasks(part, self.heldout_limit)

    def tasks(self, which: str, limit: int | None) -> Mapping[str, str]:
        """Tasks of a part, id -> type; loaded once per process."""
        return _load_tasks(self.arguments.environment, which, limit)

    def make(self, name: str) -> Any:
        """A fresh episode's environment."""
        return benchmark(self.arguments.environment).make(name, self.arguments.step_limit)

    def pool(self) -> Pool | None:
        """The one pool of this process behind the live executors; None where all are scripted."""
        task = self.arguments
        return _live_executors(str(task.catalogue), tuple(task.live), task.reply_cache) if task.live else None

    def executors(self) -> list[Executor]:
        """Cheapest first. A scripted one that the catalogue lists costs what its tokens do there.

        Raises:
            ValueError: a catalogue that lists none of the executors.
        """
        task, pool = self.arguments, self.pool()
        found: list[Executor] = []
        priced = {} if task.catalogue is None else _catalogue(str(task.catalogue))
        if task.catalogue is not None and not priced.keys() & {*task.executors}:
            raise ValueError(
                f"{task.catalogue}: lists none of the executors {', '.join(task.executors)}; leave it out"
            )
        for name, usd in zip(task.executors, task.executor_usd, strict=True):
            if pool is not None and name not in SCRIPTED:
                by_messages = task.environment == "messages"
                found.append(LiveMember(priced[name], pool.ledger) if by_messages else ReActExecutor(pool, name))
                continue
            scripted = SCRIPTED[name](usd)
            if name in priced and isinstance(scripted, ScriptedMember):
                scripted.member = priced[name]
            elif name in priced:
                scripted = PricedExecutor(scripted, priced[name])
            found.append(scripted)
        return found

    def environment(self, *parts: tuple[str, int | None]) -> StepRoutingEnvironment:
        """The environment of rows whose `task` the benchmark knows.

        Args:
            parts: (part, limit) to load before, for a process that has not listed them.
        """
        for which, limit in parts:
            self.tasks(which, limit)
        task, pool = self.arguments, self.pool()
        return StepRoutingEnvironment(
            lambda row: self.make(row[TASK]),
            self.executors(),
            OBSERVATIONS[task.observation].describe,
            task.budget(),
            task.labels,
            ledger=None if pool is None else pool.ledger,
            waits=self.arguments.environment == "messages" and agent_of(task.train_tasks.partition("/")[0]).waits,
        )

    def player(self, *parts: tuple[str, int | None]) -> Player:
        """Plays rules on tasks of these parts: scripted executors in processes, live ones in one event loop."""
        make = functools.partial(self.environment, *parts)
        if self.arguments.live:
            return Player(make, threads=self.arguments.concurrency, pause=PAUSE)
        return Player(make, processes=self.arguments.profile_workers)

    def rows(self, names: Iterable[str], caps: Sequence[float], bad: Quarantine | None = None) -> list[dict[str, Any]]:
        """A row per cap and task: prompt (chat messages), task, cap, query_id; none where a task twice does not begin.

        Args:
            bad: takes the tasks that do not begin; None: they are printed.

        Raises:
            ValueError: a cap that cannot pay for a call.
        """
        environment, prompt = self.environment(), OBSERVATIONS[self.arguments.observation].prompt
        limits, names = [None if math.isinf(cap) else cap for cap in caps], list(names)

        async def begin(name: str) -> list[str]:
            return [prompt(start, environment.labels) for start in environment.starts({TASK: name}, limits)]

        texts: dict[str, list[str]] = {}
        for name, found in zip(names, twice([functools.partial(begin, name) for name in names]), strict=True):
            if not isinstance(found, Failure):
                texts[name] = found
            elif found.cause.startswith("ValueError: "):
                raise ValueError(found.cause.removeprefix("ValueError: "))
            elif bad is not None:
                bad.add(names.index(name) + 1, "does not begin", f"{name}: {found.cause}", name)
            else:
                print(f"WARNING: left out, it does not begin: {name}: {found.cause}", flush=True)
        if bad is not None:
            bad.settle(len(names))
        return [
            {
                "prompt": [{"role": "user", "content": texts[name][number]}],
                TASK: name,
                CAP: limit,
                "query_id": f"{name}@{cap:g}",
            }
            for number, (cap, limit) in enumerate(zip(caps, limits, strict=True))
            for name in texts
        ]

    def completed(
        self, rows: Iterable[Mapping[str, Any]], profiled: Mapping[str, BoundaryProfile]
    ) -> list[dict[str, Any]]:
        """The rows with what the reward and the advantage read."""
        found, rule, difficulty = [], self.arguments.reward(), self.arguments.difficulty()
        for row in rows:
            columns = profiled[row[TASK]].columns(difficulty)
            budget = row[CAP] if self.arguments.budget_unit == "usd" else None
            references = list(rule.references(boundary_of(columns), budget))
            found.append({**row, **columns, BUDGET: budget, REFERENCES: references})
        return found

    def profile_settings(self) -> dict[str, Any]:
        """What profiles and rules depend on, beside the tasks."""
        names = ("environment", "step_limit", "executors", "executor_usd", "catalogue", "profile_runs")
        task = self.arguments
        return {**{name: getattr(task, name) for name in names}, "catalogue_content": source(task.catalogue)}

    def profiles(
        self, name: str, which: str, types: Mapping[str, str], limit: int | None, folder: Path
    ) -> dict[str, BoundaryProfile]:
        """Profiles of tasks of a part, by task; made once, in `folder`.

        Args:
            name: their file is `profiles_NAME.parquet`.
            which: the part of the benchmark.
            types: task id -> type.
            limit: this many of the tasks; None: all.

        Raises:
            ValueError: the folder was made with other settings.
        """
        check_folder(self.profile_settings(), folder)
        _check_content(which, folder)
        play, path = self.player((which, limit)), folder / f"profiles_{name}.parquet"
        return {profile.task: profile for profile in profile_tasks(types, play, path, self.arguments.profile_runs)}

    def given_profiles(self, path: Path) -> dict[str, BoundaryProfile]:
        """Profiles of the training tasks, by task, from a file that an earlier run wrote: OUTPUT/profiles.parquet.

        Raises:
            ValueError: the file was made with other settings, or holds no profile of a training task.
            FileNotFoundError: there is no such file.
        """
        if not path.is_file():
            raise FileNotFoundError(f"profiles: there is no {path}; srpo train writes OUTPUT/profiles.parquet")
        _refuse_changes(read_settings(path), self.profile_settings(), f"profiles: {path}", "another file, or none")
        found = {profile.task: profile for profile in read_profiles(path)}
        names = list(self.train_tasks())
        if missing := [name for name in names if name not in found]:
            raise ValueError(
                f"profiles: {path} has no profile of {missing[0]!r}, nor of {len(missing) - 1} more of the "
                f"{len(names)} training tasks; give the file of a run on these tasks, or none, and they are profiled"
            )
        return {name: found[name] for name in names}

    def check_parts(self) -> None:
        """Raise where a held-out part cannot be read, or a given `task_dir` is for something else; writes nothing."""
        task = self.arguments
        self.heldout()
        self.validation()
        if self.chooses and task.validation_tasks in (task.train_tasks, *task.heldout_tasks):
            raise ValueError(
                f"validation_tasks: {task.validation_tasks} is trained on or held out, and eval_strategy chooses the "
                "best checkpoint on it: name another part, or none, which sets a fifth of the training tasks aside"
            )
        if self.arguments.task_dir is not None:
            folder = Path(self.arguments.task_dir)
            if (folder / "settings.json").exists():
                check_folder(self.profile_settings(), folder)
            for which in (self.arguments.train_tasks, *self.arguments.heldout_tasks):
                _known_contents(which, folder)


@functools.cache
def _load_tasks(environment: str, which: str, limit: int | None) -> Mapping[str, str]:
    return benchmark(environment).tasks(which, limit or 0)


@functools.cache
def _catalogue(path: str) -> Mapping[str, Member]:
    return load_catalogue(path)


@functools.cache
def _live_executors(catalogue: str, names: tuple[str, ...], reply_cache: str | None) -> Pool:
    """Limits, circuit breakers and money of these executors are shared.

    Raises:
        ValueError: a member is missing, or not usable.
    """
    members = _catalogue(catalogue)
    if unknown := [name for name in names if name not in members]:
        raise ValueError(f"executors: {unknown[0]!r} is not in {catalogue}")
    cache = None if reply_cache is None else ReplyCache(reply_cache)
    return live_pool({name: members[name] for name in names}, cache=cache, agent_prompt="{query}")


def step_settings(task: StepRoutingArguments, run: RunArguments, config: SRPOConfig) -> StepSettings:
    """How the policy is told about an episode, in training and ever after."""
    return StepSettings(
        executors=tuple(task.executors),
        labels=tuple(task.labels),
        observation=task.observation,
        unit=task.budget_unit,
        tail_calls=task.tail_calls,
        on_empty=task.on_empty,
        step_limit=task.step_limit,
        observation_tokens=config.max_observation_tokens,
        chat_template_kwargs=config.chat_template_kwargs or {},
        environment=task.environment,
        temperature=config.temperature,
        policy_price=(run.policy_price_in, run.policy_price_out),
    )


def describe_rows(rule: BoundaryReward, rows: Sequence[Mapping[str, Any]]) -> str:
    """Classes of the training tasks, and a warning where cheap failure pays (for cost_norm budget: at each budget)."""
    counts = Counter({row[TASK]: row["difficulty"] for row in rows}.values())
    budgets = rule.cost_norm == "budget"
    hard = {(row[TASK], budgets and row[BUDGET]): (boundary_of(row), row[BUDGET]) for row in rows if row["hard"]}
    warning = cheap_failure_pays(rule, hard.values())
    classes = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
    return f"training tasks: {classes}" + (f"\nWARNING: {warning}" if warning else "")


def boundary_of(columns: Mapping[str, Any]) -> Boundary:
    """What the reward knows of a task, from the columns of its profile."""
    return Boundary(*(columns[name] for name in ("p_small", "p_large", "cost_small", "cost_large", "hard")))


def check_folder(settings: Mapping[str, Any], folder: Path) -> None:
    """Refuse a folder that was made with other settings; mark a new one."""
    mark = folder / "settings.json"
    if mark.exists():
        then = json.loads(mark.read_text())
        return _refuse_changes(then, settings, str(folder), "another folder, or remove that one")
    folder.mkdir(parents=True, exist_ok=True)
    mark.write_text(json.dumps(settings, indent=1) + "\n")


def _check_content(which: str, folder: Path) -> None:
    """Refuse a file of tasks whose content has changed since its profiles were made; mark one that is new."""
    if Path(which).exists():
        (folder / _PARTS).write_text(json.dumps(_known_contents(which, folder), indent=1) + "\n")


def _known_contents(which: str, folder: Path) -> dict[str, Any]:
    """The contents of files of tasks whose profiles lie in the folder, this one's too."""
    if not Path(which).exists():
        return {}
    path, now = folder / _PARTS, source(which)
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if known.setdefault(which, now) != now:
        raise ValueError(
            f"{folder} holds profiles of {which} as it was: its content has changed; give another task_dir (or "
            "output_dir), or remove that one"
        )
    return known


def _refuse_changes(then: Mapping[str, Any], settings: Mapping[str, Any], what: str, instead: str) -> None:
    """ValueError where `settings` say something else than those of `then`, which made `what`."""
    now = json.loads(json.dumps(settings))
    if changed := sorted(key for key in now if now[key] != then.get(key)):
        raise ValueError(
            f"{what} was made with {changed[0]}={then.get(changed[0])!r}, the recipe says {now[changed[0]]!r}; give "
            f"{instead}"
        )
