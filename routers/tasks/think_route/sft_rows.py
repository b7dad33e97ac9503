"""Demonstrations for the supervised start of a think/route agent, made from recorded replies of training queries.

They show the form of an episode and how a reply is read, and nothing about who is good: members are drawn uniformly,
and no outcome is looked at. Whom to ask, and when to ask again, is left to reinforcement learning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from routers.data.table import ReplyTable
from routers.language.actions import Actions
from routers.language.prompts import Messages, family_phrase
from routers.pool.reasoning import split_reasoning
from srpo.rollout.loop import observation_ids
from srpo.task import Ids
from srpo.texts import encode_frame, inside, opened_by, opened_in
from srpo.types import Observation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_ANSWER = "unknown"


@dataclass(frozen=True)
class Demonstration:
    """A prompt, and what policy (text) and world (observation) say after it, in turn."""

    prompt: Messages
    turns: tuple[str | Observation, ...]


def result_of(reply: str) -> str:
    """The result of a reply that shows its working: what follows the last " = " of its first line, else that line.

    The quickstart's members end with their result ("convert('2 yards', 'feet') = 6"); a policy of 1M parameters can
    copy a result, but not find it in a paragraph. It is a fixed rule that looks at the reply only, behind what it
    thought aloud. An empty reply, or only reasoning, becomes `NO_ANSWER`: an endpoint that says nothing has failed.
    """
    first = split_reasoning(reply)[0].strip().split("\n")[0].strip()
    return first.rsplit(" = ", 1)[-1].strip() or NO_ANSWER


def restricted(
    table: ReplyTable, members: Sequence[str] | None = None, rewrite: Callable[[str], str] | None = None
) -> ReplyTable:
    """The same table with some members only, and every reply rewritten; tokens and costs stay those of the recording.

    Args:
        members: keep these, in this order; None: all.
        rewrite: applied to every reply, such as `result_of`; None: replies stay as they are.

    Raises:
        ValueError: a member that the table does not have.
    """
    names = table.members if members is None else list(members)
    if unknown := [name for name in names if name not in table.members]:
        raise ValueError(f"member {unknown[0]!r} is not in the table; it has {', '.join(table.members)}")
    rows = []
    for query in table.queries():
        for name in names:
            found = table.lookup(query["query_id"], name)
            rows.append(
                {
                    **query,
                    "gold": table.gold(query["query_id"]),
                    "member": name,
                    **({"reply": rewrite(found.reply) if rewrite else found.reply} if table.has_replies else {}),
                    "prompt_tokens": found.prompt_tokens,
                    "completion_tokens": found.completion_tokens,
                    "seconds": found.seconds,
                    "correct": found.correct,
                    "cost": found.cost,
                }
            )
    return ReplyTable(rows, {name: table.catalogue[name] for name in names}, source="restricted table")


def demonstrations(
    queries: Sequence[Mapping[str, Any]],
    table: ReplyTable,
    prompt: Callable[[Mapping[str, Any]], Messages],
    actions: Actions,
    rng: np.random.Generator,
    *,
    again: float = 0.5,
    failed: Callable[[str], bool] = lambda reply: not reply or reply.startswith("Error"),
    think: Callable[[Mapping[str, Any]], str] = family_phrase,
) -> list[Demonstration]:
    """One episode per query: ask a member drawn at random, read the reply, answer with it.

    Where the reply is a failure, with probability ``again`` another member is drawn and asked; whoever fails last is
    answered with `NO_ANSWER`.

    Args:
        queries: ``query_id``, ``query``, ``family`` and ``split``; a held-out query is refused.
        table: what each member replied.
        prompt: query -> the policy's prompt.
        actions: how turns are written.
        rng: draws members; the same generator state gives the same episodes.
        failed: whether a reply is no answer, by its text.
        think: the reasoning of a route.

    Raises:
        ValueError: a query of the held-out split.
    """
    made = []
    for query in queries:
        if query.get("split", "train") != "train":
            raise ValueError(f"query {query.get('query_id')!r} is of split {query['split']!r}: train on 'train' only")
        order = [table.members[i] for i in rng.permutation(len(table.members))]
        asks = 2 if len(order) > 1 and rng.random() < again else 1
        turns: list[str | Observation] = []
        reply = ""
        for name in order[:asks]:
            reply, reasoning = split_reasoning(table.lookup(query["query_id"], name).reply.strip())
            asked = "" if actions.forward_empty else str(query["query"]).strip()
            turns += [actions.route(think(query), name, asked), actions.reply(reply, reasoning)]
            if not failed(reply):
                break
        answer = NO_ANSWER if failed(reply) else reply
        made.append(
            Demonstration(prompt(query), (*turns, _answered(answer, actions) or actions.answer("", NO_ANSWER)))
        )
    return made


def _answered(text: str, actions: Actions) -> str | None:
    """The turn that answers so; None: there is none, as the text holds a tag."""
    try:
        return actions.answer("", text)
    except ValueError:
        return None


def copy_drills(
    replies: Sequence[str],
    words: Sequence[str],
    actions: Actions,
    rng: np.random.Generator,
    count: int,
) -> Iterator[Demonstration]:
    """Exercises without a question: an observation and the answer that repeats it.

    Reading a reply is copying, and copying is what costs a small model most of its supervised start; an exercise has a
    fifth of an episode's tokens. Half of the texts are recorded replies, half are words drawn at random, so that
    whatever the policy can write it can also repeat.

    Args:
        replies: texts to draw from.
        words: pieces of text that are put together at random, up to eight: the tokens of the policy.
        count: how many exercises.
    """
    made = 0
    while made < count:
        if rng.random() < 0.5:
            text = replies[int(rng.integers(len(replies)))]
        else:
            text = "".join(words[i] for i in rng.integers(len(words), size=rng.integers(1, 9)))
        text = " ".join(text.split())
        if answer := _answered(text, actions):
            made += 1
            yield Demonstration([], (actions.reply(text), answer))


def encode(
    demonstration: Demonstration, tokenizer: PreTrainedTokenizerBase, actions: Actions, observation_tokens: int
) -> Ids:
    """`input_ids`, and `labels`: -100 on prompt and observations. A turn ends as the rollout's would."""
    ids: list[int] = actions.ids(demonstration.prompt) if demonstration.prompt else []
    labels = [-100] * len(ids)
    opened = opened_by(tokenizer, ids)
    for turn in demonstration.turns:
        if isinstance(turn, str):
            part = encode_frame(tokenizer, inside(opened, turn) + actions.end)
            opened = ""
            labels += part
        else:
            part = list(observation_ids(turn, tokenizer, observation_tokens))
            opened = opened_in(turn.after)
            labels += [-100] * len(part)
        ids += part
    return {"input_ids": ids, "labels": labels}
