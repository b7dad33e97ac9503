"""What a think/route policy was trained with besides its weights: prompt, tags, limits, pool. Saved in `router.yaml`.

One owner for training, evaluation and serving: whoever has a checkpoint asks questions exactly as it learned them. The
defaults are Router-R1's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, get_args

from routers.data.catalogue import Member
from routers.data.typical import TypicalCalls
from routers.language.actions import ActionFormat, Actions, PromptStyle, Tags
from routers.language.grammar import ROUTER_R1, Grammar
from routers.router import ROUTER_FILE, plain_settings, read_router, write_router
from srpo.ranges import Ranges, at_least, between, check_numbers

KIND = "think_route"


@dataclass(frozen=True)
class AgentSettings(TypicalCalls):
    """How a question becomes an episode.

    Raises:
        ValueError: an unknown prompt style or action format, or a number out of its range.
    """

    RANGES: ClassVar[Ranges] = {
        "turns": at_least(1),
        "tokens": at_least(1),
        "turn_tokens": at_least(1),
        "observation_tokens": at_least(0),
        "cost_weights": between(0, 1),
    }

    prompt: PromptStyle = "router_r1"
    """Or short, for policies of a million parameters."""
    action_format: ActionFormat = "tags"
    """json: members are functions of the policy's chat template."""
    grammar: Grammar = ROUTER_R1
    """Of action_format tags."""
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
        for name, known in (("prompt", get_args(PromptStyle)), ("action_format", get_args(ActionFormat))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} is unknown; use one of {', '.join(known)}")
        check_numbers(self)

    def actions(self, members: Sequence[Member], tokenizer: Any = None) -> Actions:
        """What the policy reads and writes with these members.

        Args:
            tokenizer: of the policy; None, with tags alone: prompts are texts, in which no control token is broken.

        Raises:
            ValueError: action_format json, and the chat template takes no tools.
        """
        how = (members, tokenizer, self.chat_template_kwargs)
        if self.action_format == "json":
            from routers.language.calls import Calls

            return Calls(*how, style=self.prompt, forward_empty=self.forward_empty)
        return Tags(*how, grammar=self.grammar, style=self.prompt, forward_empty=self.forward_empty)

    def check_policy(self, name: str | Path) -> None:
        """ValueError for a think/route checkpoint whose policy learned another format."""
        if not Path(name, ROUTER_FILE).is_file() or (file := read_router(name)).kind != KIND:
            return
        learned = file.settings_of(AgentSettings).action_format
        if learned != self.action_format:
            raise ValueError(
                f"{name}: this policy learned action_format: {learned}, and is to be asked with action_format: "
                f"{self.action_format}; use the first, or a policy that has learned neither"
            )

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
