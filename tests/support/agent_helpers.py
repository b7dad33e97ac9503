"""A real, tiny policy that knows two tricks, trained from nothing in a few seconds; and a pool for it to act on.

To a question that holds "beta" it asks beta, to any other it asks alpha; then it answers "ok".
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from scripted import Scripted

from routers.data.catalogue import Member
from routers.pool import Ledger, Pool
from routers.tasks.think_route.settings import AgentSettings

MEMBERS = (Member("alpha", "first things", 1.0, 2.0), Member("beta", "second things", 3.0, 4.0))
SETTINGS = AgentSettings(
    prompt="short",
    forward_empty=True,
    turns=3,
    tokens=96,
    turn_tokens=32,
    observation_tokens=16,
    members=MEMBERS,
)
QUESTIONS = ("What is one?", "Say beta now", "Which alpha is it?", "Is this beta?", "Count to nine", "beta beta")
REPLIES = ("a reply", "forty-two", "no idea at all", "12")


def settings_of(action_format: str) -> AgentSettings:
    if action_format == "tags":
        return SETTINGS
    return dataclasses.replace(SETTINGS, action_format=action_format, tokens=160, turn_tokens=48)


def tokenizer_of(settings: AgentSettings) -> Any:
    """Of the policy's own texts."""
    from srpo.scratch_lm import train_tokenizer

    if settings.action_format == "tags":
        grammar = settings.grammar
        tags = [tag(name) for name in grammar.names for tag in (grammar.open, grammar.close)]
        texts = [settings.actions(MEMBERS).prompt(q)[0]["content"] for q in QUESTIONS]
        return train_tokenizer([*texts, "alpha: beta: ok why", *REPLIES], vocab_size=400, whole=tags)
    from tool_tokenizers import tokenizer_with

    from srpo.scratch_lm import CHAT_TEMPLATE

    first = tokenizer_with(CHAT_TEMPLATE)
    actions = settings.actions(MEMBERS, first)
    texts = [first.decode(actions.ids(actions.prompt(q))) for q in QUESTIONS]
    return tokenizer_with(
        CHAT_TEMPLATE, [*texts, *(actions.route("why", m.name) for m in MEMBERS), "ok", *REPLIES], size=500
    )


def train_policy(folder: Path, steps: int = 150, action_format: str = "tags") -> Path:
    """Save model, tokenizer and settings in `folder`."""
    from routers.tasks.think_route.sft_rows import Demonstration, encode
    from srpo.scratch_lm import tiny_causal_lm

    settings = settings_of(action_format)
    tokenizer = tokenizer_of(settings)
    actions = settings.actions(MEMBERS, tokenizer)
    model = tiny_causal_lm(tokenizer, hidden=64, heads=2, intermediate=128, seed=0)
    rows = []
    for question in QUESTIONS:
        for reply in REPLIES:
            member = "beta" if "beta" in question else "alpha"
            turns = (actions.route("why", member), actions.reply(reply), actions.answer("", "ok"))
            encoded = encode(Demonstration(actions.prompt(question), turns), tokenizer, actions, 16)
            rows.append((encoded["input_ids"], encoded["labels"]))
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([row + [0] * (width - len(row)) for row, _ in rows])
    labels = torch.tensor([row + [-100] * (width - len(row)) for _, row in rows])
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        loss = torch.nn.functional.cross_entropy(model(ids).logits[:, :-1].transpose(1, 2), labels[:, 1:])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.02, f"the policy did not learn its tricks: loss {loss.item():.3f}"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings.save(folder)
    return folder


def scripted_pool(policy_price: tuple[float, float] = (0.0, 0.0), **backends: Any) -> Pool:
    """alpha replies "one", beta "two", unless told otherwise."""
    made = {"alpha": Scripted("one"), "beta": Scripted("two"), **backends}
    return Pool({m.name: m for m in MEMBERS}, made, ledger=Ledger(None, policy_price))
