"""What the policy reads: the members with price and strength, the format of its turn, the question last."""

from __future__ import annotations

from collections.abc import Sequence

from routers.catalogue import Member
from routers.grammar import Grammar


def price(member: Member) -> str:
    """What the prompt shows of a member's price: USD per million tokens, prompt/completion."""
    return f"${member.price_in:g}/{member.price_out:g}"


def policy_prompt(query: str, members: Sequence[Member], grammar: Grammar | None = None) -> list[dict[str, str]]:
    """One user message for ``apply_chat_template``.

    It is as short as it can be, since a small policy reads it thousands of times. Everything before the question is
    the same for all queries of a pool, so the shared prefix can be encoded once.

    Args:
        query: the question, put last and unchanged.
        members: the pool in the order in which it is shown; prices are USD per million tokens, in/out.
        grammar: the tags of the action; ``None`` is the default grammar.

    Raises:
        ValueError: no member, or two of one name (a route action could not tell them apart).
    """
    grammar = grammar or Grammar()
    names = [member.name for member in members]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"a prompt needs at least one member and every name once; got {names}")
    lines = [f"{m.name} {price(m)}: {m.descriptor}" for m in members]
    text = "\n".join(["Who should answer?", *lines, f"Write {grammar.example()}", f"Question: {query}"])
    return [{"role": "user", "content": text}]
