"""The task of budget-aware routing as a recipe names it: games, executors, budgets, profiles; for the scripts."""

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from policies import Corpus

from routers.budget import Budget
from routers.budget_episode import CAP, GAME, BudgetEnvironment, drive
from routers.budget_rules import always_large, always_small
from routers.budget_state import compact, compact_prompt, verbose, verbose_prompt, vocabulary
from routers.catalogue import load_catalogue
from routers.environments.alfworld import AlfWorld
from routers.environments.executors import EXPLORER_USD, PLANNER_USD, Explorer, Planner
from routers.environments.facts import Game
from routers.environments.games import load_games
from routers.environments.generate import generate_games, generated
from routers.environments.protocol import AgentEnvironment, Executor
from routers.profiles import BoundaryProfile, DifficultyRule, Run, profile_tasks
from srpo.types import CORRECT, COST, Row


@dataclass
class BudgetTask:
    """Games, executors, budgets."""

    train_games: str = field(
        default="generated",
        metadata={"help": "`generated`, or a packed file or folder of ALFWorld games (routers.environments.games)."},
    )
    train_count: int = field(default=192, metadata={"help": "Use this many training games; 0: all of a file."})
    heldout_count: int = field(default=180, metadata={"help": "Generated held-out games."})
    heldout_games: str | None = field(
        default=None, metadata={"help": "A file or folder of ALFWorld games to evaluate on too, such as valid_unseen."}
    )
    step_limit: int = field(default=20, metadata={"help": "Steps of an episode."})
    executors: list[str] = field(
        default_factory=lambda: ["explorer", "planner"],
        metadata={
            "help": "Cheapest first: the SCRIPTED explorer and planner, or names of `catalogue`, each driven by a "
            "ReAct prompt."
        },
    )
    labels: list[str] = field(
        default_factory=lambda: ["<small>", "<large>"],
        metadata={"help": "The policy's words for the executors; each must be one token of the policy."},
    )
    catalogue: str | None = field(default=None, metadata={"help": "Prices and endpoints (YAML) of live executors."})
    explorer_usd: float = field(default=EXPLORER_USD, metadata={"help": "USD per call of the scripted explorer."})
    planner_usd: float = field(default=PLANNER_USD, metadata={"help": "USD per call of the scripted planner."})
    observation: str = field(
        default="compact",
        metadata={"help": "What the policy is told: compact (a few words, ALFWorld only) or verbose (the texts)."},
    )
    budget_unit: str = field(default="large_calls", metadata={"help": "usd or large_calls."})
    train_caps: list[float] = field(
        default_factory=lambda: [math.inf], metadata={"help": "Every training game is played at each; .inf: no cap."}
    )
    eval_caps: list[float] = field(
        default_factory=lambda: [math.inf], metadata={"help": "Caps of the evaluation; .inf: no cap."}
    )
    tail_calls: int = field(default=0, metadata={"help": "Cheap calls that an expensive one must leave affordable."})
    on_empty: str = field(default="stop", metadata={"help": "When nothing is affordable: stop, or force_small."})
    profile_runs: int = field(default=5, metadata={"help": "K runs of each boundary policy per game."})
    profile_workers: int = field(default=1, metadata={"help": "Processes for profiling."})
    tau_easy: float = field(default=0.6, metadata={"help": "Easy: always-small succeeds at least this often."})
    tau_large: float = field(default=0.2, metadata={"help": "Hard: not Easy, and always-large succeeds this often."})
    task_dir: str | None = field(
        default=None, metadata={"help": "Profiles and baselines, to share between runs; None: OUTPUT/task."}
    )

    def __post_init__(self) -> None:
        if len(self.labels) != len(self.executors):
            raise ValueError(f"{len(self.labels)} labels for {len(self.executors)} executors")
        if self.observation not in ("compact", "verbose"):
            raise ValueError(f"observation={self.observation!r} is not one of compact, verbose")
        self.budget()

    def budget(self) -> Budget:
        return Budget(None, self.budget_unit, self.tail_calls, self.on_empty)  # type: ignore[arg-type]

    @property
    def rule(self) -> DifficultyRule:
        return DifficultyRule(self.tau_easy, self.tau_large)

    def profile_settings(self) -> dict[str, Any]:
        """What profiles and baselines depend on, beside the game."""
        names = ("step_limit", "executors", "catalogue", "explorer_usd", "planner_usd", "profile_runs")
        return {name: getattr(self, name) for name in names}


