"""The quickstart's agent: it repairs a code base with five functions, for members that are SCRIPTED.

An agent's usual loop: a handbook as the system's message, a job as the user's, then call after call: search, read,
edit, run_tests, submit. Nothing about right and wrong is told to anybody: it is in the arguments of the calls, which
the world checks, as a repository would. The *senior* does every call right. The *junior* is right at what is easy:

    typo       all of it is easy; a failed edit shows in the tests, and is mended
    flaky      the same, and the tests fail for no reason at first: errors that mean nothing
    trace      the junior searches for the wrong words, and finds nothing
    migrate    the junior's edit destroys what cannot be got back; the tests do not see it
    refactor   the junior reads the wrong file and edits it wrongly; the tests fail, and it may try again

So who waits for errors pays where they mean nothing and comes too late where nothing can be mended. The kind of a job
is in its words, the stage in the calls so far; both are in the digest that a router reads.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from routers.data.catalogue import Member
from routers.environments.messages.agent import Talk
from routers.environments.messages.members import ScriptedMember

KINDS = ("typo", "flaky", "trace", "migrate", "refactor")
SPLITS = {"train": 0, "validation": 100_000, "test": 200_000}
_EACH = 2_000
_WORDS = {
    "typo": ("Correct the spelling", "Fix the wording", "Mend a typing mistake"),
    "flaky": ("Make the build green", "Get the pipeline to pass", "Repair the nightly run"),
    "trace": ("Find the cause of the crash", "Track down the wrong totals", "Explain and fix the leak"),
    "migrate": ("Migrate the stored records", "Move the table to the new schema", "Convert the saved data"),
    "refactor": ("Split the large class", "Untangle the two modules", "Restructure the call chain"),
}
_MODULES = "billing search login export mail cache report import queue map chart form menu sync audit".split()
_SYMBOLS = "Ledger Index Session Writer Letter Store Table Reader Worker Tile Axis Field Entry Clock Trail".split()
_SKILL: Mapping[str, Mapping[str, float]] = {
    "typo": {"edit": 0.9},
    "flaky": {"edit": 0.9},
    "trace": {"search": 0.1, "edit": 0.9},
    "migrate": {"edit": 0.1},
    "refactor": {"read": 0.3, "edit": 0.3},
}
"""The junior's chances to be right, where they are not 1."""
FUNCTIONS = ("search", "read", "edit", "run_tests", "submit")
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {
        argument: {"type": "string"} for argument in arguments}}}}
    for name, arguments in zip(FUNCTIONS, (("query",), ("file",), ("file", "patch"), (), ()), strict=True)
]  # fmt: skip


@dataclass(frozen=True)
class Told:
    """What a job's words say."""

    kind: str
    module: str
    symbol: str

    @classmethod
    def read(cls, text: str) -> Told:
        what, _, rest = text.rstrip(".").rpartition(" in ")
        module, _, symbol = rest.partition(": ")
        return cls(next(kind for kind, words in _WORDS.items() if what in words), module, symbol)

    @property
    def files(self) -> tuple[str, str, str]:
        """What a search for the symbol finds; the first is the right one."""
        return (f"{self.module}/{self.symbol.lower()}.py", f"{self.module}/base.py", f"{self.module}/legacy.py")


@dataclass(frozen=True)
class Job:
    """One job, by its number: how it is told, and what members cannot know before they look."""

    number: int

    def _dice(self, what: str) -> random.Random:
        return random.Random(f"repairs/{self.number}/{what}")

    @property
    def told(self) -> Told:
        kind = KINDS[self.number % len(KINDS)]
        return Told(kind, self._dice("module").choice(_MODULES), self._dice("symbol").choice(_SYMBOLS))

    @property
    def text(self) -> str:
        told = self.told
        return f"{self._dice('words').choice(_WORDS[told.kind])} in {told.module}: {told.symbol}."

    def content(self, file: str) -> str:
        """A file of some 500 tokens, with a mark in it that a patch of this file must carry."""
        start = self._dice(file).randrange(10**6)
        lines = [f"{name} = {start + number}" for number, name in enumerate(_SYMBOLS * 6)]
        return "\n".join([f"# {file} revision {self.mark(file)}", *lines])

    def mark(self, file: str) -> str:
        return f"{self._dice('mark' + file).randrange(16**6):06x}"

    @property
    def unrelated(self) -> int:
        """Runs of the tests that fail for no reason."""
        return self._dice("flaky").randint(1, 3) if self.told.kind == "flaky" else 0


HANDBOOK = "You repair a code base with the functions that you are given, one call at a time.\n" + "\n".join(
    f"{number}. In {module}, look at {symbol} first; keep its tests as they are, and say what you changed."
    for number, (module, symbol) in enumerate(((m, s) for m in _MODULES for s in _SYMBOLS[:4]), 1)
)
"""Some 1,300 tokens, which every request begins with: long enough for a prompt cache."""


