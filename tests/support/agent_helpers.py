"""A real, tiny policy that knows two tricks, trained from nothing in a few seconds; and a pool for it to act on.

To a question that holds "beta" it asks beta, to any other it asks alpha; then it answers "ok".
"""

from pathlib import Path
from typing import Any

import torch
from scripted import Scripted

from routers.data.catalogue import Member
from routers.language.grammar import render_answer, render_route
from routers.language.observations import reply_observation
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


def train_policy(folder: Path, steps: int = 150) -> Path:
    """Save model, tokenizer and settings in `folder`."""
    from srpo.rollout.loop import observation_ids
    from srpo.rollout.untrusted import encode_frame
    from srpo.scratch_lm import tiny_causal_lm, train_tokenizer

    grammar = SETTINGS.grammar
    tags = [tag(name) for name in grammar.names for tag in (grammar.open, grammar.close)]
    texts = [SETTINGS.messages(q, MEMBERS)[0]["content"] for q in QUESTIONS] + ["alpha: beta: ok why", *REPLIES]
    tokenizer = train_tokenizer(texts, vocab_size=400, whole=tags)
    model = tiny_causal_lm(tokenizer, hidden=64, heads=2, intermediate=128, seed=0)
    rows = []
    for question in QUESTIONS:
        for reply in REPLIES:
            prompt = tokenizer.apply_chat_template(
                SETTINGS.messages(question, MEMBERS), add_generation_prompt=True, return_dict=False
            )
            member = "beta" if "beta" in question else "alpha"
            route = encode_frame(tokenizer, render_route("why", member, "", grammar))
            seen = list(observation_ids(reply_observation(reply, grammar), tokenizer, 16))
            answer = encode_frame(tokenizer, render_answer("", "ok", grammar))
            labels = [-100] * len(prompt) + route + [-100] * len(seen) + answer
            rows.append((prompt + route + seen + answer, labels))
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
    SETTINGS.save(folder)
    return folder


def scripted_pool(policy_price: tuple[float, float] = (0.0, 0.0), **backends: Any) -> Pool:
    """alpha replies "one", beta "two", unless told otherwise."""
    made = {"alpha": Scripted("one"), "beta": Scripted("two"), **backends}
    return Pool({m.name: m for m in MEMBERS}, made, ledger=Ledger(None, policy_price))
