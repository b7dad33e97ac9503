"""What a router of agent steps reads of a conversation in OpenAI's messages: a digest of fixed size, not all of it.

    call 3; after error; function 2 of 6; errors 1, in a row 1; messages 6 (user 1, assistant 2, tool 3); characters 99
    task: "Fix the failing test in ..."
    assistant calls run_tests: "{\"path\": \"tests\"}"
    tool run_tests, error, 812 characters: "Traceback (most recent call last): ..."

The first line holds numbers only, and small policies read nothing else (`signs` of step routing); the task stands in
the digest of the first call, the last messages in those after it. It is a function of the request alone, so a policy
reads the same in training and behind a server. Texts of others are cut, and quoted as JSON does it: they cannot begin
a line, hence not be taken for the numbers. Work is linear in the size of the messages.

INFERRED: which tool results are errors (`failed`): OpenAI's messages have no field for it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from srpo.texts import well_formed

After = Literal["start", "result", "error", "user", "assistant"]
"""What the call answers: the first messages, tool results (error: one of them is), a user, an unfinished reply."""
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_COUNTED = ("system", "user", "assistant", "tool", "other")
_TASK, _EXCERPT, _LAST = 400, 200, 4
"""Characters of the task, of every other excerpt, and messages that are shown."""
_LOOKED_AT = 1_000
"""Characters at either end of a tool result in which an error is looked for."""
_FAILED = re.compile(
    r"^[\s*#>!\[(-]{0,4}(?!(?:no|0|without|zero) )(?:\w{1,40}[ .:]){0,3}"
    r"\w{0,40}(?:error|exception|failed|failure|fatal)\b"
    r"|traceback \(most recent call last\)|\bexit(?:ed with)?(?: code| status)?:? [1-9]"
    r"|\"(?:is_?error|failed)\"\s{0,3}:\s{0,3}true|\"(?:ok|success)\"\s{0,3}:\s{0,3}false"
    r"|\"error\"\s{0,3}:\s{0,3}(?!null|\"\"|false|\{\}|\[\])\S|\"status\"\s{0,3}:\s{0,3}\"(?:error|failed|failure)\"",
    re.IGNORECASE,
)
_HEAD = re.compile(
    r"call (\d+); after (\w+); function (\d+) of (\d+); errors (\d+), in a row (\d+); messages (\d+) \([^)\n]*\); "
    r"characters (\d+)(?:\n|$)"
)


@dataclass(frozen=True)
class Head:
    """The numbers of a digest."""

    call: int
    """1 + the assistant's messages so far."""
    after: After
    function: int
    """Place of the last called function in the list of tools, from 1; 0: none was called, or it is not in the list."""
    functions: int
    errors: int
    """Tool results so far that are errors."""
    row: int
    """Of these, the last ones without another result between them."""
    messages: int
    characters: int

    @classmethod
    def read(cls, text: str) -> Head:
        """The numbers of a digest's text.

        Raises:
            ValueError: no such text.
        """
        found = _HEAD.match(text)
        if found is None:
            raise ValueError(
                "this policy reads digests of OpenAI's messages (routers.language.digest), and the observation is not "
                "one: let `digest(messages, tools).text` be what it is told, or train it with observation: verbose"
            )
        call, after, *numbers = found.groups()
        return cls(int(call), after, *map(int, numbers))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Digest:
    """Of one request."""

    head: Head
    text: str
    """At most `LONGEST` characters."""
    task: str
    """The beginning of the first user's message, as it is."""


LONGEST = 3_000


