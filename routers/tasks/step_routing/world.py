"""The task of budget-aware routing as a recipe names it: environment, executors, budgets, profiles."""

import functools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from routers.environments.registry import benchmark
from routers.environments.scripted import EXPLORER_USD, PLANNER_USD, SCRIPTED
from routers.tasks.step_routing.budget import Budget
from routers.tasks.step_routing.environment import CAP, TASK, StepRoutingEnvironment
from routers.tasks.step_routing.executors import make_executors, make_pool
from routers.tasks.step_routing.player import PAUSE, Player, twice
from routers.tasks.step_routing.profiles import BoundaryProfile, DifficultyRule, profile_tasks
from routers.tasks.step_routing.prompts import OBSERVATIONS
from routers.tasks.step_routing.settings import StepSettings
from srpo.quarantine import MAX_BAD_SHARE, Quarantine
from srpo.ranges import Ranges, at_least, between, check_numbers
from srpo.rollout.worker_loop import Failure
from srpo.run.derived import source
from srpo.types import Row

if TYPE_CHECKING:
    from srpo import SRPOConfig
    from srpo.policy import Corpus

PARTS = "parts.json"


@dataclass
class BudgetTask:
    """Environment, executors, budgets."""

    RANGES: ClassVar[Ranges] = {
        "max_bad_share": between(0, 1),
        "train_count": at_least(0),
        "heldout_count": at_least(0),
        "step_limit": at_least(1),
        "executor_usd": at_least(0),
        "concurrency": at_least(1),
        "train_caps": at_least(0, math.inf),
        "eval_caps": at_least(0, math.inf),
        "tail_calls": at_least(0),
        "profile_runs": at_least(1),
        "profile_workers": at_least(1),
        "tau_easy": between(0, 1, open_low=True),
        "tau_large": between(0, 1, open_low=True),
    }

    environment: str = field(
        default="alfworld", metadata={"help": "alfworld, appworld, bfcl, scienceworld or textworld."}
    )
    train_tasks: str = field(
        default="generated/train",
        metadata={
            "help": "Part of the environment: generated/SPLIT or a file or folder of games (alfworld), a split "
            "(scienceworld, appworld), a category (bfcl), a folder of games (textworld)."
        },
    )
    train_count: int = field(default=192, metadata={"help": "Use this many training tasks; 0: all."})
    max_bad_share: float = field(
        default=MAX_BAD_SHARE,
        metadata={"help": "Training tasks that do not begin are left out up to this share; above it the run stops."},
    )
    heldout_tasks: list[str] = field(
        default_factory=lambda: ["generated/test"], metadata={"help": "Parts to evaluate on, one table each."}
    )
    heldout_count: int = field(default=180, metadata={"help": "Use at most this many tasks of each; 0: all."})
    step_limit: int = field(default=20, metadata={"help": "Steps of an episode."})
    executors: list[str] = field(
        default_factory=lambda: ["explorer", "planner"],
        metadata={
            "help": "Cheapest first: SCRIPTED ones (routers.environments.scripted), or names of `catalogue`, each "
            "driven by a ReAct prompt."
        },
    )
    executor_usd: list[float] = field(
        default_factory=lambda: [EXPLORER_USD, PLANNER_USD],
        metadata={"help": "USD per call of each scripted executor; members of `catalogue` have prices of their own."},
    )
    labels: list[str] = field(
        default_factory=lambda: ["<small>", "<large>"],
        metadata={"help": "The policy's words for the executors; each must be one token of the policy."},
    )
    catalogue: str | None = field(default=None, metadata={"help": "Prices and endpoints (YAML) of live executors."})
    concurrency: int = field(
        default=32, metadata={"help": "Episodes at once of profiling, demonstrations and rules with live executors."}
    )
    reply_cache: str | None = field(
        default=None,
        metadata={"help": "Folder where live executors' replies are kept: what was asked before is free."},
    )
    observation: str = field(
        default="compact",
        metadata={
            "help": "What the policy is told: compact (a few words, ALFWorld only), progress (a few words, any "
            "environment) or verbose (the texts)."
        },
    )
    budget_unit: str = field(default="large_calls", metadata={"help": "usd or large_calls."})
    train_caps: list[float] = field(
        default_factory=lambda: [math.inf], metadata={"help": "Every training task is played at each; .inf: no cap."}
    )
    eval_caps: list[float] = field(
        default_factory=lambda: [math.inf], metadata={"help": "Caps of the evaluation; .inf: no cap."}
    )
    tail_calls: int = field(default=0, metadata={"help": "Cheap calls that an expensive one must leave affordable."})
    on_empty: str = field(default="stop", metadata={"help": "When nothing is affordable: stop, or force_small."})
    profile_runs: int = field(default=5, metadata={"help": "K runs of each boundary policy per task."})
    profile_workers: int = field(default=1, metadata={"help": "Processes for the same with scripted executors."})
    tau_easy: float = field(default=0.6, metadata={"help": "Easy: always-small succeeds at least this often."})
    tau_large: float = field(default=0.2, metadata={"help": "Hard: not Easy, and always-large succeeds this often."})
    task_dir: str | None = field(
        default=None, metadata={"help": "Profiles and baselines, to share between runs; None: OUTPUT/task."}
    )

    def __post_init__(self) -> None:
        check_numbers(self)
        for name in ("executors", "heldout_tasks", "train_caps", "eval_caps"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name}={values}: give at least one, and none of them twice")
        if not len(self.labels) == len(self.executors) == len(self.executor_usd):
            raise ValueError(
                f"{len(self.executors)} executors, {len(self.labels)} labels, {len(self.executor_usd)} executor_usd: "
                "give one of each per executor"
            )
        if self.observation not in OBSERVATIONS:
            raise ValueError(f"observation={self.observation!r} is not one of {', '.join(OBSERVATIONS)}")
        if self.live and self.catalogue is None:
            raise ValueError(
                f"executors: {self.live[0]!r} is not one of the scripted {', '.join(SCRIPTED)}, and there is no "
                "catalogue"
            )
        self.budget()

    @property
    def live(self) -> list[str]:
        """Executors behind endpoints."""
        return [name for name in self.executors if name not in SCRIPTED]

    def budget(self) -> Budget:
        return Budget(None, self.budget_unit, self.tail_calls, self.on_empty)  # type: ignore[arg-type]

    @property
    def rule(self) -> DifficultyRule:
        return DifficultyRule(self.tau_easy, self.tau_large)

    def profile_settings(self) -> dict[str, Any]:
        """What profiles and baselines depend on, beside the tasks."""
        names = ("environment", "step_limit", "executors", "executor_usd", "catalogue", "profile_runs")
        return {**{name: getattr(self, name) for name in names}, "catalogue_content": source(self.catalogue)}

    def evaluation_settings(self) -> dict[str, Any]:
        """What episodes of a policy on the held-out tasks depend on, beside the policy."""
        names = """heldout_tasks heldout_count eval_caps budget_unit tail_calls on_empty observation labels
            tau_easy tau_large"""
        parts = [source(which) for which in self.heldout_tasks]
        return {**self.profile_settings(), **{n: getattr(self, n) for n in names.split()}, "heldout_content": parts}

    def row_settings(self) -> dict[str, Any]:
        """What the training rows and their order depend on, beside that."""
        names = (
            "train_tasks train_count train_caps budget_unit tail_calls on_empty observation labels tau_easy tau_large"
        )
        return {**{name: getattr(self, name) for name in names.split()}, "train_content": source(self.train_tasks)}


