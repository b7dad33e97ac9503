"""What a query router was trained with besides its weights: members, prompt, tags. Saved beside it in `router.yaml`.

One owner for training, evaluation and serving: whoever has a checkpoint asks it exactly as it learned to be asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from routers.data.billing import token_usd
from routers.data.catalogue import Member
from routers.data.table import ReplyTable
from routers.data.typical import TypicalCalls, seen_in
from routers.language.grammar import DEFAULT, Grammar
from routers.language.prompts import Clean, Messages, policy_prompt
from routers.router import find_router, plain_settings, write_router
from srpo.ranges import Ranges, at_least, between, check_numbers

if TYPE_CHECKING:
    from srpo.rollout.constrained import OneOf

KIND = "query_routing"


def settings_of(policy: str) -> QuerySettings | None:
    """Of a policy that was trained to route queries; None: another, or one that is not there.

    Args:
        policy: a folder or Hub id.

    Raises:
        ValueError: its `router.yaml` cannot be read.
    """
    file = find_router(policy)
    return None if file is None or file.kind != KIND else file.settings_of(QuerySettings)


@dataclass(frozen=True)
class QuerySettings(TypicalCalls):
    """How a query becomes a prompt, and what its answer may be.

    Raises:
        ValueError: a number out of its range.
    """

    RANGES: ClassVar[Ranges] = {
        "completion_tokens": at_least(1),
        "cost_weights": between(0, 1),
        "policy_price": at_least(0),
        "query_chars": at_least(1),
    }

    members: tuple[Member, ...]
    """The pool, in the order of the prompt."""
    grammar: Grammar = DEFAULT
    completion_tokens: int = 64
    """Longest turn of the policy."""
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    cost_weights: tuple[float, ...] = ()
    """Price sensitivities that prompts of the training stated, one each; empty: prompts state none."""
    policy_price: tuple[float, float] = (0.0, 0.0)
    """USD per million tokens that the policy reads and writes."""
    show_members: bool = True
    """Whether prompts list the pool."""
    query_chars: int | None = None
    """A longer query is shown by its beginning and its end, so many characters together; None: always whole."""
    typical: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Mean tokens of a member's prompt and reply in the training data."""
    typical_usd: Mapping[str, float] = field(default_factory=dict)
    """Mean USD of a member's reply in the training data, at its prices."""

    def __post_init__(self) -> None:
        check_numbers(self)

    def seen_in(self, table: ReplyTable) -> QuerySettings:
        """The same with the typical tokens and costs of a table's training split (of all of it if there is none)."""
        return replace(self, **seen_in(table))

    def messages(
        self,
        query: str,
        members: Sequence[Member] | None = None,
        *,
        cost_weight: float | None = None,
        clean: Clean | None = None,
    ) -> Messages:
        """The policy's prompt; `members`: None for the pool of the training; `clean` breaks its control tokens."""
        chosen = self.members if members is None else members
        if self.query_chars is not None and len(query) > self.query_chars:
            half = self.query_chars // 2
            query = f"{query[:half]} ... {query[-half:]}"
        how: Any = {"cost_weight": cost_weight, "clean": clean, "show_members": self.show_members}
        return policy_prompt(query, chosen, self.grammar, **how)

    def mask(self, tokenizer: Any, members: Sequence[Member] | None = None, *, each: bool = False) -> OneOf:
        """Which ids may follow in a turn, so that its route names a member: for sampling, and for scoring samples.

        Args:
            each: a group of a training holds each member (`srpo.rollout.each_of`).

        Raises:
            ValueError: the tokenizer cannot write a name.
        """
        from srpo.rollout.constrained import OneOf  # imports torch
        from srpo.rollout.each_of import EachOf

        names = [member.name for member in (self.members if members is None else members)]
        tag = self.grammar.route
        return (EachOf if each else OneOf)(tokenizer, self.grammar.open(tag), names, [self.grammar.close(tag)])

    def policy_usd(self, read: int, written: int) -> float:
        """USD of the policy's own tokens."""
        return float(token_usd(read, written, *self.policy_price))

    def save(self, folder: str | Path, made_from: Mapping[str, Any] | None = None) -> None:
        """Write `router.yaml` into a checkpoint's folder; `made_from`: hashes of data and prices."""
        write_router(folder, KIND, plain_settings(self), made_from)
