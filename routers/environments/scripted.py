"""Scripted executors, for work without language models.

They are SCRIPTED, and every table that shows them says so. Their prices are what one call of 1,000 prompt and 50
completion tokens costs at the list price of a large model ($2 and $8 per million tokens: $0.0024) and of a small one
($0.05 and $0.20: $0.00006).
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Callable

from routers.environments.alfworld.explorer import explore
from routers.environments.messages.repairs import Junior, Senior
from routers.environments.protocol import Act, Executor, GameError, View
from routers.environments.scienceworld.novice import novice
from srpo.types import Reply

PLANNER_USD = 0.0024
EXPLORER_USD = 0.00006


class _Scripted(ABC):
    name: str

    def __init__(self, price: float) -> None:
        self.price = price

    def bound(self, view: View) -> float:
        return self.price

    @abstractmethod
    def choose(self, view: View) -> str: ...

    async def act(self, view: View, deadline: float) -> Act:
        action = self.choose(view)
        return Act(action, self.price, Reply(action, cost=self.price))


class Planner(_Scripted):
    """Scripted and PRIVILEGED: does what the environment's `expert` says, which knows the hidden state.

    `AlfWorld`, `ScienceWorld` and `TextWorld` have one, which plans from the present state. "look" where it knows no
    way to the goal.
    """

    name = "planner"

    def __init__(self, price: float = PLANNER_USD) -> None:
        super().__init__(price)

    def choose(self, view: View) -> str:
        expert = getattr(view.environment, "expert", None)
        if expert is None:
            raise GameError(f"{view.environment.seed}: this environment has no expert for the scripted planner")
        return expert() or "look"


class Explorer(_Scripted):
    """Scripted, knows only what the episode's texts have said; its search order is decided by `View.seed`."""

    name = "explorer"

    def __init__(self, price: float = EXPLORER_USD) -> None:
        super().__init__(price)

    def choose(self, view: View) -> str:
        return explore(view)


class Novice(_Scripted):
    """Scripted, for ScienceWorld: goes, looks, carries, guesses. Knows only what the episode's texts have said."""

    name = "novice"

    def __init__(self, price: float = EXPLORER_USD) -> None:
        super().__init__(price)

    def choose(self, view: View) -> str:
        return novice(view)


class RandomActor(_Scripted):
    """Scripted: any admissible command, uniformly; the floor of every table."""

    name = "random"

    def __init__(self, price: float = 0.0) -> None:
        super().__init__(price)

    def choose(self, view: View) -> str:
        return random.Random(f"random/{view.seed}/{len(view.steps)}").choice(view.admissible)


SCRIPTED: dict[str, Callable[[float], Executor]] = {
    **{kind.name: kind for kind in (Explorer, Novice, Planner, RandomActor)},
    "junior": Junior,
    "senior": Senior,
}
"""Names that recipes use -> made with USD per call; `junior` and `senior` are paid for their tokens besides."""
