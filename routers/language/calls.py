"""Function calls of a chat model as the actions of a think/route agent: `action_format: json`.

Each member is a function of one argument, the query. They are given to the chat template as `tools`, so the prompt,
the form of a call and the frame of a reply are those that the model was trained with; none of it is written here.
For Qwen2.5, which calls as Hermes does:

    <|im_start|>assistant                     the template's
    <think>why</think>                        the policy's; may be left out
    <tool_call>
    {"name": "small", "arguments": {"query": "Who wrote Dune?"}}
    </tool_call><|im_end|>
    <|im_start|>user                          the world's
    <tool_response>
    Frank Herbert                             of others: no control or added token can be in it
    </tool_response><|im_end|>
    <|im_start|>assistant
    Frank Herbert<|im_end|>                   the policy's: a turn without a call is the answer

Calls are read by transformers' `parse_response`, with the tokenizer's own `response_template`, TRL's for its chat
template, or else that of Hermes. A tokenizer with which a call is not read back as it was written is refused.
A turn ends with the end token alone, so one that a limit cut is no action (`whole_turns`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from routers.data.catalogue import Member
from routers.language.actions import PromptStyle, cleaner, templated
from routers.language.grammar import Action, framed, shown_name, think_block
from routers.language.prompts import Messages, call_prompt, schemas
from srpo.texts import well_formed
from srpo.types import Observation

if TYPE_CHECKING:
    from srpo.rollout.constrained import OneOf

_ARGUMENT = "query"
_USER, _NAME, _QUERY, _REPLY, _BEFORE = (f"srpo{word}mark" for word in ("user", "name", "query", "reply", "before"))
"""Stand for a question, a name, a query, a reply and a text before a call, where a template is taken apart."""
_PROBE = "a: {b} [c] \"d\" 'e' \u00e9\n\\n, 7"
_LEAD, _JOINT = re.compile(r"\s[^\w\s]*$"), re.compile(r"[^\w\s]*[\r\n]*")
"""What tokenizers write together before and behind a name, such as ` "` and `",`: the mask cuts where they do."""
_TAG = re.compile(r"</?([A-Za-z_][A-Za-z0-9_-]*)")


@dataclass(frozen=True)
class _Marks:
    """`routers.language.grammar.Marks`: the tags of a chat template's calls and replies."""

    names: tuple[str, ...] = ("think",)
    think: str = "think"

    @cached_property
    def tags(self) -> re.Pattern[str]:
        return re.compile(rf"</?(?:{'|'.join(map(re.escape, self.names))})(?![A-Za-z0-9_-])[^<>]{{0,64}}>?")


class _Unfit(Exception):
    """Why a tokenizer cannot be used, in words."""