def cap_of(value: float) -> float | None:
    """A recipe's cap; .inf means none."""
    return None if math.isinf(value) else value


def train_games(task: BudgetTask) -> list[Game]:
    """The training games that the recipe names."""
    if task.train_games == "generated":
        return generate_games(task.train_count, "train")
    games = load_games(task.train_games)
    return games[: task.train_count] if task.train_count else games


def heldout_sets(task: BudgetTask) -> dict[str, list[Game]]:
    """Name -> games of every set to evaluate on."""
    sets = {"generated": generate_games(task.heldout_count, "heldout")} if task.heldout_count else {}
    if task.heldout_games:
        path = Path(task.heldout_games)
        sets[path.name.split(".")[0]] = load_games(path)
    return sets


def make_executors(task: BudgetTask) -> list[Executor]:
    """The recipe's executors, cheapest first."""
    if task.catalogue is None:
        scripted = {"explorer": Explorer(task.explorer_usd), "planner": Planner(task.planner_usd)}
        if unknown := [name for name in task.executors if name not in scripted]:
            raise ValueError(f"executors: {unknown[0]!r} is neither explorer nor planner, and there is no catalogue")
        return [scripted[name] for name in task.executors]
    from routers.environments.react import ReActExecutor
    from routers.pool import live_pool

    pool = live_pool(load_catalogue(task.catalogue), agent_prompt="{query}")
    return [ReActExecutor(pool, name) for name in task.executors]


def make_environment(task: BudgetTask, games: Sequence[Game]) -> BudgetEnvironment:
    """The environment of rows whose `game` is among these, or the id of a generated game."""
    known = {game.id: game for game in games}

    def make(row: Row) -> AgentEnvironment:
        name = row[GAME]
        return AlfWorld(known[name] if name in known else generated(name), limit=task.step_limit)

    describe = compact if task.observation == "compact" else verbose
    return BudgetEnvironment(make, make_executors(task), describe, task.budget(), task.labels)


def make_rows(task: BudgetTask, games: Sequence[Game], caps: Sequence[float]) -> list[dict[str, Any]]:
    """A row per game and cap: prompt (chat messages), game, cap, query_id."""
    environment = make_environment(task, games)
    prompt = compact_prompt if task.observation == "compact" else verbose_prompt
    rows = []
    for cap in caps:
        for game in games:
            row = {GAME: game.id, CAP: cap_of(cap), "query_id": f"{game.id}@{cap:g}"}
            situation = environment.episode(row, "prompt").situation
            text = prompt(game.task, situation, environment.labels)
            rows.append({"prompt": [{"role": "user", "content": text}], **row})
    return rows


def corpus(task: BudgetTask, games: Sequence[Game]) -> Corpus:
    """For the tokenizer of a policy made from nothing: the task lines, and the words that are one token each."""
    return Corpus([game.task for game in games], [*task.labels, *vocabulary()])


def _play(game: str, boundary: Literal["small", "large"], k: int, task: BudgetTask, games: dict[str, Game]) -> Run:
    environment = make_environment(task, [games[game]])
    choose = always_small if boundary == "small" else always_large
    columns = drive(environment, {GAME: game}, f"profile/{boundary}/{k}/{game}", choose).columns
    return Run(columns[CORRECT], columns[COST])


def profiles(task: BudgetTask, name: str, games: Sequence[Game], folder: Path) -> dict[str, BoundaryProfile]:
    """Profiles of a set of games, by game; made once, in `folder`.

    Raises:
        ValueError: the folder was made with other settings.
    """
    check_folder(task, folder)
    play = functools.partial(_play, task=task, games={game.id: game for game in games})
    types = {game.id: game.task_type for game in games}
    found = profile_tasks(types, play, folder / f"profiles_{name}.parquet", task.profile_runs, task.profile_workers)
    return {profile.task: profile for profile in found}


def check_folder(task: BudgetTask, folder: Path) -> None:
    """Refuse a folder of other settings; mark a new one."""
    mark, now = folder / "settings.json", json.loads(json.dumps(task.profile_settings()))
    if mark.exists():
        then = json.loads(mark.read_text())
        if changed := sorted(key for key in now if now[key] != then.get(key)):
            raise ValueError(
                f"{folder} was made with {changed[0]}={then.get(changed[0])!r}, the recipe says {now[changed[0]]!r}; "
                "give another task_dir"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    mark.write_text(json.dumps(now, indent=1) + "\n")


