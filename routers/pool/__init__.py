"""The pool of models that a policy calls: ask(member, query, deadline) -> Reply, with limits, cache and ledger."""

from collections.abc import Callable, Mapping

from routers.data.catalogue import Member
from routers.pool.cache import ReplyCache
from routers.pool.endpoint import AGENT_PROMPT, Endpoint
from routers.pool.ledger import Account, Ledger, OverBudget, Reservation, Spending
from routers.pool.limits import Retry
from routers.pool.pool import Pool
from routers.pool.protocol import KINDS, Attempt, Backend, kind
from routers.pool.recorded import recorded_pool


def live_pool(
    catalogue: Mapping[str, Member],
    *,
    ledger: Ledger | None = None,
    cache: ReplyCache | None = None,
    retry: Retry | None = None,
    agent_prompt: str = AGENT_PROMPT,
    endpoint: Callable[[Member, str], Endpoint] = Endpoint,
) -> Pool:
    """Every member of a catalogue behind its OpenAI-compatible endpoint.

    Args:
        endpoint: made of a member and the agent prompt.

    Raises:
        ValueError: a member without ``base_url``, or whose key's environment variable is not set.
    """
    backends = {name: endpoint(member, agent_prompt) for name, member in catalogue.items()}
    return Pool(catalogue, backends, ledger=ledger, cache=cache, retry=retry)


__all__ = [
    "AGENT_PROMPT",
    "KINDS",
    "Account",
    "Attempt",
    "Backend",
    "Endpoint",
    "Ledger",
    "OverBudget",
    "Pool",
    "ReplyCache",
    "Reservation",
    "Retry",
    "Spending",
    "kind",
    "live_pool",
    "recorded_pool",
]
