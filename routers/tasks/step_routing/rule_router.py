"""A rule as a router: behind a server and in one's own loop it is used as a trained step router is.

router = RuleRouter(RuleSettings("escalate", math.inf, StepSettings(("gpt-4.1-mini", "gpt-4.1"), ("<s>", "<l>"))))
conversations = Conversations(router, cap=0.5, unit="usd")        # or router.session(...), router.save(folder)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from routers.pool.ledger import Account
from routers.router import Decision, Router, RouterFile, plain_settings, write_router
from routers.tasks.step_routing.advantages import Advantages
from routers.tasks.step_routing.arguments import Unit
from routers.tasks.step_routing.budget import BudgetGate
from routers.tasks.step_routing.environment import Choose, Situation
from routers.tasks.step_routing.rules import FAMILIES, arbitrage
from routers.tasks.step_routing.session import StepSession, StepState, first_call
from routers.tasks.step_routing.settings import StepSettings
from srpo.rollout.turns import Request, Sample

KIND = "step_rule"


@dataclass(frozen=True)
class RuleSettings:
    """A rule, and who is there to choose from.

    Raises:
        ValueError: a family that is unknown, or arbitrage without estimates.
    """

    family: str
    """A key of `rules.FAMILIES`, or arbitrage."""
    knob: float
    told: StepSettings
    advantages: Advantages | None = None

    def __post_init__(self) -> None:
        self.rule()

    def rule(self) -> Choose:
        if self.family == "arbitrage" and self.advantages is not None:
            return arbitrage(self.advantages, self.knob, self.told.observation)
        if self.family not in FAMILIES or math.isnan(self.knob):
            known = ", ".join(FAMILIES)
            raise ValueError(f"rule {self.family!r} {self.knob:g}: use one of {known}, or arbitrage with advantages")
        return FAMILIES[self.family](self.knob)


class RuleRouter(Router):
    """Decides agent steps by a rule of `rules`. Nothing to close."""

    kind = KIND

    def __init__(self, how: RuleSettings) -> None:
        self.how = how
        # a rule reads texts itself, in whichever words the policy beside it is told
        self.settings = replace(how.told, observation="verbose") if how.told.observation == "compact" else how.told
        self.name = how.family if how.family in ("always-small", "always-large") else f"{how.family} {how.knob:g}"
        self._numbers = itertools.count()

    def session(
        self,
        task: str = "",
        cap: float | None = None,
        *,
        unit: Unit | None = None,
        seed: str | None = None,
        step_limit: int | None = None,
        task_type: str = "",
        state: StepState | None = None,
        account: Account | None = None,
    ) -> StepSession:
        """As `StepRouter.session`: `task`, `cap`, `unit`, `seed`, `step_limit`, `task_type`, `state` and `account`."""
        return _RuleSession(
            self.how.rule(),
            self.settings,
            BudgetGate(self.settings.budget(cap, unit), account),
            number=next(self._numbers),
            seed=seed,
            limit=step_limit,
            task=task,
            task_type=task_type,
            state=state,
        )

    def route(
        self,
        query: str,
        *,
        context: Any = None,
        cost_weight: float | None = None,
        members: Sequence[str] | None = None,
    ) -> Decision:
        """As `StepRouter.route`."""
        if cost_weight is not None:
            raise self._cannot("take a cost_weight")
        return first_call(self, query, context, members)

    def save(self, folder: str | Path) -> None:
        write_router(folder, KIND, plain_settings(self.how))

    @classmethod
    def load(cls, name: str, file: RouterFile, members: Any = None, catalogue: Any = None) -> RuleRouter:
        if members is not None or catalogue is not None:
            raise ValueError(f"{file.path}: a rule of steps keeps its executors")
        return cls(file.settings_of(RuleSettings))


class _RuleSession(StepSession):
    """A session whose "policy" is a rule: its tokens are the executors' places."""

    def __init__(self, choose: Choose, settings: StepSettings, gate: BudgetGate, **more: Any) -> None:
        super().__init__(settings, gate, None, None, str, self._chosen, **more)  # type: ignore[arg-type]
        self._choose = choose

    def _request(self, situation: Situation) -> Request:
        self._situation = situation
        return Request(self._number, self._ids, self.seed, 1, self._tokens(situation.affordable))

    def _tokens(self, names: Sequence[str]) -> tuple[int, ...]:
        return tuple(self.settings.executors.index(name) for name in names)

    def _chosen(self, request: Request) -> Future[Sample]:
        allowed = self._situation.affordable
        name = self._choose(self._situation, allowed)
        scores = tuple(0.0 if other == name else -math.inf for other in allowed)
        future: Future[Sample] = Future()
        future.set_result(Sample(self._tokens([name]), (0.0,), True, scores))
        return future