def digest(messages: Sequence[Any], tools: Sequence[Any] | None = None) -> Digest:
    """The digest of a request.

    Args:
        messages, tools: as in the body of a chat completion; whatever is no such thing counts as `other`, and text
            that is not there as empty.
    """
    counts = dict.fromkeys(_COUNTED, 0)
    characters = errors = row = last_reply = 0
    called: dict[str, str] = {}
    function, results = "", list[bool]()
    for number, message in enumerate(messages):
        role = _role(message)
        counts[role] += 1
        text = _text(message)
        characters += len(text)
        if role == "assistant":
            last_reply = number + 1
            results = []
            for call in _calls(message):
                function = _name(call)
                characters += len(_arguments(call))
                called[str(call.get("id"))] = function
        elif role == "tool":
            bad = failed(message)
            errors, row = errors + bad, row + 1 if bad else 0
            results.append(bad)
    new = messages[last_reply:]
    names = [_name(tool) for tool in tools or ()]
    head = Head(
        call=counts["assistant"] + 1,
        after=_after(counts["assistant"], new, results),
        function=names.index(function) + 1 if function in names else 0,
        functions=len(names),
        errors=errors,
        row=row,
        messages=len(messages),
        characters=characters,
    )
    task = well_formed(next((_text(m) for m in messages if _role(m) == "user"), "")[:_TASK])
    parts = ", ".join(f"{role} {count}" for role, count in counts.items() if count)
    lines = [
        f"call {head.call}; after {head.after}; function {head.function} of {head.functions}; errors {errors}, "
        f"in a row {row}; messages {head.messages} ({parts or 'none'}); characters {characters}"
    ]
    if not counts["assistant"]:
        lines.append(f"task: {_quoted(task, _TASK)}")
    else:
        told = [*_told_reply(messages[last_reply - 1]), *(_told(message, called) for message in new)]
        lines += told if len(told) <= _LAST else [f"({len(told) - _LAST} are left out)", *told[-_LAST:]]
    return Digest(head, "\n".join(lines)[:LONGEST], task)


def failed(message: Any) -> bool:
    """Whether a tool's message looks like an error: it says so as it begins, in JSON, or as a shell or Python does."""
    if not isinstance(message, Mapping):
        return False
    if message.get("is_error") is True:
        return True
    text = _text(message)
    near = text if len(text) <= 2 * _LOOKED_AT else f"{text[:_LOOKED_AT]}\n{text[-_LOOKED_AT:]}"
    return _FAILED.search(near) is not None


def _after(replies: int, new: Sequence[Any], results: Sequence[bool]) -> After:
    if not replies:
        return "start"
    if not new:
        return "assistant"
    if not results:
        return "user"
    return "error" if any(results) else "result"


def _told_reply(message: Any) -> list[str]:
    said, calls = _text(message), [f"assistant calls {_name(c)}: {_quoted(_arguments(c))}" for c in _calls(message)]
    return [f"assistant, {len(said)} characters: {_quoted(said)}", *calls] if said or not calls else calls


def _told(message: Any, called: Mapping[str, str]) -> str:
    role, text = _role(message), _text(message)
    size = f"{len(text)} characters: {_quoted(text)}"
    if role != "tool":
        return f"{role}, {size}"
    name = called.get(str(message.get("tool_call_id")), "?")
    return f"tool {name}, {'error, ' if failed(message) else ''}{size}"


def _quoted(text: str, most: int = _EXCERPT) -> str:
    """The beginning and the end of a text, on one line."""
    if len(text) > most:
        text = f"{text[: most // 2]} ... {text[-most // 2 :]}"
    return json.dumps(well_formed(text), ensure_ascii=False).replace("\u2028", " ").replace("\u2029", " ")[: 2 * most]


def _role(message: Any) -> str:
    return ROLES.get(str(message.get("role")), "other") if isinstance(message, Mapping) else "other"


def _text(message: Any) -> str:
    """The texts of a message; other parts (images, sound) by their type, however large they are."""
    content = message.get("content") if isinstance(message, Mapping) else None
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        return ""
    return "".join(_part(part) for part in content)


def _part(part: Any) -> str:
    if not isinstance(part, Mapping):
        return ""
    text = part.get("text")
    return text if isinstance(text, str) else f"[{_safe_name(part.get('type'))}]"


def _calls(message: Any) -> list[Mapping[str, Any]]:
    calls = message.get("tool_calls") if isinstance(message, Mapping) else None
    return [call for call in calls if isinstance(call, Mapping)] if isinstance(calls, Sequence) else []


def _name(call: Any) -> str:
    function = call.get("function") if isinstance(call, Mapping) else None
    return _safe_name(function.get("name") if isinstance(function, Mapping) else None)


def _arguments(call: Mapping[str, Any]) -> str:
    function = call.get("function")
    arguments = function.get("arguments") if isinstance(function, Mapping) else None
    return arguments if isinstance(arguments, str) else ""


def _safe_name(name: Any) -> str:
    """A name as an identifier of at most 64 characters; "?" for anything else."""
    return name if isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", name) else "?"
