"""What a think/route policy was trained with besides its weights: prompt, tags, limits, pool. Saved in `router.yaml`.

One owner for training, evaluation and serving: whoever has a checkpoint asks questions exactly as it learned them. The
defaults are Router-R1's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from routers.data.catalogue import Member
from routers.data.typical import TypicalCalls
from routers.language.grammar import ROUTER_R1, Grammar
from routers.language.prompts import Clean, Messages, short_think_route_prompt, think_route_prompt
from routers.router import plain_settings, read_router, write_router
from srpo.ranges import Ranges, at_least, between, check_numbers

if TYPE_CHECKING:
    from srpo.rollout.constrained import OneOf

KIND = "think_route"
PromptStyle = Literal["router_r1", "short"]


@dataclass(frozen=True)
class AgentSettings(TypicalCalls):
    """How a question becomes an episode.

    Raises:
        ValueError: an unknown prompt style, or a number out of its range.
    """

    RANGES: ClassVar[Ranges] = {
        "turns": at_least(1),
        "tokens": at_least(1),
        "turn_tokens": at_least(1),
        "observation_tokens": at_least(0),
        "cost_weights": between(0, 1),
    }

    prompt: PromptStyle = "router_r1"
    """`think_route_prompt`, or `short_think_route_prompt` for policies of a million parameters."""
    grammar: Grammar = ROUTER_R1
    forward_empty: bool = False
    """A route without a query sends the question itself."""
    turns: int = 5
    """Of the policy. Router-R1: 4 turns that may route, and one that has to answer."""
    tokens: int = 4096
    """Of all turns and observations."""
    turn_tokens: int | None = 1024
    observation_tokens: int = 600
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    cost_weights: tuple[float, ...] = ()
    """Price sensitivities that prompts of the training stated, one each; empty: prompts state none."""
    members: tuple[Member, ...] = ()
    """The pool that the policy was trained with, in the order of its prompt; empty: unknown."""
    typical: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Mean tokens of a member's prompt and reply in the training's table; empty: it was live."""
    typical_usd: Mapping[str, float] = field(default_factory=dict)
    """Mean USD of a member's reply there, at its prices."""

    def __post_init__(self) -> None:
        if self.prompt not in get_args(PromptStyle):
            raise ValueError(f"prompt {self.prompt!r} is unknown; use one of {', '.join(get_args(PromptStyle))}")
        check_numbers(self)

    def messages(
        self,
        question: str,
        members: Sequence[Member],
        *,
        cost_weight: float | None = None,
        clean: Clean | None = None,
    ) -> Messages:
        """The policy's prompt for a question and a pool."""
        build = think_route_prompt if self.prompt == "router_r1" else short_think_route_prompt
        return build(question, members, self.grammar, cost_weight=cost_weight, clean=clean)

    def mask(self, tokenizer: Any, names: Sequence[str]) -> OneOf:
        """Which ids may follow in a turn, so that its routes name members; a space may stand before the name.

        Raises:
            ValueError: the tokenizer cannot write a name.
        """
        from srpo.rollout.constrained import OneOf  # imports torch

        tag = self.grammar.route
        closings = [":", *([self.grammar.close(tag)] if self.forward_empty else [])]
        return OneOf(tokenizer, self.grammar.open(tag), [*names, *(f" {name}" for name in names)], closings)

    def save(self, folder: str | Path, made_from: Mapping[str, Any] | None = None) -> None:
        """Write `router.yaml` into a checkpoint's folder; of the members, what the policy was told, and prices."""
        write_router(folder, KIND, plain_settings(self), made_from)

    @classmethod
    def load(cls, name: str | Path) -> AgentSettings:
        """Read `router.yaml` of a folder or Hub id.

        Raises:
            ValueError: names the file and what cannot be read.
        """
        return read_router(name).settings_of(cls, KIND)