def cap_of(value: float) -> float | None:
    """A recipe's cap; .inf means none."""
    return None if math.isinf(value) else value


def train_tasks(task: BudgetTask) -> Mapping[str, str]:
    """Training tasks: id -> type."""
    return load_tasks(task.environment, task.train_tasks, task.train_count)


def heldout_sets(task: BudgetTask) -> dict[str, str]:
    """Name of every set to evaluate on -> its part.

    Raises:
        ValueError: two parts would share a name.
    """
    sets: dict[str, str] = {}
    for which in task.heldout_tasks:
        name = "generated" if which == "generated/test" else Path(which).name.split(".")[0].split(":")[0]
        if name in sets or name == "train":
            raise ValueError(f"heldout_tasks: {which!r} would be called {name!r}, which another part is called")
        sets[name] = which
    return sets


def make_environment(task: BudgetTask, *parts: tuple[str, int]) -> StepRoutingEnvironment:
    """The environment of rows whose `task` the suite knows.

    Args:
        parts: (part, count) to load before, for a process that has not listed them.
    """
    for which, count in parts:
        load_tasks(task.environment, which, count)
    tasks, pool = benchmark(task.environment), make_pool(task)
    return StepRoutingEnvironment(
        lambda row: tasks.make(row[TASK], task.step_limit),
        make_executors(task),
        OBSERVATIONS[task.observation].describe,
        task.budget(),
        task.labels,
        ledger=None if pool is None else pool.ledger,
    )


def make_player(task: BudgetTask, *parts: tuple[str, int]) -> Player:
    """Plays rules on tasks of these parts: scripted executors in processes, live ones in one event loop."""
    make = functools.partial(make_environment, task, *parts)
    if task.live:
        return Player(make, threads=task.concurrency, pause=PAUSE)
    return Player(make, processes=task.profile_workers)


