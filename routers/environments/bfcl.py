"""BFCL's multi-turn tool use (Patil et al., package `bfcl-eval`, Apache-2.0) as an agent environment.

Optional: `pip install --no-deps bfcl-eval mpmath`. The package's tools and its checks of state and responses are used.
Its way of running a call, which evaluates the model's text as Python, is not: see `tool_calls`.
"""

import ast
import copy
import functools
import hashlib
import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from routers.environments.protocol import NOTHING_HAPPENS, GameError
from routers.environments.tool_calls import call_tool, read_calls

CATEGORIES = ("base", "long_context", "miss_param", "miss_func")

SPLITS = ("train", "heldout")

MORE_FUNCTIONS = "I have updated some more functions you can choose from. What about now?"
"""The package's words where functions are added; only there a turn has none of its own."""
_MORE = ({"content": MORE_FUNCTIONS},)

INSTRUCTION = (
    "An action is a list of calls of these functions: [f(a=1), g(b='x')]. You see the results and may call again. "
    "Once the request is dealt with, the action is a sentence without a call; there may be a further request."
)


@dataclass(frozen=True)
class BfclTask:
    """A conversation: what the user says in each turn, and the calls that would be right."""

    id: str
    category: str
    turns: tuple[str, ...]
    gold: tuple[tuple[str, ...], ...]
    config: dict[str, Any]
    classes: tuple[str, ...]
    excluded: tuple[str, ...]
    later: Mapping[int, Sequence[str]]
    """Functions that are first told of in a turn (`miss_func`), in which the user says `MORE_FUNCTIONS`."""

    @property
    def split(self) -> str:
        """Ours: `train` or `heldout`, the same for the variants of a conversation in all categories."""
        number = self.id.rsplit("_", 1)[-1]
        return SPLITS[int(hashlib.sha256(number.encode()).hexdigest(), 16) % 5 >= 3]

    @property
    def walkthrough(self) -> tuple[str, ...]:
        """Actions that solve it: the right calls of each turn, then words that end the turn."""
        done = "That is done."
        return tuple(a for calls in self.gold for a in ([f"[{', '.join(calls)}]", done] if calls else [done]))


def load_bfcl(category: str = "base") -> list[BfclTask]:
    """The tasks of a category, from the data in the installed package."""
    if category not in CATEGORIES:
        raise GameError(f"BFCL category {category!r} is not supported; there are {', '.join(CATEGORIES)}")
    name = f"BFCL_v4_multi_turn_{category}.json"
    gold = {row["id"]: row["ground_truth"] for row in _lines(f"possible_answer/{name}")}
    return [
        BfclTask(
            row["id"],
            category,
            tuple("\n".join(message["content"] for message in turn or _MORE) for turn in row["question"]),
            tuple(tuple(calls) for calls in gold[row["id"]]),
            row["initial_config"],
            tuple(row["involved_classes"]),
            tuple(row.get("excluded_function", ())),
            {int(turn): names for turn, names in row.get("missed_function", {}).items()},
        )
        for row in _lines(name)
    ]


class BfclBenchmark:
    """The multi-turn conversations; a `Benchmark`. Without privileged information no scripted executor can do them.

    Parts: `CATEGORY`, `CATEGORY:train` (111 of 200) and `CATEGORY:heldout` (89). BFCL is a test set and has no split:
    this one is OURS, by a hash of the conversation's number. The categories are variants of the same conversations
    under the same numbers, so that no held-out one of any category is seen in training.
    """

    def __init__(self) -> None:
        importlib.import_module("bfcl_eval")
        self._loaded: dict[str, BfclTask] = {}

    def tasks(self, which: str, count: int = 0) -> dict[str, str]:
        category, _, split = which.partition(":")
        if category not in CATEGORIES or split not in ("", *SPLITS):
            parts = ", ".join(f"{name}[:{'|'.join(SPLITS)}]" for name in CATEGORIES)
            raise GameError(f"BFCL has no part {which!r}; there are {parts}")
        found = [task for task in load_bfcl(category) if split in ("", task.split)][: count or None]
        self._loaded |= {task.id: task for task in found}
        return {task.id: task.category for task in found}

    def task(self, name: str) -> BfclTask:
        """A task of a part that was listed."""
        if name not in self._loaded:
            raise GameError(f"{name}: no part of BFCL with it was listed")
        return self._loaded[name]

    def make(self, task: str, limit: int) -> "Bfcl":
        return Bfcl(self.task(task), limit)

    def close(self) -> None: ...


