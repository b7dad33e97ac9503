"""The world a routing policy acts in: pool members and prices, recorded replies, environments, evaluation, serving."""

import importlib
from typing import TYPE_CHECKING, Any

from routers.data.catalogue import Member, cost, load_catalogue
from routers.data.table import Recorded, ReplyTable, load_table, quickstart_table
from routers.router import Decision, Router, load_router

if TYPE_CHECKING:
    from routers.environments.messages.served import episode
    from routers.tasks.query_routing.router import QueryRouter
    from routers.tasks.step_routing.conversations import Conversations
    from routers.tasks.step_routing.router import StepRouter
    from routers.tasks.think_route.agent import RouterAgent

__all__ = [
    "Conversations",
    "Decision",
    "Member",
    "QueryRouter",
    "Recorded",
    "ReplyTable",
    "Router",
    "RouterAgent",
    "StepRouter",
    "cost",
    "episode",
    "load_catalogue",
    "load_router",
    "load_table",
    "quickstart_table",
]


_LATE = {
    "episode": "routers.environments.messages.served",
    "Conversations": "routers.tasks.step_routing.conversations",
    "QueryRouter": "routers.tasks.query_routing.router",
    "RouterAgent": "routers.tasks.think_route.agent",
    "StepRouter": "routers.tasks.step_routing.router",
}


def __getattr__(name: str) -> Any:
    if name in _LATE:  # only when they are asked for: most need torch
        return getattr(importlib.import_module(_LATE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATE})