class Calls:
    """Actions as function calls (`routers.language.actions.Actions`).

    Args:
        members: may be asked; the function of each has its name, with _ for what is no letter, digit, - or _.
        tokenizer: of the policy.
        chat_template_kwargs: of its chat template.
        style: of prompt and descriptions.
        forward_empty: a call without a query sends the question itself.

    Raises:
        ValueError: two members whose functions would have one name; or the chat template takes no tools, or writes
            calls that cannot be read back from text.
    """

    names: Sequence[str]
    tools: Sequence[Mapping[str, Any]] | None
    stops: tuple[str, ...] = ()
    whole_turns = True

    def __init__(
        self,
        members: Sequence[Member],
        tokenizer: Any,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        *,
        style: PromptStyle = "router_r1",
        forward_empty: bool = False,
    ) -> None:
        self.names, self.forward_empty = [member.name for member in members], forward_empty
        self._functions = {name: re.sub(r"[^A-Za-z0-9_-]", "_", name) for name in self.names}
        self._members = {function: name for name, function in self._functions.items()}
        if hidden := [n for n, function in self._functions.items() if self._members[function] != n]:
            raise ValueError(
                f"action_format: json: the functions of two members, {hidden[0]!r} and "
                f"{self._members[self._functions[hidden[0]]]!r}, would have one name; rename one in the catalogue"
            )
        self._tokenizer, self._kwargs = tokenizer, dict(chat_template_kwargs or {})
        self._short, self._clean = style == "short", cleaner(tokenizer)
        self._marks, self.end = _Marks(), str(tokenizer.eos_token or "")
        self.tools = self._schemas(members)
        try:
            self._take_apart()
            self.tools = self._schemas(members)  # without the tags that are known now
            self._response_template = _response_template(tokenizer)
            self._read_back()
        except _Unfit as problem:
            raise ValueError(
                "action_format: json needs a chat template that takes tools, and calls that can be read back from "
                f"text, but {problem}: use action_format: tags, or a policy such as Qwen2.5, Qwen3 or Llama 3.1"
            ) from None

    @property
    def tags(self) -> list[str]:
        return [tag for name in self._marks.names for tag in (f"<{name}>", f"</{name}>")]

    def prompt(self, question: str, cost_weight: float | None = None) -> Messages:
        return call_prompt(question, self._marks, short=self._short, cost_weight=cost_weight, clean=self._clean)

    def ids(self, prompt: Messages) -> list[int]:
        return templated(self._tokenizer, prompt, {**self._kwargs, "tools": self.tools})

    def parse(self, text: str, *, first: bool = True) -> Action:
        """One call of one function, or an answer; ``error`` says the first thing that is wrong."""

        def invalid(error: str) -> Action:
            return Action("invalid", None, think, error)

        think, error, rest = think_block(text, self._marks, required=False)
        if error:
            return invalid(error)
        if not rest:
            return invalid("After the think block came neither a function call nor an answer.")
        if self.end in rest:  # spelled out: the parser would take it for the end
            return invalid("There was a control token in the text.")
        try:
            message = self._tokenizer.parse_response(
                rest + self.end, schema=self._response_template, prefix="", tools=self.tools
            )
        except (ValueError, TypeError, KeyError, RecursionError):
            return invalid("The function call could not be read; write it as one JSON object with name and arguments.")
        content = str(message.get("content") or "").strip()
        if mark := self._marks.tags.search(content):
            return invalid(f"There was {mark.group()} where no function call can be.")
        calls = message.get("tool_calls") or []
        if not calls:
            if not content:
                return invalid("There was neither a function call nor an answer.")
            return Action("answer", None, think, answer=content, final=True)
        if len(calls) > 1:
            return invalid(f"There were {len(calls)} function calls; write one, and wait for its reply.")
        if not rest.endswith(self._closing):
            return invalid(f"There was more text after {self._closing}.")
        return self._called(calls[0], think)

    def _called(self, call: Any, think: str) -> Action:
        function = call.get("function") if isinstance(call, Mapping) else None
        function = function if isinstance(function, Mapping) else {}
        name, arguments = function.get("name"), function.get("arguments", {})
        query = arguments.get(_ARGUMENT, "") if isinstance(arguments, Mapping) else None
        if not isinstance(name, str) or not isinstance(arguments, Mapping) or set(function) - {"name", "arguments"}:
            error = "The function call was not an object with a name and an object of arguments."
        elif name not in self._members:
            known = ", ".join(self._members)
            error = f"The function call named {shown_name(name)}, which is no function. They are: {known}."
        elif unknown := [argument for argument in arguments if argument != _ARGUMENT]:
            error = f"The function call had the argument {shown_name(str(unknown[0]))}; the only one is {_ARGUMENT!r}."
        elif not isinstance(query, str):
            error = f"The argument {_ARGUMENT!r} was not a text."
        elif not (query.strip() or self.forward_empty):
            error = f"The argument {_ARGUMENT!r} was empty or missing."
        else:  # JSON can spell half a character
            return Action("route", self._members[name], think, query=well_formed(query).strip())
        return Action("invalid", None, think, error)

    def route(self, think: str, member: str, query: str = "") -> str:
        arguments = {_ARGUMENT: query} if query else {}
        call, *_ = self._exchange(self._functions.get(member, member), arguments)
        return self._checked(self._thought(think) + call, Action("route", member, think, query=query))

    def answer(self, think: str, answer: str) -> str:
        return self._checked(self._thought(think) + answer, Action("answer", None, think, answer=answer, final=True))

    def reply(self, text: str, reasoning: str = "") -> Observation:
        return framed(text, self._marks, self._before, self._after, reasoning)

    def mask(self, tokenizer: Any) -> OneOf:
        from srpo.rollout.constrained import OneOf  # imports torch

        return OneOf(tokenizer, self._opening, [self._lead + name for name in self._members], [self._after_name])

    def member_of(self, alternative: str) -> str:
        return self._members[alternative.removeprefix(self._lead)]

    def _thought(self, think: str) -> str:
        return f"<{self._marks.think}>\n{think}\n</{self._marks.think}>\n\n" if think else ""

    def _checked(self, text: str, wanted: Action) -> str:
        if self.parse(text) != wanted:
            what = wanted.query if wanted.kind == "route" else wanted.answer
            raise ValueError(f"no turn is read back as the {wanted.kind} {str(what)[:80]!r} of {wanted.member!r}")
        return text

    def _schemas(self, members: Sequence[Member]) -> list[dict[str, Any]]:
        by_function = {self._functions[member.name]: member for member in members}
        return schemas(
            by_function, self._marks, short=self._short, needs_query=not self.forward_empty, clean=self._clean
        )

    # ------------------------------------------------------------------------------------------ the chat template

    def _take_apart(self) -> None:
        """How the template writes a call and frames a reply."""
        call, self._before, self._after = self._exchange(_NAME, {_ARGUMENT: _QUERY})
        if _NAME not in call or _QUERY not in call:
            raise _Unfit("this one leaves out calls")
        if _NAME in self._before + self._after:
            raise _Unfit("this one writes the function's name before a reply")
        opening, rest = call.split(_NAME, 1)
        lead = _LEAD.search(opening)
        self._lead = lead.group() if lead else ""
        self._opening = opening.removesuffix(self._lead)
        self._after_name = _JOINT.match(rest).group()  # type: ignore[union-attr]  # matches any text
        if not self._opening or not self._after_name:
            raise _Unfit("nothing in this one shows where the name of a function stands")
        rest = rest.split(_QUERY, 1)[1]
        self._closing = rest.split()[-1].lstrip("\"'}])") if rest.split() else ""
        tags = _TAG.findall(call + self._before + self._after)
        self._marks = _Marks(tuple(dict.fromkeys((self._marks.think, *tags))))

    def _exchange(self, name: str, arguments: Mapping[str, str]) -> tuple[str, str, str]:
        """A call as the template writes it, and what stands before and after its reply."""
        asked = {"role": "user", "content": _USER}
        head = self._rendered([asked], self.tools)
        if head == self._rendered([asked], None):
            raise _Unfit("this one leaves out the tools")

        def conversation(before: str) -> str:
            call = {"type": "function", "function": {"name": name, "arguments": dict(arguments)}}
            turn = {"role": "assistant", "content": before, "tool_calls": [call]}
            return self._rendered([asked, turn, {"role": "tool", "name": name, "content": _REPLY}], self.tools)

        text = conversation("")
        start = len(head)
        if not text.startswith(head):  # the head closes an empty think block, which no template shows again
            text = conversation(_BEFORE)
            start = text.find(_BEFORE) + len(_BEFORE)
            if _BEFORE not in text:
                raise _Unfit("this one does not show where a turn of the policy begins")
        stop = text.find(self.end, start) if self.end else -1
        before, reply, after = text[stop + len(self.end) :].partition(_REPLY)
        if stop < 0 or not reply or _REPLY in after:
            raise _Unfit(f"this one does not show a call that ends with {self.end!r}, and its reply once")
        return text[start:stop].strip(), before, after

    def _rendered(self, messages: Sequence[Mapping[str, Any]], tools: Any) -> str:
        how = {"tools": tools, "add_generation_prompt": True, "tokenize": False, **self._kwargs}
        try:
            return str(self._tokenizer.apply_chat_template(list(messages), **how))
        except Exception as error:  # whatever a template raises
            raise _Unfit(f"this one says: {' '.join(str(error).split())[:200]}") from error

    def _read_back(self) -> None:
        """Whether a call survives the way that a policy's turns take: ids, text without special tokens, the parser."""
        from srpo.texts import encode_frame, text_of

        try:
            text = self.route("why", self.names[0], _PROBE)
        except ValueError:
            raise _Unfit("a call that this one writes is read as another, or as none") from None
        if text_of(self._tokenizer, encode_frame(self._tokenizer, text + self.end)) != text:
            raise _Unfit("this one writes calls with special tokens, which texts do not show")


def _response_template(tokenizer: Any) -> Any:
    if own := getattr(tokenizer, "response_template", None):
        return own
    from trl.chat_template_utils import add_response_schema, qwen3_template

    known = SimpleNamespace(chat_template=tokenizer.chat_template)  # TRL would write it into the tokenizer
    try:
        return add_response_schema(known).response_template
    except ValueError:  # a template that TRL does not know
        return qwen3_template
