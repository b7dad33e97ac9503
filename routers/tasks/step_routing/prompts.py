"""What a router is told after every step: a few words of a fixed vocabulary, or the texts themselves.

`compact`, `progress` and `signs` are for small policies. `compact`, for ALFWorld: one word each for what the episode
needs next, how many steps are gone, how many places were never looked into, and what is left of the budget. It reads
the episode's texts only (`explorer.remember`), never the hidden state, so a router that sees it knows no more than the
explorer does.
`progress`, for any environment: steps, budget, the score so far, and whether the last step showed anything new.

`signs` and `digest` are for agents that speak OpenAI's messages, where an observation is a digest of the next request
(`routers.language.digest`): `signs` is its first line in a few words, `digest` the whole of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import get_args

from routers.environments.alfworld.explorer import PHASES, phase, remember
from routers.language.digest import After, Head
from routers.tasks.step_routing.environment import Describe, Situation
from srpo.types import Observation

_MOST = 30


def _numbers(letters: str) -> list[str]:
    return [f"<{letter}{n}>" for letter in letters for n in range(_MOST + 1)] + ["<b*>"]


def compact(situation: Situation) -> Observation:
    """`<search><t4><u7><b2>`: phase, steps taken, places not looked into, what is left of the budget (* no limit).

    The budget is shown in calls where calls are counted, else in thirtieths of the cap.
    """
    memory = remember(situation.view)
    unseen = sum(place not in memory.seen for place in memory.places)
    steps = len(situation.view.steps)
    words = [phase(memory), f"t{min(steps, _MOST)}", f"u{min(unseen, _MOST)}", f"b{_left(situation)}"]
    return Observation(before="".join(f"<{word}>" for word in words))


def _left(situation: Situation) -> str:
    budget, remaining = situation.gate.budget, situation.left
    if budget.cap is None:
        return "*"
    if budget.unit == "large_calls":
        return str(min(int(remaining), _MOST))
    return str(math.floor(_MOST * remaining / budget.cap) if budget.cap else 0)


def progress(situation: Situation) -> Observation:
    """`<new><t4><s3><b2>`: whether the last observation is one that was not seen before (else `<again>`), steps taken,
    score so far in tenths (0 where the environment tells it at the end only), what is left of the budget."""
    seen = [situation.view.first, *(step.observation for step in situation.view.steps)]
    score = math.floor(10 * situation.view.environment.score)
    steps = min(len(situation.view.steps), _MOST)
    words = ["again" if seen[-1] in seen[:-1] else "new", f"t{steps}", f"s{score}", f"b{_left(situation)}"]
    return Observation(before="".join(f"<{word}>" for word in words))


def signs(situation: Situation) -> Observation:
    """`<error><f2><e1><k12><t3><b2>`: what the next call answers (`digest.After`), the place of the last called
    function in the list of tools, errors in a row, the size of the conversation (k: powers of two of 256 characters),
    steps taken, what is left of the budget."""
    steps = situation.view.steps
    head = Head.read(steps[-1].observation if steps else situation.view.first)
    numbers = {"f": head.function, "e": head.row, "k": (head.characters // 256).bit_length(), "t": len(steps)}
    words = [head.after, *(f"{letter}{min(number, _MOST)}" for letter, number in numbers.items())]
    return Observation(before="".join(f"<{word}>" for word in [*words, f"b{_left(situation)}"]))


def digested(situation: Situation) -> Observation:
    """The digest of the next request as text of others, in a frame that says who acted and what is left."""
    steps = situation.view.steps
    body = steps[-1].observation if steps else situation.view.first
    Head.read(body)
    who = f"\n{situation.calls[-1]} acted." if steps else ""
    return Observation(body=body, before=f"{who}{_steps_left(situation)}", after="\n")


def _steps_left(situation: Situation) -> str:
    left = "" if situation.gate.budget.cap is None else f", budget left {situation.left:.4g}"
    return f"\n[steps left {situation.steps_left}{left}]\n"


def verbose(situation: Situation) -> Observation:
    """The last action and its observation as text of others, in a frame that says who acted and what is left."""
    head = _steps_left(situation)
    if not situation.view.steps:
        return Observation(body=situation.view.first, before=head, after="\n")
    last = situation.view.steps[-1]
    return Observation(
        body=f"> {last.action}\n{last.observation}", before=f"\n{situation.calls[-1]} acted.{head}", after="\n"
    )


def compact_prompt(situation: Situation, labels: Mapping[str, str]) -> str:
    """The task, and the words of the start."""
    return f"{situation.view.environment.task}\n{compact(situation).before}"


def progress_prompt(situation: Situation, labels: Mapping[str, str]) -> str:
    """The task and its type, and the words of the start."""
    environment = situation.view.environment
    return f"{environment.task_type}: {environment.task}\n{progress(situation).before}"


def verbose_prompt(situation: Situation, labels: Mapping[str, str]) -> str:
    """What a language model is asked to do, who can act, what is left, and the first observation."""
    return (
        "You do not act yourself. At every step of the task you decide which executor acts; the first is cheap, those "
        f"after it are stronger and more expensive. Answer with its word only.\n{_limits(situation, labels)}\n\n"
        f"{situation.view.first}"
    )


def _limits(situation: Situation, labels: Mapping[str, str]) -> str:
    cap = situation.gate.budget.cap
    limit = "There is no budget." if cap is None else f"The budget is {cap:g} {situation.gate.budget.unit}."
    names = "\n".join(f"{label}: {name}" for name, label in labels.items())
    return f"{names}\n{limit} There are {situation.steps_left} steps."


def signs_prompt(situation: Situation, labels: Mapping[str, str]) -> str:
    """The task, out of the digest, and the signs of the start."""
    task = "".join(line for line in situation.view.first.split("\n") if line.startswith("task: "))
    return f"{task.removeprefix('task: ')}\n{signs(situation).before}"


def digested_prompt(situation: Situation, labels: Mapping[str, str]) -> str:
    """What a language model is asked to do, who can answer, what is left, and the digest of the first request."""
    Head.read(situation.view.first)
    return (
        "An agent works on a task by calling a language model again and again. Before each of its calls you are told "
        "what happened, and decide which model answers it; the first is cheap, those after it are stronger and more "
        f"expensive. Answer with its word only.\n{_limits(situation, labels)}\n\n{situation.view.first}"
    )


@dataclass(frozen=True)
class Style:
    """One way of telling a router what happens."""

    describe: Describe
    prompt: Callable[[Situation, Mapping[str, str]], str]
    """The user's message, from the situation at the start and the labels of the executors by name."""
    words: tuple[str, ...] = ()
    """What must be one token each of a policy that is made from nothing."""


OBSERVATIONS = {
    "compact": Style(compact, compact_prompt, (*(f"<{phase}>" for phase in PHASES), *_numbers("tub"))),
    "progress": Style(progress, progress_prompt, ("<new>", "<again>", *_numbers("tsb"))),
    "verbose": Style(verbose, verbose_prompt),
    "signs": Style(signs, signs_prompt, (*(f"<{after}>" for after in get_args(After)), *_numbers("fektb"))),
    "digest": Style(digested, digested_prompt),
}
"""Names that recipes use."""
