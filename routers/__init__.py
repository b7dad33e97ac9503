"""The world a routing policy acts in: pool members and prices, recorded replies, environments, evaluation, serving."""

from typing import TYPE_CHECKING, Any

from routers.catalogue import Member, cost, load_catalogue
from routers.table import Recorded, ReplyTable, load_table, quickstart_table

if TYPE_CHECKING:
    from routers.agent import RouterAgent

__all__ = [
    "Member",
    "Recorded",
    "ReplyTable",
    "RouterAgent",
    "cost",
    "load_catalogue",
    "load_table",
    "quickstart_table",
]


def __getattr__(name: str) -> Any:
    if name == "RouterAgent":  # only when it is asked for: it needs torch
        from routers.agent import RouterAgent

        return RouterAgent
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