def make_rows(
    task: BudgetTask, names: Iterable[str], caps: Sequence[float], bad: Quarantine | None = None
) -> list[dict[str, Any]]:
    """A row per cap and task: prompt (chat messages), task, cap, query_id. Tasks that twice do not begin have none.

    Args:
        bad: takes the tasks that do not begin; None: they are printed.

    Raises:
        ValueError: a cap that cannot pay for a call.
    """
    environment, prompt = make_environment(task), OBSERVATIONS[task.observation].prompt
    limits, names = [cap_of(cap) for cap in caps], list(names)

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


def step_settings(task: BudgetTask, args: "SRPOConfig", policy_price: tuple[float, float]) -> StepSettings:
    """How the policy is told about an episode, in training and ever after."""
    return StepSettings(
        executors=tuple(task.executors),
        labels=tuple(task.labels),
        observation=task.observation,
        unit=task.budget_unit,
        tail_calls=task.tail_calls,
        on_empty=task.on_empty,
        step_limit=task.step_limit,
        observation_tokens=args.max_observation_tokens,
        chat_template_kwargs=args.chat_template_kwargs or {},
        environment=task.environment,
        temperature=args.temperature,
        policy_price=policy_price,
    )


def corpus(task: BudgetTask, rows: Sequence[Row]) -> "Corpus":
    """For the tokenizer of a policy made from nothing: the prompts, and the words that are one token each."""
    from srpo.policy import Corpus  # imports torch, which processes that only play need not

    return Corpus([row["prompt"][0]["content"] for row in rows], [*task.labels, *OBSERVATIONS[task.observation].words])


@functools.cache
def load_tasks(environment: str, which: str, count: int) -> Mapping[str, str]:
    """Tasks of a part, id -> type; loaded once per process."""
    return benchmark(environment).tasks(which, count)


def profiles(task: BudgetTask, name: str, which: str, count: int, folder: Path) -> dict[str, BoundaryProfile]:
    """Profiles of the tasks of a part, by task; made once, in `folder`.

    Raises:
        ValueError: the folder was made with other settings.
    """
    check_folder(task.profile_settings(), folder)
    _check_content(which, folder)
    types = load_tasks(task.environment, which, count)
    play = make_player(task, (which, count))
    found = profile_tasks(types, play, folder / f"profiles_{name}.parquet", task.profile_runs)
    return {profile.task: profile for profile in found}


def check_parts(task: BudgetTask) -> None:
    """Raise where a held-out part cannot be read, or a given `task_dir` is for something else; writes nothing."""
    for which in heldout_sets(task).values():
        load_tasks(task.environment, which, task.heldout_count)
    if task.task_dir is not None:
        _refuse_other_settings(task.profile_settings(), Path(task.task_dir))
        for which in (task.train_tasks, *task.heldout_tasks):
            _known_contents(which, Path(task.task_dir))


def check_folder(settings: Mapping[str, Any], folder: Path) -> None:
    """Refuse a folder that was made with other settings; mark a new one."""
    mark = folder / "settings.json"
    if mark.exists():
        return _refuse_other_settings(settings, folder)
    folder.mkdir(parents=True, exist_ok=True)
    mark.write_text(json.dumps(settings, indent=1) + "\n")


def _refuse_other_settings(settings: Mapping[str, Any], folder: Path) -> None:
    mark = folder / "settings.json"
    if mark.exists():
        refuse_changes(json.loads(mark.read_text()), settings, str(folder), "another folder, or remove that one")


def _check_content(which: str, folder: Path) -> None:
    """Refuse a file of tasks whose content has changed since its profiles were made; mark one that is new."""
    if Path(which).exists():
        (folder / PARTS).write_text(json.dumps(_known_contents(which, folder), indent=1) + "\n")


def _known_contents(which: str, folder: Path) -> dict[str, Any]:
    """The contents of files of tasks whose profiles lie in the folder, this one's too."""
    if not Path(which).exists():
        return {}
    path, now = folder / PARTS, source(which)
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if known.setdefault(which, now) != now:
        raise ValueError(
            f"{folder} holds profiles of {which} as it was: its content has changed; give another task_dir (or "
            "output_dir), or remove that one"
        )
    return known


def refuse_changes(then: Mapping[str, Any], settings: Mapping[str, Any], what: str, instead: str) -> None:
    """ValueError where `settings` say something else than those of `then`, which made `what`."""
    now = json.loads(json.dumps(settings))
    if changed := sorted(key for key in now if now[key] != then.get(key)):
        raise ValueError(
            f"{what} was made with {changed[0]}={then.get(changed[0])!r}, the recipe says {now[changed[0]]!r}; give "
            f"{instead}"
        )
