"""The recipe keys of step routing: benchmark, executors, budgets, profiles, demonstrations and reward."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from rewards.boundary import BoundaryReward
from routers.environments.scripted import EXPLORER_USD, PLANNER_USD, SCRIPTED
from routers.tasks.step_routing.budget import Budget
from srpo.ranges import Ranges, at_least, between, check_numbers

Observations = Literal["compact", "progress", "verbose", "signs", "digest"]
Unit = Literal["usd", "large_calls"]
OnEmpty = Literal["stop", "force_small"]
Strata = Literal["class", "p_large", "none"]
CostNorm = Literal["boundary", "large", "max", "budget"]


@dataclass(frozen=True)
class DifficultyRule:
    """Thresholds on the success rates (mean scores) of a task's profile (`profiles.BoundaryProfile.difficulty`).

    Raises:
        ValueError: a threshold outside (0, 1].
    """

    RANGES: ClassVar[Ranges] = {
        "tau_easy": between(0, 1, open_low=True),
        "tau_large": between(0, 1, open_low=True),
    }

    tau_easy: float = 0.6
    tau_large: float = 0.2
    small_only_is_easy: bool = True
    """Guard: p_L < tau_L, but always-small solved it in one of its runs: Easy instead of Intractable."""

    def __post_init__(self) -> None:
        check_numbers(self)


@dataclass(frozen=True)
class Synthesis:
    """How demonstrations are made.

    Raises:
        ValueError: numbers out of range, an unknown word.
    """

    RANGES: ClassVar[Ranges] = {
        "sweep": at_least(1),
        "keep": at_least(1),
        "max_intractable_share": between(0, 1, open_high=True),
    }

    sweep: int = 10
    """N: rollouts of the sweep on every Hard task."""
    keep: int = 1
    """Cheapest successes that are kept of every Hard task."""
    strata: Strata = "class"
    max_intractable_share: float = 0.2

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.strata not in ("class", "p_large", "none"):
            raise ValueError(f"strata={self.strata!r} is not one of class, p_large, none")


VALIDATION = "validation"
"""Name of the set of `validation_tasks`."""


@dataclass
class StepRoutingArguments:
    """At every step of an agent the policy picks who acts, under a budget."""

    RANGES: ClassVar[Ranges] = {
        "step_limit": at_least(1),
        "executor_usd": at_least(0),
        "concurrency": at_least(1),
        "train_caps": at_least(0, math.inf),
        "heldout_caps": at_least(0, math.inf),
        "heldout_temperature": at_least(0),
        "tail_calls": at_least(0),
        "profile_runs": at_least(1),
        "profile_workers": at_least(1),
        "tau_easy": between(0, 1, open_low=True),
        "tau_large": between(0, 1, open_low=True),
        "sft_sweep": at_least(1),
        "sft_keep": at_least(1),
        "cost_weight": at_least(0),
        "hard_bonus": at_least(0),
    }

    environment: str = field(
        default="alfworld",
        metadata={
            "help": "Benchmark: alfworld, appworld, bfcl, messages (agents that speak OpenAI's), scienceworld "
            "or textworld."
        },
    )
    train_tasks: str = field(
        default="generated/train",
        metadata={
            "help": "Part of the benchmark: generated/SPLIT or a file or folder of games (alfworld), a split "
            "(scienceworld, appworld), a category (bfcl), a folder of games (textworld), AGENT/SPLIT (messages)."
        },
    )
    heldout_tasks: list[str] = field(
        default_factory=lambda: ["generated/test"], metadata={"help": "Parts to evaluate on, one table each."}
    )
    validation_tasks: str | None = field(
        default=None,
        metadata={
            "help": "Part on which rules choose their settings (heldout_limit of its tasks); None: all settings are "
            "played on the held-out tasks."
        },
    )
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
        metadata={
            "help": "USD per call of each scripted executor; those that `catalogue` lists cost what their tokens do "
            "there, prompt cache included (junior, senior: tokens besides, where it does not)."
        },
    )
    labels: list[str] = field(
        default_factory=lambda: ["<small>", "<large>"],
        metadata={"help": "The policy's words for the executors; each must be one token of the policy."},
    )
    catalogue: str | None = field(
        default=None, metadata={"help": "Prices and endpoints (YAML) of live executors, prices of scripted ones."}
    )
    concurrency: int = field(
        default=32, metadata={"help": "Episodes at once of profiling, demonstrations and rules with live executors."}
    )
    reply_cache: str | None = field(
        default=None,
        metadata={"help": "Folder where live executors' replies are kept: what was asked before is free."},
    )
    observation: Observations = field(
        default="compact",
        metadata={
            "help": "What the policy is told: compact (a few words, ALFWorld only), progress (a few words, any "
            "benchmark), verbose (the texts); of agents that speak messages: signs (a few words) or digest (a text)."
        },
    )
    budget_unit: Unit = field(
        default="large_calls", metadata={"help": "What caps count: dollars, or expensive calls."}
    )
    train_caps: list[float] = field(
        default_factory=lambda: [math.inf], metadata={"help": "Every training task is played at each; inf: no cap."}
    )
    heldout_caps: list[float] = field(
        default_factory=lambda: [math.inf], metadata={"help": "Caps of the evaluation; inf: no cap."}
    )
    heldout_temperature: float = field(default=1.0, metadata={"help": "Of the policy in the evaluation; 0: greedy."})
    tail_calls: int = field(default=0, metadata={"help": "Cheap calls that an expensive one must leave affordable."})
    on_empty: OnEmpty = field(default="stop", metadata={"help": "When nothing is affordable."})
    profile_runs: int = field(default=5, metadata={"help": "K runs of each boundary policy per task."})
    profile_workers: int = field(default=1, metadata={"help": "Processes for the same with scripted executors."})
    profiles: str | None = field(
        default=None,
        metadata={
            "help": "OUTPUT/profiles.parquet of an earlier run on the same tasks, to start from instead of profiling: "
            "what its policy solved is no longer Intractable."
        },
    )
    tau_easy: float = field(default=0.6, metadata={"help": "Easy: always-small succeeds at least this often."})
    tau_large: float = field(default=0.2, metadata={"help": "Hard: not Easy, and always-large succeeds this often."})
    task_dir: str | None = field(
        default=None, metadata={"help": "Profiles and rules, to share between runs; None: OUTPUT/task."}
    )
    sft_sweep: int = field(default=10, metadata={"help": "Rollouts of the P(large) sweep on every Hard row."})
    sft_keep: int = field(default=1, metadata={"help": "Cheapest successes kept of every Hard row."})
    sft_strata: Strata = field(default="class", metadata={"help": "What the demonstrations are balanced by."})
    cost_weight: float = field(default=0.3, metadata={"help": "lambda: price of the normalised cost."})
    hard_bonus: float = field(default=1.0, metadata={"help": "beta: what a success on a Hard task earns beside 1."})
    cost_norm: CostNorm = field(default="boundary", metadata={"help": "What cost is divided by; budget: in USD."})
    gate_cost_on_success: bool = field(default=False, metadata={"help": "Charge cost on successes only."})

    def __post_init__(self) -> None:
        check_numbers(self)
        for name in ("executors", "heldout_tasks", "train_caps", "heldout_caps"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name}={values}: give at least one, and none of them twice")
        if not len(self.labels) == len(self.executors) == len(self.executor_usd):
            raise ValueError(
                f"{len(self.executors)} executors, {len(self.labels)} labels, {len(self.executor_usd)} executor_usd: "
                "give one of each per executor"
            )
        if self.live and self.catalogue is None:
            raise ValueError(
                f"executors: {self.live[0]!r} is not one of the scripted {', '.join(SCRIPTED)}, and there is no "
                "catalogue"
            )
        if self.cost_norm == "budget" and (self.budget_unit != "usd" or not all(map(math.isfinite, self.train_caps))):
            raise ValueError(
                "cost_norm: budget divides by the budget in USD: set budget_unit: usd and finite train_caps"
            )
        for name in ("train_caps", "heldout_caps"):
            for cap in filter(math.isfinite, getattr(self, name)):
                try:
                    self.budget(cap)
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from None
        self.reward()
        self.synthesis()
        self.heldout_sets()

    @property
    def live(self) -> list[str]:
        """Executors behind endpoints."""
        return [name for name in self.executors if name not in SCRIPTED]

    def budget(self, cap: float | None = None) -> Budget:
        return Budget(cap, self.budget_unit, self.tail_calls, self.on_empty)

    def difficulty(self) -> DifficultyRule:
        return DifficultyRule(self.tau_easy, self.tau_large)

    def reward(self) -> BoundaryReward:
        return BoundaryReward(self.cost_weight, self.hard_bonus, self.cost_norm, self.gate_cost_on_success)

    def synthesis(self) -> Synthesis:
        return Synthesis(self.sft_sweep, self.sft_keep, self.sft_strata)

    def heldout_sets(self) -> dict[str, str]:
        """Name of every set to evaluate on -> its part.

        Raises:
            ValueError: two parts would share a name.
        """
        sets: dict[str, str] = {}
        taken = {"train", *([] if self.validation_tasks is None else [VALIDATION])}
        for which in self.heldout_tasks:
            name = "generated" if which == "generated/test" else Path(which).name.split(".")[0].split(":")[0]
            if name in {*sets, *taken}:
                raise ValueError(f"heldout_tasks: {which!r} would be called {name!r}, which another part is called")
            sets[name] = which
        return sets
