"""What a think/route agent writes and reads, in one of two formats behind one interface.

    tags    <think>why</think><search>name:query</search>   <information>reply</information>   <answer>..</answer>
    json    members are functions of the policy's chat template (`routers.language.calls`)

Whoever prompts, parses, demonstrates or answers an agent does it through `Actions`, so that training, evaluation and
serving cannot differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

from routers.data.catalogue import Member
from routers.language.grammar import (
    ROUTER_R1,
    Action,
    Grammar,
    parse_turn,
    render_answer,
    render_route,
    reply_observation,
)
from routers.language.prompts import Messages, short_think_route_prompt, think_route_prompt
from srpo.types import Observation

if TYPE_CHECKING:
    from srpo.rollout.constrained import OneOf

ActionFormat = Literal["tags", "json"]
PromptStyle = Literal["router_r1", "short"]


class Actions(Protocol):
    """The format of an agent with these members."""

    names: Sequence[str]
    """Of the members that may be asked, in the order of the prompt."""
    forward_empty: bool
    """A route without a query sends the question itself."""
    tools: Sequence[Mapping[str, Any]] | None
    """What the chat template is given with every prompt; None: nothing."""
    stops: tuple[str, ...]
    """Texts that end a turn, beside the policy's end token."""
    end: str
    """What stands behind the text of a turn that is not cut."""

    @property
    def whole_turns(self) -> bool:
        """See `srpo.types.Environment`."""

    @property
    def tags(self) -> list[str]:
        """Texts that are one token each for a tokenizer that is made for this format."""

    def prompt(self, question: str, cost_weight: float | None = None) -> Messages: ...

    def ids(self, prompt: Messages) -> list[int]:
        """A prompt as the policy reads it, up to where it writes."""

    def parse(self, text: str, *, first: bool) -> Action:
        """Read one turn (`srpo.types.Episode.step`); `first`: of its episode. ``member`` is a member's name."""

    def route(self, think: str, member: str, query: str = "") -> str:
        """The turn that `parse` reads back as this route, without `end`. Raises ValueError where there is none."""

    def answer(self, think: str, answer: str) -> str:
        """The same for an answer."""

    def reply(self, text: str, reasoning: str = "") -> Observation:
        """What a member replied, or the library has to say: text that may quote others."""

    def mask(self, tokenizer: Any) -> OneOf:
        """Which ids may follow in a turn, so that its routes name members.

        Raises:
            ValueError: the tokenizer cannot write a name.
        """

    def member_of(self, alternative: str) -> str:
        """The member that an alternative of the mask names."""


class Tags:
    """Actions between tags, as Router-R1 has them.

    Args:
        members: may be asked.
        tokenizer: of the policy; None: prompts stay texts, in which its control tokens are not broken.
        chat_template_kwargs: of its chat template.
        grammar: the tags.
        style: of the prompt.
    """

    names: Sequence[str]
    tools: Sequence[Mapping[str, Any]] | None = None
    stops: tuple[str, ...]
    end = ""
    whole_turns = False

    def __init__(
        self,
        members: Sequence[Member],
        tokenizer: Any = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        *,
        grammar: Grammar = ROUTER_R1,
        style: PromptStyle = "router_r1",
        forward_empty: bool = False,
    ) -> None:
        self.members, self.names = members, [member.name for member in members]
        self.grammar, self.forward_empty, self.stops = grammar, forward_empty, grammar.stops
        self._prompt = think_route_prompt if style == "router_r1" else short_think_route_prompt
        self._tokenizer, self._kwargs = tokenizer, dict(chat_template_kwargs or {})
        self._clean = cleaner(tokenizer)

    @property
    def tags(self) -> list[str]:
        return [tag(name) for name in self.grammar.names for tag in (self.grammar.open, self.grammar.close)]

    def prompt(self, question: str, cost_weight: float | None = None) -> Messages:
        return self._prompt(question, self.members, self.grammar, cost_weight=cost_weight, clean=self._clean)

    def ids(self, prompt: Messages) -> list[int]:
        return templated(self._tokenizer, prompt, self._kwargs)

    def parse(self, text: str, *, first: bool) -> Action:
        # Router-R1: the transcript begins with a think block
        return parse_turn(text, self.names, self.grammar, needs_think=first, forward_empty=self.forward_empty)

    def route(self, think: str, member: str, query: str = "") -> str:
        return render_route(think, member, query, self.grammar)

    def answer(self, think: str, answer: str) -> str:
        return render_answer(think, answer, self.grammar)

    def reply(self, text: str, reasoning: str = "") -> Observation:
        return reply_observation(text, self.grammar, reasoning)

    def mask(self, tokenizer: Any) -> OneOf:
        from srpo.rollout.constrained import OneOf  # imports torch

        tag = self.grammar.route
        closings = [":", *([self.grammar.close(tag)] if self.forward_empty else [])]
        spaced = [f" {name}" for name in self.names]  # a space may stand before the name
        return OneOf(tokenizer, self.grammar.open(tag), [*self.names, *spaced], closings)

    def member_of(self, alternative: str) -> str:
        return alternative.strip()


def cleaner(tokenizer: Any) -> Any:
    """What breaks the control tokens of a policy in texts of others; None without a tokenizer."""
    if tokenizer is None:
        return None
    from srpo.texts import without_control_tokens

    return without_control_tokens(tokenizer)


def templated(tokenizer: Any, prompt: Messages, kwargs: Mapping[str, Any]) -> list[int]:
    """Ids of a prompt, with the generation prompt."""
    return list(
        tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=False, **kwargs)
    )
