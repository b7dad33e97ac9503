"""What a think/route policy was trained with besides its weights: prompt, tags, limits, pool. Saved beside it as YAML.

One owner for training, evaluation and serving: whoever has a checkpoint asks questions exactly as it learned them.
A checkpoint without the file (Router-R1's own, for instance) gets the defaults, which are Router-R1's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import yaml

from routers.data.catalogue import Member, shared_fields, shared_member
from routers.language.grammar import ROUTER_R1, Grammar
from routers.language.prompts import Clean, Messages, short_think_route_prompt, think_route_prompt
from srpo.ranges import Ranges, at_least, between, check_numbers
from srpo.redact import redacted
from srpo.strict_yaml import YamlError, read_yaml

AGENT = "agent.yaml"
PromptStyle = Literal["router_r1", "short"]


@dataclass(frozen=True)
class AgentSettings:
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
    chat_template_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    cost_weights: tuple[float, ...] = ()
    """Price sensitivities that prompts of the training stated, one each; empty: prompts state none."""
    members: tuple[Member, ...] = ()
    """The pool that the policy was trained with, in the order of its prompt; empty: unknown."""

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

    def save(self, folder: str | Path) -> None:
        """Write `agent.yaml` into a checkpoint's folder; of the members, what the policy was told, and prices."""
        document = dataclasses.asdict(self)
        document["cost_weights"] = list(self.cost_weights)
        document["chat_template_kwargs"] = redacted(self.chat_template_kwargs)
        document["members"] = [shared_fields(member) for member in self.members]
        text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
        Path(folder, AGENT).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> AgentSettings:
        """Read `agent.yaml` of a folder; the defaults where there is none.

        Raises:
            ValueError: names the file and what cannot be read.
        """
        path = Path(folder, AGENT)
        if not path.is_file():
            return cls()
        try:
            document = read_yaml(path)
            document["grammar"] = Grammar(**document["grammar"])
            document["cost_weights"] = tuple(document.get("cost_weights", ()))
            document["members"] = tuple(shared_member(entry) for entry in document["members"])
            return cls(**document)
        except YamlError:
            raise  # names the file already
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{path}: cannot be read: {error}") from error