class Repairs:
    """The agent. Splits: train, validation, test, of 2,000 jobs each, a fifth of every kind."""

    waits = False

    def tasks(self, split: str, count: int = 0) -> dict[str, str]:
        if split not in SPLITS:
            raise ValueError(f"there is no split {split!r}; there are {', '.join(SPLITS)}")
        jobs = [Job(SPLITS[split] + number) for number in range(min(count, _EACH) if count else _EACH)]
        return {f"{job.told.kind}-{job.number}": job.told.kind for job in jobs}

    def talk(self, task: str) -> Talk:
        job = Job(int(task.rpartition("-")[2]))
        messages: list[Mapping[str, Any]] = [
            {"role": "system", "content": HANDBOOK},
            {"role": "user", "content": job.text},
        ]
        world = _World(job)
        while True:
            reply = yield {"messages": list(messages), "tools": TOOLS}
            messages.append(reply)
            for call in reply.get("tool_calls") or ():
                name, arguments = call["function"]["name"], json.loads(call["function"]["arguments"])
                if name == "submit":
                    return float(world.right)
                messages.append({"role": "tool", "tool_call_id": call["id"], "content": world.run(name, arguments)})


class _World:
    """The code base of a job."""

    def __init__(self, job: Job) -> None:
        self._job, self._told = job, job.told
        self._unrelated = job.unrelated
        self._patched = self._destroyed = False

    @property
    def right(self) -> bool:
        return self._patched and not self._destroyed

    def run(self, name: str, arguments: Mapping[str, Any]) -> str:
        job, told = self._job, self._told
        if name == "search":
            found = arguments.get("query") == told.symbol
            return "\n".join(f"{file}: class {told.symbol}" for file in told.files) if found else "no matches"
        if name == "read":
            return job.content(str(arguments.get("file")))
        if name == "edit":
            good = arguments.get("file") == told.files[0] and job.mark(told.files[0]) in str(arguments.get("patch"))
            self._patched = good
            self._destroyed |= not good and told.kind == "migrate"
            return "the patch was applied"
        if self._unrelated:
            self._unrelated -= 1
            return "Error: the test server did not answer (connection reset)"
        unseen = told.kind == "migrate"
        return "12 passed" if self._patched or unseen else "Error: 2 of 12 tests failed"


class _Repairer(ScriptedMember):
    """Knows the loop by heart: what comes next, from the messages alone."""

    def right(self, kind: str, function: str, dice: random.Random) -> bool:
        return True

    def say(self, request: Mapping[str, Any], seed: str) -> dict[str, Any]:
        told, calls = _read(request["messages"])
        name = _next(calls)
        right = self.right(told.kind, name, random.Random(seed))
        last = next((arguments["file"] for n, arguments, _ in reversed(calls) if n == "read"), "")
        shown = next((result for n, _, result in reversed(calls) if n == "read"), "")
        mark = shown.partition("revision ")[2][:6]
        arguments = {
            "search": {"query": told.symbol if right else f"why {told.module} is wrong"},
            "read": {"file": told.files[0] if right else told.files[1 + len(calls) % 2]},
            "edit": {"file": last, "patch": f"@@ {mark if right else 'unknown'} @@ the change that was asked for"},
        }.get(name, {})
        function = {"name": name, "arguments": json.dumps(arguments)}
        call = {"id": f"call_{len(calls)}", "type": "function", "function": function}
        return {"role": "assistant", "content": None, "tool_calls": [call]}


class Junior(_Repairer):
    """SCRIPTED. Cheap, at the prices of gpt-4.1-nano; `usd` is a fee per request besides."""

    def __init__(self, usd: float = 0.0) -> None:
        super().__init__(_member("junior", 0.1, 0.4, usd))

    def right(self, kind: str, function: str, dice: random.Random) -> bool:
        return dice.random() < _SKILL[kind].get(function, 1.0)


class Senior(_Repairer):
    """SCRIPTED. Never wrong, at the prices of gpt-4.1: twenty times as much."""

    def __init__(self, usd: float = 0.0) -> None:
        super().__init__(_member("senior", 2.0, 8.0, usd))


def _member(name: str, price_in: float, price_out: float, usd: float) -> Member:
    return Member(
        name, "scripted", price_in, price_out, max_tokens=128, price_cached=price_in / 4, price_request=usd,
        cache_seconds=300.0, cache_min_tokens=1024, cache_step_tokens=128,
    )  # fmt: skip


Called = tuple[str, Mapping[str, Any], str]
"""Function, arguments, result."""


def _read(messages: Sequence[Mapping[str, Any]]) -> tuple[Told, list[Called]]:
    """The job's words, and the calls so far: all that a member knows."""
    results = {m.get("tool_call_id"): str(m["content"]) for m in messages if m["role"] == "tool"}
    calls: list[Called] = []
    for message in messages:
        for call in message.get("tool_calls") or ():
            function = call["function"]
            calls.append((function["name"], json.loads(function["arguments"]), results.get(call["id"], "")))
    return Told.read(str(messages[1]["content"])), calls


def _next(calls: Sequence[Called]) -> str:
    if not calls:
        return "search"
    name, _, result = calls[-1]
    if name == "search":
        return "search" if result == "no matches" else "read"
    if name == "run_tests":
        return "submit" if not result.startswith("Error") else "run_tests" if "server" in result else "read"
    return {"read": "edit", "edit": "run_tests"}[name]