class Conversation:
    """The tools of a conversation, and its score by the rules of the package's `multi_turn_checker`."""

    def __init__(self, task: BfclTask) -> None:
        self.task = task
        self.turn = 0
        """Of the user; the number of turns once all were dealt with."""
        self.right = True
        """Whether all turns that ended were right."""
        self._said: list[str] = []
        self._called = False
        self._tools, self._gold_tools = _tools(task), _tools(task)

    @property
    def over(self) -> bool:
        return self.turn == len(self.task.turns) or not self.right

    @property
    def won(self) -> bool:
        return self.right and self.turn == len(self.task.turns)

    def run(self, call: Callable[[dict[str, Any], tuple[str, ...]], str]) -> str:
        """The result of a call on (tools, methods that are not there)."""
        self._called = True
        self._said.append(call(self._tools, self.task.excluded))
        return self._said[-1]

    def end_turn(self) -> str:
        """End the user's turn; what the user says next, "" where it is over."""
        self.right = self._check()
        self.turn += 1
        return "" if self.over else self.task.turns[self.turn]

    def _check(self) -> bool:
        """Whether the turn that ends was right."""
        checker = importlib.import_module("bfcl_eval.eval_checker.multi_turn_eval.multi_turn_checker")
        gold = self.task.gold[self.turn]
        results = [call_tool(self._gold_tools, call, ()) for text in gold for call in read_calls(text)]
        called, self._called = self._called, False
        if not gold:  # something is missing; what was called nevertheless shows in the state of the next turn
            return True
        return bool(
            called
            and checker.state_checker(self._tools, self._gold_tools)["valid"]
            and checker.response_checker(self._said, results, self.turn)["valid"]
        )


class Bfcl:
    """One conversation; an `AgentEnvironment` with free text. Score: 1 if every turn was right, known at the end.

    Words without a call end the user's turn, as in the package; no words at all cost a step and change nothing.
    """

    admissible: tuple[str, ...] = ()
    how = INSTRUCTION
    waits = False

    def __init__(self, task: BfclTask, limit: int = 40) -> None:
        self._task = task
        self.seed, self.task, self.task_type, self.limit = task.id, task.turns[0], task.category, limit
        self.steps = 0
        self._conversation: Conversation | None = None

    @property
    def won(self) -> bool:
        return self._conversation is not None and self._conversation.won

    @property
    def score(self) -> float:
        return float(self.won)

    @property
    def done(self) -> bool:
        return self.steps >= self.limit or (self._conversation is not None and self._conversation.over)

    def reset(self) -> str:
        if self._conversation is not None:
            raise GameError(f"{self.seed}: an episode object is played once; make a new one")
        self._conversation = Conversation(self._task)
        return self._told(self._task.turns[0])

    def _told(self, said: str) -> str:
        """What the user says, after the functions that are new in this turn."""
        assert self._conversation is not None
        docs = "\n".join(json.dumps(doc) for doc in documents(self._task, self._conversation.turn))
        return f"{docs}\n\n{said}" if docs else said

    def step(self, action: str) -> tuple[str, bool]:
        if self._conversation is None or self.done:
            raise GameError(f"{self.seed}: step() {'after the end' if self._conversation else 'before reset()'}")
        self.steps += 1
        if not action:  # an executor that could not be reached has not said that it is done
            return NOTHING_HAPPENS, self.done
        if calls := read_calls(action):
            run = self._conversation.run
            results = [run(functools.partial(_written, call)) for call in calls]
            return "\n".join(results), self.done
        said = self._conversation.end_turn()
        return ("" if self.done else self._told(said)), self.done


def _written(call: ast.Call, tools: dict[str, Any], excluded: tuple[str, ...]) -> str:
    return call_tool(tools, call, excluded)


def _backends() -> Any:
    return importlib.import_module("bfcl_eval.constants.executable_backend_config")


def _tools(task: BfclTask) -> dict[str, Any]:
    made = {}
    for name in task.classes:
        made[name] = getattr(importlib.import_module(_backends().CLASS_FILE_PATH_MAPPING[name]), name)()
        if name not in _backends().STATELESS_CLASSES:
            config = copy.deepcopy(task.config.get(name, {}))
            made[name]._load_scenario(config, long_context=task.category == "long_context")
    return made


def documents(task: BfclTask, turn: int) -> list[dict[str, Any]]:
    """What the package says of the functions that are first told of in a turn."""
    files = (_backends().MULTI_TURN_FUNC_DOC_FILE_MAPPING[name] for name in task.classes)
    docs = (doc for file in files for doc in _lines(f"multi_turn_func_doc/{file}"))
    later = {name: number for number, names in task.later.items() for name in names}
    return [doc for doc in docs if doc["name"] not in task.excluded and later.get(doc["name"], 0) == turn]


def _lines(name: str) -> list[dict[str, Any]]:
    text = resources.files("bfcl_eval").joinpath("data", name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]
